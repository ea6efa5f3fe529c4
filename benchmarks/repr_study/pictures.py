"""The pictures of CIFAR-10 of this study: `python benchmarks/repr_study/pictures.py CIFAR10 cifar5k`.

CIFAR10 is a folder of pictures, `train/CLASS/*` and `test/CLASS/*`, as many tools export it. The first 500
of each class in `train` and the first 400 of each in `test`, by name, are copied.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

COUNTS = {"train": 500, "test": 400}


def main(source: Path, out: Path) -> None:
    """Copy the first pictures of each class from ``source`` to ``out``."""
    for part, count in COUNTS.items():
        classes = sorted(path for path in (source / part).iterdir() if path.is_dir())
        for folder in classes:
            home = out / part / folder.name
            home.mkdir(parents=True, exist_ok=True)
            for picture in sorted(folder.iterdir())[:count]:
                shutil.copy(picture, home / picture.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder with train and test")
    parser.add_argument("out", type=Path, help="where to copy to")
    arguments = parser.parse_args()
    main(arguments.source, arguments.out)
