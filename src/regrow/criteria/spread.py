"""How much the outputs of layers vary: as they are, behind their norms, and in the sums they are added to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regrow.criteria.batches import run
from regrow.criteria.values import of_filters
from regrow.looking.hooks import hooked
from regrow.looking.shortcuts import Uses
from regrow.modules import CONSUMER_CLASSES, Norm, channel_dim
from regrow.numbers import at_least_float32
from regrow.structure.norms import own_norms


@dataclass
class Spread:
    """The variance of each channel over all pictures and positions of some tensors.

    Attributes:
        count: numbers in a channel; mean and squares about it: [channels], float64, on the CPU.
    """

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))

    def add(self, layer: Any, tensor: Tensor, placing: Sequence[Any] = ()) -> None:
        """Add ``tensor``, which has its channels where the output of ``layer`` has them.

        Args:
            placing: the modules of which one may have placed the channels of a cut layer among zeros; those
                between them do not count.
        """
        each = at_least_float32(tensor.movedim(channel_dim(layer, tensor), -1)).flatten(0, -2)
        each = each if each.dim() > 1 else each[None]
        # Not every device has double precision.
        both = torch.stack(torch.var_mean(each, 0, correction=0)).cpu().double()
        for module in placing:
            both = of_filters(module, both.T).T
        variance, mean = both
        count, apart = self.count + len(each), mean - self.mean
        self.squares = self.squares + variance * len(each) + apart**2 * (self.count * len(each) / count)
        self.mean, self.count = self.mean + apart * (len(each) / count), count

    def variance(self) -> Tensor:
        """[channels], float64."""
        return self.squares / max(1, self.count)


class Spreads:
    """The spreads of the outputs of convolutions and linear layers, added up over passes.

    Args:
        model: in evaluation mode.
        inputs: of a first pass, which shows norms and sums; its numbers do not count.

    Attributes:
        normed: the layers with a norm of their own, one alone.
        raw: {layer: Spread} of the outputs.
        made: {layer: Spread} of what the layer's own norm makes of them; where there is no such norm, or more
            than one, of the outputs themselves.
        sums: {layer: Spread} of the sums of ``made`` with the output of another branch, where nothing else
            uses ``made``.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        norms = own_norms(model, inputs)
        self._model = model
        self._owners = {own[0]: name for name, own in norms.items() if len(own) == 1}
        self.normed = set(self._owners.values())
        kinds = (*CONSUMER_CLASSES, Norm)
        self._layers = [each for each in model.named_modules() if isinstance(each[1], kinds)]
        self._added = self._summands(inputs)
        self.raw: dict[str, Spread] = {}
        self.made: dict[str, Spread] = {}
        self.sums: dict[str, Spread] = {}

    def look(self, inputs: Any) -> None:
        """Add what a pass over ``inputs`` makes."""

        def used(key: tuple[str, Tensor], other: Tensor | None) -> None:
            name, made = key
            watcher.forget(made)
            if other is not None:
                self._add(self.sums, name, made + other)

        watcher = Uses(used)

        def after(name: str, module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if not isinstance(module, Norm):
                self._add(self.raw, name, output, module)
            if owner := self._owner(name):
                self._add(self.made, owner, output, self._model.get_submodule(owner), module)
                if owner in self._added:
                    watcher.note(output, (owner, output))

        with hooked(self._layers, after), watcher:
            run(self._model, inputs)

    def scale(self, name: str) -> Tensor:
        """By what the layer's norm multiplies each output, as measured: [filters], float64, without signs.

        For a batch norm this is its weight, divided by its standard deviation.
        """
        raw, made = self.raw[name].variance(), self.made[name].variance()
        return torch.where(raw > 0, (made / raw.clamp(min=torch.finfo(raw.dtype).tiny)).sqrt(), 0)

    def total(self, name: str) -> float:
        """The variance of what the layer's outputs become, summed over channels: of ``sums`` or ``made``."""
        return float(self.sums.get(name, self.made[name]).variance().sum())

    def shares(self, name: str) -> Tensor:
        """The variances of ``made`` as shares of ``total``: [filters], float64; 0 where nothing varies."""
        variance, total = self.made[name].variance(), self.total(name)
        return variance / total if total else torch.zeros_like(variance)

    def _owner(self, name: str) -> str:
        """The layer whose ``made`` a layer or norm makes; empty if it makes none."""
        if name in self._owners:
            return self._owners[name]
        is_norm = isinstance(self._model.get_submodule(name), Norm)
        return "" if is_norm or name in self.normed else name

    def _add(self, spreads: dict[str, Spread], name: str, tensor: Tensor, *placing: nn.Module) -> None:
        # The layer, or the norm behind it, but not both.
        spreads.setdefault(name, Spread()).add(
            self._model.get_submodule(name), tensor, list(dict.fromkeys(placing))
        )

    def _summands(self, inputs: Any) -> set[str]:
        """The layers whose ``made`` is in every call a summand, and nothing else."""
        uses: dict[str, list[bool]] = {}
        calls: dict[str, int] = {}
        watcher = Uses(lambda name, other: uses.setdefault(name, []).append(other is not None))

        def after(name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if owner := self._owner(name):
                calls[owner] = calls.get(owner, 0) + 1
                watcher.note(output, owner)

        with hooked(self._layers, after), watcher:
            run(self._model, inputs)
        return {name for name, found in uses.items() if found == [True] * calls[name]}
