"""What is particular about Ultralytics' networks: the head, pictures, and norms that are folded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regrow.marks import is_placed


def head_of(net: nn.Module) -> str:
    """The qualified name of the last of the network's parts, which detects.

    Raises:
        ValueError: this is no network of Ultralytics.
    """
    parts = getattr(net, "model", None)
    if not isinstance(parts, nn.Sequential) or not len(parts):
        raise ValueError(f"a network of Ultralytics has parts in .model, and {type(net).__name__} has not.")
    return f"model.{len(parts) - 1}"


def pictures_like(net: nn.Module, size: int) -> Tensor:
    """One picture of noise as ``net`` takes it; PyTorch's own generators do not move."""
    first = next(each for each in net.modules() if isinstance(each, nn.Conv2d))
    picture = torch.rand(1, first.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    return picture.to(first.weight.device)


def keep_placed_norms(net: nn.Module) -> None:
    """Keep Ultralytics from folding norms whose channels do not lie as those of their convolution do.

    Its ``fuse()`` takes away ``.bn``, and with it where a cut norm puts its channels. Here such a norm
    becomes a part of ``.conv``, and the block is one whose norm has gone, as ``fuse()`` leaves it.
    """
    blocks: list[Any] = [block for block in net.modules() if hasattr(block, "forward_fuse")]
    for block in blocks:
        conv, norm = getattr(block, "conv", None), getattr(block, "bn", None)
        if conv is not None and norm is not None and (is_placed(conv) or is_placed(norm)):
            block.conv = nn.Sequential(conv, norm)
            del block.bn
            block.forward = block.forward_fuse
