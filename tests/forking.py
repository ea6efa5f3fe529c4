"""Processes that are forked from one that has imported PyTorch already, and what they print.

A process that starts Python takes seconds for its imports. These take them once, for all tests.
"""

from __future__ import annotations

import io
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

context = multiprocessing.get_context("forkserver")
# All that a run and a command import, so that a process costs a fork and not the seconds that these take.
context.set_forkserver_preload(
    [
        "__main__",
        "regrow.study.train",
        "sklearn.datasets",
        "timm",
        "torch._dynamo",
        "torch.distributed.nn",
        "torch_pruning",
        "torchvision",
    ]
)


def start_server() -> None:
    """Start the process that others are forked from, and do not wait for its imports."""
    multiprocessing.forkserver.ensure_running()


def regrow(
    *arguments: object,
    folder: Path,
    encoding: str | None = None,
    stop: tuple[str, int, int] | None = None,
) -> CompletedProcess[str]:
    """Call ``regrow`` with ``arguments``; ``folder`` is for what it prints.

    Args:
        encoding: of what it prints (default: that of this process).
        stop: (place, count, signal): the process gets the signal at that call of a place of ``killing``.
    """
    return _printed(partial(_command, encoding, stop), list(map(str, arguments)), folder)


def script(
    path: Path | str, *arguments: object, folder: Path, variables: Mapping[str, object] | None = None
) -> CompletedProcess[str]:
    """Run a script with ``arguments``, in ``folder``; it finds the modules that the tests find.

    Args:
        variables: of the environment, beside those that there are.
    """
    given = {name: str(value) for name, value in (variables or {}).items()}
    return _printed(partial(_script, given), [str(path), *map(str, arguments)], folder)


def _printed(work: Callable[[list[str]], None], arguments: list[str], folder: Path) -> CompletedProcess[str]:
    process = context.Process(target=_print_into, args=(folder, work, arguments))
    process.start()
    process.join(timeout=120)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{arguments} has not ended")
    out, err = (
        (folder / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr")
    )
    return CompletedProcess(arguments, process.exitcode, out, err)


def _print_into(folder: Path, work: Callable[[list[str]], None], arguments: list[str]) -> None:
    os.chdir(folder)
    # The descriptors, for what libraries print on their own is to be seen, too.
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        with open(name, "wb", buffering=0) as file:
            os.dup2(file.fileno(), descriptor)
    work(arguments)


def _command(encoding: str | None, stop: tuple[str, int, int] | None, arguments: list[str]) -> None:
    import regrow.__main__ as command
    from killing import dying_at

    if encoding is not None:
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding)
    # As a terminal starts a process; the server that this one is forked from ignores the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    sys.argv = [str(command.__file__), *arguments]
    with dying_at(stop and stop[:2], *(stop or ())[2:]):
        command.main()


def _script(variables: dict[str, str], arguments: list[str]) -> None:
    os.environ.update(variables)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))  # as Python does
    runpy.run_path(arguments[0], run_name="__main__")
