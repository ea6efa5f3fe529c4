"""How far the outputs of two forms of a network are apart."""

from __future__ import annotations

import torch
from torch import Tensor


def difference(expected: Tensor, found: Tensor) -> float:
    """The largest change of a number, as a share of the largest finite number in ``expected``.

    Equal infinite numbers differ by 0. The result is NaN where either tensor holds one, and infinite where
    numbers differ from ``expected`` that are all 0.
    """
    wide = torch.complex128 if expected.is_complex() else torch.float64
    ours, theirs = expected.detach().cpu().to(wide), found.detach().cpu().to(wide)
    if not ours.numel():
        return 0.0
    apart = float(torch.where(ours == theirs, 0.0, (ours - theirs).abs()).max())
    sizes = ours.abs()
    largest = float(sizes.where(sizes.isfinite(), 0.0).max())
    if largest:
        return apart / largest
    return float("inf") if apart > 0 else apart
