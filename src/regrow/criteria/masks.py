"""Masks of ``torch.nn.utils.prune`` → keep masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regrow.callers import warn
from regrow.filters import convolutions
from regrow.given import check_module
from regrow.modules import filters_first
from regrow.torch_private import own_buffers, own_parameters


@torch.no_grad()
def keep_of_masks(model: nn.Module) -> dict[str, Tensor]:
    """The filters that masks of ``torch.nn.utils.prune`` leave: False for those that emit exactly 0.

    A filter goes if all of its weights are masked, and its bias is masked, 0 or absent: only then does the
    layer compute the same without it. Call this before ``torch.nn.utils.prune.remove``, which forgets the
    masks, and cut after it. Masks on other layers, and single weights, say nothing about filters.

    Args:
        model: any module with masks on its convolutions; wrappers are looked through. It is only read.

    Returns:
        {qualified name: BoolTensor[filters]} of the convolutions that lose filters, True = alive.

    Raises:
        ValueError: no filter goes, or a layer would lose all of them.

    Warns:
        UserWarning: filters of a layer have no weight left, and still emit their bias. They are kept.
    """
    check_module(model, "keep_of_masks")
    keep, masked = {}, False
    for name, conv in convolutions(model).items():
        mask = own_buffers(conv).get("weight_mask")
        if mask is None or "weight_orig" not in own_parameters(conv):
            continue
        masked = True
        gone = ~filters_first(conv, mask.bool()).flatten(1).any(1)
        bias = _bias(conv)
        loud = gone & (bias != 0) if bias is not None else gone & False
        if loud.any():
            warn(
                f"{int(loud.sum())} filters of {name!r} have all of their weights masked, but not their "
                "biases, which they still emit: they are kept. To cut them, mask the biases first: "
                "torch.nn.utils.prune.custom_from_mask(layer, 'bias', layer.weight_mask.flatten(1).any(1))."
            )
        if (gone & ~loud).all():
            raise ValueError(f"all {len(gone)} filters of {name!r} are masked: leave at least one.")
        if (gone & ~loud).any():
            keep[name] = (~gone | loud).cpu()
    if not keep:
        raise ValueError(
            "no filter has all of its weights and its bias masked, and only whole filters can be cut: "
            "torch.nn.utils.prune.ln_structured(layer, 'weight', amount, n=2, dim=0) masks whole filters."
            if masked
            else "no convolution has a mask of torch.nn.utils.prune on its weight. prune.remove forgets the "
            "masks: call keep_of_masks before it."
        )
    return keep


def _bias(conv: nn.Module) -> Tensor | None:
    """The bias that ``conv`` computes with, without the hook that sets it before a pass."""
    own = own_parameters(conv)
    if "bias_orig" not in own:
        return own.get("bias")
    bias: Tensor = own["bias_orig"] * own_buffers(conv)["bias_mask"]
    return bias
