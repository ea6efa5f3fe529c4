"""The gradients of weights for single pictures, all pictures of a batch in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from regrow.criteria.batches import Loss, one_by_one, run, total_loss
from regrow.looking.hooks import hooked
from regrow.modules import Convolution, Transposed, filter_dim, filters_first, is_stock
from regrow.torch_private import own_parameters

Reduce = Callable[[Tensor], Tensor]
_NUMBERS = 1 << 24  # of all that is computed at once for a few pictures
# How far the sum of the gradients may be from the gradient of the sum, by rounding.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}


def reduced_gradients(
    model: nn.Module,
    convs: Mapping[str, Convolution],
    inputs: Any,
    labels: Any,
    count: int,
    loss: Loss | None,
    reduce: Reduce,
) -> dict[str, Tensor]:
    """What ``reduce`` makes of the gradients of each layer's weight, summed over the pictures of a batch.

    One pass and one backward pass serve all pictures where every layer is PyTorch's own and is used as a
    layer: the gradient of a picture is then the product of what the layer reads and of the gradient of what
    it makes. The sum of these gradients is compared with what autograd says of the weight. Where they differ,
    or a layer is of another kind, each picture has a pass of its own.

    Args:
        convs: layers in a model that is in evaluation mode, with gradients on.
        reduce: takes gradients [pictures, filters, weights of a filter], and returns a sum over the pictures,
            of any shape.
    """
    found = None
    if count > 1 and all(is_stock(conv) for conv in convs.values()):
        found = _together(model, convs, inputs, labels, count, loss, reduce)
    if found is None:
        found = _one_by_one(model, convs, inputs, labels, count, loss, reduce)
    return found


def _one_by_one(
    model: nn.Module,
    convs: Mapping[str, Convolution],
    inputs: Any,
    labels: Any,
    count: int,
    loss: Loss | None,
    reduce: Reduce,
) -> dict[str, Tensor]:
    weights = [own_parameters(conv)["weight"] for conv in convs.values()]
    found: dict[str, Tensor] = {}
    for one, label in one_by_one(inputs, labels, count):
        total = total_loss(run(model, one), label, 1, loss)
        gradients = torch.autograd.grad(total, weights, allow_unused=True)
        for (name, conv), weight, gradient in zip(convs.items(), weights, gradients, strict=True):
            given = torch.zeros_like(weight) if gradient is None else gradient
            part = reduce(_wide(filters_first(conv, given).flatten(1).unsqueeze(0)))
            found[name] = found[name] + part if name in found else part
    return found


def _together(
    model: nn.Module,
    convs: Mapping[str, Convolution],
    inputs: Any,
    labels: Any,
    count: int,
    loss: Loss | None,
    reduce: Reduce,
) -> dict[str, Tensor] | None:
    """As ``reduced_gradients``, from one pass; None where autograd contradicts."""
    made: list[tuple[str, Tensor, GradientEdge]] = []
    strange = False

    def after(name: str, conv: Any, given: Any, output: Tensor) -> None:
        nonlocal strange
        whole = output.requires_grad and output.dim() == len(conv.kernel_size) + 2 and len(output) == count
        if whole:
            made.append((name, given[0].detach(), get_gradient_edge(output)))
        else:  # without a batch dimension or a gradient, or with several entries for a picture
            strange = True

    with hooked(list(convs.items()), after):
        outputs = run(model, inputs)
    if strange:
        return None
    total = total_loss(outputs, labels, count, loss)
    weights = [own_parameters(conv)["weight"] for conv in convs.values()]
    edges = [edge for *_, edge in made]
    gradients = torch.autograd.grad(total, [*weights, *edges], allow_unused=True)
    of_outputs = gradients[len(weights) :]
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for (name, conv), whole in zip(convs.items(), gradients, strict=False):
            calls = [
                (read, gradient)
                for (other, read, _), gradient in zip(made, of_outputs, strict=True)
                if other == name and gradient is not None
            ]
            shape = filters_first(conv, conv.weight).flatten(1).shape
            sums, sizes = conv.weight.new_zeros(shape), conv.weight.new_zeros(shape)
            sums, sizes = _wide(sums), _wide(sizes)
            for part in _in_parts(conv, calls, count):
                sums += part.sum(0)
                sizes += part.abs().sum(0)
                reduced = reduce(part)
                found[name] = found[name] + reduced if name in found else reduced
            if name not in found:
                found[name] = reduce(sums.unsqueeze(0))
            told = sums.new_zeros(shape) if whole is None else filters_first(conv, whole).flatten(1)
            allowed = _ROUNDING.get(conv.weight.dtype, 5e-2) * sizes.max()
            if not bool(((sums - told).abs().max() <= allowed) | ~sizes.max().isfinite()):
                return None
    return found


def _in_parts(conv: Any, calls: list[tuple[Tensor, Tensor]], count: int) -> Iterator[Tensor]:
    """The gradients of a layer's weight, [pictures, filters, weights of a filter], a few pictures at a time.

    Args:
        calls: what the layer read and the gradient of what it made, for each call of the layer.
    """
    if not calls:
        return
    most = max(_numbers(conv, read, gradient) for read, gradient in calls)
    size = max(1, _NUMBERS // most)
    for begin in range(0, count, size):
        at = slice(begin, begin + size)
        total = _gradients(conv, *(tensor[at] for tensor in calls[0]))
        for call in calls[1:]:
            total = total + _gradients(conv, *(tensor[at] for tensor in call))
        yield total


def _numbers(conv: Any, read: Tensor, gradient: Tensor) -> int:
    """How many numbers are computed for one picture."""
    around, positions = (gradient, read) if isinstance(conv, Transposed) else (read, gradient)
    windows = around.shape[1] * conv.weight[0, 0].numel() * positions[0, 0].numel()
    return int(windows + conv.weight.numel())


def _gradients(conv: Any, read: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of an ungrouped layer's weight for each picture: [pictures, filters, weights]."""
    read, gradient = _wide(read), _wide(gradient)
    if filter_dim(conv):  # a transposed convolution: what it makes lies around what it reads
        windows = _windows(conv, gradient, read)
        found = torch.bmm(read.flatten(2), windows).unflatten(2, (conv.out_channels, -1))
        return found.transpose(1, 2).flatten(2)
    return torch.bmm(gradient.flatten(2), _windows(conv, read, gradient))


def _windows(conv: Any, around: Tensor, positions: Tensor) -> Tensor:
    """What the kernel lies on at each of ``positions``: [pictures, positions, channels · kernel]."""
    sides = len(conv.kernel_size)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padding: list[int] = []
    for side in reversed(range(sides)):  # F.pad begins with the last
        pad = conv.padding if isinstance(conv.padding, str) else conv.padding[side]
        both = conv.dilation[side] * (conv.kernel_size[side] - 1) if pad == "same" else 0
        padding += [both // 2, both - both // 2] if isinstance(pad, str) else [pad, pad]
    windows = nn.functional.pad(around, padding, mode=mode) if any(padding) else around
    for side in range(sides):
        wide = conv.dilation[side] * (conv.kernel_size[side] - 1) + 1
        windows = windows.unfold(2 + side, wide, conv.stride[side])[..., :: conv.dilation[side]]
        windows = windows.narrow(2 + side, 0, positions.shape[2 + side])
    order = [0, *range(2, 2 + sides), 1, *range(2 + sides, 2 + 2 * sides)]
    return windows.permute(order).flatten(1 + sides).flatten(1, sides)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
