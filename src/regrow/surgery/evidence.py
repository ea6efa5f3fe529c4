"""What one pass of a masked model shows, to hold a cut one against."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regrow.indexing import channel_dim, index_tensor, place
from regrow.looking.hooks import instead
from regrow.looking.small_inputs import Way, step
from regrow.structure.confirm import reads_silence
from regrow.structure.readers import Consumer, Norm, per_channel
from regrow.surgery.layers import CutPlan

_NONE = torch.zeros(0, dtype=torch.int64)


@dataclass
class Seen:
    """One pass.

    Attributes:
        ran: the layers, in order.
        given: what convolutions and linear layers read, and the largest number in it.
        made: the layers that made something of it. A detector without a box calls its head with nothing.
        outputs: the model's.
        noise: what stood for what convolutions and linear layers compute, if noise did.
        drew: the model drew random numbers, for all that is known.
    """

    ran: list[str] = field(default_factory=list)
    given: list[tuple[str, Tensor, float]] = field(default_factory=list)
    made: set[str] = field(default_factory=set)
    outputs: list[Tensor] = field(default_factory=list)
    noise: list[tuple[str, Tensor]] = field(default_factory=list)
    drew: bool = False

    def reach(self, name: str, output: Tensor) -> None:
        """Note that a layer ran and what it made."""
        if not self.ran or name != self.ran[-1]:
            self.ran.append(name)
        if output.numel():
            self.made.add(name)


class Look:
    """What a pass shows of the layers of a masked model.

    Attributes:
        samples: of convolutions and linear layers other than PyTorch's own: an input to try a slice on.
        silent: the norms of removed filters read and make 0 in their channels.
        way: as ``shrinking.way`` gives it.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], stock: Collection[str], removed: Mapping[str, Tensor]
    ) -> None:
        self._modules, self._stock = modules, stock
        self.way: Way = []
        self._made: dict[int, tuple[str, Tensor]] = {}
        self._readers: dict[str, list[str]] = {}
        self._sources: dict[str, list[str]] = {}
        self.samples: dict[str, Tensor] = {}
        self.silent = True
        self._removed = removed

    def note(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """To be called behind every convolution, linear layer and norm."""
        self.way.append(step(name, output))
        if not isinstance(module, nn.Linear) and isinstance(module, Consumer):
            # Holding the tensor keeps its id from being used again.
            self._made[id(output)] = (name, output)
            self._readers.setdefault(name, [])
        if isinstance(module, Norm):
            source = self._made.get(id(inputs[0]), ("", None))[0] if inputs else ""
            self._sources.setdefault(name, []).append(source)
            if source:
                self._readers[source].append(name)
            if name in self._removed:
                self.silent = self.silent and reads_silence(module, inputs, output, self._removed[name])
        elif inputs and name not in self._stock:
            self.samples[name] = inputs[0].detach().clone()

    def own(self) -> dict[str, str]:
        """{convolution: the norm that reads its output, and nothing else's}."""
        self._made.clear()
        return {
            name: norms[0]
            for name, norms in self._readers.items()
            if norms
            and set(norms) == {norms[0]}
            and set(self._sources[norms[0]]) == {name}
            and per_channel(self._modules[norms[0]])
        }


@contextmanager
def replayed(
    layers: Sequence[tuple[str, nn.Module]], noise: Sequence[tuple[str, Tensor]], plan: CutPlan
) -> Iterator[None]:
    """Convolutions and linear layers of a cut model make what is left of the ``noise`` that stood for what
    the masked model's made, call by call."""
    calls = iter(noise)

    def replay(name: str, module: nn.Module, rows: Tensor | None, _input: Tensor) -> Tensor:
        expected, values = next(calls, ("", _NONE))
        if expected != name:
            raise ValueError(f"{name!r} runs where {expected!r} should")
        dim = channel_dim(module, values)
        values = values.clone() if rows is None else values.index_select(dim, rows.to(values.device))
        if name in plan.placed:
            width, positions = plan.placed[name]
            values = place(values, index_tensor(positions, values.device), dim, width)
        return values

    rows = {name: index_tensor(filters) for name, filters in plan.rows.items()}
    replaced = [(name, module) for name, module in layers if noise and not isinstance(module, Norm)]
    with instead(
        (module, functools.partial(replay, name, module, rows.get(name))) for name, module in replaced
    ):
        yield


def close(a: Tensor, b: Tensor, tolerance: float, scale: float) -> bool:
    """Whether they differ by no more than ``tolerance``, of themselves or of ``scale``."""
    if a.shape != b.shape:
        return False
    if not a.numel() or float((a - b).abs_().max()) <= tolerance * scale:  # most are, and quicker told so
        return True
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def largest(tensor: Tensor) -> float:
    """Of the absolute values. Not a number where the tensor holds one that is none."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def scale_of(tensor: Tensor) -> float:
    """``largest`` of what is a finite number."""
    return largest(tensor.nan_to_num(0, 0, 0))
