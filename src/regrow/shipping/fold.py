"""A network for inference only: its batch norms folded into the convolutions in front of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regrow.indexing import place
from regrow.log import gave_up, log
from regrow.looking.calls import PassFailed, call, floating
from regrow.looking.copies import NotCopied, copied, copied_as, inputs_as
from regrow.looking.noise import noise_like, unsettle
from regrow.marks import borrowed_weight, check, is_spread, strip
from regrow.modules import Convolution, unwrap
from regrow.structure.norms import own_norms
from regrow.surgery.evidence import Refuted, compare, see
from regrow.surgery.small import Small
from regrow.torch_private import BatchNorm, has_hooks, own_modules

_VERSION = 1


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
    check(model, "fold_norms")
    model = unwrap(model)
    try:
        whole = copied(model, torch.clone).eval()
        strip(whole)
        expected = floating(call(whole, example_inputs))
        own = own_norms(whole, example_inputs)
    except (NotCopied, PassFailed) as error:
        raise ValueError(
            f"the model cannot be copied and run on example_inputs: {error}. Pass what the model takes, for "
            "example one batch of your loader, x[:1]."
        ) from error
    pairs = {norms[0]: name for name, norms in own.items() if len(norms) == 1}
    left = {
        name: reason
        for name, norm in whole.named_modules()
        if isinstance(norm, BatchNorm)
        and (reason := _unfoldable(norm, whole.get_submodule(pairs[name]) if name in pairs else None))
    }
    wished = {norm: conv for norm, conv in pairs.items() if norm not in left}
    folded = _confirmed(whole, wished, example_inputs)
    left |= {norm: "forward passes did not confirm it" for norm in wished if norm not in folded}
    _fold(whole, folded)
    found = floating(call(whole, example_inputs))
    for conv in folded.values():
        whole.get_submodule(conv)._regrow_folded = True  # type: ignore[assignment]
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
        return place(x, self.positions, 1, self.width)

    def extra_repr(self) -> str:
        return f"{len(self.positions)} among {self.width}"


def _unfoldable(norm: Any, conv: nn.Module | None) -> str:
    """Empty, or why ``norm`` cannot be folded into ``conv``, the layer whose output it alone reads."""
    if norm.running_mean is None:
        return "it has no running statistics"
    if not isinstance(conv, Convolution):
        return "it does not read the output of one convolution alone"
    if reason := borrowed_weight(conv):
        return f"the convolution in front of it: {reason}"
    if is_spread(conv):
        return "the convolution holds filters at zero"
    if has_hooks(norm) or has_hooks(conv):
        return "it or its convolution has hooks"
    return ""


def _confirmed(model: nn.Module, pairs: dict[str, str], example_inputs: Any) -> dict[str, str]:
    """The ``pairs`` (norm → convolution) that can be folded in a copy with random statistics, without that
    any layer reads something else."""
    for dtype in (torch.float64, torch.float32):
        probe, inputs = copied_as(model, dtype), noise_like(inputs_as(example_inputs, dtype), 1)
        with torch.no_grad():
            unsettle(probe, torch.Generator().manual_seed(0))
        try:
            expected = see(probe, inputs)
        except PassFailed as error:  # a type written into the model's code
            gave_up(f"computing in {dtype}", error)
            continue
        tolerance = 1e-6 if dtype == torch.float64 else 1e-3
        break
    else:
        return {}

    def equal(some: dict[str, str]) -> bool:
        trial = copied(probe)
        try:
            _fold(trial, some)
            compare(trial, inputs, expected, tolerance)
        except (Refuted, PassFailed) as reason:
            log.debug("norms were not folded: %s", reason)
            return False
        return True

    if equal(pairs):
        return pairs
    good: dict[str, str] = {}
    for norm, conv in pairs.items():
        if equal({**good, norm: conv}):
            good[norm] = conv
    return good


def _fold(model: nn.Module, pairs: dict[str, str]) -> None:
    """Fold each norm into its convolution, in place; ``Refuted`` where that changes their result."""
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
                raise Refuted(f"{name!r} adds to channels that {of!r} has none of")
            scale, shift = scale[at], shift[at]
        weight, bias = conv.weight, conv.bias
        shift = shift if bias is None else shift + bias.double() * scale
        scaled = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
        conv.weight = nn.Parameter(
            scaled.to(weight).contiguous(memory_format=_format(weight)), requires_grad=weight.requires_grad
        )
        conv.bias = nn.Parameter(shift.to(weight), requires_grad=weight.requires_grad)
        replacements[norm] = _stand_in(norm)
    for module in list(model.modules()):
        for key, child in list(own_modules(module).items()):
            if child in replacements:
                setattr(module, key, replacements[child])


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
