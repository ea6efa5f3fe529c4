"""Train runs in processes of this machine, a fresh one for each, so that no run can bring down another.

This process does not import PyTorch. A server process imports it once, and each run is a fork of the server.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.context import BaseContext, Process
from pathlib import Path
from typing import cast

from regrow.study import records
from regrow.study.config import RunConfig
from regrow.study.cpus import available_cpus
from regrow.study.plan import Job
from regrow.study.watching import Watch, log_path

_TICK = 0.25
# Methods that read the structure of the network.
_STRUCTURED = {"repr", "restart", "redo", "continual-backprop"}


def run_local(
    jobs: Sequence[Job], watch: Watch, *, workers: int | None = None, rerun: bool = False
) -> dict[Path, str]:
    """Train ``jobs``, in their order, each in its own process.

    The output of a process goes to the job's log file; an interrupt stops all processes at once.

    Args:
        jobs: what to train.
        watch: is informed when a run starts and ends, and about four times a second in between.
        workers: how many run at a time (default: as many as there are CPUs); a run without the setting
            ``threads`` gets its share of the CPUs.
        rerun: train finished runs again.

    Returns:
        {run folder: error} of the runs that failed.
    """
    cpus = available_cpus()
    workers = max(1, min(len(jobs), workers or cpus))
    threads = shared_out(cpus, workers)
    waiting, failed = deque(jobs), {}
    running: dict[int, tuple[Process, Job]] = {}
    context = _context(jobs)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.popleft()
                process = _start(context, job, threads, rerun)
                running[process.sentinel] = process, job
                watch.started(job)
            for sentinel in connection.wait(list(running), timeout=_TICK):
                process, job = running.pop(cast(int, sentinel))
                process.join()
                error = _error(process.exitcode or 0, job)
                if error is not None:
                    failed[job.folder] = error
                watch.finished(job, error)
            watch.tick()
    finally:
        for process, _ in running.values():
            process.kill()
        for process, _ in running.values():
            process.join()
    return failed


def shared_out(cpus: int, workers: int) -> int:
    """CPU threads for each of ``workers``; no more than OMP_NUM_THREADS, where that is set."""
    share = max(1, cpus // workers)
    given = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(given)) if given.isdecimal() and int(given) > 0 else share


def _context(jobs: Sequence[Job]) -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Everything that a run imports, also in the optimizer's first step and in reading the structure. These
    # imports take most of the time that a run needs to start, and here it is spent once.
    modules = ["regrow.study.train", "torch._dynamo"]
    if any(job.config.data == "digits" for job in jobs):
        modules.append("sklearn.datasets")
    if any(set(job.config.method.split("+")) & _STRUCTURED for job in jobs):
        modules.append("torch_pruning")
    context.set_forkserver_preload(modules)
    _start_server()
    return context


def _start_server() -> None:
    """Start the server process so that Ctrl-C leaves it and its forks alone: this process decides."""
    from multiprocessing import forkserver, resource_tracker

    resource_tracker.ensure_running()  # first, because it unblocks the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the server inherits it
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start(context: BaseContext, job: Job, threads: int, rerun: bool) -> Process:
    log = log_path(job.folder)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    # daemon: multiprocessing ends it when this process ends in any orderly way.
    process = context.Process(  # type: ignore[attr-defined]
        target=_work, args=(job.config, job.folder, log, threads, rerun), daemon=True
    )
    with _threads_in_environment(threads):
        process.start()
    started: Process = process
    return started


@contextmanager
def _threads_in_environment(threads: int) -> Iterator[None]:
    """Set OMP_NUM_THREADS for the server process, whose libraries read it when they are loaded."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _work(config: RunConfig, folder: Path, log: Path, threads: int, rerun: bool) -> None:
    """The main function of a run's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Redirect the descriptors, not sys.stderr, so that the last message of a library that aborts is logged.
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None if this command was started with the stream closed
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    work(config, folder, threads, rerun)


def work(config: RunConfig, folder: Path, threads: int, rerun: bool = False) -> None:
    """Train one run in this process; on an error exit with code 1, and the reason in stderr's last line."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        import torch

        from regrow.study.train import train

        if config.threads is None:
            torch.set_num_threads(threads)
        train(config, folder, rerun=rerun)
    except (ValueError, ArithmeticError, OSError) as error:  # errors that the user can correct
        print(" ".join(str(error).split()), file=sys.stderr, flush=True)
        sys.exit(1)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        sys.exit(1)


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _error(code: int, job: Job) -> str | None:
    """Why a process that ended with ``code`` failed; None if its run is finished."""
    log = log_path(job.folder)
    last = last_line(log)
    if code == 0 and records.is_finished(job.folder):
        if not last:
            log.unlink(missing_ok=True)
        return None
    if code >= 0:
        return last or f"ended with exit code {code} and without a result"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (is there enough memory?)" if name == "SIGKILL" else ""
    return f"killed by {name}{hint}" + (f"; its last words: {last}" if last else "")


def last_line(log: Path) -> str:
    """The last line of ``log`` that is not empty."""
    try:
        lines = log.read_bytes()[-10_000:].decode("utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
