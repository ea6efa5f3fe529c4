"""Splitting, label noise and channel statistics: pure functions of the data and a seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# A second number beside the seed keeps the draws for different purposes apart.
_ORDER, _NOISE = 0, 1


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """A shuffled order of ``labels`` (int64 [n]) in which classes are spread evenly: int64 [n].

    Any stretch of it holds each class in proportion, to within one picture or so, because the pictures of
    a class are spaced as evenly as whole pictures allow (Sainte-Laguë's rule). So cutting it anywhere
    gives stratified parts, and a larger part from the start contains a smaller one.
    """
    shuffled = np.random.default_rng([seed, _ORDER]).permutation(len(labels))
    classes = labels.numpy()[shuffled]
    place = np.empty(len(classes))
    for each in np.unique(classes):
        (members,) = np.nonzero(classes == each)
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return torch.from_numpy(shuffled[np.argsort(place, kind="stable")])


def stratified_split(labels: Tensor, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Indices of one part for each of ``sizes``, then of the rest; ``seed`` fixes them.

    Raises:
        ValueError: the sizes leave no rest.
    """
    if sum(sizes) >= len(labels):
        raise ValueError(f"{len(labels)} pictures are too few: they must be more than {sum(sizes)}.")
    return list(stratified_order(labels, seed).split([*sizes, len(labels) - sum(sizes)]))


def noisy_labels(labels: Tensor, share: float, classes: int, seed: int) -> Tensor:
    """``labels`` (int64 [n]) with round(share · n) of them replaced by another class, uniformly.

    A larger share replaces the same labels and some more.

    Raises:
        ValueError: ``share`` is outside [0, 1), or there is no other class.
    """
    if not 0 <= share < 1:
        raise ValueError(f"label_noise is a share, 0 or more and below 1, not {share}.")
    if share > 0 and classes < 2:
        raise ValueError("label_noise needs at least two classes.")
    count = round(share * len(labels))
    generator = np.random.default_rng([seed, _NOISE])
    chosen = torch.from_numpy(generator.permutation(len(labels))[:count])
    noisy = labels.clone()
    if count:
        noisy[chosen] = (labels[chosen] + torch.from_numpy(generator.integers(1, classes, count))) % classes
    return noisy


def channel_statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of ``pixels`` (uint8 [n, channels, h, w]), in 0..1 units.

    A channel without variation gets the deviation 1, so that dividing by it is possible.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in pixels.unbind(1):
        # Counting the 256 values is exact, and needs no float copy of the whole split.
        weights = torch.bincount(channel.flatten(), minlength=256) / channel.numel()
        mean = (weights * values).sum()
        deviation = (weights * (values - mean) ** 2).sum().sqrt().item()
        means.append(mean.item())
        deviations.append(deviation if deviation > 1e-6 else 1.0)
    return tuple(means), tuple(deviations)
