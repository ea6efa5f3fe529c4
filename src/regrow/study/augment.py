"""Augmentations of a batch, as functions of the pictures and of what was drawn for each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_sides


def padding(size: tuple[int, int]) -> int:
    """Pixels a picture of ``size`` (height, width) is shifted at most: an eighth of a side, at least 1."""
    return max(1, min(size) // 8)


def shift(pictures: Tensor, rows: Tensor, columns: Tensor, pad: int) -> Tensor:
    """Crop each picture out of itself with ``pad`` black pixels around, at its own offset.

    Args:
        pictures: [n, channels, height, width].
        rows: int64 [n], first row of the crop in 0..2·pad; ``pad`` leaves the picture where it is.
        columns: int64 [n], the first column, likewise.
        pad: in pixels.

    Returns:
        A new tensor of the shape of ``pictures``.
    """
    height, width = pictures.shape[2:]
    # A view [n, channels, 2·pad+1, 2·pad+1, height, width] of all crops: one gather takes each its own.
    crops = pad_sides(pictures, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
    return crops[torch.arange(len(pictures), device=pictures.device), :, rows, columns]


def flip(pictures: Tensor, chosen: Tensor) -> Tensor:
    """Mirror left and right the pictures [n, channels, height, width] where ``chosen`` (bool [n])."""
    return torch.where(chosen.view(-1, 1, 1, 1), pictures.flip(-1), pictures)
