"""New weights for the layers behind removed filters, by least squares on unlabelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from regrow.compensation.targets import Call, Target, calls_of, shift_holders, survey
from regrow.least_squares.moments import Moments, fit
from regrow.least_squares.unfolded import positions, weight_of
from regrow.looking.calls import evaluating
from regrow.looking.images import check_finite_results, count_images, there

_SHARE = 0.25  # of the positions of each picture: neighbours hold nearly the same
_ROWS = 1 << 15  # of a batch, at most
_TIMES = 4  # as many rows as columns, at least, where a batch has them
# A norm that scales a channel down by more than this, beside its largest channel, hides the shortcut's error.
_HIDDEN = 1e-3


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
        batches: inputs of the model, as ``picked`` yields them; they are read once for each layer.
        advance: called with the share of the layers that are done.

    Raises:
        ValueError: the batches do not fit the model, or give NaN or infinite values.
    """
    targets = survey(model, norms, gone, there(model, batches[0]))
    done = Reconstruction({}, {}, sum(map(count_images, batches)), {})
    for number, target in enumerate(targets):
        _renew(model, cut, target, sorted(gone.get(target.name, ())), norms, batches, done)
        advance((number + 1) / len(targets))
    return done


def _renew(
    model: nn.Module,
    cut: nn.Module,
    target: Target,
    dead: Sequence[int],
    norms: Mapping[str, Sequence[str]],
    batches: Sequence[Any],
    done: Reconstruction,
) -> None:
    halves = _moments(model, cut, target, dead, batches)
    for half in halves:
        check_finite_results(target.name, half.rr, half.xx, half.xr, half.x)
    if not any(half.rr.any() for half in halves):
        return
    channels = halves[0].r.numel()
    holders = shift_holders(cut, norms, target.name, channels)
    columns = halves[0].xx.shape[-1]
    rows = sum(half.count for half in halves)
    if columns > rows:
        done.few[target.name] = rows, columns
    if not holders and not columns:
        done.unfolded[target.name] = target.why
        return
    change, record = fit(halves, shifts=bool(holders))
    done.layers[target.name] = record
    if columns:
        weight: Any = cut.get_submodule(target.name).weight
        weight.add_(weight_of(cut.get_submodule(target.name), change.weights.to(weight.device)).to(weight))
    for tensor, sign in holders:
        tensor.add_(sign * change.shift.flatten().to(tensor))


def _moments(
    model: nn.Module, cut: nn.Module, target: Target, dead: Sequence[int], batches: Iterable[Any]
) -> list[Moments]:
    """The moments of what a layer reads in ``cut`` and of what its outputs lack, for each half of them."""
    layer = cut.get_submodule(target.name)
    groups = 1 if target.why else int(getattr(layer, "groups", 1))
    scale = _scale(model, target)
    generator = torch.Generator().manual_seed(0)
    halves: list[Moments | None] = [None, None]

    def draw(_number: int, layer: nn.Module, output: Tensor) -> Tensor:
        count, pictures = positions(layer, output), max(1, len(output))
        least = _TIMES * cast(Tensor, layer.weight)[0].numel() // pictures if not target.why else 1
        most = max(min(round(_SHARE * count), _ROWS // pictures), min(least, count))
        return torch.randperm(count, generator=generator)[: max(1, most)].to(output.device)

    with evaluating(model), evaluating(cut):
        for each in batches:
            inputs = there(model, each)
            whole = calls_of(model, target, inputs, draw, reads=False)
            chosen = [call.chosen for call in whole]
            left = calls_of(cut, target, inputs, lambda number, *_, those=chosen: those[number], reads=True)
            for before, after in zip(whole, left, strict=True):
                lack = _lack(before, after, scale)
                lack[:, dead] = 0
                lack = lack.unflatten(1, (groups, -1)).movedim(1, 0)
                rows = len(before.chosen)
                for half, (x, r) in enumerate(_halves(after.inputs, lack, rows)):
                    if r.shape[1]:
                        more, so_far = Moments.of(x, r), halves[half]
                        halves[half] = more if so_far is None else so_far + more
    return [half for half in halves if half is not None]


def _halves(x: Any, r: Tensor, rows: int) -> list[tuple[Tensor, Tensor]]:
    """The rows of every second picture, and the others."""
    x, r = (each.unflatten(1, (-1, rows)) for each in (x, r))
    return [(x[:, half::2].flatten(1, 2), r[:, half::2].flatten(1, 2)) for half in (0, 1)]


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
