"""A network for inference only: its batch norms folded into the convolutions in front of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from regrow.compensation.compensate import norms_behind
from regrow.compensation.images import evaluating
from regrow.filters import Convolution, unwrap
from regrow.indexing import place
from regrow.looking.calls import call, floating, mapped
from regrow.structure.confirm import unsettle
from regrow.surgery.layers import Small

_VERSION = 1
_BatchNorm = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def fold_norms(model: nn.Module, *, example_inputs: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of ``model`` for inference, in which convolutions do the work of the batch norms behind them.

    In evaluation mode a batch norm is a scale and a shift per channel: multiplied into the filters in front
    of it and added to their biases, it costs nothing. The copy computes the same up to rounding, in
    evaluation mode; it is not for training, and can be exported. Where a norm of a cut network puts its
    channels at their places, a layer that does no more than that stands in for it.

    A norm is folded only if it alone reads what one convolution gives, and forward passes confirm it.

    Args:
        model: any module, cut or not; wrappers are looked through. It is only read.
        example_inputs: what ``model`` takes: a tensor, a tuple of arguments or a dict of keywords; one
            picture is enough.

    Returns:
        The copy, in evaluation mode, and a JSON-able record: version; folded {norm: convolution}; left
        {norm: why it stays}; difference (the largest of an output on ``example_inputs``, as a share of its
        largest value: rounding, but where outputs are chosen among others, as a detector's boxes are).

    Raises:
        ValueError: the model cannot be copied or run.
    """
    model = unwrap(model)
    try:
        whole = copy.deepcopy(model).eval()
        expected = floating(call(whole, example_inputs))
        behind = norms_behind(whole, example_inputs)
    except Exception as error:
        raise ValueError(
            f"the model cannot be copied and run on example_inputs: {error}. Pass what the model takes, for "
            "example one batch of your loader, x[:1]."
        ) from error
    pairs = {norms[0]: name for name, norms in behind.items() if len(norms) == 1}
    left = {
        name: reason
        for name, norm in whole.named_modules()
        if isinstance(norm, _BatchNorm)
        and (reason := _unfoldable(norm, whole.get_submodule(pairs[name]) if name in pairs else None))
    }
    wished = {norm: conv for norm, conv in pairs.items() if norm not in left}
    folded = _confirmed(whole, wished, example_inputs)
    left |= {norm: "forward passes did not confirm it" for norm in wished if norm not in folded}
    _fold(whole, folded)
    found = floating(call(whole, example_inputs))
    whole._regrow_folded = True  # type: ignore[assignment]
    record = {
        "version": _VERSION,
        "folded": folded,
        "left": left,
        "difference": max((_difference(a, b) for a, b in zip(expected, found, strict=True)), default=0.0),
    }
    return whole, record


class Placed(nn.Module):
    """Puts the channels of its input (dim 1) at ``positions`` of a tensor of zeros, ``width`` wide."""

    positions: Tensor

    def __init__(self, positions: Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("positions", positions)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        # A compiler makes its own kernels, and an exported graph knows nothing of other derivatives.
        if torch.compiler.is_compiling():
            shape = [x.shape[0], self.width, *x.shape[2:]]
            return x.new_zeros(shape).index_copy(1, self.positions, x)
        return place(x, self.positions, 1, self.width)

    def extra_repr(self) -> str:
        return f"{len(self.positions)} among {self.width}"


def _unfoldable(norm: _BatchNorm, conv: nn.Module | None) -> str:
    """Empty, or why ``norm`` cannot be folded into ``conv``, the layer whose output it alone reads."""
    if norm.running_mean is None:
        return "it has no running statistics"
    if not isinstance(conv, Convolution):
        return "it does not read the output of one convolution alone"
    if conv._parameters.get("weight") is None:
        return "the convolution's weight is computed from others (a parametrization)"
    if getattr(conv, "_regrow_spread", None) is not None:
        return "the convolution holds filters at zero"
    if any(module._forward_hooks or module._forward_pre_hooks for module in (norm, conv)):
        return "it or its convolution has hooks"
    return ""


def _confirmed(model: nn.Module, pairs: dict[str, str], example_inputs: Any) -> dict[str, str]:
    """Those of ``pairs`` (norm → convolution) that a copy with random statistics bears to be folded."""
    for dtype in (torch.float64, torch.float32):
        probe, inputs = copy.deepcopy(model).to(dtype), _noise(example_inputs, dtype)
        unsettle(probe, torch.Generator().manual_seed(0))
        try:
            expected = _seen(probe, inputs)
        except Exception:  # a dtype written into the model's code
            continue
        tolerance = 1e-6 if dtype == torch.float64 else 1e-3
        break
    else:
        return {}

    def equal(some: dict[str, str]) -> bool:
        trial = copy.deepcopy(probe)
        try:
            _fold(trial, some)
            found = _seen(trial, inputs)
        except Exception:  # a shift where there is no channel, or what a layer of the user's own raises
            return False
        return found.shape == expected.shape and bool(
            ((found - expected).abs().amax(1) <= tolerance * expected.abs().amax(1)).all()
        )

    if equal(pairs):
        return pairs
    good: dict[str, str] = {}
    for norm, conv in pairs.items():
        if equal({**good, norm: conv}):
            good[norm] = conv
    return good


def _noise(example: Any, dtype: torch.dtype) -> Any:
    """Random numbers for the floating tensors in ``example``, of which one is not to be taken for 0."""
    generator = torch.Generator().manual_seed(1)
    return mapped(example, lambda x: torch.rand(x.shape, generator=generator, dtype=dtype).to(x.device))


def _seen(model: nn.Module, inputs: Any) -> Tensor:
    """What convolutions and linear layers read in one pass, in order, and the outputs: Tensor[tensors, 2],
    of each tensor its length and its product with a fixed vector."""
    seen: list[Tensor] = []

    def note(tensor: Tensor) -> None:
        flat = tensor.detach().flatten()
        seen.append(torch.stack([flat.norm(), flat @ torch.arange(len(flat)).to(flat).cos()]))

    def before(_module: nn.Module, given: Any) -> None:
        for tensor in floating(given):
            note(tensor)

    handles = [
        module.register_forward_pre_hook(before)
        for module in model.modules()
        if isinstance(module, Convolution | nn.Linear)
    ]
    try:
        with evaluating(model):
            for tensor in floating(call(model, inputs)):
                note(tensor)
    finally:
        for handle in handles:
            handle.remove()
    result = torch.stack(seen)
    if not result.isfinite().all():
        raise ValueError("numbers overflow")
    return result


def _fold(model: nn.Module, pairs: dict[str, str]) -> None:
    """Fold each norm into its convolution, in place; ``ValueError`` where that changes what they compute."""
    modules: dict[str, Any] = dict(model.named_modules())
    replacements: dict[nn.Module, nn.Module] = {}
    for name, of in pairs.items():
        norm, conv = modules[name], modules[of]
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.double()
        if (at := getattr(conv, "_regrow_placed", None)) is not None:
            elsewhere = torch.ones_like(shift, dtype=torch.bool)
            elsewhere[at] = False
            if shift[elsewhere].any():
                raise ValueError(f"{name!r} adds to channels that {of!r} has none of")
            scale, shift = scale[at], shift[at]
        weight, bias = conv.weight, conv.bias
        shift = shift if bias is None else shift + bias.double() * scale
        scaled = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
        conv.weight = nn.Parameter(
            scaled.to(weight).contiguous(memory_format=_format(weight)), requires_grad=weight.requires_grad
        )
        conv.bias = nn.Parameter(shift.to(weight), requires_grad=weight.requires_grad)
        replacements[norm] = _stand_in(norm)
    for module in model.modules():
        for key, child in module._modules.items():
            if child in replacements:
                module._modules[key] = replacements[child]


def _stand_in(norm: Any) -> nn.Module:
    """What is left to do of a folded norm: what a class of its own does behind it, and its placing."""
    # timm's norms, for one, hold the dropout and the activation behind them as children.
    steps = [step for step in norm.children() if not isinstance(step, nn.Identity)]
    if isinstance(norm, Small) and norm._regrow_placed is not None:
        steps = [*steps, Placed(norm._regrow_placed, norm._regrow_widths[0])]  # type: ignore[arg-type]
    if not steps:
        return nn.Identity()
    return steps[0] if len(steps) == 1 else nn.Sequential(*steps)


def _format(weight: Tensor) -> torch.memory_format:
    if weight.dim() == 4 and not weight.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def _difference(expected: Tensor, found: Tensor) -> float:
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    return float((expected - found).abs().max()) / largest if largest else 0.0
