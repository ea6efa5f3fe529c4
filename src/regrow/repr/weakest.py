"""The weakest filters of a model, by a criterion."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from regrow.criteria import score as scoring
from regrow.criteria.select import select
from regrow.given import kind_of

Function = Callable[[nn.Module], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Criterion:
    """How filters are scored.

    Attributes:
        of: a name in ``CRITERIA``, or a function of the model that returns {name: Tensor[filters]}.
        batches: the pictures of criteria that read any: an iterable of batches, or a function that returns
            one.
        loss: of (outputs, labels); None for the cross entropy.
        often: whether ``batches`` are read more than once.

    Raises:
        ValueError: one of these is of another kind, or ``of`` needs batches and there are none.
    """

    of: str | Function
    batches: Iterable[Any] | Callable[[], Iterable[Any]] | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    often: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.of, str) or not callable(self.of):
            scoring.check_criterion(self.of)
        if self.batches is None and self.of in getattr(scoring, "DATA_CRITERIA", ()):  # SHIM
            raise ValueError(
                f"criterion {self.of!r} reads pictures: pass batches=loader, or a list of (inputs, labels)."
            )
        if self.often and isinstance(self.batches, Iterator):
            raise ValueError(
                f"batches are read once in every cycle, and {kind_of(self.batches)} can be read only once: "
                "pass the loader itself, a list of batches, or a function that returns them anew."
            )
        if self.loss is not None and not callable(self.loss):
            raise ValueError(f"loss is a function of (outputs, labels), got {kind_of(self.loss)}.")

    @property
    def name(self) -> str:
        """The name of the criterion, or the qualified name of the function."""
        if isinstance(self.of, str):
            return self.of
        named: Any = self.of if hasattr(self.of, "__qualname__") else type(self.of)
        return f"{named.__module__}.{named.__qualname__}"

    def weakest(
        self, model: nn.Module, settings: Mapping[str, Any], *, exclude: Mapping[str, str], seed: int
    ) -> tuple[dict[str, list[int]], list[str]]:
        """The filters with the lowest scores, as plain JSON-able data.

        Args:
            settings: fraction, scope and floor.
            exclude: {convolution: why it is left out}.

        Returns:
            {qualified name: indices of the filters}, without the layers that keep all of theirs; and the
            warnings of ``select``, as texts.
        """
        batches = self.batches() if callable(self.batches) else self.batches
        more: dict[str, Any] = {} if batches is None else {"batches": batches, "loss": self.loss}  # SHIM
        of: Any = self.of
        scores = scoring.score(model, of, exclude=exclude, seed=seed, **more)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            keep = select(scores, settings["fraction"], scope=settings["scope"], floor=settings["floor"])
        dropped = {
            name: (~mask).nonzero().flatten().tolist() for name, mask in keep.items() if not mask.all()
        }
        return dropped, [str(warning.message) for warning in caught]
