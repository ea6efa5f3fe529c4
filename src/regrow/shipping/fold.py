"""Fold the batch norms of a network into the convolutions in front of them, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from regrow.given import check_inputs
from regrow.log import gave_up, log
from regrow.looking.calls import PassFailed, call, floating
from regrow.looking.copies import NotCopied, copied, copied_as, inputs_as
from regrow.looking.noise import noise_like, unsettle
from regrow.looking.precision import without_tf32
from regrow.marks import borrowed_weight, check, is_spread, strip
from regrow.modules import Convolution, filter_count, grouped, unwrap
from regrow.shipping.agreement import difference
from regrow.shipping.plain import placing, replace_modules
from regrow.structure.norms import own_norms
from regrow.surgery.evidence import Refuted, compare, see
from regrow.surgery.small import Small
from regrow.torch_private import BatchNorm, has_hooks

_VERSION = 1


@torch.no_grad()
def fold_norms(model: nn.Module, *, example_inputs: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Return a copy of ``model`` for inference whose convolutions also do the work of their batch norms.

    In evaluation mode a batch norm scales and shifts each channel. The convolution in front of it does the
    same at no cost: the scale is multiplied into its filters, the shift added to its biases. The copy
    computes the same in evaluation mode, up to rounding; it can be exported, but not trained. If a norm of
    a cut network places its channels among zeros, a layer that does only that takes its place.

    A norm is folded only if it reads the output of one convolution, no other layer reads that output, and
    forward passes confirm the fold.

    Args:
        model: any module, cut or not; wrappers are looked through. It is only read.
        example_inputs: the inputs of ``model``: a tensor, a tuple of arguments or a dict of keywords; one
            picture is enough.

    Returns:
        The copy, in evaluation mode, and a JSON-able record: version; folded {norm: convolution}; left
        {norm: why it stays}; difference (the largest change of an output on ``example_inputs``, as a share
        of the output's largest value: rounding, unless the model selects outputs, as detectors select boxes).

    Raises:
        ValueError: the model cannot be copied or run.
    """
    check(model, "fold_norms")
    check_inputs(example_inputs, "fold_norms")
    model = unwrap(model)
    try:
        whole = copied(model, torch.clone).eval()
        strip(whole)
        with without_tf32():
            expected = floating(call(whole, example_inputs))
        own = own_norms(whole, example_inputs)
    except (NotCopied, PassFailed) as error:
        raise ValueError(
            f"the model cannot be copied and run on example_inputs: {error}. Pass inputs that the model "
            "takes, for example one batch of your loader, x[:1]."
        ) from error
    modules = dict(whole.named_modules())
    norms = {name: norm for name, norm in modules.items() if isinstance(norm, BatchNorm)}
    pairs = {behind[0]: name for name, behind in own.items() if len(behind) == 1}
    reasons = {name: _unfoldable(norm, modules.get(pairs.get(name, "?"))) for name, norm in norms.items()}
    left = {name: reason for name, reason in reasons.items() if reason}
    wished = {name: pairs[name] for name in norms if name not in left}
    folded = _confirmed(whole, wished, example_inputs)
    left |= {norm: "forward passes did not confirm it" for norm in wished if norm not in folded}
    _fold(whole, folded)
    with without_tf32():
        found = floating(call(whole, example_inputs))
    for conv in folded.values():
        whole.get_submodule(conv)._regrow_folded = True  # type: ignore[assignment]
    record = {
        "version": _VERSION,
        "folded": folded,
        "left": left,
        "difference": max(map(difference, expected, found), default=0.0),
    }
    return whole, record


def _unfoldable(norm: Any, conv: nn.Module | None) -> str:
    """Return why ``norm`` cannot be folded into ``conv``, whose output only ``norm`` reads; "" if it can."""
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
    """Return the ``pairs`` (norm → convolution) whose fold leaves the input of every layer the same."""
    # Try the folds on a copy with random statistics.
    for dtype in (torch.float64, torch.float32):
        probe, inputs = copied_as(model, dtype), noise_like(inputs_as(example_inputs, dtype), 1)
        with torch.no_grad():
            unsettle(probe, torch.Generator().manual_seed(0))
        try:
            expected = see(probe, inputs)
        except PassFailed as error:  # the model's code fixes another precision
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
    """Fold each norm into its convolution, in place. Raise ``Refuted`` if that would change their result."""
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
                raise Refuted(f"{name!r} shifts channels that {of!r} does not compute")
            scale, shift = scale[at], shift[at]
        weight, bias, trains = conv.weight, conv.bias, conv.weight.requires_grad
        if len(scale) != filter_count(conv, weight):
            raise Refuted(f"{name!r} has other channels than {of!r} has filters")
        shift = shift if bias is None else shift + bias.double() * scale
        scaled = weight.to(torch.float64, copy=True)
        parts = grouped(conv, scaled)
        parts *= scale.view(*parts.shape[:2], *[1] * (parts.dim() - 2))
        scaled = scaled.to(weight)
        layout = torch.contiguous_format
        if weight.dim() == 4 and not weight.is_contiguous():
            layout = torch.channels_last
        conv.weight = nn.Parameter(scaled.contiguous(memory_format=layout), requires_grad=trains)
        conv.bias = nn.Parameter(shift.to(weight), requires_grad=trains)
        replacements[norm] = _stand_in(norm)
    replace_modules(model, replacements)


def _stand_in(norm: Any) -> nn.Module:
    """Return the module that replaces a folded norm: its child modules, then the placing of its channels."""
    # timm's norms, for example, hold the dropout and the activation behind them as children.
    steps = [step for step in norm.children() if not isinstance(step, nn.Identity)]
    if isinstance(norm, Small) and (place := placing(norm)) is not None:
        steps = [*steps, place]
    if not steps:
        return nn.Identity()
    return steps[0] if len(steps) == 1 else nn.Sequential(*steps)
