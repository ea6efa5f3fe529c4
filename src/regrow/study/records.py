"""The files that a run writes: versioned YAML, JSON and JSON lines. Imports no PyTorch.

A **run folder** is one training run (one method, one seed):

- ``config.yaml``: every setting, enough to repeat the run;
- ``environment.json``: versions, processor, device, the command;
- ``epochs.jsonl``: one line per epoch; accuracies are fractions from 0 to 1, ``flops`` are the
  floating-point operations of its training steps (None when they cannot be counted), ``task`` is the number
  of the task that the epoch trained, from 1;
- ``events.jsonl``: one line per drop or restore, or what else a method did to the network (``KINDS``).
  ``epoch`` is the number of epochs trained when it happened: a filter dropped at 20 and restored at 30 was
  off in epochs 21 to 30;
- ``result.json``: written last; a run that has it is finished. ``resumed`` says how often it was
  stopped and resumed. ``task_accuracies`` are the test accuracies at the end of each task, on the test
  pictures of that task; ``test_accuracy`` is the last of them, and ``mean_accuracy_after_switch`` the mean of
  all but the first (None for a single task). ``best_epoch`` is the epoch with the highest validation
  accuracy, the earliest of several, and ``best_test_accuracy`` the test accuracy of its weights (both are
  None for several tasks);
- ``weights.safetensors``: the final weights;
- ``curve-{split}-{criterion}-{scope}.json``: accuracy with filters cut from those weights (``study.curves``).

A **comparison folder** holds run folders named ``{method}-seed{seed}`` and ``comparison.json``. A **study
folder** holds a folder of run folders for each comparison, and ``study.json``.

Version 1 had no ``flops``, ``train_flops`` and ``resumed``; in its records they are read as None. Versions 1
and 2 had no tasks and no best epoch: ``task`` is read as 1, and the others as None.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from regrow import atomic
from regrow.reading import from_json, read_file
from regrow.short import said, short

VERSION = 3
# Kinds of events: what a method did to the network between two epochs.
KINDS = (
    "drop", "restore", "restart", "replace", "reset", "fresh", "shrink", "evolve", "sparsify", "densify",
)  # fmt: skip

# More than the records of the longest run that the settings allow.
_MOST_BYTES = 1 << 26
# No accuracy, time or number of operations is beyond it, and its square is a float.
_MOST = 1e100
_INTEGER = (int,)
_INTEGER_OR_NONE = (int, type(None))
_NUMBER = (int, float)
_NUMBER_OR_NONE = (int, float, type(None))
_TEXT = (str,)
_TEXT_OR_NONE = (str, type(None))
_MAPPING = (dict,)
_Kinds = Mapping[str, tuple[type, ...]]

_CONFIG: _Kinds = {"method": _TEXT, "seed": _INTEGER}
_ENVIRONMENT: _Kinds = {
    "regrow": _TEXT_OR_NONE,
    "python": _TEXT,
    "torch": _TEXT_OR_NONE,
    "torchvision": _TEXT_OR_NONE,
    "numpy": _TEXT_OR_NONE,
    "platform": _TEXT,
    "processor": _TEXT,
    "cores": _INTEGER,
    "threads": _INTEGER,
    "device": _TEXT,
    "command": _TEXT,
}
# A diverging run has NaN or infinity for some of these, which are recorded as None.
_EPOCH: _Kinds = {
    "epoch": _INTEGER,
    "task": _INTEGER,
    "phase": _TEXT,
    "learning_rate": _NUMBER_OR_NONE,
    "train_loss": _NUMBER_OR_NONE,
    "train_accuracy": _NUMBER_OR_NONE,
    "validation_loss": _NUMBER_OR_NONE,
    "validation_accuracy": _NUMBER_OR_NONE,
    "overlap": _NUMBER_OR_NONE,
    "alive": _INTEGER,
    "filters": _INTEGER,
    "seconds": _NUMBER,
    "flops": _INTEGER_OR_NONE,
}
_EVENT: _Kinds = {
    "epoch": _INTEGER,
    "kind": _TEXT,
    "cycle": _INTEGER,
    "filters": _MAPPING,
    "notes": (list,),
}
_RESULT: _Kinds = {
    "test_accuracy": _NUMBER,
    "test_loss": _NUMBER_OR_NONE,
    "validation_accuracy": _NUMBER,
    "best_epoch": _INTEGER_OR_NONE,
    "best_validation_accuracy": _NUMBER_OR_NONE,
    "best_test_accuracy": _NUMBER_OR_NONE,
    "train_seconds": _NUMBER,
    "seconds": _NUMBER,
    "parameters": _INTEGER,
    "filters": _MAPPING,
    "train_flops": _INTEGER_OR_NONE,
    "resumed": _INTEGER_OR_NONE,
    "task_accuracies": (list, type(None)),
    "mean_accuracy_after_switch": _NUMBER_OR_NONE,
}
# Keys that earlier versions did not have, and the values that they are read as.
_ADDED: Mapping[str, int | None] = {
    # Version 2.
    "flops": None,
    "train_flops": None,
    "resumed": None,
    # Version 3.
    "task": 1,
    "task_accuracies": None,
    "mean_accuracy_after_switch": None,
    "best_epoch": None,
    "best_validation_accuracy": None,
    "best_test_accuracy": None,
}
_CURVE: _Kinds = {
    "split": _TEXT,
    "criterion": _TEXT,
    "scope": _TEXT,
    "seed": (int, type(None)),
    "weights": _TEXT,
    "classes": _INTEGER,
    "images": _INTEGER,
    "calibration_images": _INTEGER,
    "layers": _MAPPING,
    "left_out": _MAPPING,
    "points": (list,),
}
_COMPARISON: _Kinds = {"baseline": _TEXT, "runs": (list,)}
_STUDY: _Kinds = {"comparisons": (list,)}
_OF_STUDY: _Kinds = {"baseline": _TEXT, "runs": _MAPPING}
_POINT: _Kinds = {"reading": _TEXT, "fraction": _NUMBER, "dropped": _INTEGER, "accuracy": _NUMBER}


def config_path(folder: str | Path) -> Path:
    return Path(folder) / "config.yaml"


def environment_path(folder: str | Path) -> Path:
    return Path(folder) / "environment.json"


def epochs_path(folder: str | Path) -> Path:
    return Path(folder) / "epochs.jsonl"


def events_path(folder: str | Path) -> Path:
    return Path(folder) / "events.jsonl"


def result_path(folder: str | Path) -> Path:
    return Path(folder) / "result.json"


def weights_path(folder: str | Path) -> Path:
    return Path(folder) / "weights.safetensors"


def curve_path(folder: str | Path, split: str, criterion: str, scope: str) -> Path:
    return Path(folder) / f"curve-{split}-{criterion}-{scope}.json"


def curve_paths(folder: str | Path) -> list[Path]:
    """The paths of the curve records in ``folder``, sorted by name."""
    return sorted(Path(folder).glob("curve-*.json"))


def comparison_path(folder: str | Path) -> Path:
    return Path(folder) / "comparison.json"


def study_path(folder: str | Path) -> Path:
    return Path(folder) / "study.json"


def run_folder(comparison: str | Path, method: str, seed: int) -> Path:
    """Where the run of ``method`` with ``seed`` lives inside a comparison folder."""
    return Path(comparison) / f"{method}-seed{seed}"


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all; missing parent folders are made."""
    write_bytes(path, text.encode("utf-8", errors="replace"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data``, whole or not at all; missing parent folders are made."""
    path = Path(path)
    _make_folder(path)
    atomic.write_bytes(path, data)


def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write ``data`` as JSON, whole or not at all; NaN and infinity become null.

    Raises:
        ValueError: a value that JSON cannot hold, such as a tensor.
    """
    write_text(path, _to_json(path, data, indent=2) + "\n")


def write_yaml(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write ``data`` as YAML in its own order, whole or not at all; NaN and infinity become null.

    Raises:
        ValueError: a value that plain YAML cannot hold, such as a tensor or a path.
    """
    import yaml

    try:
        text = yaml.safe_dump(_without_nan(data), sort_keys=False, allow_unicode=True)
    except yaml.YAMLError as error:
        raise ValueError(
            f"{path}: {error.args[-1]!r} cannot be written as YAML. Use numbers, strings, booleans, None, "
            "lists and mappings."
        ) from error
    write_text(path, text)


def append_line(path: str | Path, data: Mapping[str, Any]) -> None:
    """Append ``data`` to a JSON-lines file in one write; NaN and infinity become null.

    The torn last line of a killed run, if there is one, is cut off first.

    Raises:
        ValueError: a value that JSON cannot hold.
    """
    path = Path(path)
    text = _to_json(path, data) + "\n"
    _make_folder(path)
    try:
        _cut_torn_line(path)
        with path.open("ab") as file:
            file.write(text.encode())
    except OSError as error:
        raise said(error, path, "written") from error


def write_lines(path: str | Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write ``lines`` as a JSON-lines file, whole or not at all; without any line the file is removed.

    Raises:
        ValueError: a value that JSON cannot hold.
    """
    text = "".join(_to_json(path, line) + "\n" for line in lines)
    if text:
        write_text(path, text)
    else:
        Path(path).unlink(missing_ok=True)


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; none when the file is not there.

    A last line without a line end, which a killed run leaves, is dropped.

    Raises:
        ValueError: any other line that is not a JSON object, named by file and line number.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = read_file(path, _MOST_BYTES).split(b"\n")[:-1]
    return [_from_json(each, f"{path}, line {number}") for number, each in enumerate(lines, start=1)]


def environment(device: str, threads: int) -> dict[str, Any]:
    """The contents of ``environment.json``: versions, machine, and the command of this process."""
    return {
        "version": VERSION,
        "regrow": _installed("regrow"),
        "python": platform.python_version(),
        "torch": _installed("torch"),
        "torchvision": _installed("torchvision"),
        "numpy": _installed("numpy"),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": threads,
        "device": device,
        "command": _command(sys.argv),
    }


@dataclass(frozen=True)
class RunRecord:
    """One run folder, read and checked. ``result`` is None while the run is unfinished."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    epochs: list[dict[str, Any]]
    events: list[dict[str, Any]]
    result: dict[str, Any] | None

    @property
    def method(self) -> str:
        return str(self.config["method"])

    @property
    def seed(self) -> int:
        return int(self.config["seed"])


def is_finished(folder: str | Path) -> bool:
    """Whether the run in ``folder`` has written its result, which is its last file."""
    return result_path(folder).exists()


def read_run(folder: str | Path) -> RunRecord:
    """Read and check one run folder.

    Raises:
        ValueError: it is not a run folder, was written by a newer regrow, or a file in it is malformed;
            the message names the file and the key or line.
    """
    folder = Path(folder)
    config = read_config(folder)
    finished = is_finished(folder)
    return _checked(
        RunRecord(
            folder=folder,
            config=config,
            # A run that has only just started may not have written it yet.
            environment=_read_json(environment_path(folder), _ENVIRONMENT)
            if finished or environment_path(folder).exists()
            else {},
            epochs=_read_records(epochs_path(folder), _EPOCH),
            events=_read_records(events_path(folder), _EVENT),
            result=_read_json(result_path(folder), _RESULT) if finished else None,
        )
    )


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read and check the settings of the run in ``folder`` alone. Errors as ``read_run``."""
    if not config_path(folder).exists():
        raise ValueError(f"{folder} is not a run folder: it has no config.yaml.")
    return _read_config(config_path(folder))


def run_folders(folder: str | Path, unreadable: Callable[[OSError], None]) -> list[Path]:
    """The run folders in and below ``folder``, sorted.

    Args:
        folder: to search; links in it are not followed.
        unreadable: is called for each folder that the system does not let this process read.
    """
    found = os.walk(folder, onerror=unreadable)
    return sorted(Path(home) for home, _, files in found if config_path("").name in files)


def find_runs(*folders: str | Path) -> list[RunRecord]:
    """Every run in ``folders`` and below them, sorted by parent folder, method and seed; none twice.

    Raises:
        ValueError: a folder is not there, holds no run, or holds one that cannot be read.
    """
    found: dict[Path, RunRecord] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}.")
        for run in run_folders(folder, _refuse):
            if run.resolve() not in found:
                found[run.resolve()] = read_run(run)
    if not found:
        raise ValueError(
            f"no run found in {', '.join(map(str, folders)) or 'no folder'}. A run folder holds config.yaml, "
            "epochs.jsonl and, once finished, result.json; `regrow train` makes one."
        )
    return sorted(found.values(), key=lambda run: (str(run.folder.parent), run.method, run.seed))


def _refuse(error: OSError) -> None:
    raise ValueError(f"{error.filename} cannot be read: {error.strerror}.")


def weights_hash(folder: str | Path) -> str | None:
    """SHA-256 of the run's weights as hexadecimal digits; None when the file is not there."""
    path = weights_path(folder)
    if not path.exists():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_curve(path: str | Path) -> dict[str, Any]:
    """Read and check one ``curve-….json`` of a run.

    Raises:
        ValueError: written by a newer regrow, or malformed; the message names the file and the key.
    """
    record = _read_json(Path(path), _CURVE)
    if record["classes"] < 1:
        raise ValueError(f"{path}: 'classes' must be 1 or more, got {record['classes']}.")
    for number, point in enumerate(record["points"], start=1):
        where = f"{path}, point {number}"
        _check_keys(point, _POINT, where)
        if not 0 <= point["fraction"] < 1:
            raise ValueError(
                f"{where}: 'fraction' must be from 0 to below 1, got {short(point['fraction'])}."
            )
    return record


def read_curves(folder: str | Path) -> list[dict[str, Any]]:
    """Every accuracy–pruned curve of the run in ``folder``, by name of its file.

    Raises:
        ValueError: as ``read_curve``.
    """
    return [read_curve(path) for path in curve_paths(folder)]


def read_comparison(path: str | Path) -> dict[str, Any]:
    """Read and check a ``comparison.json``. Raises ``ValueError`` as ``read_curve``."""
    return _read_json(Path(path), _COMPARISON)


def read_study(path: str | Path) -> list[dict[str, Any]]:
    """Read and check the comparisons in a ``study.json``. Raises ``ValueError`` as ``read_curve``."""
    comparisons: list[dict[str, Any]] = _read_json(Path(path), _STUDY)["comparisons"]
    return [_check_keys(each, _OF_STUDY, f"{path}, comparisons") for each in comparisons]


def _read_config(path: Path) -> dict[str, Any]:
    from regrow.study.yamls import MOST_BYTES, from_yaml

    text = read_file(path, MOST_BYTES)
    try:
        data = from_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    return _check(data, _CONFIG, str(path))


def _read_json(path: Path, kinds: _Kinds) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path} is missing from a finished run.")
    return _check(_from_json(read_file(path, _MOST_BYTES), str(path)), kinds, str(path))


def _read_records(path: Path, kinds: _Kinds) -> list[dict[str, Any]]:
    return [
        _check(each, kinds, f"{path}, line {number}") for number, each in enumerate(read_lines(path), start=1)
    ]


def check_epochs(lines: object, count: int) -> None:
    """Raise ``ValueError`` unless ``lines`` are the records of the epochs from 1 to ``count``.

    Numbers may be NaN or infinite where they are written as None.
    """
    if not isinstance(lines, list) or len(lines) != count:
        raise ValueError(f"epochs must list the records of {count} epochs")
    for number, each in enumerate(lines, start=1):
        if _check(_plain(each), _EPOCH, f"the record of epoch {number}")["epoch"] != number:
            raise ValueError(f"the record of epoch {number} is that of epoch {short(each['epoch'])}.")


def check_events(lines: object, count: int) -> None:
    """Raise ``ValueError`` unless ``lines`` record what a method did in the first ``count`` epochs."""
    if not isinstance(lines, list):
        raise ValueError("events must be a list of records")
    for number, each in enumerate(lines, start=1):
        event = _check(_plain(each), _EVENT, f"event {number}")
        if not 1 <= event["epoch"] <= count:
            raise ValueError(f"event {number} is in epoch {short(event['epoch'])} of {count}.")
    _check_drops(lines, None, "event")


def _plain(line: object) -> object:
    """``line`` as it is written; it must be JSON-able."""
    try:
        return from_json(json.dumps(_without_nan(line), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"it holds what no record can: {short(error)}") from None


def _check(data: object, kinds: _Kinds, where: str) -> dict[str, Any]:
    """Return ``data`` if it is a mapping of a known version with the keys and types of ``kinds``."""
    if isinstance(data, dict):
        data = {key: value for key, value in _ADDED.items() if key in kinds} | data
    return _check_keys(data, {"version": _INTEGER, **kinds}, where)


def _check_keys(data: object, kinds: _Kinds, where: str) -> dict[str, Any]:
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ValueError(f"{where} must hold a mapping from names to values, got {type(data).__name__}.")
    for key, types in kinds.items():
        if key not in data:
            raise ValueError(f"{where} has no {key!r}.")
        value = data[key]
        # A newer version may have other keys and types, so the version is checked first.
        if key == "version" and isinstance(value, int) and value > VERSION:
            raise ValueError(
                f"{where} was written by a newer regrow (record version {value}, this one knows {VERSION}): "
                "upgrade regrow."
            )
        wrong = not isinstance(value, types) or isinstance(value, bool)
        if wrong or (isinstance(value, float) and not math.isfinite(value)):
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise ValueError(f"{where}: {key!r} must be {names}, got {short(value)}.")
        if isinstance(value, int | float) and abs(value) > _MOST:
            raise ValueError(f"{where}: {key!r} cannot be beyond {_MOST:g}, got {short(value)}.")
        if key.endswith("accuracy") and value is not None and not 0 <= value <= 1:
            raise ValueError(f"{where}: {key!r} must be a fraction from 0 to 1, got {short(value)}.")
    return data


def _checked(run: RunRecord) -> RunRecord:
    """Return ``run`` if its files agree: epochs in order, and events about filters that exist."""
    path, number = epochs_path(run.folder), 0
    for line, epoch in enumerate(run.epochs, start=1):
        if epoch["epoch"] <= number:
            raise ValueError(f"{path}, line {line}: epoch {epoch['epoch']} comes after epoch {number}.")
        number = epoch["epoch"]
    if run.result is not None:
        _check_tasks(run.result, result_path(run.folder))
    sizes = None if run.result is None else run.result["filters"]
    if sizes is not None and not all(_is_index(size) for size in sizes.values()):
        raise ValueError(f"{result_path(run.folder)}: 'filters' must give each layer's number of filters.")
    _check_drops(run.events, sizes, f"{events_path(run.folder)}, line")
    return run


def _check_tasks(result: Mapping[str, Any], path: Path) -> None:
    """Raise ``ValueError`` unless the accuracies over tasks are fractions that fit each other."""
    accuracies, mean = result["task_accuracies"], result["mean_accuracy_after_switch"]
    if accuracies is not None:
        check_accuracies(accuracies, f"{path}: 'task_accuracies'")
    if (mean is not None) != (accuracies is not None and len(accuracies) > 1):
        raise ValueError(
            f"{path}: 'mean_accuracy_after_switch' must be a number where 'task_accuracies' has two or more, "
            f"and null elsewhere, got {short(mean)}."
        )
    if mean is not None and not 0 <= mean <= 1:
        raise ValueError(
            f"{path}: 'mean_accuracy_after_switch' must be a fraction from 0 to 1, got {short(mean)}."
        )


def check_accuracies(values: object, what: str) -> None:
    """Raise ``ValueError`` unless ``values`` are a list of fractions."""
    if not isinstance(values, list) or not all(
        isinstance(each, int | float) and not isinstance(each, bool) and 0 <= each <= 1 for each in values
    ):
        raise ValueError(f"{what} must list fractions from 0 to 1, got {short(values)}.")


def _check_drops(events: list[dict[str, Any]], sizes: Mapping[str, int] | None, place: str) -> None:
    """Check the filters of ``events`` against ``sizes``, the number of filters of each layer, if known."""
    for number, event in enumerate(events, start=1):
        where = f"{place} {number}"
        if event["kind"] not in KINDS:
            raise ValueError(
                f"{where}: 'kind' must be one of {', '.join(map(repr, KINDS))}, got {short(event['kind'])}."
            )
        for layer, indices in event["filters"].items():
            if not isinstance(indices, list) or not all(_is_index(index) for index in indices):
                raise ValueError(f"{where}: 'filters' must give a list of indices for {short(layer)}.")
            if sizes is not None and any(index >= sizes.get(layer, 0) for index in indices):
                raise ValueError(
                    f"{where}: {short(layer)} has {sizes.get(layer, 0)} filters by result.json, so there is "
                    f"no filter {short(max(indices))}."
                )


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _to_json(path: str | Path, data: Mapping[str, Any], indent: int | None = None) -> str:
    try:
        return json.dumps(_without_nan(data), indent=indent, allow_nan=False)
    except TypeError as error:
        raise ValueError(
            f"{path}: cannot be written as JSON: {error}. Use numbers, strings, booleans, None, lists and "
            "mappings."
        ) from error


def _from_json(text: bytes, where: str) -> dict[str, Any]:
    try:
        data = from_json(text)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(data).__name__}.")
    return data


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _make_folder(path: Path) -> None:
    """Make the folder of ``path``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise said(error, path.parent, "made") from error


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name as people know it; ``platform.processor()`` is often empty on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name") and ":" in line]
    return next(iter(names), "") or platform.processor() or platform.machine()


def _command(arguments: list[str]) -> str:
    """The command line, without the folder the program is installed in."""
    program = Path(arguments[0]).name if arguments else ""
    return shlex.join(["regrow" if program == "__main__.py" else program, *arguments[1:]])
