"""Build the data, network, optimizer and learning rates of a run from its settings."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from regrow.short import line, short
from regrow.study.config import RunConfig
from regrow.study.data import Splits, load_data
from regrow.study.models import build_model
from regrow.study.schedule import rate_factor
from regrow.study.tasks import check_tasks, with_second


def load_splits(config: RunConfig) -> Splits:
    """Load the pictures of a run, from which ``tasks.task_splits`` makes each of its tasks.

    Raises the errors of ``load_data``, ``with_second`` and ``check_tasks``.
    """
    splits = _loaded(config, config.data, config.data_dir, config.image_size)
    if config.regime == "new-domain":
        # The folder of the user's own pictures does not hold a published data set.
        place = None if config.data == "folder" else config.data_dir
        splits = with_second(splits, _loaded(config, config.second_data, place, None))
    check_tasks(splits, config)
    return splits


def _loaded(config: RunConfig, name: str, folder: str | None, side: int | None) -> Splits:
    return load_data(
        name,
        data_dir=Path(folder) if folder else None,
        split_seed=config.split_seed,
        train_size=config.train_size,
        # The tasks whose labels are wrong get their noise from ``task_splits``.
        label_noise=0.0 if config.regime == "corrected-labels" else config.label_noise,
        image_size=side,
    )


def build(config: RunConfig, splits: Splits) -> nn.Module:
    """Build the network of a run, with first weights from PyTorch's global generator.

    Raises the errors of ``build_model``.
    """
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
    """Build the optimizer that ``config`` names, over all trainable parameters of ``model``."""
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


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: RunConfig, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Build the scheduler that sets the learning rate of every step of a round.

    With several generations the schedule of a task is squeezed into each of them.

    Args:
        steps: of an epoch of the round.
    """
    rounds = config.rounds
    of_task = rounds.length * rounds.generations
    hold = min(of_task, config.cycle.last_restore) * steps // rounds.generations
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(config.schedule, step, rounds.length * steps, hold)
    )


def device_of(name: str) -> torch.device:
    """The device of a setting such as "cpu" or "cuda:1"; "auto" is a GPU if there is one, else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names of devices that PyTorch does not have any more
            device = torch.device(name)
        if device.type == "cpu" and device.index:
            raise RuntimeError("there is one CPU device, and threads say how many cores it takes")
        # Some devices that hold tensors do not compute, and one holds no values.
        torch.ones(2, device=device).add(1).sum().item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"device {short(name)} cannot be used here ({line(error, 100)}). Write --device cpu."
        ) from None
    return device
