"""The reference loop: train one run from its settings to a run folder, in spite of interruptions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regrow.atomic import sweep
from regrow.criteria.score import overlap
from regrow.filters import eligible
from regrow.interrupts import uninterrupted
from regrow.modules import filters_first
from regrow.noise.layers import remove_bridgeout
from regrow.repr.cycle import RePr
from regrow.study import records
from regrow.study.building import (
    add_noise,
    build,
    device_of,
    load_splits,
    make_optimizer,
    make_repr,
    make_scheduler,
)
from regrow.study.captured import training_step
from regrow.study.checkpoints import from_bytes, remove_checkpoints, to_bytes, write_checkpoint
from regrow.study.config import RunConfig
from regrow.study.data import Splits
from regrow.study.feeding import Batches, calibration_batches
from regrow.study.fits import check_fits
from regrow.study.flops import step_flops
from regrow.study.lock import locked
from regrow.study.models import model_channels
from regrow.study.observing import Observer
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
from regrow.study.snapshot import load_random_state, load_state, random_state, state_of
from regrow.study.steps import BadLoss, Step, evaluate, state_of_weights, train_epoch

_EVALUATION_BATCH = 500
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    run = _set_up(config, ranks.in_turn(lambda: load_splits(config)), device, ranks)
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
                    check=lambda done: check_fits(done, config.epochs, len(run.train), *run.trained),
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


@dataclass
class _Parts:
    """The objects that a run trains with."""

    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    step: Step
    repr_: RePr | None
    train: Batches
    validation: Batches
    test: Batches
    calibration: list[Tensor]

    @property
    def trained(self) -> tuple[Any, ...]:
        return self.model, self.optimizer, self.scheduler, self.scaler, self.repr_


def _set_up(config: RunConfig, splits: Splits, device: torch.device, ranks: Ranks) -> _Parts:
    torch.manual_seed(config.seed)
    model = build(config, splits).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    channels = model_channels(config.model, splits.channels)
    whole: dict[str, Any] = {"mean": splits.mean, "std": splits.std, "device": device, "channels": channels}
    feed = {**whole, "rank": ranks.rank, "ranks": ranks.count}
    train_batches = Batches(
        splits.train, batch_size=config.batch_size, augmentation=config.augmentation, seed=config.seed, **feed
    )
    # Every process draws the same noise on the weights, as if one process saw the whole batch.
    add_noise(model, config)
    optimizer = make_optimizer(model, config)
    wrapped = ranks.wrapped(model)
    repr_ = make_repr(wrapped, optimizer, config, torch.zeros(1, channels, *splits.size, device=device))
    if ranks.rank > 0:
        # Dropout draws a mask per picture, and every process has other pictures: each needs other draws.
        torch.manual_seed(int(np.random.SeedSequence([config.seed, ranks.rank]).generate_state(1)[0]))
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    return _Parts(
        model=model,
        wrapped=wrapped,
        optimizer=optimizer,
        scheduler=make_scheduler(optimizer, config, len(train_batches)),
        scaler=scaler,
        step=training_step(
            wrapped, optimizer, scaler, _DTYPES[config.precision], ranks.count, size=config.batch_size
        ),
        repr_=repr_,
        train=train_batches,
        validation=Batches(splits.validation, batch_size=_EVALUATION_BATCH, shuffle=False, **feed),
        test=Batches(splits.test, batch_size=_EVALUATION_BATCH, shuffle=False, **feed),
        calibration=calibration_batches(splits.train, **whole),
    )


def _run(
    config: RunConfig,
    folder: Path,
    run: _Parts,
    checkpoint: bytes | None,
    environment: dict[str, Any],
    ranks: Ranks,
    progress: Progress,
) -> None:
    started = time.perf_counter()
    model, repr_, steps = run.model, run.repr_, len(run.train)
    ranked = eligible(model)
    filters = {name: conv.out_channels for name, conv in ranked.items()}
    done: dict[str, Any] = {
        "epoch": 0, "epochs": [], "events": [], "measured": {}, "seconds": 0.0, "environment": environment,
    }  # fmt: skip
    observer = Observer(model, folder, config.snapshots, ranks)
    if checkpoint is None:
        observer.begin()
    else:
        done = from_bytes(checkpoint)
        observer.load_state_dict(done.get("observed"))
        load_state(done["trained"], *run.trained)
        if ranks.rank < len(done["random"]):
            load_random_state(done["random"][ranks.rank])
        done["environment"] = environment
    spent: float = done["seconds"]
    good = state_of_weights(model)
    counted: tuple[int, tuple[int, int] | None] | None = None
    progress.start(folder.name, config.epochs * steps)
    for line in done["epochs"]:
        progress.advance(steps, line["train_loss"])
        progress.epoch(line["epoch"], config.epochs, line["train_loss"], line["validation_accuracy"])
    for epoch in range(done["epoch"] + 1, config.epochs + 1):
        phase = repr_.phase if repr_ is not None and repr_.phase == "sub" else "full"
        alive = sum(filters.values())
        if repr_ is not None:
            alive -= sum(int((~mask).sum()) for mask in repr_.keep.values())
        rate = run.optimizer.param_groups[0]["lr"]
        # Each drop takes other filters, so FLOPs are counted anew for each sub phase.
        if counted is None or counted[0] != len(done["events"]):
            images = run.calibration[0].contiguous(memory_format=torch.channels_last)
            labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
            counted = len(done["events"]), step_flops(model, images, labels)
        begun = time.perf_counter()
        try:
            loss, accuracy = train_epoch(
                run.step, run.train, epoch, run.scheduler, ranks, progress, observer.step
            )
        except BadLoss as bad:
            ranks.first(partial(save_weights, good, last_good_path(folder)))
            raise Diverged(
                f"the loss became {bad.loss} in epoch {epoch}, step {bad.step} of {steps}, at a learning "
                f"rate of {bad.rate:.4g}. The weights as they were after epoch {epoch - 1} are in "
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
                "filters": sum(filters.values()),
                "seconds": seconds,
                "flops": counted[1] and counted[1][0] * _pictures(run.train) // counted[1][1],
            }
        )
        progress.epoch(epoch, config.epochs, loss, measured["accuracy"])
        event = repr_.step() if repr_ is not None else None
        if event is not None:
            run.step.renew()
            done["events"].append({"version": records.VERSION, "epoch": epoch, **event.to_dict()})
        observer.after_epoch(epoch, good, done["events"][-1] if event is not None else None)
        generators = ranks.gather(to_bytes(random_state()))
        done.update(
            epoch=epoch,
            measured=measured,
            seconds=spent + time.perf_counter() - started,
            trained=state_of(*run.trained),
            random=[from_bytes(each) for each in generators],
            observed=observer.state_dict(),
        )
        ranks.first(partial(_write, folder, done, new_event=event is not None))
    observer.write_gradients()
    _finish(config, folder, run, done, ranks, spent - started)


def _write(folder: Path, done: dict[str, Any], *, new_event: bool) -> None:
    with writing(folder), uninterrupted():  # the last line is that of the last checkpoint
        records.append_line(records.epochs_path(folder), done["epochs"][-1])
        if new_event:
            records.append_line(records.events_path(folder), done["events"][-1])
        write_checkpoint(folder, done["epoch"], done)


def _finish(
    config: RunConfig, folder: Path, run: _Parts, done: dict[str, Any], ranks: Ranks, started: float
) -> None:
    measured = done["measured"]
    if config.method in ("bridgeout", "targeted-bridgeout"):
        remove_bridgeout(run.model, run.calibration if config.reestimate else None)
        ranks.copy_from_first(run.model)
        measured = evaluate(run.model, run.validation, ranks)
    final = evaluate(run.model, run.test, ranks)
    flops = [line["flops"] for line in done["epochs"]]
    result = {
        "version": records.VERSION,
        "test_accuracy": final["accuracy"],
        "test_loss": final["loss"],
        "validation_accuracy": measured["accuracy"],
        "train_seconds": sum(line["seconds"] for line in done["epochs"]),
        "seconds": time.perf_counter() + started,
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "filters": {name: conv.out_channels for name, conv in eligible(run.model).items()},
        "train_flops": None if None in flops else sum(flops),
        "resumed": done["environment"]["resumed"],
    }

    def write() -> None:
        with writing(folder), uninterrupted():
            save_weights(state_of_weights(run.model), records.weights_path(folder))
            records.write_json(records.result_path(folder), result)
            remove_checkpoints(folder)

    ranks.first(write)


def _most_bytes(model: nn.Module) -> int:
    """More than the size of any checkpoint: weights, the optimizer's two slots, RePr's memory and records."""
    return 5 * sum(tensor.nbytes for tensor in model.state_dict().values()) + (1 << 27)


def _pictures(batches: Batches) -> int:
    """How many pictures an epoch trains on."""
    return sum(batches.size_of(number) for number in range(len(batches)))
