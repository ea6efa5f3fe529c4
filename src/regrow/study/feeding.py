"""Make normalised batches of pictures in memory; seed and epoch fix their order and augmentation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regrow.study.augment import flip, padding, shift
from regrow.study.images import Images
from regrow.study.names import AUGMENTATIONS
from regrow.suggest import nearest

_PIXELS_AT_ONCE = 2**21  # 8 MiB as float32, about the cache of a CPU
_PIXELS_AT_ONCE_ON_GPU = 2**24
_CALIBRATION = 512
# Of a GPU's free memory: the pictures of validation and test, other runs and the training itself need theirs.
_MOST_OF_MEMORY = 1 / 4


class Batches:
    """The batches of each epoch: float32 [batch, channels, height, width] and labels int64 [batch].

    The batches of epoch e depend on ``seed`` and e alone, and their order does not depend on the
    augmentation; the global random generators are neither read nor changed. A last batch of a single
    picture is left out when shuffling, because batch norm cannot train on one.

    Args:
        images: all of them are moved to ``device``, unless it is a GPU and they take more than a quarter of
            its free memory: then those of a few batches at a time are.
        batch_size: the last batch may be smaller.
        mean: of each channel of ``images``, in 0..1 units; it is subtracted.
        std: of each channel likewise; the pictures are divided by it.
        augmentation: ``none``, ``shift`` (a crop after zero padding by ``augment.padding``), ``flip``
            (left and right, half of the pictures) or ``shift-flip``. Padding is black before
            normalisation.
        seed: 0 or more.
        shuffle: False keeps the order of ``images``, for evaluation.
        device: where the batches are made.
        channels: 3 repeats the channel of grey pictures. Default: the channels of ``images``.
        rank, ranks: this process is number ``rank``, from 0, of ``ranks`` processes. It gets its part of
            every batch: pictures that follow each other in the order of a single process. The sizes of
            the parts differ by one at most, and ``batch_size`` is the size of all parts together. When
            shuffling, a last batch with fewer than two pictures per process is left out; without
            shuffling, parts may be empty.

    Raises:
        ValueError: a bad value, no pictures, or too few for every process.
    """

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: str = "none",
        seed: int = 0,
        shuffle: bool = True,
        device: torch.device | str = "cpu",
        channels: int | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        own = images.pixels.shape[1]
        if len(images) == 0:
            raise ValueError("there are no pictures to make batches of.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, not {batch_size}.")
        if len(mean) != own or len(std) != own or min(std) <= 0:
            raise ValueError(
                f"mean and std need one number for each of the {own} channels, std above 0, not "
                f"{tuple(mean)} and {tuple(std)}."
            )
        if augmentation not in AUGMENTATIONS:
            raise ValueError(f"unknown augmentation {augmentation!r}{nearest(augmentation, AUGMENTATIONS)}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, not {seed}.")
        if channels not in (None, own) and own != 1:
            raise ValueError(f"only grey pictures can be repeated to {channels} channels; these have {own}.")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank must be from 0 to {ranks - 1}, not {rank}.")
        if shuffle and ranks > 1 and min(batch_size, len(images)) < 2 * ranks:
            raise ValueError(
                f"{ranks} processes need two pictures each in a batch, {2 * ranks} in all: batch_size is "
                f"{batch_size}, and there are {len(images)} pictures."
            )
        self.device = torch.device(device)
        home = _home(self.device, images.pixels.nbytes)
        self.pixels = images.pixels.to(home)
        self.labels = images.labels.to(home)
        self.batch_size = batch_size
        self.augmentation = augmentation
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.ranks = ranks
        self.channels = own if channels is None else channels
        self._mean = torch.tensor(mean, device=device).mul(255).view(1, -1, 1, 1)
        self._scale = torch.tensor(std, device=device).mul(255).reciprocal().view(1, -1, 1, 1)

    def __len__(self) -> int:
        """Batches per epoch."""
        if self.shuffle:
            return batch_count(len(self.labels), self.batch_size, self.ranks)
        return math.ceil(len(self.labels) / self.batch_size)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch ``number``, counted from 0.

        Raises:
            ValueError: a negative number.
        """
        if number < 0:
            raise ValueError(f"epochs are counted from 0: there is no epoch {number}.")
        return self._batches(number)

    def _batches(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        count, home = len(self.labels), self.labels.device
        # PyTorch's CPU generator reads 32 bits of a seed: mix both numbers into these.
        mixed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(mixed)
        order = torch.randperm(count, generator=generator).to(home) if self.shuffle else None
        pad = padding((self.pixels.shape[2], self.pixels.shape[3]))
        offsets = torch.randint(2 * pad + 1, (2, count), generator=generator).to(home)
        mirrored = torch.randint(2, (count,), generator=generator).bool().to(home)
        # Several small batches are made at once and handed out in pieces, because for 8×8 pictures the calls
        # cost more than the arithmetic (4.7 % of an epoch one by one, 1.2 % together).
        at_once = _PIXELS_AT_ONCE_ON_GPU if self.device.type == "cuda" else _PIXELS_AT_ONCE
        together = max(1, at_once // (self.batch_size * self.pixels[0].numel()))
        end = min(len(self) * self.batch_size, count)
        for start in range(0, end, together * self.batch_size):
            parts = [
                self.part(first, min(first + self.batch_size, end))
                for first in range(start, min(start + together * self.batch_size, end), self.batch_size)
            ]
            here: slice | Tensor = slice(parts[0].start, parts[-1].stop)
            if self.ranks > 1:
                here = torch.cat([torch.arange(part.start, part.stop) for part in parts]).to(home)
            chosen = here if order is None else order[here]
            taken = self.pixels[chosen], offsets[:, here], mirrored[here], self.labels[chosen]
            pixels, shifts, flips, labels = (each.to(self.device) for each in taken)
            pictures = self._prepared(pixels, shifts, flips, pad)
            sizes = [part.stop - part.start for part in parts]
            yield from zip(pictures.split(sizes), labels.split(sizes), strict=True)

    def part(self, start: int, stop: int) -> slice:
        """This process's part of the batch of pictures ``start`` to ``stop`` in the order of an epoch."""
        count = stop - start
        bounds = (start + count * rank // self.ranks for rank in (self.rank, self.rank + 1))
        return slice(*bounds)

    def size_of(self, number: int) -> int:
        """How many pictures batch ``number`` (from 0) of an epoch has, over all processes."""
        return min(self.batch_size, len(self.labels) - number * self.batch_size)

    def _prepared(self, pictures: Tensor, offsets: Tensor, mirrored: Tensor, pad: int) -> Tensor:
        if "shift" in self.augmentation:
            pictures = shift(pictures, offsets[0], offsets[1], pad)
        if "flip" in self.augmentation:
            pictures = flip(pictures, mirrored)
        # The pixels are bytes up to here, which take a quarter of the memory of floats.
        batch = pictures.float().sub_(self._mean).mul_(self._scale)
        return batch.expand(-1, self.channels, -1, -1).contiguous()


def batch_count(pictures: int, batch_size: int, ranks: int = 1) -> int:
    """How many batches a shuffled epoch over so many pictures has, for ``ranks`` processes."""
    whole, left = divmod(pictures, batch_size)
    dropped = whole > 0 and left < 2 * ranks
    return whole + (left > 0 and not dropped)


def _home(device: torch.device, size: int) -> torch.device:
    """Where pictures of ``size`` bytes lie from which batches are made on ``device``."""
    if device.type == "cuda" and size > _MOST_OF_MEMORY * torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device


def calibration_batches(images: Images, **settings: Any) -> list[Tensor]:
    """The pictures of ``labelled_batches``, to take statistics from."""
    return [pictures for pictures, _ in labelled_batches(images, **settings)]


def labelled_batches(images: Images, **settings: Any) -> list[tuple[Tensor, Tensor]]:
    """The first 512 of ``images`` and their labels in batches of 128 to 255, without augmentation.

    In a training set from ``load_data`` they are a stratified part, the same for every run.

    Args:
        images: unaugmented; if there are fewer than 512, all are taken, and fewer than 128 make one batch.
        settings: ``mean``, ``std``, ``device`` and ``channels`` of ``Batches``.
    """
    first = Images(images.pixels[:_CALIBRATION], images.labels[:_CALIBRATION])
    # No small batch at the end: a batch norm cannot take statistics from one picture.
    size = math.ceil(len(first) / max(1, len(first) // 128))
    return list(Batches(first, batch_size=size, shuffle=False, **settings).epoch(0))
