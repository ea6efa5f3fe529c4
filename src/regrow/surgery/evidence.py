"""What one pass of a network shows, and whether another network shows the same."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regrow.indexing import index_tensor, index_tensors, place
from regrow.looking.calls import PassFailed, floating, run
from regrow.looking.dropout import NoDropout
from regrow.looking.hooks import Layers, carrying, hooked, instead
from regrow.looking.small_inputs import Way, step
from regrow.modules import Convolution, Norm, channel_dim, channel_layers, device_of, per_channel
from regrow.numbers import answers_at_once, largest_of, numbers
from regrow.structure.confirm import are_silent, loudness_of
from regrow.structure.norms import NormFinder
from regrow.surgery.plan import CutPlan

_NONE = torch.zeros(0, dtype=torch.int64)


class Refuted(Exception):
    """A network does not compute what another one shows."""


@dataclass
class Seen:
    """The evidence of one pass.

    Attributes:
        ran: the layers, in order.
        given: the inputs of convolutions and linear layers, each with the largest number in it.
        made: the layers whose output held a number. A detector without a box calls its head with nothing.
        outputs: the model's.
        noise: the noise that stood for the outputs of convolutions and linear layers, if it did.
        drew: the model drew random numbers, or that could not be seen.
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


def see(
    model: nn.Module,
    inputs: Any,
    training: bool = False,
    *,
    then: Callable[..., Tensor | None] | None = None,
    dropout: NoDropout | None = None,
) -> Seen:
    """The evidence of one pass of ``model``.

    Args:
        then: called as ``then(seen, name, module, inputs, output)`` behind each layer; a tensor that it
            returns replaces the output.

    Raises:
        PassFailed: the model's forward pass fails.
    """
    seen = Seen()
    read: list[tuple[str, Tensor, Tensor]] = []

    def before(name: str, module: nn.Module, given: Any) -> None:
        if not isinstance(module, Norm) and given and isinstance(given[0], Tensor):
            seen.ran.append(name)
            mine = given[0].detach()
            # A copy: the model may write to its tensor in place later.
            read.append((name, mine.clone(), largest_of(mine)))

    def after(name: str, module: nn.Module, given: Any, output: Tensor) -> Tensor | None:
        seen.reach(name, output)
        return None if then is None else then(seen, name, module, given, output)

    with hooked(channel_layers(model), after, before):
        output, seen.drew = run(model, inputs, training, dropout)
    seen.outputs = floating(output)
    scales = numbers([scale for _, _, scale in read])
    seen.given = [(name, mine, scale) for (name, mine, _), scale in zip(read, scales, strict=True)]
    return seen


def compare(
    other: nn.Module,
    inputs: Any,
    expected: Seen,
    tolerance: float,
    training: bool = False,
    *,
    plan: CutPlan | None = None,
    present: Mapping[str, Tensor] | None = None,
    ran: list[str] | None = None,
    dropout: NoDropout | None = None,
) -> None:
    """Run ``other``, and hold what its layers read, and its outputs, against what was ``expected``.

    A layer that reads the right numbers is then given exactly the expected ones, so that rounding does not
    add up.

    Args:
        plan: by which ``other`` was cut.
        present: layer → BoolTensor[channels]: which of its input channels the plan leaves in the tensor that
            arrives. Layers not listed: all.
        ran: the layers that run are added to it, so that it tells where a difference showed.

    Raises:
        Refuted: there is a difference.
        PassFailed: the forward pass of ``other`` fails, as it may on tensors of a width it does not know.
    """
    plan, present = plan or CutPlan(), present or {}
    device = device_of(other)
    seen, layers, read = Seen([] if ran is None else ran), channel_layers(other), 0
    reading = [name for name, module in layers if not isinstance(module, Norm)]
    partly = {name: present[name] for name in reading if name in present and not present[name].all()}
    indices = index_tensors([mask.nonzero().flatten() for mask in partly.values()], device)
    arriving = {name: (len(mask), index) for (name, mask), index in zip(partly.items(), indices, strict=True)}
    left_out = _left_out(dict(layers), expected, plan, device)
    limits = _Limits(seen.ran)

    def before(name: str, module: nn.Module, given: Any) -> Any:
        nonlocal read
        if isinstance(module, Norm) or not given or not isinstance(given[0], Tensor):
            return None
        seen.ran.append(name)
        if read == len(expected.given) or expected.given[read][0] != name:
            raise Refuted(f"{name!r} runs where another layer should")
        _, whole, scale = expected.given[read]
        read += 1
        if not math.isfinite(scale):
            raise Refuted(f"{name!r} reads numbers that are not finite")
        dim = channel_dim(module, whole)
        width, index = arriving.get(name, (0, _NONE))
        narrow = width == whole.shape[dim]
        theirs = whole.index_select(dim, index.to(whole.device)) if narrow else whole.clone()
        mine = given[0].detach()
        if theirs.shape != mine.shape:
            raise Refuted(f"{name!r} reads something else")
        if mine.numel():
            excess = excess_of(theirs, mine, tolerance)
            limits.hold(excess, tolerance * scale, f"{name!r} reads something else")
        if (lost := left_out.get(read - 1)) is not None:
            carried = largest_of(whole.index_select(dim, lost.to(whole.device)))
            limits.hold(carried, 0, f"{name!r} leaves out channels that carry something")
        return theirs, *given[1:]

    def after(name: str, _module: nn.Module, _given: Any, output: Tensor) -> None:
        seen.reach(name, output)

    try:
        with _replayed(layers, expected.noise, plan, device), hooked(layers, after, before):
            output, _ = run(other, inputs, training, dropout)
    except (Refuted, PassFailed):
        limits.settle()  # a difference that was there before
        raise
    limits.settle()
    outputs = floating(output)
    same = read == len(expected.given) and len(outputs) == len(expected.outputs)
    if not same or not all(
        close(theirs, mine, tolerance, scale_of(theirs))
        for theirs, mine in zip(expected.outputs, outputs, strict=True)
    ):
        raise Refuted("the outputs differ")


class _Limits:
    """Numbers of a pass that must not be larger than their limits.

    On a GPU they are asked for at the end of the pass: the host waits for it at each that it asks for.

    Args:
        ran: the layers that run. Where a number is too large, those are taken out that ran later.
    """

    def __init__(self, ran: list[str]) -> None:
        self._ran = ran
        self._held: list[tuple[Tensor, float, str, int]] = []

    def hold(self, number: Tensor, limit: float, message: str) -> None:
        """Raise ``Refuted``, now or in ``settle``, if a tensor of one number is larger or is NaN."""
        self._held.append((number, limit, message, len(self._ran)))
        if answers_at_once(number.device):
            self.settle()

    def settle(self) -> None:
        held, self._held = self._held, []
        for value, (_, limit, message, count) in zip(numbers([each[0] for each in held]), held, strict=True):
            if not value <= limit:
                del self._ran[count:]
                raise Refuted(message)


def _left_out(
    modules: Mapping[str, nn.Module], expected: Seen, plan: CutPlan, device: torch.device
) -> dict[int, Tensor]:
    """The channels that layers of a cut model leave out, by the place of their call in ``expected.given``.

    Where noise stands for the outputs of layers, no later layer shows what this one lacks.
    """
    lost = {}
    for at, (name, whole, _) in enumerate(expected.given if expected.noise else ()):
        if name in plan.columns:
            width = whole.shape[channel_dim(modules[name], whole)]
            lost[at] = sorted(set(range(width)).difference(plan.columns[name]))
    return dict(zip(lost, index_tensors(list(lost.values()), device), strict=True))


@contextmanager
def _replayed(
    layers: Layers, noise: Sequence[tuple[str, Tensor]], plan: CutPlan, device: torch.device
) -> Iterator[None]:
    """Convolutions and linear layers of a cut model return the part that is left of the ``noise``, call by
    call, that stood for the outputs of the masked model's layers."""
    calls = iter(noise)

    def replay(name: str, module: nn.Module, rows: Tensor | None, *_: Any, **__: Any) -> Tensor:
        expected, values = next(calls, ("", _NONE))
        if expected != name:
            raise Refuted(f"{name!r} runs where {expected!r} should")
        dim = channel_dim(module, values)
        values = values.clone() if rows is None else values.index_select(dim, rows.to(values.device))
        if name in plan.placed:
            width, positions = plan.placed[name]
            values = place(values, index_tensor(positions, values.device), dim, width)
        return values

    rows = dict(zip(plan.rows, index_tensors(list(plan.rows.values()), device), strict=True)) if noise else {}
    replaced = [(name, module) for name, module in layers if noise and not isinstance(module, Norm)]
    with instead(
        (module, carrying(functools.partial(replay, name, module, rows.get(name))))
        for name, module in replaced
    ):
        yield


class Look:
    """What a pass shows of the layers of a masked model.

    Attributes:
        samples: of convolutions and linear layers other than PyTorch's own: an input to try a slice on.
        way: as ``small_inputs.way`` gives it.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        stock: Collection[str],
        removed: Mapping[str, Tensor],
        device: torch.device | None = None,
    ) -> None:
        self._modules, self._stock = modules, stock
        there = index_tensors(list(removed.values()), device)
        self._removed = {
            name: (index, int(removed[name].max())) for name, index in zip(removed, there, strict=True)
        }
        self._norms = NormFinder()
        self._loudness: list[list[list[Tensor]]] = []
        self.way: Way = []
        self.samples: dict[str, Tensor] = {}

    def note(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """To be called behind every convolution, linear layer and norm."""
        self.way.append(step(name, output))
        self._norms.note(name, module, inputs, output)
        if isinstance(module, Norm):
            if name in self._removed:
                self._loudness.append(loudness_of(module, inputs, output, *self._removed[name]))
        elif name not in self._stock and inputs and isinstance(inputs[0], Tensor):
            self.samples[name] = inputs[0].detach().clone()

    @functools.cached_property
    def silent(self) -> bool:
        """Whether the norms of removed filters read and make 0 in their channels, after the pass."""
        return all(are_silent(self._loudness))

    def own(self) -> dict[str, str]:
        """{convolution: the norm that alone of all norms reads its output, and reads nothing else}."""
        return {
            name: norms[0]
            for name, norms in self._norms.own().items()
            if len(norms) == 1
            and isinstance(self._modules[name], Convolution)
            and per_channel(self._modules[norms[0]])
        }


def excess_of(a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    """The largest of |a − b| − ``tolerance`` · |b|: a tensor of one number, NaN if unknown.

    The tensors are ``close`` if it is at most ``tolerance · scale`` and ``a`` is finite.
    """
    if not (a.is_floating_point() or a.is_complex()):
        a, b = a.float(), b.float()
    return (a - b).abs().sub_(b.abs(), alpha=tolerance).max()


def close(a: Tensor, b: Tensor, tolerance: float, scale: float) -> bool:
    """Whether they differ by no more than ``tolerance``, of themselves or of ``scale``."""
    if a.shape != b.shape:
        return False
    # The first test decides most cases in less time.
    if not a.numel() or float((a - b).abs_().max()) <= tolerance * scale:
        return True
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def largest(tensor: Tensor) -> float:
    """The largest absolute value, 0 for an empty tensor; NaN if there is a NaN."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def scale_of(tensor: Tensor) -> float:
    """The largest absolute value among the finite numbers."""
    return largest(tensor.nan_to_num(0, 0, 0))
