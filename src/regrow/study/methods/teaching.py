"""Training with the scores of a teacher: of another run, or of the network's own last generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow.losses import distillation_loss
from regrow.restarts.perturb import reinitialize
from regrow.shipping.stored import check_stored
from regrow.short import line, short
from regrow.study import records
from regrow.study.methods.method import Given, Method, event
from regrow.study.models import model_channels
from regrow.study.teachers import teacher_folder
from regrow.study.trained import network_of_run


class Distillation(Method):
    """The loss of Hinton et al. 2015 (arXiv 1503.02531) with the network of another run as the teacher.

    The teacher computes in eval mode, on the same augmented pictures as the student.
    """

    name = "distillation"

    def __init__(self, given: Given) -> None:
        config, example = given.config, given.example_inputs
        assert config.teacher is not None  # ``make_config`` has seen to it
        folder = teacher_folder(config.teacher, config.seed)
        self._given, self._settings = given, _settings(given)
        self._teacher = _Teacher(folder, config.data_dir).to(example.device)
        self._weights = records.weights_hash(folder)
        self.begin(0)
        with torch.no_grad():
            try:
                theirs = self._teacher(example).shape
            except (RuntimeError, ValueError, IndexError, AssertionError) as error:
                raise ValueError(
                    f"teacher: the network in {line(folder)} does not take pictures of "
                    f"{example.shape[2]}×{example.shape[3]} ({line(error, 100)}): choose another one."
                ) from None
            ours = given.fresh(0).eval()(example).shape
        if theirs != ours:
            raise ValueError(
                f"teacher: the network in {line(folder)} tells {theirs[-1]} classes apart, and the pictures "
                f"of this run have {ours[-1]}: choose another one."
            )

    def begin(self, number: int) -> None:  # noqa: ARG002
        self._teacher.take_pictures_of(*self._given.normalization())

    def loss(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return _distilled(self._teacher, logits, images, labels, self._settings)

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self._weights}

    def check_state_dict(self, state: Mapping[str, Any], epochs: int) -> None:  # noqa: ARG002
        if not isinstance(state, Mapping) or state.get("teacher") != self._weights:
            raise ValueError("it was trained by another teacher")


class BornAgain(Method):
    """Born-Again networks (Furlanello et al. 2018, arXiv 1805.04770).

    Each generation begins with first weights and learns from the network of the generation before it. The
    first generation of each task learns from the labels alone.
    """

    name = "ban"

    def __init__(self, given: Given) -> None:
        self._given, self._settings = given, _settings(given)
        self._number = 0
        self._teacher: nn.Module | None = None

    @property
    def _taught(self) -> bool:
        return self._number % self._given.config.rounds.generations > 0

    def begin(self, number: int) -> None:
        self._number = number

    def loss(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor | None:
        if self._teacher is None:
            return None
        return _distilled(self._teacher, logits, images, labels, self._settings)

    def switch(self, number: int) -> list[dict[str, Any]]:
        given, self._number = self._given, number
        self._teacher = self._frozen(given.model.state_dict()) if self._taught else None
        notes = reinitialize(given.wrapped, given.optimizer, fresh=given.fresh(number))["notes"]
        return [event("fresh", number, notes=notes)]

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": None if self._teacher is None else dict(self._teacher.state_dict())}

    def check_state_dict(self, state: Mapping[str, Any], epochs: int) -> None:  # noqa: ARG002
        if not isinstance(state, Mapping) or "teacher" not in state:
            raise ValueError(f"the state of ban has no teacher: {short(state)}")
        teacher = state["teacher"]
        if not self._taught:
            if teacher is not None:
                raise ValueError("the first generation has no teacher")
            return
        if not isinstance(teacher, Mapping) or not all(isinstance(each, Tensor) for each in teacher.values()):
            raise ValueError(f"the teacher cannot be {short(teacher)}")
        check_stored(dict(self._given.model.state_dict()), dict(teacher))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._teacher = None if state["teacher"] is None else self._frozen(state["teacher"])

    def _frozen(self, weights: Mapping[str, Tensor]) -> nn.Module:
        teacher = self._given.fresh(0)
        teacher.load_state_dict(dict(weights))
        return teacher.eval().requires_grad_(False)


class _Teacher(nn.Module):
    """The network of a finished run, which takes pictures as another run normalises them."""

    def __init__(self, folder: Path, data_dir: str | None) -> None:
        super().__init__()
        network, config, splits = network_of_run(folder, data_dir)
        self.network = network.to(memory_format=torch.channels_last)
        self._channels = model_channels(config.model, splits.channels)
        self._own = splits.mean, splits.std
        self._changed = False
        self.eval().requires_grad_(False)

    def take_pictures_of(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take pictures from which ``mean`` was subtracted, and which were divided by ``std``."""
        if len(mean) != len(self._own[0]):
            raise ValueError(
                f"teacher: its pictures have {len(self._own[0])} channels, and those of this run have "
                f"{len(mean)}: choose another one."
            )
        self._changed = (tuple(mean), tuple(std)) != self._own
        device = next(self.network.parameters()).device
        ours, theirs = (
            [torch.tensor(each, device=device).view(1, -1, 1, 1) for each in pair]
            for pair in ((mean, std), self._own)
        )
        self._scale, self._shift = ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]

    def forward(self, images: Tensor) -> Any:
        if self._changed:
            images = images * self._scale + self._shift
        if images.shape[1] > self._channels:
            images = images[:, : self._channels]  # a grey picture that was repeated
        elif images.shape[1] < self._channels:
            images = images.expand(-1, self._channels, -1, -1)
        return self.network(images)


def _settings(given: Given) -> dict[str, float]:
    return {"temperature": given.config.temperature, "weight": given.config.distillation_weight}


def _distilled(
    teacher: nn.Module, logits: Tensor, images: Tensor, labels: Tensor, settings: Mapping[str, float]
) -> Tensor:
    with torch.no_grad():
        scores = teacher(images)
    return distillation_loss(logits, scores, labels, **settings)
