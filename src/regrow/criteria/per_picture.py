"""The gradients of weights for single pictures, all pictures of a batch in one pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from regrow.criteria.batches import Batch, Loss, run, total_loss
from regrow.looking.hooks import hooked
from regrow.modules import Convolution, filter_dim, filters_first, is_stock
from regrow.numbers import at_least_float32
from regrow.torch_private import own_parameters

Add = Callable[[Tensor, Tensor], Any]
_NUMBERS = 1 << 20  # of all that is computed at once: as many as lie in a cache
# How far the sum of the gradients may be from the gradient of the sum, by rounding.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}


def add_gradients(
    model: nn.Module,
    convs: Mapping[str, Convolution],
    batch: Batch,
    loss: Loss | None,
    add: Add,
    shape: Callable[[Convolution], tuple[int, ...]],
) -> dict[str, Tensor]:
    """Sums over the pictures of a batch, of what ``add`` makes of the gradients of each layer's weight.

    One pass and one backward pass serve all pictures where every layer is PyTorch's own and is used as a
    layer: the gradient of a picture is then the product of what the layer reads and of the gradient of what
    it makes. The sum of these gradients is compared with what autograd says of the weight. Where they differ,
    or a layer is of another kind, each picture has a pass of its own.

    Args:
        convs: layers in a model that is in evaluation mode, with gradients on.
        add: takes a sum and gradients [pictures, filters, weights of a filter], which it may change, and
            adds to the sum in place.
        shape: of the sum of a layer.

    Returns:
        {name: Tensor of that shape}, float32 (float64 for float64 weights).
    """

    def empty() -> dict[str, Tensor]:
        return {name: at_least_float32(conv.weight).new_zeros(shape(conv)) for name, conv in convs.items()}

    if batch.pictures > 1 and all(is_stock(conv) for conv in convs.values()):
        sums = empty()
        if _together(model, convs, batch, loss, add, sums):
            return sums
    sums = empty()
    weights = [own_parameters(conv)["weight"] for conv in convs.values()]
    for single in batch.singles():
        total = total_loss(run(model, single.inputs), single, loss)
        gradients = torch.autograd.grad(total, weights, allow_unused=True)
        for (name, conv), gradient in zip(convs.items(), gradients, strict=True):
            if gradient is not None:
                rows = filters_first(conv, gradient).flatten(1).clone()
                add(sums[name], at_least_float32(rows.unsqueeze(0)))
    return sums


def _together(
    model: nn.Module,
    convs: Mapping[str, Convolution],
    batch: Batch,
    loss: Loss | None,
    add: Add,
    sums: dict[str, Tensor],
) -> bool:
    """Fill ``sums`` from one pass; return whether autograd agrees."""
    made: list[tuple[str, Tensor, GradientEdge]] = []
    strange = False

    def after(name: str, conv: Any, given: Any, output: Tensor) -> None:
        nonlocal strange
        whole = (
            output.requires_grad
            and output.dim() == len(conv.kernel_size) + 2
            and len(output) == batch.pictures
        )
        if whole:
            made.append((name, given[0].detach(), get_gradient_edge(output)))
        else:  # without a batch dimension or a gradient, or with several entries for a picture
            strange = True

    with hooked(list(convs.items()), after):
        outputs = run(model, batch.inputs)
    if strange:
        return False
    total = total_loss(outputs, batch, loss)
    weights = [own_parameters(conv)["weight"] for conv in convs.values()]
    gradients = torch.autograd.grad(total, [*weights, *(edge for *_, edge in made)], allow_unused=True)
    of_outputs = gradients[len(weights) :]
    with torch.no_grad():
        for (name, conv), whole in zip(convs.items(), gradients, strict=False):
            calls = [
                (read, gradient)
                for (other, read, _), gradient in zip(made, of_outputs, strict=True)
                if other == name and gradient is not None
            ]
            if not _add_layer(conv, calls, batch.pictures, whole, functools.partial(add, sums[name])):
                return False
    return True


def _add_layer(
    conv: Any,
    calls: list[tuple[Tensor, Tensor]],
    count: int,
    whole: Tensor | None,
    add: Callable[[Tensor], Any],
) -> bool:
    """Hand the gradients of a layer's weight to ``add``, a few pictures at a time.

    A gradient is a product, [rows of the weight, positions] times [positions, all else of the weight]. The
    sum of the gradients is compared with ``whole``, what autograd found, by its product with a vector.

    Args:
        calls: what the layer read and the gradient of what it made, for each call of the layer.

    Returns:
        Whether they are equal.
    """
    if not calls:
        return whole is None or not bool(whole.any())
    rows = conv.weight.flatten(1)
    ruler = torch.linspace(1, 2, rows.shape[1], dtype=at_least_float32(rows).dtype, device=rows.device)
    measured, sizes = ruler.new_zeros(len(rows)), ruler.new_zeros(len(rows))
    size = max(1, _NUMBERS // max(_numbers(conv, read, gradient) for read, gradient in calls))
    for begin in range(0, count, size):
        total = None
        for read, gradient in calls:
            left, right = _factors(conv, read[begin : begin + size], gradient[begin : begin + size])
            lengths = torch.matmul(left, (right @ ruler).unsqueeze(2)).squeeze(2)
            measured += lengths.sum(0)
            sizes += lengths.abs().sum(0)
            product = torch.bmm(left, right)
            total = product if total is None else total.add_(product)
        assert total is not None
        if filter_dim(conv):
            total = total.unflatten(2, (conv.out_channels, -1)).transpose(1, 2).flatten(2)
        add(total)
    told = at_least_float32(whole.flatten(1)) @ ruler if whole is not None else torch.zeros_like(measured)
    allowed = _ROUNDING.get(conv.weight.dtype, 5e-2) * sizes.max()
    return bool(((measured - told).abs().max() <= allowed) | ~allowed.isfinite())


def _numbers(conv: Any, read: Tensor, gradient: Tensor) -> int:
    """How many numbers are computed for one picture."""
    around, positions = (gradient, read) if filter_dim(conv) else (read, gradient)
    windows = around.shape[1] * conv.weight[0, 0].numel() * positions[0, 0].numel()
    return int(windows + conv.weight.numel())


def _factors(conv: Any, read: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors, [pictures, rows of the weight, positions] and [pictures, positions, all else of the
    weight], whose product is the gradient of an ungrouped layer's weight for each picture."""
    read, gradient = at_least_float32(read), at_least_float32(gradient)
    if filter_dim(conv):  # a transposed convolution: what it makes lies around what it reads
        return read.flatten(2), _windows(conv, gradient, read)
    return gradient.flatten(2), _windows(conv, read, gradient)


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
