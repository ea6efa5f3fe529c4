"""What an analysis reads and writes in the folders of runs. Imports no PyTorch.

Beside the files of ``records``, a **run folder** may hold:

- ``weights-epoch0010.safetensors``: the weights after so many epochs, 0 being those that the run began with
  (setting ``snapshots``). ``weights-epoch0010-drop``, ``-restore`` and ``-restart`` are those right after a
  drop, a restore, or both at once, that happened then;
- ``gradients.jsonl``: one line per restore, as ``GradientWatch.records`` has them: the gradients of
  regrown and kept rows over the steps after it;
- ``analysis.json``: what ``regrow analyse`` found in the run's weights.

The folder that holds the runs gets an ``analysis.json`` too, with the correlations between the runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.reading import from_json, read_file
from regrow.short import short
from regrow.study import records

VERSION = 1
_MOST_BYTES = 1 << 26
_NAME = re.compile(r"weights-epoch(\d+)(?:-(\w+))?\.safetensors")
# What each record must have, and of which type.
_OF_RUN: Mapping[str, tuple[type, ...]] = {
    "weights": (str,), "pictures": (int,), "split": (str,), "accuracy": (int, float), "moments": (list,),
    "layers": (dict,), "drop_one": (dict,), "first_layer": (dict,),
}  # fmt: skip
_OF_RUNS: Mapping[str, tuple[type, ...]] = {
    "runs": (list,), "pictures": (int,), "layers": (list,), "mean": (list,),
}  # fmt: skip
_OF_GRADIENTS: Mapping[str, tuple[type, ...]] = {
    "event": (dict,), "steps": (list,), "regrown": (list,), "kept": (list,), "layers": (dict,),
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Snapshot:
    """Weights that were kept during training.

    Attributes:
        epoch: epochs trained until then.
        moment: empty: before a drop or restore after this epoch; ``"drop"``, ``"restore"`` or ``"restart"``
            (both at once): right after it.
        path: the file.
    """

    epoch: int
    moment: str
    path: Path


def snapshot_path(folder: Path, epoch: int, moment: str = "") -> Path:
    """Where the weights after ``epoch`` epochs are kept, those right after an event of kind ``moment``."""
    return folder / f"weights-epoch{epoch:04d}{f'-{moment}' if moment else ''}.safetensors"


def snapshots(folder: str | Path) -> list[Snapshot]:
    """The weights that were kept in ``folder``, in order of time."""
    found = [(_NAME.fullmatch(path.name), path) for path in Path(folder).glob("weights-epoch*.safetensors")]
    return sorted(Snapshot(int(name[1]), name[2] or "", path) for name, path in found if name)


def gradients_path(folder: str | Path) -> Path:
    return Path(folder) / "gradients.jsonl"


def analysis_path(folder: str | Path) -> Path:
    return Path(folder) / "analysis.json"


def remove(folder: Path) -> None:
    """Remove what belongs to a run that is trained again."""
    for path in (gradients_path(folder), analysis_path(folder), *(each.path for each in snapshots(folder))):
        path.unlink(missing_ok=True)


def read_gradients(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of ``gradients.jsonl``; none if it is not there. Raises ``ValueError`` for damaged ones."""
    path = gradients_path(folder)
    return [
        _check(each, _OF_GRADIENTS, f"{path}, line {number}")
        for number, each in enumerate(records.read_lines(path), start=1)
    ]


def read_analysis(folder: str | Path) -> dict[str, Any] | None:
    """The analysis of the run in ``folder``; None if there is none.

    Raises:
        ValueError: it was written by a newer regrow, or is malformed; the message names the file and the key.
    """
    return _read(analysis_path(folder), _OF_RUN)


def read_between(folder: str | Path) -> dict[str, Any] | None:
    """The correlations between the runs in ``folder``; None without any. As ``read_analysis``."""
    return _read(analysis_path(folder), _OF_RUNS)


def _read(path: Path, kinds: Mapping[str, tuple[type, ...]]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    return _check(from_json(read_file(path, _MOST_BYTES)), kinds, str(path))


def _check(data: Any, kinds: Mapping[str, tuple[type, ...]], where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{where} must hold a JSON object.")
    version = data.get("version")
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"{where}: 'version' must be a whole number, got {short(version)}.")
    if version > VERSION:
        raise ValueError(f"{where} was written by a newer regrow (version {version}): update regrow.")
    for key, types in kinds.items():
        if not isinstance(data.get(key), types) or isinstance(data.get(key), bool):
            raise ValueError(f"{where}: {key!r} is missing or of the wrong type, got {short(data.get(key))}.")
    return data


def ratios(record: Mapping[str, Any]) -> tuple[Sequence[int], list[float | None]]:
    """The steps of a line of ``gradients.jsonl``, and the gradient of regrown rows over that of kept rows."""
    pairs = zip(record["regrown"], record["kept"], strict=True)
    return record["steps"], [
        regrown / kept if regrown is not None and kept else None for regrown, kept in pairs
    ]
