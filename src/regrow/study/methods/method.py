"""What a training method may add to standard training, and several of them in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regrow.filters import eligible
from regrow.study.config import RunConfig

# A second number beside the seed keeps the draws of methods apart from all others.
_DRAWS = 7


@dataclass(frozen=True)
class Given:
    """What a method works with.

    Attributes:
        config: the settings of the run.
        model: the network, without a data-parallel wrapper.
        wrapped: the same, in its wrapper if several processes train together.
        optimizer: of the parameters of ``model``.
        example_inputs: a batch of one picture.
        normalization: gives mean and standard deviation of each channel, in 0..1 units, by which the pictures
            of the round that trains are normalised.
        pictures: gives the first 256 training pictures of a round, with labels, in batches, not augmented.
        calibration: gives the calibration batches of the round that trains.
        fresh: builds the network anew for a round, on the device, without noise and wrappers; its first
            weights depend on the run's seed and the number of the round alone.
    """

    config: RunConfig
    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    example_inputs: Tensor
    normalization: Callable[[], tuple[tuple[float, ...], tuple[float, ...]]]
    pictures: Callable[[int], list[tuple[Tensor, Tensor]]]
    calibration: Callable[[], list[Tensor]]
    fresh: Callable[[int], nn.Module]

    def seed(self, number: int) -> int:
        """A seed for what a method draws before round ``number``."""
        return int(np.random.SeedSequence([self.config.seed, _DRAWS, number]).generate_state(1)[0])


class Method:
    """What a method adds to standard training; this one adds nothing.

    A round is as ``rounds.Rounds`` counts them, from 0. Events are JSON-able records without version and
    epoch, as ``event`` makes them.

    Attributes:
        name: under which its state is kept in a checkpoint.
        captured: whether a CUDA graph can hold a training step; False for a method whose Python looks at
            every pass.
    """

    name = ""
    captured = True

    @property
    def phase(self) -> str:
        """A word for the epochs that train now."""
        return "full"

    @property
    def dropped(self) -> int:
        """How many filters are off now."""
        return 0

    def begin(self, number: int) -> None:
        """Get ready for round ``number``: before its first epoch, or before a state of it is loaded.

        Weights, buffers and the global random generators stay as they are.
        """

    def loss(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor | None:  # noqa: ARG002
        """The loss [] of a batch in place of cross entropy; None leaves it."""
        return None

    def penalty(self) -> Tensor | None:
        """A term [] that is added to the loss of each step, whatever the batch."""
        return None

    def after_step(self) -> None:
        """To be called after each step of the optimizer."""

    def after_epoch(self) -> list[dict[str, Any]]:
        """To be called after each epoch, before any ``switch``; returns what was done to the network."""
        return []

    def switch(self, number: int) -> list[dict[str, Any]]:  # noqa: ARG002
        """To be called before round ``number``, from 1 on, begins; returns what was done to the network."""
        return []

    def finish(self) -> bool:
        """Take everything off the network after the last epoch; returns whether its outputs have changed."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """All that the method needs to go on in the middle of a round, beside the network and optimizer."""
        return {}

    def check_state_dict(self, state: Mapping[str, Any], epochs: int) -> None:
        """Raise ``ValueError`` unless ``load_state_dict`` would take ``state``; nothing is changed.

        Args:
            state: from a file, so it may be anything.
            epochs: how many epochs of the round are trained.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where ``state_dict`` was taken, in a round that has begun."""


class Several(Method):
    """Methods that work in one run, in the order given. One of them at most replaces the loss."""

    def __init__(self, parts: Sequence[Method]) -> None:
        self.parts = {part.name: part for part in parts}

    @property
    def captured(self) -> bool:  # type: ignore[override]
        return all(part.captured for part in self.parts.values())

    @property
    def phase(self) -> str:
        phases = [part.phase for part in self.parts.values()]
        return next((phase for phase in phases if phase != "full"), "full")

    @property
    def dropped(self) -> int:
        return sum(part.dropped for part in self.parts.values())

    def begin(self, number: int) -> None:
        for part in self.parts.values():
            part.begin(number)

    def loss(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor | None:
        found = (part.loss(logits, images, labels) for part in self.parts.values())
        return next((loss for loss in found if loss is not None), None)

    def penalty(self) -> Tensor | None:
        found = [term for part in self.parts.values() if (term := part.penalty()) is not None]
        return torch.stack(found).sum() if found else None

    def after_step(self) -> None:
        for part in self.parts.values():
            part.after_step()

    def after_epoch(self) -> list[dict[str, Any]]:
        return [event for part in self.parts.values() for event in part.after_epoch()]

    def switch(self, number: int) -> list[dict[str, Any]]:
        return [event for part in self.parts.values() for event in part.switch(number)]

    def finish(self) -> bool:
        return sum(part.finish() for part in self.parts.values()) > 0

    def state_dict(self) -> dict[str, Any]:
        states = {name: part.state_dict() for name, part in self.parts.items()}
        return {name: state for name, state in states.items() if state}

    def check_state_dict(self, state: Mapping[str, Any], epochs: int) -> None:
        wanted = self.state_dict().keys()
        if not isinstance(state, Mapping) or state.keys() != wanted:
            there = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"the state is that of another method: {str(there)[:80]}, not {sorted(wanted)}")
        for name in wanted:
            self.parts[name].check_state_dict(state[name], epochs)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, each in state.items():
            self.parts[name].load_state_dict(each)


def event(
    kind: str,
    number: int,
    *,
    filters: Mapping[str, Sequence[int]] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """A record of what a method did to the network.

    Args:
        kind: one of ``records.KINDS``.
        number: how often it was done so far, this time included.
        filters: {qualified name: indices of the filters} that it was done to; none for whole layers.
        notes: a sentence for each thing that a reader of the report should know.
    """
    listed = {name: list(map(int, indices)) for name, indices in (filters or {}).items()}
    return {"kind": kind, "cycle": number, "filters": listed, "notes": list(notes)}


def replaced(
    model: nn.Module, number: int, units: Mapping[str, Sequence[int]], notes: Sequence[str] = ()
) -> dict[str, Any]:
    """The event of ``units``, {qualified name of a layer: indices}, that were drawn anew one by one."""
    ranked = eligible(model)
    others = [
        f"{len(indices)} units of the linear layer {name} are new."
        for name, indices in units.items()
        if name not in ranked
    ]
    filters = {name: indices for name, indices in units.items() if name in ranked}
    return event("replace", number, filters=filters, notes=[*notes, *others])
