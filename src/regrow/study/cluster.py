"""Train runs on a Ray cluster; a run whose worker is lost resumes from its checkpoint.

Ray runs in a second process, which this process talks to through a pipe: when an address does not answer,
Ray tries it for minutes and then ends its own process. This process imports neither PyTorch nor Ray.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from regrow.short import short
from regrow.study import records
from regrow.study.config import make_config
from regrow.study.cpus import available_cpus
from regrow.study.local import last_line, work
from regrow.study.plan import Job
from regrow.study.watching import Watch, log_path

_RETRIES = 2
_LOOKED_FOR = 200
_TICK = 0.25
# Limits in seconds: for `import ray`, for an answer from an address, for starting a cluster, and for the
# check that every node sees the folder.
_IMPORT, _CONNECT, _START, _LOOK = 60, 15, 90, 60
_STORE = 100 * 2**20  # bytes, for a cluster started here: only settings are sent through it

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}
# For a cluster started here. By the first, Ray's processes talk, and listen, on the loopback address only, as
# on macOS and Windows; by the second, none of them collects figures for a monitoring service.
_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_enable_metrics_collection": "0"}


class _NoAnswer(ValueError):
    pass


@contextmanager
def ray_cluster(
    address: str | None = None, *, cpus: int = 1, gpus: float = 0
) -> Iterator[Callable[[Sequence[Job], Watch], dict[Path, str]]]:
    """Connect to a Ray cluster, and yield a function that trains jobs on it.

    A run whose worker or node is lost is tried twice more, from its checkpoint. Every node must see the
    run folders under the same path; this is checked before the first run.

    Args:
        address: ``auto`` (the cluster that this machine is part of), ``host:port`` or
            ``ray://host:port``; None starts a temporary cluster of this machine's CPUs.
        cpus, gpus: how many each run reserves. A run without the setting ``threads`` gets one thread for
            each CPU.

    Raises:
        ValueError: Ray is not installed, the address is invalid or does not answer, or no node has that
            many CPUs and GPUs. The yielded function raises it when a node does not see the folder.
    """
    if not (1 <= cpus <= 10_000 and 0 <= gpus <= 1_000):
        raise ValueError(
            "a run needs 1 CPU or more, 10,000 at most, and 0 GPUs or more, 1,000 at most, not "
            f"{short(cpus)} and {short(gpus)}."
        )
    if importlib.util.find_spec("ray") is None:
        raise ValueError("--launcher ray needs Ray, which is not installed: pip install 'regrow[ray]'.")
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_drive, args=(there, address, cpus, gpus), daemon=True
    )
    process.start()
    there.close()
    try:
        _answer(here, _IMPORT, "Ray could not be imported")
        if address is None:
            _answer(here, _START, "no Ray cluster could be started here")
        else:
            _answer(
                here, _CONNECT, f"no Ray cluster answers at {address} (or it asks for a token: docs/study.md)"
            )
        yield partial(_run, here)
    except _NoAnswer:
        process.kill()
        raise
    finally:
        here.close()  # tells the process to end
        process.join(timeout=10)
        process.kill()


def _run(here: Connection, jobs: Sequence[Job], watch: Watch) -> dict[Path, str]:
    """Send ``jobs``, watch their folders until the last has ended, and return {folder: error}."""
    for job in jobs:
        log_path(job.folder).parent.mkdir(parents=True, exist_ok=True)
        log_path(job.folder).unlink(missing_ok=True)  # the run creates it when it starts
    root = Path(os.path.commonpath([job.folder.parent.resolve() for job in jobs]))
    here.send((root, [_parcel(job) for job in jobs], sys.argv))
    _answer(here, _LOOK, f"the cluster did not answer whether it sees {root}")
    failed: dict[Path, str] = {}
    waiting, running = list(range(len(jobs))), set[int]()
    while waiting or running:
        # Runs start in about this order, and looking for thousands of files is slow on a network drive.
        for number in [each for each in waiting[:_LOOKED_FOR] if log_path(jobs[each].folder).exists()]:
            waiting.remove(number)
            running.add(number)
            watch.started(jobs[number])
        try:
            if here.poll(_TICK):
                number, error = here.recv()
                if number in waiting:
                    waiting.remove(number)
                    watch.started(jobs[number])
                running.discard(number)
                error = _checked(jobs[number], error)
                if error is not None:
                    failed[jobs[number].folder] = error
                watch.finished(jobs[number], error)
        except (EOFError, OSError):
            for number in [*running, *waiting]:
                failed[jobs[number].folder] = "the connection to the Ray cluster was lost"
                watch.finished(jobs[number], failed[jobs[number].folder])
            return failed
        watch.tick()
    return failed


def _checked(job: Job, error: str | None) -> str | None:
    log = log_path(job.folder)
    if error is None and not records.is_finished(job.folder):
        return f"the cluster reports that the run is done, but {job.folder} has no result"
    if error is None and not last_line(log):
        log.unlink(missing_ok=True)
    return error


def _parcel(job: Job) -> tuple[dict[str, Any], str, str]:
    settings = job.config.model_dump(mode="json")
    data = job.config.data_dir
    if data is None and job.config.data not in ("digits", "folder"):
        data = os.environ.get("REGROW_DATA") or "data"
    # A relative folder means another place on another node.
    settings["data_dir"] = data and str(Path(data).resolve())
    return settings, str(job.folder.resolve()), str(log_path(job.folder).resolve())


def _answer(here: Connection, seconds: float, otherwise: str) -> None:
    """Wait until the process with Ray reports success.

    Raises:
        ValueError: the process reports an error, reports nothing within ``seconds``, or has ended.
    """
    if not here.poll(seconds):
        raise _NoAnswer(f"{otherwise} within {seconds:.0f} seconds.")
    try:
        error = here.recv()
    except EOFError:
        error = f"{otherwise}."
    if error is not None:
        raise ValueError(error)


def _drive(there: Connection, address: str | None, cpus: int, gpus: float) -> None:
    """Run in the process with Ray: connect, check the nodes, send the runs, report how each one ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process decides, and closes the pipe
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.environ.update(_QUIET if address is not None else _QUIET | _ALONE)
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ.update(_token_settings(address))
    import ray

    there.send(None)
    try:
        _connect(ray, address)
        there.send(_misfit(ray, cpus, gpus))
        root, parcels, arguments = there.recv()
        unseen = _unseen(ray, root)
        there.send(unseen)
        if unseen is None:
            _send_all(ray, there, parcels, arguments, cpus, gpus)
        there.recv()  # until the other side closes
    except (EOFError, BrokenPipeError):
        pass
    except Exception as error:  # whatever Ray raises: its own kinds, RuntimeError, ConnectionError
        with contextlib.suppress(OSError):
            where = "here" if address is None else f"at {address}"
            there.send(f"Ray cannot be used {where}: {' '.join(str(error).split())[-500:]}")
    finally:
        ray.shutdown()


def _token_settings(address: str | None) -> dict[str, str]:
    """The environment variables for Ray's token authentication, for a user who has set none."""
    if address is None:
        # A temporary cluster of this process: a random token keeps others out, and none is written to disk.
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    places = [os.environ.get("RAY_AUTH_TOKEN_PATH"), Path.home() / ".ray" / "auth_token"]
    has_token = "RAY_AUTH_TOKEN" in os.environ or any(place and Path(place).exists() for place in places)
    # Ray by itself uses its token with "auto" only. Send the token to this machine, but not to another.
    return {"RAY_AUTH_MODE": "token"} if has_token and _is_here(address) else {}


def _is_here(address: str) -> bool:
    """Whether an address with a port is this machine's: only then can this process listen there."""
    host = address.removeprefix("ray://").rpartition(":")[0]
    try:
        socket.create_server((host, 0)).close()
    except OSError:
        return False
    return bool(host)


def _connect(ray: Any, address: str | None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options.update(num_cpus=available_cpus(), include_dashboard=False, object_store_memory=_STORE)
    ray.init(address=address or "local", **options)


def _misfit(ray: Any, cpus: int, gpus: float) -> str | None:
    """Why no node can take a run, which would then wait for ever; None if a node can."""
    sizes = [
        (node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
        for node in ray.nodes()
        if node["Alive"]
    ]
    if any(has_cpus >= cpus and has_gpus >= gpus for has_cpus, has_gpus in sizes):
        return None
    shown = ", ".join(f"{has_cpus:g} CPUs and {has_gpus:g} GPUs" for has_cpus, has_gpus in sizes)
    return f"a run needs {cpus} CPUs and {gpus:g} GPUs, but the nodes of the cluster have {shown}."


def _unseen(ray: Any, root: Path) -> str | None:
    """Which nodes do not see a file that is written into ``root`` here, as an error; None if all see it."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    marker = root / f".seen-{secrets.token_hex(8)}"
    marker.touch()
    try:
        look = ray.remote(num_cpus=0, max_retries=0)(_look)
        answers = {
            node["NodeManagerHostname"]: look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(str(marker))
            for node in ray.nodes()
            if node["Alive"]
        }
        blind = [host for host, answer in answers.items() if not ray.get(answer, timeout=_LOOK)]
    finally:
        marker.unlink(missing_ok=True)
    if not blind:
        return None
    return (
        f"{', '.join(blind)} of the Ray cluster does not see {root} as this machine does: choose an --out "
        "that all nodes share under one path."
    )


def _look(marker: str) -> bool:
    return Path(marker).exists()


def _send_all(
    ray: Any,
    there: Connection,
    parcels: Sequence[tuple[dict[str, Any], str, str]],
    arguments: list[str],
    cpus: int,
    gpus: float,
) -> None:
    # Ray retries a run whose worker died. An error that train raises is returned, and not retried.
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=_RETRIES)(_remote)
    pending = {remote.remote(*parcel, cpus, arguments): number for number, parcel in enumerate(parcels)}
    while pending:
        if there.poll(0):
            raise EOFError
        done, _ = ray.wait(list(pending), timeout=_TICK)
        for task in done:
            try:
                error = ray.get(task)
            except ray.exceptions.RayTaskError as raised:  # before train: on a node without regrow, say
                error = str(raised).strip().splitlines()[-1]
            except ray.exceptions.RayError as raised:
                error = f"{str(raised).splitlines()[0]} ({_RETRIES + 1} attempts)"
            there.send((pending.pop(task), error))


def _remote(
    settings: dict[str, Any], folder: str, log: str, threads: int, arguments: list[str]
) -> str | None:
    """Train a run on a node of the cluster; return why it failed, or None."""
    sys.argv = arguments  # the run's record names these as its command
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with Path(log).open("a", buffering=1, encoding="utf-8") as file, contextlib.redirect_stderr(file):
        try:
            work(make_config(settings), Path(folder), threads)
        except SystemExit:
            return f"{last_line(Path(log)) or 'failed without a message'} (on {socket.gethostname()})"
    return None
