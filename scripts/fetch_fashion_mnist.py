"""Get Fashion-MNIST onto this machine, and say where it is: `python scripts/fetch_fashion_mnist.py`.

With apt-get, the script takes Debian's package, which it installs as root, and unpacks into the data folder
as any other user. If that is not possible, it uses torchvision's download. The data folder is $REGROW_DATA,
else ./data. If the data is there already, the script does nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def complete(folder: Path) -> bool:
    """Whether all four files are in ``folder``, plain or packed."""
    return all((folder / name).is_file() or (folder / f"{name}.gz").is_file() for name in FILES)


def run(*command: str, folder: Path | None = None) -> bool:
    """Run a command in ``folder``, and return whether it succeeded. Its output goes to standard error."""
    print("$", *command, file=sys.stderr)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(command, cwd=folder, env=environment, stdout=sys.stderr).returncode == 0


def unpack_debian_package(target: Path) -> bool:
    """Download the package without installing it, and move its complete files to ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".fetching-") as temporary:
        folder = Path(temporary)
        if not run("apt-get", "download", PACKAGE, folder=folder):
            return False
        (archive,) = folder.glob(f"{PACKAGE}_*.deb")
        if not run("dpkg-deb", "-x", str(archive), str(folder)):
            return False
        for path in (folder / DEBIAN_FOLDER.relative_to("/")).iterdir():
            os.replace(path, target / path.name)
    return complete(target)


def from_debian(target: Path) -> Path | None:
    """Get the files by apt-get; return their folder, or None."""
    if shutil.which("apt-get") is None:
        return None
    run("apt-get", "update")  # may need root, and the lists may be there already: go on either way
    if os.geteuid() == 0:
        run("apt-get", "install", "--yes", "--no-install-recommends", PACKAGE)
        if complete(DEBIAN_FOLDER):
            return DEBIAN_FOLDER
    if shutil.which("dpkg-deb") and unpack_debian_package(target):
        return target
    return None


def from_torchvision(data: Path) -> Path | None:
    """Get the files by torchvision's download; return their folder, or None."""
    try:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(data, download=True)
    except (ImportError, OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return None
    return data / "FashionMNIST" / "raw"


def main() -> int:
    data = Path(os.environ.get("REGROW_DATA") or "data")
    target = data / "fashion-mnist"
    there = next((folder for folder in (DEBIAN_FOLDER, target) if complete(folder)), None)
    found = there or from_debian(target) or from_torchvision(data)
    if found is None:
        print(
            f"Fashion-MNIST could not be fetched. Install Debian's package {PACKAGE} (apt-get install "
            f"{PACKAGE}), or put these four files, plain or .gz, into {target}: {', '.join(FILES)}.",
            file=sys.stderr,
        )
        return 1
    print(f"Fashion-MNIST is in {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
