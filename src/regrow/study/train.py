"""The reference loop: train one run from its settings to a run folder, in spite of interruptions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regrow.atomic import sweep
from regrow.criteria.score import overlap
from regrow.filters import eligible
from regrow.interrupts import uninterrupted
from regrow.modules import filters_first
from regrow.study import records
from regrow.study.best import better, measured_best
from regrow.study.building import device_of, load_splits
from regrow.study.checkpoints import from_bytes, remove_checkpoints, to_bytes, write_checkpoint
from regrow.study.config import RunConfig
from regrow.study.flops import epoch_flops
from regrow.study.lock import locked
from regrow.study.observing import Observer
from regrow.study.parts import Parts
from regrow.study.progress import Progress
from regrow.study.ranks import Ranks, device_here, joined
from regrow.study.run_folder import (
    begin,
    check_folder,
    check_not_foreign,
    last_good_path,
    save_weights,
    writing,
)
from regrow.study.sequences import mean_after_switch
from regrow.study.snapshot import random_state, state_of
from regrow.study.steps import BadLoss, evaluate, state_of_weights, train_epoch


class Diverged(ArithmeticError):
    """The loss became NaN or infinite; the message says where, and where the last good weights lie."""


def train(config: RunConfig, folder: Path, *, rerun: bool = False, progress: Progress | None = None) -> bool:
    """Train one network as ``config`` says and write a run folder.

    Processes that ``torchrun`` starts train the network together (see docs/resume.md).

    Args:
        config: the settings.
        folder: made if missing. A finished run of the same settings is left as it is; an unfinished one
            resumes from its last checkpoint, and ends as if it had not been stopped.
        rerun: start from the beginning, and replace the run that the folder holds.
        progress: the bar that shows how far the run is; None shows nothing.

    Returns:
        Whether anything was trained.

    Raises:
        ValueError: settings that do not fit each other, the data or the model, or a folder that holds
            another run.
        BlockingIOError: another process trains in the folder.
        OSError: the folder cannot be written to.
        Diverged: the loss became NaN or infinite.
    """
    with joined() as ranks:
        return _train(config, folder, rerun, progress, ranks)


def _train(config: RunConfig, folder: Path, rerun: bool, progress: Progress | None, ranks: Ranks) -> bool:
    if ranks.first(lambda: _is_done(config, folder, rerun)):
        return False
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = device_of(device_here(config.device))
    with _repeatable():
        return _train_on(device, config, folder, rerun, progress, ranks)


@contextmanager
def _repeatable() -> Iterator[None]:
    """Have cuDNN take only kernels that add in a fixed order, by shape and not by what is quicker today."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def _train_on(
    device: torch.device,
    config: RunConfig,
    folder: Path,
    rerun: bool,
    progress: Progress | None,
    ranks: Ranks,
) -> bool:
    run = Parts(config, ranks.in_turn(lambda: load_splits(config)), device, ranks)
    with ExitStack() as held:

        def start() -> bool:
            with writing(folder):
                held.enter_context(locked(folder))
            # Another process may have finished the run while this one was getting ready.
            return _is_done(config, folder, rerun)

        if ranks.first(start):
            return False
        environment = {
            **records.environment(str(device), torch.get_num_threads()),
            "processes": ranks.count,
        }
        begun: list[bytes | None] = []

        def prepare() -> int:
            with writing(folder):
                checkpoint, resumed = begin(
                    config,
                    folder,
                    environment,
                    rerun=rerun,
                    check=run.check,
                    most=_most_bytes(run.model),
                )
            begun.append(checkpoint)
            return resumed

        environment["resumed"] = ranks.first(prepare)
        checkpoint = ranks.share(begun[0] if begun else None)
        shown = progress if progress is not None and ranks.rank == 0 else Progress(quiet=True)
        with shown:
            _run(config, folder, run, checkpoint, environment, ranks, shown)
    return True


def _is_done(config: RunConfig, folder: Path, rerun: bool) -> bool:
    if rerun:
        check_not_foreign(folder)
        return False
    if done := check_folder(config, folder):
        # Left by a process that was killed after it had written the result.
        remove_checkpoints(folder)
        sweep(folder)
    return done


def _run(
    config: RunConfig,
    folder: Path,
    run: Parts,
    checkpoint: bytes | None,
    environment: dict[str, Any],
    ranks: Ranks,
    progress: Progress,
) -> None:
    started = time.perf_counter()
    model = run.model
    ranked = eligible(model)
    filters = sum(conv.out_channels for conv in ranked.values())
    done: dict[str, Any] = {
        "epoch": 0, "epochs": [], "events": [], "measured": {}, "seconds": 0.0, "environment": environment,
        "task_accuracies": [],
        # The test pictures of a task are used once, so in a sequence no epoch is the best.
        "best": {} if config.tasks == 1 else None,
    }  # fmt: skip
    observer = Observer(model, folder, config.snapshots, ranks)
    if checkpoint is None:
        run.begin(0)  # a checkpoint of a later round may have been tried
        observer.begin()
    else:
        # Those of earlier versions have no accuracies of tasks, and have not kept the best epoch.
        done |= {"best": None, **from_bytes(checkpoint)}
        run.load(done)
        observer.load_state_dict(done.get("observed"))
        done["environment"] = environment
    spent: float = done["seconds"]
    good = state_of_weights(model)
    counted: tuple[int, int] | None = None
    flops: int | None = None
    steps = run.steps()
    progress.start(folder.name, sum(steps))
    for line in done["epochs"]:
        progress.advance(steps[line["epoch"] - 1], line["train_loss"])
        progress.epoch(line["epoch"], config.epochs, line["train_loss"], line["validation_accuracy"])
    for epoch in range(done["epoch"] + 1, config.epochs + 1):
        phase, alive = run.method.phase, filters - run.method.dropped
        rate = run.optimizer.param_groups[0]["lr"]
        # Each drop takes other filters, so FLOPs are counted anew after each event, and in each round.
        if counted != (len(done["events"]), run.round):
            counted, flops = (len(done["events"]), run.round), epoch_flops(run)
        begun = time.perf_counter()
        try:
            loss, accuracy = train_epoch(
                run.step, run.train, epoch, run.scheduler, ranks, progress, observer.step
            )
        except BadLoss as bad:
            ranks.first(partial(save_weights, good, last_good_path(folder)))
            raise Diverged(
                f"the loss became {bad.loss} in epoch {epoch}, step {bad.step} of {len(run.train)}, at a "
                f"learning rate of {bad.rate:.4g}. The weights as they were after epoch {epoch - 1} are in "
                f"{last_good_path(folder)}. Train with a lower --lr, and --rerun."
            ) from None
        seconds = time.perf_counter() - begun
        ranks.copy_from_first(model)
        measured = evaluate(model, run.validation, ranks)
        good = state_of_weights(model)
        done["epochs"].append(
            {
                "version": records.VERSION,
                "epoch": epoch,
                "task": run.task + 1,
                "phase": phase,
                "learning_rate": rate,
                "train_loss": loss,
                "train_accuracy": accuracy,
                "validation_loss": measured["loss"],
                "validation_accuracy": measured["accuracy"],
                "overlap": sum(
                    float(overlap(filters_first(conv, conv.weight)).sum()) for conv in ranked.values()
                ),
                "alive": alive,
                "filters": filters,
                "seconds": seconds,
                "flops": flops,
            }
        )
        progress.epoch(epoch, config.epochs, loss, measured["accuracy"])
        best = better(done["best"], epoch, measured["accuracy"], good)
        happened = run.method.after_epoch()
        another = run.rounds.ends(epoch)
        if run.rounds.ends_task(epoch):
            # The only look at the test pictures of this task.
            done["task_accuracies"].append(evaluate(model, run.test, ranks)["accuracy"])
        if another:
            happened += run.switch()
        if happened or another:
            run.step.renew()
        done["events"] += [{"version": records.VERSION, "epoch": epoch, **each} for each in happened]
        observer.after_epoch(epoch, good, happened)
        generators = ranks.gather(to_bytes(random_state()))
        done.update(
            epoch=epoch,
            measured=measured,
            best=best,
            seconds=spent + time.perf_counter() - started,
            trained=state_of(*run.trained),
            random=[from_bytes(each) for each in generators],
            observed=observer.state_dict(),
        )
        ranks.first(partial(_write, folder, done, events=len(happened)))
    observer.write_gradients()
    _finish(folder, run, done, ranks, spent - started)


def _write(folder: Path, done: dict[str, Any], *, events: int) -> None:
    with writing(folder), uninterrupted():  # the last line is that of the last checkpoint
        records.append_line(records.epochs_path(folder), done["epochs"][-1])
        for each in done["events"][len(done["events"]) - events :]:
            records.append_line(records.events_path(folder), each)
        write_checkpoint(folder, done["epoch"], done)


def _finish(folder: Path, run: Parts, done: dict[str, Any], ranks: Ranks, started: float) -> None:
    measured = done["measured"]
    if run.method.finish():
        ranks.copy_from_first(run.model)
        measured = evaluate(run.model, run.validation, ranks)
    final = evaluate(run.model, run.test, ranks)
    best = measured_best(run.model, done["best"], run.test, ranks)
    flops = [line["flops"] for line in done["epochs"]]
    accuracies = [*done["task_accuracies"], final["accuracy"]]
    result = {
        "version": records.VERSION,
        "test_accuracy": final["accuracy"],
        "test_loss": final["loss"],
        "validation_accuracy": measured["accuracy"],
        **best,
        "train_seconds": sum(line["seconds"] for line in done["epochs"]),
        "seconds": time.perf_counter() + started,
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "filters": {name: conv.out_channels for name, conv in eligible(run.model).items()},
        "train_flops": None if None in flops else sum(flops),
        "resumed": done["environment"]["resumed"],
        "task_accuracies": accuracies,
        "mean_accuracy_after_switch": mean_after_switch(accuracies),
    }

    def write() -> None:
        with writing(folder), uninterrupted():
            save_weights(state_of_weights(run.model), records.weights_path(folder))
            records.write_json(records.result_path(folder), result)
            remove_checkpoints(folder)

    ranks.first(write)


def _most_bytes(model: nn.Module) -> int:
    """More than a checkpoint: weights, the best ones, slots, the method's memory and records."""
    return 9 * sum(tensor.nbytes for tensor in model.state_dict().values()) + (1 << 27)
