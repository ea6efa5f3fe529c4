"""The objects that a run trains with, made from its settings and brought from one round to the next."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from regrow.study.building import build, make_optimizer, make_scheduler
from regrow.study.captured import training_step
from regrow.study.config import RunConfig
from regrow.study.data import Splits
from regrow.study.feeding import Batches, batch_count, calibration_batches
from regrow.study.fits import check_epoch, check_fits
from regrow.study.images import Images
from regrow.study.methods.making import make_method
from regrow.study.methods.method import Given
from regrow.study.methods.noisy import add_noise
from regrow.study.models import model_channels
from regrow.study.ranks import Ranks
from regrow.study.snapshot import as_now, load_random_state, load_state
from regrow.study.tasks import task_splits, train_sizes

_EVALUATION_BATCH = 500
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Pictures that a method may look at between two epochs.
_SHOWN = 256
# A second number beside the seed keeps the draws of first weights apart from all others.
_FIRST_WEIGHTS = 6


class Parts:
    """Network, optimizer, learning rates, method and pictures of a run, in the round that goes on.

    Args:
        config: the settings.
        splits: the pictures.
        device: where the run trains.
        ranks: the processes that train together.

    Raises:
        ValueError: settings that do not fit the data or the network.
    """

    def __init__(self, config: RunConfig, splits: Splits, device: torch.device, ranks: Ranks) -> None:
        self.config, self.rounds, self._splits, self._ranks = config, config.rounds, splits, ranks
        self._device, self._channels = device, model_channels(config.model, splits.channels)
        self.round = self.task = -1
        torch.manual_seed(config.seed)
        self.model = build(config, splits).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._feed(0)
        # Every process draws the same noise on the weights, as if one process saw the whole batch.
        add_noise(self.model, config)
        self.optimizer = make_optimizer(self.model, config)
        self.wrapped = ranks.wrapped(self.model)
        self.method = make_method(
            Given(
                config=config,
                model=self.model,
                wrapped=self.wrapped,
                optimizer=self.optimizer,
                example_inputs=torch.zeros(1, self._channels, *splits.size, device=device),
                normalization=lambda: self.normalization,
                pictures=self._pictures,
                calibration=lambda: self.calibration,
                fresh=self._fresh,
            )
        )
        self.begin(0)
        if ranks.rank > 0:
            # Dropout draws a mask per picture, and every process has other pictures: each needs other draws.
            torch.manual_seed(int(np.random.SeedSequence([config.seed, ranks.rank]).generate_state(1)[0]))
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self.step = training_step(
            self.wrapped,
            self.optimizer,
            self.scaler,
            DTYPES[config.precision],
            ranks.count,
            size=config.batch_size,
            method=self.method,
        )

    @property
    def trained(self) -> tuple[Any, ...]:
        return self.model, self.optimizer, self.scheduler, self.scaler, self.method

    def begin(self, number: int) -> None:
        """Get ready for round ``number``, before its first epoch or before a state of it is loaded."""
        if number == self.round:
            return
        self.round = number
        self._feed(self.rounds.task(number))
        self.scheduler = make_scheduler(self.optimizer, self.config, len(self.train))
        self.method.begin(number)

    def steps(self) -> list[int]:
        """How many training steps each epoch of the run has."""
        of_task = [
            batch_count(size, self.config.batch_size, self._ranks.count)
            for size in train_sizes(self._splits, self.config)
        ]
        epochs = range(self.config.epochs)
        return [of_task[self.rounds.task(self.rounds.after(epoch))] for epoch in epochs]

    def switch(self) -> list[dict[str, Any]]:
        """Go on to the next round; returns the records of what the method did to the network."""
        happened = self.method.switch(self.round + 1)
        self._ranks.copy_from_first(self.model)
        self.begin(self.round + 1)
        return happened

    def check(self, done: dict[str, Any]) -> None:
        """Raise ``ValueError`` unless ``load`` would take ``done``, the state in a checkpoint."""
        self.begin(self.rounds.after(check_epoch(done, self.config.epochs)))
        check_fits(as_now(done), self.rounds, len(self.train), *self.trained)

    def load(self, done: dict[str, Any]) -> None:
        """Go on from ``done``, which ``check`` has let pass in one of the processes."""
        self.begin(self.rounds.after(done["epoch"]))
        load_state(as_now(done)["trained"], *self.trained)
        if self._ranks.rank < len(done["random"]):
            load_random_state(done["random"][self._ranks.rank])

    def _feed(self, task: int) -> None:
        """Make the batches of ``task``."""
        if task == self.task:
            return
        self.task = task
        config, ranks, splits = self.config, self._ranks, self._splits_of(task)
        whole: dict[str, Any] = {
            "mean": splits.mean, "std": splits.std, "device": self._device, "channels": self._channels,
        }  # fmt: skip
        self.normalization = splits.mean, splits.std
        feed = {**whole, "rank": ranks.rank, "ranks": ranks.count}
        self.train = Batches(
            splits.train,
            batch_size=config.batch_size,
            augmentation=config.augmentation,
            seed=config.seed,
            **feed,
        )
        self.validation = Batches(splits.validation, batch_size=_EVALUATION_BATCH, shuffle=False, **feed)
        self.test = Batches(splits.test, batch_size=_EVALUATION_BATCH, shuffle=False, **feed)
        self.calibration: list[Tensor] = calibration_batches(splits.train, **whole)

    def _splits_of(self, task: int) -> Splits:
        """The pictures of ``task``, counted from 0 as in ``rounds``."""
        return task_splits(self._splits, self.config, task + 1)

    def _pictures(self, number: int) -> list[tuple[Tensor, Tensor]]:
        splits = self._splits_of(self.rounds.task(number))
        first = Images(splits.train.pixels[:_SHOWN], splits.train.labels[:_SHOWN])
        batches = Batches(
            first,
            batch_size=_SHOWN,
            mean=splits.mean,
            std=splits.std,
            shuffle=False,
            device=self._device,
            channels=self._channels,
        )
        return list(batches.epoch(0))

    def _fresh(self, number: int) -> torch.nn.Module:
        seed = int(np.random.SeedSequence([self.config.seed, _FIRST_WEIGHTS, number]).generate_state(1)[0])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = build(self.config, self._splits)
        return model.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
