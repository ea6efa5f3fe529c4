"""Find the pictures of a folder that has a sub folder per class, and read one picture."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regrow.log import first_line

# The formats that Pillow may take a file for, whatever its name says. Among its others are programs: it gives
# a file that begins like PostScript to Ghostscript.
_FORMATS = ("PNG", "JPEG", "PPM", "BMP", "GIF", "TIFF", "WEBP")
_ENDINGS = frozenset(
    (".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp", ".gif", ".tif", ".tiff", ".webp")
)
# A strip that is longer than this many times its width is cut to that length around its middle before it is
# resized: resized whole, one of 1 × 1,000,000 pixels would fill the memory.
_LONGEST = 100

# {(device, inode) of a folder: the path by which it was reached}
Reached = dict[tuple[int, int], Path]


def find_pictures(folder: Path, reached: Reached) -> dict[str, list[Path]]:
    """The pictures of each class of ``folder``: {name of its sub folder: files in it and below it}, sorted.

    Names that begin with a dot are left out, and files whose name does not end as that of a picture. Links
    are followed.

    Args:
        folder: it has a sub folder per class.
        reached: the folders that were searched before, to which this adds its own.

    Raises:
        ValueError: ``folder`` has no class, or a class no picture; a link leads nowhere, or to a folder that
            was searched before or contains this one; something with a picture's name is no file; a folder
            cannot be read. The message names it.
    """
    for above in folder.resolve().parents:
        _note(above, reached, or_was=True)
    _note(folder, reached)
    classes = {entry.name: Path(entry.path) for entry in entries(folder) if entry.is_dir()}
    if not classes:
        raise ValueError(
            f"{folder} must have a sub folder with pictures for every class; it has no sub folder."
        )
    found = {name: _below(path, reached) for name, path in classes.items()}
    if empty := [name for name, files in found.items() if not files]:
        raise ValueError(
            f"{folder} must have a sub folder with pictures for every class; there is none in "
            f"{', '.join(empty[:5])}{', …' if len(empty) > 5 else ''}. Pictures end in "
            f"{', '.join(sorted(_ENDINGS))}."
        )
    return found


def _below(folder: Path, reached: Reached) -> list[Path]:
    found, waiting = [], [folder]
    while waiting:
        place = waiting.pop()
        _note(place, reached)
        for entry in entries(place):
            path = Path(entry.path)
            if entry.is_dir():
                waiting.append(path)
            elif path.suffix.lower() in _ENDINGS:
                if not entry.is_file():  # reading a pipe would wait for ever
                    raise ValueError(f"{path} is not a file: remove it, or put a picture in its place.")
                found.append(path)
    return sorted(found, key=lambda path: (str(path.parent), path.name))


def entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What ``folder`` holds, by name, without hidden names.

    Raises:
        ValueError: ``folder`` cannot be read, or holds a link that leads nowhere.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"{folder} cannot be read ({error.strerror}).") from error
    for entry in entries:
        if entry.name.startswith("."):  # not pictures: .DS_Store, and ._cat.png beside each cat.png
            continue
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise ValueError(f"{entry.path} is a link that leads nowhere: mend it or remove it.")
        yield entry


def _note(folder: Path, reached: Reached, or_was: bool = False) -> None:
    """Note in ``reached`` that ``folder`` is searched; refuse it if it was before, unless ``or_was``."""
    try:
        status = folder.stat()
    except OSError as error:
        raise ValueError(f"{folder} cannot be read ({error.strerror}).") from error
    before = reached.setdefault((status.st_dev, status.st_ino), folder)
    if before is not folder and not or_was:
        raise ValueError(
            f"{folder} leads to the same folder as {before}: its pictures would count twice, or for two "
            "classes. Remove the link."
        )


def read_picture(path: Path) -> Image.Image:
    """The picture in a file, as RGB with 8 bits a channel; the first one of an animation.

    Pixels of 16 bits keep their upper 8 bits. Transparency is ignored.

    Raises:
        ValueError: the file cannot be read, is damaged or cut short, holds no picture, more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS``, or pixels without a known range. The message names it.
    """
    try:
        with Image.open(path, formats=_FORMATS) as file:
            if file.mode == "I" and file.format in ("PPM", "PNG"):  # 16 bits: Pillow scales a PPM to them
                picture = _upper_half(np.asarray(file))
            elif file.mode in ("I", "F"):
                raise ValueError("its pixels are numbers of 32 bits: save it with 8 bits a channel")
            elif file.mode.startswith("I;16"):
                picture = _upper_half(np.asarray(file))
            else:
                picture = file.convert("RGB")
    except Image.UnidentifiedImageError as error:
        kinds = ", ".join(_FORMATS)
        raise ValueError(f"{path} cannot be read as a picture (it begins like none of {kinds}).") from error
    except Exception as error:  # Pillow's readers raise errors of any kind
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ValueError(f"{path} cannot be read as a picture ({reason.rstrip('.')}).") from error
    width, height = picture.size
    most = _LONGEST * min(width, height)
    if max(width, height) <= most:
        return picture
    left, top = max(0, (width - most) // 2), max(0, (height - most) // 2)
    return picture.crop((left, top, width - left, height - top))


def _upper_half(pixels: NDArray[Any]) -> Image.Image:
    # Pillow itself would make every value above 255 white.
    return Image.fromarray((pixels.astype(np.int64) >> 8).astype(np.uint8)).convert("RGB")
