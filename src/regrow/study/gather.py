"""Find every run below some folders, and set aside runs that cannot be read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from regrow.study.records import RunRecord, epochs_path, read_run, result_path, run_folders

# Above the largest float32, and so above every loss.
_HIGHEST = 1e40
# The most filters times epochs that the map of filters may have: a larger one means a damaged number.
_LARGEST = 10**9


def gather(*folders: str | Path) -> tuple[list[RunRecord], dict[Path, str]]:
    """Every run in ``folders`` and below them that can be read, and why the others cannot.

    Returns:
        The runs, sorted by parent folder, method and seed, none twice, and {folder: what is wrong}.

    Raises:
        ValueError: a folder is not there, or none of the runs can be read.
    """
    places: dict[Path, Path] = {}
    closed: list[OSError] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}.")
        for run in run_folders(folder, closed.append):
            places.setdefault(run.resolve(), run)
    runs, left_out = read_each(places.values())
    left_out |= {Path(each.filename): f"{each.filename} cannot be read: {each.strerror}." for each in closed}
    if not runs and left_out:
        raise ValueError(f"no run can be read: {'; '.join(left_out.values())}")
    if not runs:
        raise ValueError(
            f"no run found in {', '.join(map(str, folders)) or 'no folder'}. A run folder holds config.yaml, "
            "epochs.jsonl and, once finished, result.json; `regrow train` makes one."
        )
    return sorted(runs, key=lambda run: (str(run.folder.parent), run.method, run.seed)), left_out


def read_each(folders: Iterable[Path]) -> tuple[list[RunRecord], dict[Path, str]]:
    """The runs in these run folders that can be read, in order, and {folder: what is wrong} of the others."""
    runs: list[RunRecord] = []
    left_out: dict[Path, str] = {}
    for folder in folders:
        try:
            runs.append(_drawable(read_run(folder)))
        except (ValueError, OSError) as error:
            left_out[folder] = str(error)
    return runs, left_out


def _drawable(run: RunRecord) -> RunRecord:
    """Return ``run``, or raise ``ValueError`` if drawing its numbers would overflow or fill the memory."""
    lines = [(epochs_path(run.folder), epoch) for epoch in run.epochs]
    for path, record in [*lines, (result_path(run.folder), run.result or {})]:
        for key, value in record.items():
            if isinstance(value, int | float) and abs(value) > _HIGHEST:
                raise ValueError(f"{path}: {key!r} cannot be beyond {_HIGHEST:g}.")
    filters = sum(run.result["filters"].values()) if run.result is not None else 0
    epochs = run.epochs[-1]["epoch"] if run.epochs else 0
    if filters * epochs > _LARGEST:
        raise ValueError(
            f"{result_path(run.folder)}: {filters:,} filters over {epochs:,} epochs cannot be right."
        )
    return run
