"""Load trained networks, with the pictures that go with them: of a run, by name, or by a function."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from regrow.log import first_line
from regrow.looking.calls import PassFailed, call
from regrow.reading import check_plain
from regrow.shipping.stored import CHECKSUM, check_stored, checksum
from regrow.short import line, said
from regrow.study import records
from regrow.study.building import build, device_of, load_splits
from regrow.study.config import RunConfig, make_config
from regrow.study.data import Images, Splits, load_data
from regrow.study.feeding import Batches, labelled_batches
from regrow.study.libraries import LibraryModel, library_model
from regrow.study.models import model_channels
from regrow.study.names import MODEL_FAMILIES
from regrow.study.own_network import own_network
from regrow.study.tasks import task_splits

_BATCH = 500
_SIDE = 224


class Loader:
    """Pictures in evaluation batches, which can be iterated over any number of times."""

    def __init__(self, images: Images, **feed: Any) -> None:
        self._batches = Batches(images, batch_size=_BATCH, shuffle=False, **feed)
        self._pictures = len(images)

    def __len__(self) -> int:
        """The number of pictures (not of batches)."""
        return self._pictures

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._batches.epoch(0)


@dataclass(frozen=True)
class Trained:
    """A trained network, on its device.

    Attributes:
        example: a batch of one picture, all zeros.
        calibration: training pictures without augmentation and labels; None without data.
        labelled: the calibration pictures with their labels; None as ``validation``.
        validation, test: pictures with labels; None without data, or if the network has another number of
            classes.
        unjudged: empty, or why there is no ``validation``.
        source: where the network comes from, JSON-able.
        seed: the seed of its run; 0 for a network by name.
    """

    model: nn.Module
    example: Tensor
    calibration: list[Tensor] | None
    validation: Loader | None
    test: Loader | None
    source: dict[str, Any]
    seed: int
    unjudged: str = ""
    labelled: list[tuple[Tensor, Tensor]] | None = None


def as_trained(folder: Path, config: RunConfig) -> Trained:
    """Load the network of the finished run in ``folder`` on the run's device or, without that one, another.

    PyTorch takes as many threads as the run did. Raises the errors of ``from_run``.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        device = device_of(config.device)
    except ValueError:  # the run was trained on another machine
        device = device_of("auto")
    return from_run(folder, device=str(device))


def from_run(folder: Path, *, device: str | None = None, data_dir: str | None = None) -> Trained:
    """Load the network of a finished run.

    Args:
        folder: the run folder.
        device, data_dir: to use instead of the run's own.

    Raises:
        ValueError: ``folder`` is not that of a finished run, its weights are missing or do not fit, or its
            data is missing.
    """
    model, config, splits = network_of_run(folder, data_dir)
    source = {"run": str(folder), "weights": records.weights_hash(folder), "data": config.data}
    place = device_of(device or config.device)
    channels = model_channels(config.model, splits.channels)
    return _with_data(model, splits, splits.mean, splits.std, channels, place, source, config.seed)


def network_of_run(folder: Path, data_dir: str | None = None) -> tuple[nn.Module, RunConfig, Splits]:
    """The network of a finished run on the CPU, the settings of the run, and its pictures.

    Raises the errors of ``from_run``.
    """
    run = records.read_run(folder)
    if run.result is None:
        raise ValueError(f"{folder} holds an unfinished run, which has no final weights: finish it first.")
    changed = {} if data_dir is None else {"data_dir": data_dir}
    config = make_config({**run.config, **changed})
    splits = task_splits(load_splits(config), config, config.tasks)
    with torch.random.fork_rng(devices=[]):  # it draws first weights, which are replaced
        model = build(config, splits)
    load_weights(model, records.weights_path(folder))
    return model, config, splits


def load_weights(model: nn.Module, weights: Path) -> None:
    """Load the file ``weights`` of a run into the run's ``model``.

    Raises:
        ValueError: the file is missing or damaged, or does not fit; ``model`` is not changed.
    """
    try:
        check_plain(weights, os.stat(weights))
        with safe_open(weights, framework="pt") as file:
            there = (file.metadata() or {}).get(CHECKSUM)  # runs of earlier versions have none
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        check_stored(model.state_dict(), tensors)
        if there not in (None, checksum(None, tensors)):
            raise ValueError("it is damaged: its checksum is not that of what it holds")
    except FileNotFoundError:
        raise ValueError(f"{weights} is missing: train the run again with --rerun.") from None
    except OSError as error:
        raise said(error, weights, "read") from None
    except (ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{line(weights)} does not fit the network of its config.yaml: {line(error)}"
        ) from None
    model.load_state_dict(tensors)


def by_name(
    name: str,
    *,
    weights: str = "default",
    data: str | None = None,
    data_dir: str | None = None,
    image_size: int | None = None,
    device: str | None = None,
) -> Trained:
    """Load a network of torchvision or timm with its published weights.

    Args:
        name: as ``build_model`` takes it, but not one of regrow's own families.
        weights: ``default`` (the library's best), a name of the library's (torchvision: IMAGENET1K_V1, timm:
            the tag behind the dot), or ``none`` for random ones.
        data: pictures for calibration and for measuring accuracy, normalised as the weights need it; None
            for no pictures. If the network has another number of classes, they are for calibration only.
        data_dir, image_size: as ``load_data`` takes them; without data, ``image_size`` is the side of
            the pictures (default: the one of the weights).
        device: where to put the network (default: a GPU if there is one, else the CPU).

    Raises:
        ValueError: an unknown name, weights that are unknown or cannot be downloaded, or missing data.
    """
    if name in MODEL_FAMILIES:
        raise ValueError(f"{name} has no published weights: train one, and give its run folder.")
    found = library_model(name, weights)
    place = device_of(device or "auto")
    source = {"model": name, "weights": weights, "data": data}
    return _with_pictures(found, 3, source, place, data_dir, image_size)


def by_function(
    name: str,
    *,
    weights: str | None = None,
    data: str | None = None,
    data_dir: str | None = None,
    image_size: int | None = None,
    device: str | None = None,
) -> Trained:
    """Make a network by a function of the user's own, and load its weights.

    Args:
        name, weights: as ``own_network`` takes them.
        data, data_dir, image_size, device: as ``by_name`` takes them. The pictures are normalised as those of
            a run: by mean and standard deviation of each channel of the training pictures.

    Raises:
        ValueError: as ``own_network``; missing data.
    """
    model = own_network(name, weights)
    source = {"function": name, "weights": weights, "data": data}
    found = LibraryModel(model, None, None, None)
    place = device_of(device or "auto")
    return _with_pictures(found, _channels_read(model), source, place, data_dir, image_size)


def _channels_read(model: nn.Module) -> int | None:
    """How many channels the first convolution for pictures reads; None if there is none."""
    return next((layer.in_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)


def _with_pictures(
    found: LibraryModel,
    channels: int | None,
    source: dict[str, Any],
    device: torch.device,
    data_dir: str | None,
    image_size: int | None,
) -> Trained:
    """The network with the pictures that ``source`` names as "data", or without.

    Args:
        channels: that the network reads; None for those of the pictures.
    """
    if source["data"] is None:
        side = image_size or found.side or _SIDE
        example = torch.zeros(1, channels or 3, side, side, device=device)
        model = found.model.to(device).eval()
        _scores(model, example, "pass another --image-size, or --data, or call regrow.prune in Python")
        return Trained(model, example, None, None, None, source, 0, "there are no pictures")
    splits = load_data(source["data"], data_dir=Path(data_dir) if data_dir else None, image_size=image_size)
    mean, std = found.mean or splits.mean, found.std or splits.std
    if splits.channels == 1 and len(mean) > 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    if channels is None or splits.channels > 1:
        channels = splits.channels
    return _with_data(found.model, splits, mean, std, channels, device, source, 0)


def _scores(model: nn.Module, example: Tensor, hint: str) -> Any:
    """What ``model`` returns for ``example``. ``ValueError`` with ``hint`` if its pass fails."""
    try:
        with torch.no_grad():
            return call(model, example)
    except PassFailed as error:
        channels, height, width = example.shape[1:]
        cause = error.__cause__
        reason = f"{type(cause).__name__}: {first_line(cause)}" if cause else first_line(error)
        raise ValueError(
            f"the network does not take pictures of {height}×{width} with {channels} "
            f"channel{'' if channels == 1 else 's'} ({reason.rstrip('.')}): {hint}."
        ) from cause


def _with_data(
    model: nn.Module,
    splits: Splits,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    channels: int,
    device: torch.device,
    source: dict[str, Any],
    seed: int,
) -> Trained:
    model = model.to(device).eval()
    feed: dict[str, Any] = {"mean": mean, "std": std, "device": device, "channels": channels}
    example = torch.zeros(1, channels, *splits.size, device=device)
    scores = _scores(model, example, "if it takes other inputs, call regrow.prune in Python")
    classes = scores.shape[1] if isinstance(scores, Tensor) and scores.dim() == 2 else None
    judged, known = classes == len(splits.classes), len(splits.classes)
    unjudged = "" if judged else f"the network tells {classes} classes apart, and the pictures have {known}"
    if classes is None:
        unjudged = "the network does not return one score for each class of a picture"
    labelled = labelled_batches(splits.train, **feed)
    return Trained(
        model,
        example,
        [pictures for pictures, _ in labelled],
        Loader(splits.validation, **feed) if judged else None,
        Loader(splits.test, **feed) if judged else None,
        source,
        seed,
        unjudged,
        labelled if judged else None,
    )
