"""Load a folder of pictures, one sub folder per class, as a data set in memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from regrow.study.images import Images, Source

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

_MOST_BYTES = 4 * 2**30


def image_folder(folder: Path, image_size: int) -> Source:
    """Read ``folder`` in torchvision's ImageFolder layout, every picture as RGB.

    If ``folder`` has sub folders train and test, and perhaps validation or val, each of these has a sub
    folder per class; otherwise ``folder`` has these itself. The short side of a picture is resized to
    ``image_size`` pixels, and the middle square is cut out.

    Raises:
        ValueError: ``folder`` has another layout, parts with different classes, an unreadable picture, or
            more than 4 GiB of pixels.
    """
    parts = {name: _open(path, image_size) for name, path in _parts(folder).items()}
    train = parts["train"]
    for name, part in parts.items():
        if part.classes != train.classes:
            raise ValueError(
                f"{folder / name} has other classes than {folder / 'train'}: "
                f"{', '.join(sorted(set(part.classes) ^ set(train.classes)))} must be in both."
            )
    pictures = sum(len(part) for part in parts.values())
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
        classes=tuple(train.classes),
    )


def _parts(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder.")
    named = {
        name: next((folder / option for option in options if (folder / option).is_dir()), None)
        for name, options in {
            "train": ("train",),
            "validation": ("validation", "val"),
            "test": ("test",),
        }.items()
    }
    there = {name: path for name, path in named.items() if path is not None}
    if "train" in there and "test" in there:
        return there
    if there:
        missing = " and ".join(name for name in ("train", "test") if name not in there)
        raise ValueError(
            f"{folder} has {', '.join(path.name for path in there.values())} but not {missing}: add it, or "
            "give a folder with a sub folder per class, which is then split."
        )
    return {"train": folder}


def _open(folder: Path, image_size: int) -> ImageFolder:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose([v2.Resize(image_size), v2.CenterCrop(image_size), v2.PILToTensor()])
    try:
        return ImageFolder(folder, transform)
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} must have a sub folder with pictures for every class ({error})."
        ) from error


def _read(part: ImageFolder, image_size: int) -> Images:
    pixels = torch.empty(len(part), 3, image_size, image_size, dtype=torch.uint8)

    def read(index: int) -> None:
        try:
            pixels[index] = part[index][0]
        except (OSError, SyntaxError) as error:  # Pillow's decoders raise either
            raise ValueError(f"{part.samples[index][0]} cannot be read as a picture ({error}).") from error

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(read, range(len(part))):
            pass
    return Images(pixels, torch.tensor(part.targets))
