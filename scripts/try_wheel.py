"""Use regrow as it was installed from a wheel: ``python scripts/try_wheel.py [--study]``.

Without a flag: the library alone. Every public name is imported, the three lines of README.md run, and the
command says what it needs. With ``--study``: ``regrow --help`` and a comparison of two epochs on digits. Any
failure is an exception. ``make test-wheel`` runs both in an empty environment, and tests/test_wheel.py on the
wheel's files.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def regrow_is_installed() -> None:
    """Fail where ``import regrow`` finds the source tree, or the package lacks a file of it."""
    import regrow

    package, source = Path(regrow.__file__).parent, ROOT / "src" / "regrow"
    assert not package.samefile(source), f"{package} is the source tree"

    def files(folder: Path) -> set[str]:
        found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
        return {path.relative_to(folder).as_posix() for path in found}

    assert files(package) == files(source), files(package) ^ files(source)


def library() -> None:
    """Import every public name, and train a small network with the three lines of README.md."""
    import torch
    from torch import nn

    import regrow

    for name in regrow.__all__:
        assert getattr(regrow, name) is not None, name
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "cycle = " in block]
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 4)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    events = []

    def train_one_epoch(model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    x = torch.randn(6, 1, 8, 8)
    names = {"model": model, "optimizer": optimizer, "x": x, "loader": x, "epochs": 31}
    lines = lines.replace("event = cycle.step()", "event = cycle.step(); note(event)")
    exec(lines, {**names, "train_one_epoch": train_one_epoch, "note": events.append})
    kinds = {number: event.kind for number, event in enumerate(events, start=1) if event is not None}
    assert kinds == {20: "drop", 30: "restore"}, kinds
    report = regrow.prune(model, fraction=0.3, example_inputs=x[:1], calibration=[x])
    assert report["parameters"]["after"] < report["parameters"]["before"]


def command(*arguments: object, folder: Path) -> str:
    """What ``regrow`` prints, started as the installed command starts it."""
    start = "from regrow.__main__ import main; main()"
    words = [sys.executable, "-c", start, *map(str, arguments)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"regrow {' '.join(map(str, arguments))}: {done.stdout}{done.stderr}"
    return done.stdout


def without_study() -> None:
    """The command without its extra tells how to get it."""
    with tempfile.TemporaryDirectory() as folder:
        assert "pip install 'regrow[study]'" in command("--help", folder=Path(folder))


def study() -> None:
    """The help, and a comparison of two methods in two epochs, with its report."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assert "compare" in command("--help", folder=folder)
        flags = ("--data", "digits", "--model", "convnet", "--epochs", 2, "--train-size", 200)
        command("compare", *flags, "--methods", "standard,bridgeout", "--out", "runs", folder=folder)
        assert "standard" in (folder / "runs" / "report.html").read_text(encoding="utf-8")


def main(arguments: Sequence[str]) -> None:
    regrow_is_installed()
    if list(arguments) == ["--study"]:
        study()
    else:
        library()
        without_study()
    print("The wheel works.")


if __name__ == "__main__":
    main(sys.argv[1:])
