"""New weights for the layers behind removed filters, by least squares on unlabelled images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from regrow.compensation.passes import Call, Ended, Met, Stale, follow
from regrow.compensation.selections import Selections
from regrow.compensation.targets import Target, shift_holders, survey
from regrow.least_squares.moments import Moments, fit, in_span
from regrow.least_squares.unfolded import positions, weight_of, with_batch
from regrow.looking.calls import evaluating
from regrow.looking.hooks import hooked
from regrow.looking.images import check_finite_results, count_images, forward, there
from regrow.memory import most_memory
from regrow.modules import CONSUMER_CLASSES, device_of

# How many rows a system has, and how many times as many as it has columns, where the images have so many.
_ROWS, _TIMES = 1 << 14, 32
_NUMBERS = 1 << 27  # at most, in all rows of a layer's inputs
_LIVE = 5  # outputs of the size of the largest one, which a pass holds at a time
_SHARE = 0.6  # of the memory, for a pass over all images
# A norm that scales a channel down by more than this, beside its largest channel, hides the shortcut's error.
_HIDDEN = 1e-3
# With fewer rows than this for each column, a system is solved in the space that the rows span.
_FEW = 0.7
_NOT_CALLED = "the smaller network does not call it as the other does"

# The moments of every second picture, and those of the others.
Halves = list[Moments | None]


@dataclass(frozen=True)
class Reconstruction:
    """What ``reconstruct`` did.

    Attributes:
        layers: {name: how, penalty and error, as ``fit`` records them} of the layers whose outputs lacked
            something.
        unfolded: {name: why} of layers that took neither weights nor a shift.
        images: how many were read.
        few: {name: (rows, columns)} of the layers of which there were fewer rows than columns.
    """

    layers: dict[str, dict[str, Any]]
    unfolded: dict[str, str]
    images: int
    few: dict[str, tuple[int, int]]


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    cut: nn.Module,
    gone: Mapping[str, Sequence[int]],
    norms: Mapping[str, Sequence[str]],
    batches: Sequence[Any],
    advance: Callable[[float], object] = lambda _share: None,
) -> Reconstruction:
    """Change the weights of ``cut`` so that each layer makes what it makes in ``model``, layer by layer.

    In the order of the pass, each layer gets the weights whose outputs, from what the layer reads in the
    network that is cut and changed already, come closest to the layer's outputs in the uncut network (ridge
    regression towards the old weights). Where the output is added to a shortcut, it also makes up for the
    error of the shortcut. A layer gets a shift of its mean instead, or nothing, where that leaves a smaller
    error.

    Args:
        model: the uncut network.
        cut: a copy of it, of the same shapes, in which the filters ``gone`` are silent; it is changed.
        norms: the norms that each layer has for itself (``own_norms``).
        batches: inputs of the model, as ``picked`` yields them; where they fit into the memory, all are
            read at once, else once for each layer.
        advance: called with the share of the layers that are done.

    Raises:
        ValueError: the batches do not fit the model, or give NaN or infinite values.
    """
    work = _Work(model, cut, gone, norms, batches, advance)
    with evaluating(model), evaluating(cut):
        work.targets = survey(model, norms, gone, there(model, batches[0]))
        joined = _joined(model, batches)
        if joined is None:
            for target in list(work.targets):
                work.one(target)
        else:
            work.all_at_once(there(model, joined))
    return work.done


class _Work:
    def __init__(
        self,
        model: nn.Module,
        cut: nn.Module,
        gone: Mapping[str, Sequence[int]],
        norms: Mapping[str, Sequence[str]],
        batches: Sequence[Any],
        advance: Callable[[float], object],
    ) -> None:
        self._model, self._cut, self._gone, self._norms, self._batches = model, cut, gone, norms, batches
        self._images = sum(map(count_images, batches))
        self._advance = advance
        self._generator = torch.Generator().manual_seed(0)
        self._whole: dict[str, list[Call]] = {}  # what layers make in the uncut network
        self._selections = Selections()  # of the uncut network
        self.targets: list[Target] = []
        self.done = Reconstruction({}, {}, self._images, {})

    def all_at_once(self, inputs: Any) -> None:
        """All images in one pass, in which each layer gets its weights as soon as it was called."""
        self._whole = self._shown(self.targets, inputs, lambda *_: False)
        # More pictures may take more calls than the survey saw.
        left = {
            target.name: replace(target, calls=len(self._whole[target.name]))
            for target in self.targets
            if target.name in self._whole
        }
        lost = {target.name for target in self.targets} - left.keys()

        def met(target: Target, calls: list[Call]) -> bool:
            del left[target.name]
            halves: Halves = [None, None]
            whole = self._whole.pop(target.name)
            self._add_moments(halves, target, whole, calls, 0, self._images, len(calls) == 1)
            changed = self._solve(target, halves)
            self._advance(1 - len(left) / len(self.targets))
            return changed

        while left:
            before = len(left)
            try:
                self._follow_cut(list(left.values()), inputs, met)
            except Stale:
                continue
            if len(left) == before:
                break
        for target in self.targets:
            if target.name in left or target.name in lost:
                self._not_met(target)

    def one(self, target: Target) -> None:
        """One layer, from passes over the batches that end behind it."""
        halves: Halves = [None, None]
        seen = 0

        def met(target: Target, calls: list[Call]) -> bool:
            whole = self._whole.pop(target.name)
            self._add_moments(halves, target, whole, calls, seen, count_images(batch), False)
            raise Ended

        def keep(target: Target, calls: list[Call]) -> bool:
            self._whole[target.name] = calls
            raise Ended

        for batch in self._batches:
            inputs = there(self._model, batch)
            self._whole.clear()
            with suppress(Ended):
                self._whole |= self._shown([target], inputs, keep)
            if calls := self._whole.get(target.name):  # fewer pictures may take fewer calls
                now = replace(target, calls=len(calls))
                with suppress(Ended):
                    self._follow_cut([now], inputs, met)
            seen += count_images(batch)
        if any(halves):
            self._solve(target, halves)
        else:
            self._not_met(target)
        self._advance((self.targets.index(target) + 1) / len(self.targets))

    def _shown(self, targets: Sequence[Target], inputs: Any, met: Met) -> dict[str, list[Call]]:
        """What layers make in the uncut network."""
        return follow(self._model, targets, inputs, self._draw, met, self._selections, reads=False)

    def _follow_cut(self, targets: Sequence[Target], inputs: Any, met: Met) -> None:
        follow(self._cut, targets, inputs, self._drawn, met, self._selections, reads=True)

    def _not_met(self, target: Target) -> None:
        self.done.unfolded[target.name] = target.why or _NOT_CALLED

    def _draw(self, target: Target, _number: int, layer: nn.Module, output: Tensor) -> Tensor:
        count = positions(layer, output)
        rows = _most_rows(None if target.why else layer)
        # The layer may take each picture in parts, as windows, or a part of the pictures.
        pictures = max(1, self._images, len(with_batch(layer, output)))
        wanted = math.ceil(rows / pictures)
        return torch.randperm(count, generator=self._generator)[:wanted].to(output.device)

    def _drawn(self, target: Target, number: int, _layer: nn.Module, output: Tensor) -> Tensor | None:
        whole = self._whole[target.name][number]
        return whole.chosen if whole.shape == output.shape else None

    def _add_moments(
        self,
        halves: Halves,
        target: Target,
        whole: list[Call],
        left: list[Call],
        seen: int,
        images: int,
        alone: bool,
    ) -> None:
        """Add the moments of what a layer reads in the cut network, and of what its outputs lack there, to
        those of the half that each image belongs to.

        Args:
            seen: how many images there were before.
            images: how many are in this pass.
            alone: whether one pass shows all images.
        """
        layer = self._cut.get_submodule(target.name)
        groups = 1 if target.why else int(getattr(layer, "groups", 1))
        scale = _scale(self._model, target)
        dead = sorted(self._gone.get(target.name, ()))
        for number, (before, after) in enumerate(zip(whole, left, strict=True)):
            lack = _lack(before, after, scale)
            lack[:, dead] = 0
            lack = lack.unflatten(1, (groups, -1)).movedim(1, 0)
            # Where each call is of one image, calls take turns.
            one_each = images > 1 and len(before.output) == len(before.chosen)
            first = seen + (number if one_each else 0)
            rows: Any = after.inputs
            basis: Tensor | None = None
            if alone and rows.shape[1] < _FEW * rows.shape[2]:
                rows, basis = in_span(rows)
                lack = lack.to(rows.device)  # coordinates are on the CPU, in double precision
            for half, (x, r) in enumerate(_halves(rows, lack, len(before.chosen), first)):
                if r.shape[1]:
                    more, so_far = Moments.of(x, r, basis), halves[half]
                    halves[half] = more if so_far is None else so_far + more

    def _solve(self, target: Target, both: Halves) -> bool:
        """Change the weights and the bias of a layer in the cut network; returns whether they changed."""
        halves = [half for half in both if half is not None]
        for half in halves:
            check_finite_results(target.name, half.rr, half.xx, half.xr, half.x)
        if not any(half.rr.any() for half in halves):
            return False
        layer = self._cut.get_submodule(target.name)
        holders = shift_holders(self._cut, self._norms, target.name, halves[0].r.numel())
        columns, rows = halves[0].inputs, sum(half.count for half in halves)
        if columns > rows:
            self.done.few[target.name] = rows, columns
        if not holders and not columns:
            self.done.unfolded[target.name] = target.why
            return False
        change, record = fit(halves, shifts=bool(holders))
        if record["how"] == "none":
            return False
        self.done.layers[target.name] = record
        if columns:
            weight: Any = layer.weight
            weight.add_(weight_of(layer, change.weights.to(weight.device)).to(weight))
        for tensor, sign in holders:
            tensor.add_(sign * change.shift.flatten().to(tensor))
        return True


def _most_rows(layer: Any) -> int:
    """How many rows the system of a layer gets at most; None for a layer that gets a shift alone."""
    weight = getattr(layer, "weight", None)
    if weight is None:
        return _ROWS
    columns = weight[0].numel()
    return min(max(_ROWS, _TIMES * columns), max(1, _NUMBERS // (columns * getattr(layer, "groups", 1))))


def _joined(model: nn.Module, batches: Sequence[Any]) -> Any:
    """All batches in one; None where they do not fit together, or not into a share of the memory."""
    parts = [_parts(batch) for batch in batches]
    for each, batch in zip(parts, batches, strict=True):
        pictures = count_images(batch)
        if each is None or any(len(tensor) != pictures for tensor in each.values()):
            return None
        if {key: tensor.shape[1:] for key, tensor in each.items()} != {
            key: tensor.shape[1:] for key, tensor in (parts[0] or {}).items()
        }:
            return None
    images = sum(map(count_images, batches))
    largest, kept = 0, 0.0

    def look(_name: str, module: Any, _inputs: Any, output: Tensor) -> None:
        nonlocal largest, kept
        largest = max(largest, output.nbytes)
        share = min(1.0, _most_rows(module) / max(1, positions(module, output) * images))
        kept += share * output.nbytes * images / max(1, count_images(batches[0]))

    with hooked([each for each in model.named_modules() if isinstance(each[1], CONSUMER_CLASSES)], look):
        pictures = forward(model, there(model, batches[0]))
    needed = _LIVE * largest * images / max(1, pictures) + kept
    if needed >= _SHARE * most_memory(device_of(model)):
        return None
    whole = {key: torch.cat([each[key] for each in parts if each]) for key in parts[0] or {}}
    if isinstance(batches[0], Tensor):
        return whole[0]
    return whole if isinstance(batches[0], Mapping) else tuple(whole.values())


def _parts(batch: Any) -> dict[Any, Tensor] | None:
    """The tensors of a batch by name or number; None if there is anything else in it."""
    if isinstance(batch, Tensor):
        parts: dict[Any, Any] = {0: batch}
    else:
        parts = dict(batch) if isinstance(batch, Mapping) else dict(enumerate(batch))
    return parts if all(isinstance(part, Tensor) and part.dim() for part in parts.values()) else None


def _halves(x: Any, r: Tensor, rows: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of pictures with even numbers, and the others; the first picture has the number ``first``."""
    x, r = (each.unflatten(1, (-1, rows)) for each in (x, r))
    for start in (first % 2, (first + 1) % 2):
        yield x[:, start::2].flatten(1, 2), r[:, start::2].flatten(1, 2)


def _scale(model: nn.Module, target: Target) -> Tensor | None:
    """By how much the batch norm of a summand multiplies each channel; None without a norm."""
    if not target.added or not target.norm:
        return None
    norm: Any = model.get_submodule(target.norm)
    if norm.running_var is None:
        return torch.zeros(norm.num_features)
    scale = (norm.running_var + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight


def _lack(before: Call, after: Call, scale: Tensor | None) -> Tensor:
    """What the outputs of a layer lack, [rows, channels]: also what the other summand lacks."""
    wide = torch.promote_types(before.output.dtype, torch.float32)
    lack = before.output.to(wide) - after.output.to(wide)
    if before.other is None or after.other is None:
        return lack
    error = before.other.to(wide) - after.other.to(wide)
    if scale is not None:
        scale = scale.to(error)
        seen = scale.abs() > _HIDDEN * scale.abs().max()
        error = torch.where(seen, error / torch.where(seen, scale, 1), 0)
    return lack + error
