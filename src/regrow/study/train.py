"""The reference loop: one run, from its settings to a run folder."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from regrow.bridgeout_layers import add_bridgeout, remove_bridgeout
from regrow.cycle import RePr
from regrow.filters import eligible
from regrow.scoring import overlap
from regrow.study import records
from regrow.study.config import RunConfig
from regrow.study.data import Splits, load_data
from regrow.study.feeding import Batches, calibration_batches
from regrow.study.models import build_model, model_channels
from regrow.study.progress import Progress
from regrow.study.rivals import add_dropout
from regrow.study.schedule import rate_factor

_EVALUATION_BATCH = 500
_LAST_GOOD = "last-good.safetensors"
# How many steps a NaN may go unseen: looking at a loss makes a GPU wait for it.
_LOOK_EVERY = 16


class Diverged(ArithmeticError):
    """The loss became NaN or infinite; the message says where, and where the last good state lies."""


def train(config: RunConfig, folder: Path, *, rerun: bool = False, progress: Progress | None = None) -> bool:
    """Train one network as ``config`` says and leave a run folder.

    Args:
        config: the settings.
        folder: made if it is not there. A finished run of the same settings is left as it is; an
            unfinished one is started again.
        rerun: run even if the folder holds a finished run, and replace it.
        progress: where to show how far it is; None shows nothing.

    Returns:
        Whether anything was run.

    Raises:
        ValueError: settings that do not fit each other, the data or the model, or a folder that holds
            another run.
        Diverged: the loss became NaN or infinite.
    """
    if not rerun and records.is_finished(folder):
        _check_same(config, folder)
        return False
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = device_of(config.device)
    splits = load_splits(config)
    torch.manual_seed(config.seed)
    model = build(config, splits).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    channels = model_channels(config.model, splits.channels)
    feed: dict[str, Any] = {"mean": splits.mean, "std": splits.std, "device": device, "channels": channels}
    train_batches = Batches(
        splits.train, batch_size=config.batch_size, augmentation=config.augmentation, seed=config.seed, **feed
    )
    validation = Batches(splits.validation, batch_size=_EVALUATION_BATCH, shuffle=False, **feed)
    test = Batches(splits.test, batch_size=_EVALUATION_BATCH, shuffle=False, **feed)
    calibration = calibration_batches(splits.train, **feed)
    if config.method in ("bridgeout", "targeted-bridgeout"):
        add_bridgeout(model, config.p, config.q, target_fraction=_targeted(config), seed=config.seed)
    elif config.method in ("dropout", "targeted-dropout"):
        add_dropout(model, config.p, _targeted(config))
    optimizer = make_optimizer(model, config)
    repr_: RePr | None = None
    if config.method == "repr":
        repr_ = RePr(
            model,
            optimizer,
            example_inputs=torch.zeros(1, channels, *splits.size, device=device),
            fraction=config.fraction,
            full=config.cycle.full,
            sub=config.cycle.sub,
            cycles=config.cycle.cycles,
            criterion=config.criterion,
            consumers=config.consumers,
            scope=config.scope,
            floor=config.floor,
            exclude=config.exclude,
            skip_first=config.skip_first,
            compact=config.compact,
            seed=config.seed,
        )
    _start_folder(config, folder, device)
    with progress or Progress(quiet=True) as shown:
        _run(config, folder, model, optimizer, repr_, (train_batches, validation, test), calibration, shown)
    return True


def _run(
    config: RunConfig,
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    repr_: RePr | None,
    batches: tuple[Batches, Batches, Batches],
    calibration: list[Tensor],
    progress: Progress,
) -> None:
    train_batches, validation, test = batches
    started = time.perf_counter()
    steps = len(train_batches)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: rate_factor(
            config.schedule,
            step,
            config.epochs * steps,
            min(config.epochs, config.cycle.last_restore) * steps,
        ),
    )
    ranked = eligible(model)
    filters = {name: conv.out_channels for name, conv in ranked.items()}
    train_seconds = 0.0
    good = _state(model)
    measured: dict[str, float] = {}
    progress.start(folder.name, config.epochs * steps)
    for epoch in range(1, config.epochs + 1):
        phase = repr_.phase if repr_ is not None and repr_.phase == "sub" else "full"
        alive = sum(filters.values())
        if repr_ is not None:
            alive -= sum(int((~mask).sum()) for mask in repr_.keep.values())
        rate = optimizer.param_groups[0]["lr"]
        begun = time.perf_counter()
        try:
            loss, accuracy = train_epoch(
                model, train_batches.epoch(epoch), optimizer, scheduler, steps, progress
            )
        except _BadLoss as bad:
            save_weights(good, folder / _LAST_GOOD)
            raise Diverged(
                f"the loss became {bad.loss} in epoch {epoch}, step {bad.step} of {steps}, at a learning "
                f"rate of {bad.rate:.4g}. The weights as they were after epoch {epoch - 1} are in "
                f"{folder / _LAST_GOOD}. Train with a lower --lr."
            ) from None
        seconds = time.perf_counter() - begun
        train_seconds += seconds
        measured = evaluate(model, validation)
        good = _state(model)
        records.append_line(
            records.epochs_path(folder),
            {
                "version": records.VERSION,
                "epoch": epoch,
                "phase": phase,
                "learning_rate": rate,
                "train_loss": loss,
                "train_accuracy": accuracy,
                "validation_loss": measured["loss"],
                "validation_accuracy": measured["accuracy"],
                "overlap": sum(float(overlap(conv.weight).sum()) for conv in ranked.values()),
                "alive": alive,
                "filters": sum(filters.values()),
                "seconds": seconds,
            },
        )
        progress.epoch(epoch, config.epochs, loss, measured["accuracy"])
        event = repr_.step() if repr_ is not None else None
        if event is not None:
            records.append_line(
                records.events_path(folder), {"version": records.VERSION, "epoch": epoch, **event.to_dict()}
            )
    if config.method in ("bridgeout", "targeted-bridgeout"):
        remove_bridgeout(model, calibration if config.reestimate else None)
        measured = evaluate(model, validation)
    final = evaluate(model, test)
    save_weights(_state(model), records.weights_path(folder))
    records.write_json(
        records.result_path(folder),
        {
            "version": records.VERSION,
            "test_accuracy": final["accuracy"],
            "test_loss": final["loss"],
            "validation_accuracy": measured["accuracy"],
            "train_seconds": train_seconds,
            "seconds": time.perf_counter() - started,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "filters": filters,
        },
    )


class _BadLoss(Exception):
    def __init__(self, loss: float, step: int, rate: float) -> None:
        self.loss, self.step, self.rate = loss, step, rate


def train_epoch(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    steps: int,
    progress: Progress,
) -> tuple[float, float]:
    """One pass over ``batches``; the scheduler steps with every batch. Returns mean loss and accuracy.

    Raises:
        _BadLoss: a loss is not finite.
    """
    model.train()
    device = next(model.parameters()).device
    losses = torch.zeros(steps, device=device)
    sizes = torch.zeros(steps)
    rates = []
    correct = torch.zeros((), dtype=torch.long, device=device)
    looked = 0
    for step, (images, labels) in enumerate(batches):
        optimizer.zero_grad(set_to_none=True)
        logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = nn.functional.cross_entropy(logits, labels)
        loss.backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        losses[step] = loss.detach()
        sizes[step] = len(labels)
        correct += (logits.detach().argmax(1) == labels).sum()
        if step + 1 == steps or step + 1 - looked == _LOOK_EVERY:
            recent = losses[looked : step + 1].cpu()
            if not torch.isfinite(recent).all():
                first = int((~torch.isfinite(recent)).nonzero()[0])
                raise _BadLoss(float(recent[first]), looked + first + 1, rates[looked + first])
            progress.advance(step + 1 - looked, float(recent.mean()))
            looked = step + 1
    seen = float(sizes.sum())
    return float((losses.cpu() * sizes).sum()) / seen, int(correct) / seen


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Batches) -> dict[str, float]:
    """Mean cross-entropy ``loss`` and ``accuracy`` (0 to 1) of ``model`` in eval mode."""
    model.eval()
    loss, correct, seen = 0.0, 0, 0
    for images, labels in batches.epoch(0):
        logits = model(images.contiguous(memory_format=torch.channels_last))
        loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        correct += int((logits.argmax(1) == labels).sum())
        seen += len(labels)
    return {"loss": loss / seen, "accuracy": correct / seen}


def load_splits(config: RunConfig) -> Splits:
    """The pictures of a run. Errors as ``load_data``."""
    return load_data(
        config.data,
        data_dir=Path(config.data_dir) if config.data_dir else None,
        split_seed=config.split_seed,
        train_size=config.train_size,
        label_noise=config.label_noise,
        image_size=config.image_size,
    )


def build(config: RunConfig, splits: Splits) -> nn.Module:
    """The network of a run, with first weights from the global generator. Errors as ``build_model``."""
    return build_model(
        config.model,
        classes=len(splits.classes),
        channels=splits.channels,
        size=splits.size,
        depth=config.depth,
        width=config.width,
        batch_norm=config.batch_norm,
        pooling=config.pooling,
    )


def make_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """The optimizer ``config`` names, over all of ``model``'s parameters."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            config.rate,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
        )
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, config.rate, weight_decay=config.weight_decay)


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    """Write ``state`` as safetensors, under a temporary name first."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _targeted(config: RunConfig) -> float:
    return config.target_fraction if config.method.startswith("targeted-") else 1.0


def device_of(name: str) -> torch.device:
    """The device of a setting such as "cpu" or "cuda:1"; "auto" is a GPU if there is one, else the CPU.

    Raises:
        ValueError: this machine has none such.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}). Write --device cpu.") from None
    return device


def _start_folder(config: RunConfig, folder: Path, device: torch.device) -> None:
    if folder.exists() and any(folder.iterdir()) and not records.config_path(folder).exists():
        raise ValueError(f"{folder} is not empty and not a run folder: choose another --out.")
    # The result first: without it the folder is an unfinished run, whatever else is still there.
    for path in (
        records.result_path(folder),
        records.epochs_path(folder),
        records.events_path(folder),
        records.weights_path(folder),
        folder / _LAST_GOOD,
        *records.curve_paths(folder),
    ):
        path.unlink(missing_ok=True)
    records.write_yaml(records.config_path(folder), {"version": records.VERSION, **settings_of(config)})
    records.write_json(
        records.environment_path(folder), records.environment(str(device), torch.get_num_threads())
    )


def settings_of(config: RunConfig) -> dict[str, Any]:
    """``config`` as plain data, with the lengths of the cycle and the learning rate it comes to."""
    settings = config.model_dump(mode="json")
    cycle = config.cycle
    settings.update(full=cycle.full, sub=cycle.sub, cycles=cycle.cycles, lr=config.rate)
    return settings


def _check_same(config: RunConfig, folder: Path) -> None:
    there, wanted = records.read_run(folder).config, settings_of(config)
    # Where a run may differ and still be the same run: where it ran and where its data lay.
    skipped = {"version", "device", "threads", "data_dir"}
    differing = [
        f"{key}={there.get(key)!r} (asked for: {wanted.get(key)!r})"
        for key in sorted({*there, *wanted} - skipped)
        if there.get(key) != wanted.get(key)
    ]
    if differing:
        raise ValueError(
            f"{folder} holds a finished run with {', '.join(differing)}. Choose another --out, or "
            "pass --rerun to replace it."
        )
