"""Load real data by name, and split it for training, validation and test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from regrow.study.folders import image_folder
from regrow.study.images import Images, Source, shrunk
from regrow.study.names import DATA_NAMES
from regrow.study.sources import DataNotFound, cifar, default_folder, digits, fashion_mnist
from regrow.study.splits import channel_statistics, noisy_labels, stratified_split
from regrow.suggest import nearest

__all__ = ["DataNotFound", "Images", "Splits", "load_data"]


@dataclass(frozen=True)
class Splits:
    """A data set ready for a run.

    ``mean`` and ``std``: of each channel of ``train``, in 0..1 units. ``second``: the other data set of a run
    that alternates between two; None for other runs.
    """

    train: Images
    validation: Images
    test: Images
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    second: Splits | None = None

    @property
    def channels(self) -> int:
        return self.train.pixels.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.train.pixels.shape[2], self.train.pixels.shape[3]


def load_data(
    name: str,
    *,
    data_dir: Path | None = None,
    split_seed: int = 0,
    train_size: int | None = None,
    label_noise: float = 0.0,
    image_size: int | None = None,
) -> Splits:
    """Load a data set and split it; the same arguments give the same splits.

    ``digits``, and a ``folder`` without parts, are split 60/20/20. Otherwise the official test set is
    ``test``, and a tenth of the official training set is ``validation`` unless the folder has its own.
    All splits are stratified by class.

    Args:
        name: one of ``DATA_NAMES``.
        data_dir: the folder of the data, or to download it to (default: ``$REGROW_DATA``, else ``./data``);
            for ``folder`` the folder itself. ``digits`` come with scikit-learn and need none.
        split_seed: fixes splits, subset and label noise.
        train_size: keep this many pictures of ``train``, classes in proportion; smaller subsets are
            contained in larger ones. Default: all.
        label_noise: share of the training labels, in [0, 1), replaced by another class.
        image_size: side in pixels. ``folder`` needs one; the pictures of the others are square and are
            made smaller by averaging over areas.

    Raises:
        DataNotFound: the data is not there and cannot be downloaded (a ValueError).
        ValueError: an unknown name, a bad value, or damaged data.
    """
    if name not in DATA_NAMES:
        raise ValueError(f"unknown data {name!r}{nearest(name, DATA_NAMES)}")
    if split_seed < 0:
        raise ValueError(f"split_seed must be 0 or more, not {split_seed}.")
    if not 0 <= label_noise < 1:
        raise ValueError(f"label_noise is a share, 0 or more and below 1, not {label_noise}.")
    if train_size is not None and train_size < 1:
        raise ValueError(f"train_size must be 1 or more, not {train_size}.")
    source = _source(name, data_dir, image_size)
    train, validation, test = _split(source, split_seed)
    if train_size is not None:
        if train_size > len(train):
            raise ValueError(f"train_size {train_size} is too large: {len(train)} pictures are available.")
        train = Images(train.pixels[:train_size].clone(), train.labels[:train_size].clone())
    mean, std = channel_statistics(train.pixels)
    labels = noisy_labels(train.labels, label_noise, len(source.classes), split_seed)
    return Splits(Images(train.pixels, labels), validation, test, source.classes, mean, std)


def _source(name: str, data_dir: Path | None, image_size: int | None) -> Source:
    if name == "folder":
        if data_dir is None:
            raise ValueError("data 'folder' needs the folder of the pictures: pass --data-dir FOLDER.")
        if image_size is None or image_size < 1:
            raise ValueError("data 'folder' needs the side of its pictures: pass --image-size 64, say.")
        return image_folder(Path(data_dir), image_size)
    folder = default_folder() if data_dir is None else Path(data_dir)
    if name == "digits":
        source = digits()
    else:
        source = fashion_mnist(folder) if name == "fashion-mnist" else cifar(name, folder)
    side = source.train.pixels.shape[2]
    if image_size is None or image_size == side:
        return source
    if not 0 < image_size < side:
        raise ValueError(
            f"pictures of {name} are {side} pixels a side: image_size makes them smaller, 1 to {side}, not "
            f"{image_size}."
        )

    def small(images: Images | None) -> Images | None:
        return None if images is None else shrunk(images, image_size)

    return Source(
        shrunk(source.train, image_size), source.classes, small(source.validation), small(source.test)
    )


def _split(source: Source, seed: int) -> tuple[Images, Images, Images]:
    """Train, validation, test. Train is in stratified order: any first part of it is a stratified subset."""
    train, validation, test = source.train, source.validation, source.test
    share = 0.2 if test is None else 0.1
    part = max(1, round(share * len(train)))
    if test is None:
        *held, rest = stratified_split(train.labels, [part, part], seed)
        return train.take(rest), train.take(held[1]), train.take(held[0])
    held_out = [part] if validation is None else []
    *held, rest = stratified_split(train.labels, held_out, seed)
    return train.take(rest), train.take(held[0]) if validation is None else validation, test
