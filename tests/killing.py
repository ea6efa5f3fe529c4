"""Runs in processes of their own that are killed: forked from one that has imported PyTorch already."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forking import context
from regrow.study.config import make_config

Process = multiprocessing.process.BaseProcess


def start(settings: dict[str, Any], folder: Path, kill: tuple[str, int] | None = None) -> Process:
    """Begin to train in a process of its own; with ``kill``, it dies at the call of that name and number."""
    process = context.Process(target=_run, args=(settings, folder, kill, {}))
    process.start()
    return process


def start_two(settings: dict[str, Any], folder: Path, kill: tuple[str, int] | None = None) -> list[Process]:
    """Begin to train in two processes together; with ``kill``, the second dies there."""
    processes: list[Process] = []
    for rank, variables in enumerate(variables_of_two()):
        process = context.Process(target=_run, args=(settings, folder, kill if rank else None, variables))
        process.start()
        processes.append(process)
    return processes


def variables_of_two() -> list[dict[str, Any]]:
    """The variables by which torchrun tells each of two processes where it stands."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**group, "RANK": rank, "LOCAL_RANK": rank} for rank in (0, 1)]


def _run(
    settings: dict[str, Any], folder: Path, kill: tuple[str, int] | None, variables: dict[str, Any]
) -> None:
    import torch

    from regrow.study.train import train

    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in variables.items()})
    if variables:
        _keep_what_is_measured(folder.parent / f"rank{variables['RANK']}.safetensors")
    with dying_at(kill):
        train(make_config(settings), folder)
    # A thread of gloo's that still runs when the interpreter ends would now and then abort the process.
    left = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    assert not [name for name in left if "gloo" in name], left


def _keep_what_is_measured(path: Path) -> None:
    """Leave the weights that ``evaluate`` saw last at ``path``."""
    from safetensors.torch import save_file

    from regrow.study import train

    real = train.evaluate

    def evaluate(model: Any, *rest: Any) -> dict[str, float]:
        save_file(train.state_of_weights(model), path)
        return real(model, *rest)

    train.evaluate = evaluate


@contextlib.contextmanager
def dying_at(kill: tuple[str, int] | None, number: int = signal.SIGKILL) -> Any:
    """This process gets the signal ``number`` at the call of that name and count."""
    if kill is None:
        yield
        return
    import torch

    from regrow import atomic
    from regrow.study import checkpoints, measure, prune_run, records, report, steps, train

    places: dict[str, tuple[Any, str]] = {
        "step": (torch.optim.lr_scheduler.LambdaLR, "step"),
        "evaluate": (train, "evaluate"),
        "append": (records, "append_line"),
        "checkpoint": (train, "write_checkpoint"),
        "write": (checkpoints, "write_bytes"),
        "rename": (atomic.os, "replace"),
        "sync": (atomic.os, "fsync"),
        "prune": (Path, "unlink"),
        "finish": (train, "_finish"),
        "epoch": (steps, "train_epoch"),
        "evaluated": (prune_run, "top1"),
        "moved": (prune_run, "move"),
        "saved": (prune_run, "save"),
        "measured": (measure, "measure_run"),
        "reported": (report, "write_json"),
    }
    owner, name = places[kill[0]]
    real: Callable[..., Any] = getattr(owner, name)
    left = kill[1]

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    setattr(owner, name, dying)
    yield
