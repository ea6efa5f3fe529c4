"""The pictures and labels of each task, for a run whose data changes while it trains.

``task_splits`` is a pure function of the loaded data and the settings. The split seed has fixed the order of
the training pictures, of which a task takes a part; the run's seed fixes permutations, so that they differ
from seed to seed and are the same for every method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from regrow.study.config import RunConfig
from regrow.study.data import Splits
from regrow.study.images import Images, shrunk
from regrow.study.splits import channel_statistics, noisy_labels

# A second number beside the seed keeps these draws apart from those of ``splits``, 0 and 1.
_PERMUTATION, _CLASSES, _PIXELS = 2, 3, 4


def task_splits(splits: Splits, config: RunConfig, task: int) -> Splits:
    """The data of one task.

    Every task has the classes of ``splits``, so the network keeps its outputs. ``mean`` and ``std`` are those
    of the first task's training pictures in every task: somebody with a stream of pictures has nothing
    else when training begins, and numbers that changed later would move the inputs of a trained network.

    The tasks by ``config.regime``, of n training pictures and T tasks (validation and test as in ``splits``
    where nothing else is said):

    - ``same``: all pictures in every task.
    - ``permuted-labels``: from task 2 on, a random permutation of the classes renames the labels of training,
      validation and test alike; it differs from that of the task before.
    - ``permuted-pixels``: from task 2 on, a random permutation moves the pixels of all pictures, the same for
      every picture and channel of a task; labels stay.
    - ``growing-data``: task t trains on the first t·n/T pictures (rounded down), a stratified part that
      contains the parts of the tasks before.
    - ``corrected-labels``: the share ``label_noise`` of the training labels is wrong in tasks 1 to T/2
      (rounded down), and none is after that. Labels of validation and test are right throughout.
    - ``new-classes``: the classes, in a random order, make T equal groups. Task t trains, validates and
      tests on the pictures of group t alone; the network still chooses among all classes. A picture whose
      label ``label_noise`` has falsified belongs to the group of its wrong label.
    - ``new-pictures``: task t trains on the t-th of T disjoint stratified parts, of n/T pictures each
      (rounded down; the last few pictures are in no part).
    - ``new-domain``: odd tasks have the pictures of ``data``, even tasks those of ``second_data``.

    Args:
        splits: as ``building.load_splits`` loads them: with right labels for ``corrected-labels``, and with
            ``second`` for ``new-domain``.
        config: its ``regime``, ``tasks``, ``seed``, ``split_seed`` and ``label_noise`` are read.
        task: counted from 1.

    Raises:
        ValueError: there is no such task, or the data does not suit the regime.
    """
    if not 1 <= task <= config.tasks:
        raise ValueError(f"tasks are counted from 1 to {config.tasks}: there is no task {task}.")
    found, first = _task(splits, config, task), _task(splits, config, 1)
    mean, std = splits.mean, splits.std
    if first.train.pixels is not splits.train.pixels:
        mean, std = channel_statistics(first.train.pixels)
    if config.regime == "permuted-pixels" and task > 1:
        order = pixel_permutation(splits.size[0] * splits.size[1], config.seed, task)
        found = _each(found, lambda images: Images(_permuted(images.pixels, order), images.labels))
    return replace(found, mean=mean, std=std)


def train_sizes(splits: Splits, config: RunConfig) -> list[int]:
    """How many training pictures each task has."""
    return [len(_task(splits, config, task).train) for task in range(1, config.tasks + 1)]


def check_tasks(splits: Splits, config: RunConfig) -> None:
    """Raise ``ValueError`` unless each task of ``config`` has pictures of its classes to train and test on.

    A task needs at least as many training pictures as it has classes (and two), and at least one picture each
    for validation and test.
    """
    if config.tasks == 1:
        return
    classes = len(splits.classes) // (config.tasks if config.regime == "new-classes" else 1)
    for task in range(1, config.tasks + 1):
        found = _task(splits, config, task)
        for part, images, least in (
            ("training", found.train, max(2, classes)),
            ("validation", found.validation, 1),
            ("test", found.test, 1),
        ):
            if len(images) < least:
                raise ValueError(
                    f"task {task} of {config.tasks} (regime {config.regime!r}) has {len(images)} {part} "
                    f"pictures, and needs {least}: choose fewer tasks, or a larger train_size."
                )


def label_permutation(classes: int, seed: int, task: int) -> Tensor:
    """The new label of each class in ``task`` (from 1): int64 [classes]; task 1 keeps the labels.

    A permutation is drawn again where it is that of the task before, so the labels change at every switch.

    Raises:
        ValueError: there are fewer than two classes.
    """
    if classes < 2:
        raise ValueError(f"labels can be permuted among two classes or more, not {classes}.")
    current = np.arange(classes)
    for each in range(2, task + 1):
        generator = np.random.default_rng([seed, _PERMUTATION, each])
        before = current
        while (current == before).all():
            current = generator.permutation(classes)
    return torch.from_numpy(current)


def pixel_permutation(pixels: int, seed: int, task: int) -> Tensor:
    """The old place of the pixel at each place in ``task`` (from 1): int64 [pixels]; task 1 moves none."""
    if task == 1:
        return torch.arange(pixels)
    return torch.from_numpy(np.random.default_rng([seed, _PIXELS, task]).permutation(pixels))


def class_group(classes: int, seed: int, task: int, tasks: int) -> Tensor:
    """The classes of ``task`` (from 1), one of ``tasks`` equal groups, at random: int64 [classes / tasks].

    Raises:
        ValueError: the classes cannot be divided into equal groups.
    """
    if classes % tasks:
        fitting = [str(count) for count in range(2, classes + 1) if classes % count == 0]
        raise ValueError(
            f"{classes} classes do not make {tasks} equal groups: set tasks to {' or '.join(fitting)}."
        )
    order = np.random.default_rng([seed, _CLASSES]).permutation(classes)
    size = classes // tasks
    return torch.from_numpy(order[(task - 1) * size : task * size].copy())


def with_second(first: Splits, second: Splits) -> Splits:
    """``first`` with ``second`` as its second data set, both brought to one size and number of channels.

    The larger pictures shrink by averaging over areas; grey pictures repeat their channel where the others
    have colours. ``mean`` and ``std`` of both become those of the training pictures as they are then.

    Raises:
        ValueError: the data sets have different numbers of classes.
    """
    if len(first.classes) != len(second.classes):
        raise ValueError(
            f"the two data sets of regime 'new-domain' need as many classes: data has {len(first.classes)}, "
            f"and second_data has {len(second.classes)}."
        )
    side = min(*first.size, *second.size)
    channels = max(first.channels, second.channels)
    return replace(_fitted(first, side, channels), second=_fitted(second, side, channels))


def _fitted(splits: Splits, side: int, channels: int) -> Splits:
    if splits.size == (side, side) and splits.channels == channels:
        return splits

    def fit(images: Images) -> Images:
        small = images if splits.size == (side, side) else shrunk(images, side)
        return Images(small.pixels.expand(-1, channels, -1, -1).contiguous(), small.labels)

    fitted = _each(splits, fit)
    mean, std = channel_statistics(fitted.train.pixels)
    return replace(fitted, mean=mean, std=std)


def _task(splits: Splits, config: RunConfig, task: int) -> Splits:
    """The pictures and labels of ``task``, with any ``mean`` and ``std``, and all pixels in their places."""
    train, classes, tasks = splits.train, len(splits.classes), config.tasks
    match config.regime:
        case "same" | "permuted-pixels":
            return splits
        case "permuted-labels":
            new = label_permutation(classes, config.seed, task)
            return _each(splits, lambda images: Images(images.pixels, new[images.labels]))
        case "growing-data":
            return replace(splits, train=_part(train, 0, len(train) * task // tasks))
        case "corrected-labels":
            if task > tasks // 2:
                return splits
            labels = noisy_labels(train.labels, config.label_noise, classes, config.split_seed)
            return replace(splits, train=Images(train.pixels, labels))
        case "new-classes":
            group = class_group(classes, config.seed, task, tasks)
            return _each(
                splits, lambda images: images.take(torch.isin(images.labels, group).nonzero().squeeze(1))
            )
        case "new-pictures":
            size = len(train) // tasks
            return replace(splits, train=_part(train, (task - 1) * size, task * size))
        case "new-domain":
            if splits.second is None:
                raise ValueError(
                    "regime 'new-domain' needs the second data set: load the data with load_splits."
                )
            return replace(splits, second=None) if task % 2 else splits.second


def _each(splits: Splits, change: Callable[[Images], Images]) -> Splits:
    """``splits`` with all three parts changed."""
    train, validation, test = map(change, (splits.train, splits.validation, splits.test))
    return replace(splits, train=train, validation=validation, test=test)


def _permuted(pixels: Tensor, order: Tensor) -> Tensor:
    """``pixels`` [pictures, channels, height, width] with those of each picture in ``order``."""
    return pixels.flatten(2)[:, :, order].view_as(pixels)


def _part(images: Images, start: int, stop: int) -> Images:
    return Images(images.pixels[start:stop], images.labels[start:stop])
