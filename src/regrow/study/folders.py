"""Load a folder of pictures, one sub folder per class, as a data set in memory."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

from regrow.study.images import Images, Source
from regrow.study.pictures import Reached, entries, find_pictures, read_picture

_MOST_BYTES = 4 * 2**30
# Also in capitals: taken for classes, Train and Test would be labels.
_PARTS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


def image_folder(folder: Path, image_size: int) -> Source:
    """Read ``folder`` in torchvision's ImageFolder layout, every picture as RGB.

    If ``folder`` has sub folders train and test, and perhaps validation or val, in small letters or not,
    each of these has a sub folder per class; otherwise ``folder`` has these itself. The short side of a
    picture is resized to ``image_size`` pixels, and the middle square is cut out.

    Raises:
        ValueError: ``folder`` has another layout, parts with different classes, links that make pictures
            count twice, an unreadable picture, or more than 4 GiB of pixels.
    """
    reached: Reached = {}
    places = _parts(folder)
    parts = {name: find_pictures(path, reached) for name, path in places.items()}
    train = parts["train"]
    for name, part in parts.items():
        if part.keys() != train.keys():
            raise ValueError(
                f"{places[name]} has other classes than {places['train']}: "
                f"{', '.join(sorted(part.keys() ^ train.keys()))} must be in both."
            )
    pictures = sum(len(files) for part in parts.values() for files in part.values())
    needed = pictures * 3 * image_size**2
    if needed > _MOST_BYTES:
        raise ValueError(
            f"{pictures} pictures of {image_size}×{image_size} need {needed / 2**30:.1f} GiB of memory; "
            f"{_MOST_BYTES / 2**30:.0f} GiB is the most. Use a smaller image_size, or fewer pictures."
        )
    read = {name: _read(part, image_size) for name, part in parts.items()}
    return Source(
        train=read["train"],
        validation=read.get("validation"),
        test=read.get("test"),
        classes=tuple(train),
    )


def _parts(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder.")
    there: dict[str, Path] = {}
    for entry in entries(folder):
        name, path = _PARTS.get(entry.name.lower()), Path(entry.path)
        if name is None or not entry.is_dir():
            continue
        if name in there:
            raise ValueError(f"{there[name]} and {path} are the same part of the data: remove one of them.")
        there[name] = path
    if "train" in there and "test" in there:
        return there
    if any(path.name in _PARTS for path in there.values()):  # a Train may be a class, beside a Car
        missing = " and ".join(name for name in ("train", "test") if name not in there)
        raise ValueError(
            f"{folder} has {', '.join(path.name for path in there.values())} but not {missing}: add it, or "
            "give a folder with a sub folder per class, which is then split."
        )
    return {"train": folder}


def _read(classes: Mapping[str, Sequence[Path]], image_size: int) -> Images:
    from torchvision.transforms import v2

    fitted = v2.Compose([v2.Resize(image_size), v2.CenterCrop(image_size), v2.PILToTensor()])
    paths = [path for files in classes.values() for path in files]
    labels = [label for label, files in enumerate(classes.values()) for _ in files]
    pixels = torch.empty(len(paths), 3, image_size, image_size, dtype=torch.uint8)

    def read(index: int) -> None:
        pixels[index] = fitted(read_picture(paths[index]))

    # Around the threads, which share the filters of warnings.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # they do not say which file
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for _ in pool.map(read, range(len(paths))):
            pass
    return Images(pixels, torch.tensor(labels))
