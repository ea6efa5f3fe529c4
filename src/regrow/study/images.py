"""Pictures and their labels, held in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

# How many pictures are converted at once: as floats they take four times their memory.
_AT_ONCE = 4096


@dataclass(frozen=True)
class Images:
    """``pixels`` uint8 [n, channels, height, width] in 0..255, and ``labels`` int64 [n].

    Raises:
        ValueError: another shape or type, or not one label per picture.
    """

    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.dim() != 4:
            raise ValueError(
                "pixels must be uint8 [n, channels, height, width], not "
                f"{self.pixels.dtype} {list(self.pixels.shape)}."
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.pixels.shape[:1]:
            raise ValueError(
                f"labels must be int64 [{len(self.pixels)}], one for each picture, not "
                f"{self.labels.dtype} {list(self.labels.shape)}."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Images:
        """The pictures at ``indices`` (int64 [m]), in that order."""
        return Images(self.pixels[indices], self.labels[indices])


@dataclass(frozen=True)
class Source:
    """A data set as it is published; ``validation`` or ``test`` is None if it has no such part."""

    train: Images
    classes: tuple[str, ...]
    validation: Images | None = None
    test: Images | None = None


def shrunk(images: Images, side: int) -> Images:
    """``images`` made ``side`` × ``side`` pixels, each the mean over its area, rounded."""
    parts = [
        adaptive_avg_pool2d(pixels.float(), side).round_().to(torch.uint8)
        for pixels in images.pixels.split(_AT_ONCE)
    ]
    return Images(torch.cat(parts), images.labels)
