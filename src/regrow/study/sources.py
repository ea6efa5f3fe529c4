"""Find the named data sets: bundled, on disk, or downloaded."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from regrow.study.images import Images, Source

_MOST_BYTES = 2**30  # of an idx file; Fashion-MNIST's largest has 47 million
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

_FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


class DataNotFound(ValueError):
    """The data is not on this machine and could not be downloaded."""


def default_folder() -> Path:
    """The folder to look for data in and to download it to: ``$REGROW_DATA``, else ``./data``."""
    return Path(os.environ.get("REGROW_DATA") or "data")


def digits() -> Source:
    """The 1,797 digits of 8×8 pixels that come with scikit-learn, 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    return Source(Images(pixels, labels), tuple(str(name) for name in bunch.target_names))


def fashion_mnist(folder: Path) -> Source:
    """Fashion-MNIST from ``folder``, from Debian's package, or downloaded into ``folder``, in that order.

    In ``folder`` the four idx files, plain or .gz, may lie directly, in ``fashion-mnist``, or where
    torchvision puts them, ``FashionMNIST/raw``.

    Raises:
        DataNotFound: the files are in none of these places, and the download failed.
        ValueError: a file is damaged; the message names it.
    """
    places = [folder, folder / "fashion-mnist", folder / "FashionMNIST" / "raw", DEBIAN_FASHION_MNIST]
    found = _first_complete(places)
    if found is None:
        try:
            _fetch(folder, "FashionMNIST", _download_fashion_mnist)
            found = _first_complete(places)
        except (OSError, RuntimeError, HTTPException) as error:
            raise DataNotFound(
                f"Fashion-MNIST is in none of {', '.join(map(str, places))}, and its download failed "
                f"({_first_line(error)}). Get it with `apt-get install dataset-fashion-mnist`, or say where "
                "it is with --data-dir FOLDER, a folder with torchvision's files."
            ) from error
        if found is None:
            raise DataNotFound(
                f"{folder / 'FashionMNIST'} is incomplete: remove it, and it is downloaded again."
            )
    return Source(
        train=_idx_images(found["train-images-idx3-ubyte"], found["train-labels-idx1-ubyte"]),
        test=_idx_images(found["t10k-images-idx3-ubyte"], found["t10k-labels-idx1-ubyte"]),
        classes=_FASHION_CLASSES,
    )


def cifar(name: str, folder: Path) -> Source:
    """``cifar10`` or ``cifar100``, from ``folder`` in torchvision's layout, else downloaded into it.

    An archive in ``folder`` is unpacked. torchvision compares every file with the
    authors' checksum before it reads one.

    Raises:
        DataNotFound: the data is not there, and the download failed.
        ValueError: the data is damaged.
    """
    from torchvision import datasets

    kind: type[datasets.CIFAR10] = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    archive = folder / kind.filename
    if not (folder / kind.base_folder).is_dir():

        def get(into: Path) -> None:
            if archive.is_file():
                _unpack(archive, kind.tgz_md5, into)
            else:
                kind(into, download=True)

        try:
            _fetch(folder, kind.base_folder, get)
        except (OSError, RuntimeError, HTTPException) as error:
            raise DataNotFound(
                f"{name} is not in {folder}, and its download failed ({_first_line(error)}). Place "
                f"{kind.filename} there, or say where it is with --data-dir FOLDER."
            ) from error
    try:
        train, test = kind(folder, train=True), kind(folder, train=False)
    except RuntimeError as error:
        raise ValueError(
            f"{folder / kind.base_folder} is damaged or incomplete: remove it, and it is "
            f"unpacked from {archive} or downloaded again."
        ) from error
    return Source(
        train=_channels_last_images(train.data, train.targets),
        test=_channels_last_images(test.data, test.targets),
        classes=tuple(train.classes),
    )


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The bytes of an idx file (plain, or packed when the name ends in .gz) of that many dimensions.

    The format: two zero bytes, the type (8: unsigned byte), the number of dimensions, each size as
    a big-endian 32-bit number, then the values.

    Raises:
        ValueError: the file is cut short, too long, or another kind of file; the message names it.
    """
    start = 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(start)
            if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < start:
                raise ValueError(
                    f"{path} is not an idx file of bytes in {dimensions} dimensions: fetch it again."
                )
            sizes = [int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4)]
            expected = start + math.prod(sizes)
            if expected > _MOST_BYTES:  # before the memory is taken: a packed file may be small
                raise ValueError(f"{path} says that it holds {sizes} numbers: it is damaged, fetch it again.")
            content += file.read(expected - start)
            more = len(file.read(1))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): fetch it again.") from error
    if len(content) < expected or more:
        held = f"more than {expected}" if more else f"{len(content)}"
        raise ValueError(f"{path} has {held} bytes in place of {expected}: fetch it again.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes).copy()


def _first_complete(places: list[Path]) -> dict[str, Path] | None:
    """The first place that has all four files, plain or packed: {plain name: path}."""
    for place in places:
        found: dict[str, Path] = {}
        for part in ("train", "t10k"):
            for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
                for path in (place / name, place / f"{name}.gz"):
                    if path.is_file():
                        found.setdefault(name, path)
        if len(found) == 4:
            return found
    return None


def _idx_images(pictures: Path, labels: Path) -> Images:
    pixels, targets = read_idx(pictures, 3), read_idx(labels, 1)
    if len(pixels) != len(targets):
        raise ValueError(f"{pictures} has {len(pixels)} pictures, but {labels} has {len(targets)} labels.")
    if not pixels.size:
        raise ValueError(f"{pictures} holds no picture: fetch it again.")
    if targets.max() >= len(_FASHION_CLASSES):
        raise ValueError(f"{labels} has the label {targets.max()}: Fashion-MNIST has 0 to 9.")
    return Images(torch.from_numpy(pixels).unsqueeze(1), torch.from_numpy(targets).to(torch.int64))


def _channels_last_images(pixels: NDArray[np.uint8], labels: list[int]) -> Images:
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))


def _download_fashion_mnist(into: Path) -> None:
    from torchvision.datasets import FashionMNIST

    FashionMNIST(into, download=True)


def _unpack(archive: Path, checksum: str, into: Path) -> None:
    from torchvision.datasets.utils import check_integrity, extract_archive

    if not check_integrity(archive, checksum):
        raise ValueError(f"{archive} is damaged or cut short: fetch it again, or remove it.")
    extract_archive(archive, into)


def _fetch(folder: Path, name: str, get: Callable[[Path], None]) -> None:
    """Let ``get`` fill a temporary folder, then move its ``name`` to ``folder``, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
        get(Path(temporary))
        try:
            os.replace(Path(temporary) / name, folder / name)
        except OSError:
            if not (folder / name).is_dir():  # if it is there, another process was first
                raise


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
