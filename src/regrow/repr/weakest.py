"""The weakest filters of a model, by a criterion."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from regrow.criteria.score import Criterion, check_criterion, check_pictures, score
from regrow.criteria.select import select
from regrow.filters import check_finite, eligible
from regrow.given import kind_of
from regrow.looking.images import check_batches

Batches = Iterable[Any] | Callable[[], Iterable[Any]]


@dataclass(frozen=True)
class Weakest:
    """Finds the weakest filters.

    Attributes:
        criterion, loss: as ``score`` takes them.
        batches: as ``score`` takes them, or a function that returns them.
        often: whether ``batches`` are read more than once.

    Raises:
        ValueError: one of these is of another kind, or the criterion needs batches and there are none.
    """

    criterion: Criterion
    batches: Batches | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    often: bool = False

    def __post_init__(self) -> None:
        check_criterion(self.criterion)
        check_pictures(self.criterion, self.batches, self.loss)
        if self.often and isinstance(self.batches, Iterator):
            raise ValueError(
                f"batches are read in every cycle, and {kind_of(self.batches)} can be read only once: pass "
                "the loader itself, a list of batches, or a function that returns them, such as "
                "lambda: itertools.islice(loader, 4)."
            )
        if self.batches is not None and (isinstance(self.batches, nn.Module) or not callable(self.batches)):
            check_batches(self.batches, "batches")

    @property
    def name(self) -> str:
        """The name of the criterion, or the qualified name of the function."""
        if isinstance(self.criterion, str):
            return self.criterion
        named: Any = self.criterion if hasattr(self.criterion, "__qualname__") else type(self.criterion)
        return f"{named.__module__}.{named.__qualname__}"

    def of(
        self, model: nn.Module, settings: Mapping[str, Any], *, exclude: Mapping[str, str], seed: int
    ) -> tuple[dict[str, list[int]], list[str]]:
        """The filters of ``model`` with the lowest scores, as plain JSON-able data.

        Args:
            settings: fraction, scope and floor.
            exclude: {convolution: why it is left out}.

        Returns:
            {qualified name: indices of the filters}, without the layers that keep all of theirs; and the
            warnings of ``select``, as texts.
        """
        check_finite(eligible(model, exclude))  # a function may return scores for NaN weights too
        batches: Any = self.batches() if callable(self.batches) else self.batches
        scores = score(model, self.criterion, exclude=exclude, seed=seed, batches=batches, loss=self.loss)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            keep = select(scores, settings["fraction"], scope=settings["scope"], floor=settings["floor"])
        dropped = {
            name: (~mask).nonzero().flatten().tolist() for name, mask in keep.items() if not mask.all()
        }
        return dropped, [str(warning.message) for warning in caught]
