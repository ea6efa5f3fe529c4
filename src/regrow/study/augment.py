"""Augmentations of a batch: functions of the pictures and of the random numbers drawn for each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_sides


def padding(size: tuple[int, int]) -> int:
    """The largest shift in pixels: an eighth of the shorter side of ``size`` (height, width), at least 1."""
    return max(1, min(size) // 8)


def shift(pictures: Tensor, rows: Tensor, columns: Tensor, pad: int) -> Tensor:
    """Put ``pad`` black pixels around each picture, then crop the picture's size at its own offset.

    Args:
        pictures: [n, channels, height, width].
        rows: int64 [n], first row of the crop in 0..2·pad; a value of ``pad`` leaves the picture where it is.
        columns: int64 [n], the first column, likewise.
        pad: in pixels.

    Returns:
        A new tensor of the shape of ``pictures``.
    """
    height, width = pictures.shape[2:]
    # A view [n, channels, 2·pad+1, 2·pad+1, height, width] of all crops: one gather picks one per picture.
    crops = pad_sides(pictures, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
    return crops[torch.arange(len(pictures), device=pictures.device), :, rows, columns]


def flip(pictures: Tensor, chosen: Tensor) -> Tensor:
    """Mirror left and right the pictures [n, channels, height, width] that ``chosen`` (bool [n]) marks."""
    return torch.where(chosen.view(-1, 1, 1, 1), pictures.flip(-1), pictures)
