"""Prepare a run's folder: check which run it holds, and resume what an earlier process left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from regrow.atomic import sweep, write_bytes
from regrow.callers import warn
from regrow.reading import from_json, read_file
from regrow.shipping.stored import CHECKSUM, checksum
from regrow.study import analysed, records
from regrow.study.checkpoints import MOST_BYTES, from_bytes, read_checkpoint, remove_checkpoints
from regrow.study.config import RunConfig
from regrow.study.identity import check_same_run, resolved

# A resumed run ends bit for bit as if it had not been stopped only if these are as in its earlier part.
_MOST_BYTES = 1 << 20
_ALIKE = ("torch", "processor", "device", "threads", "processes")


def last_good_path(folder: Path) -> Path:
    """The weights after the last epoch without a NaN, when a run diverged."""
    return folder / "last-good.safetensors"


def check_folder(config: RunConfig, folder: Path) -> bool:
    """Whether ``folder`` holds a finished run of ``config``; nothing is changed.

    Raises:
        ValueError: it holds a run with other settings, finished or not, or something else.
    """
    check_not_foreign(folder)
    if not records.config_path(folder).exists():
        return False
    check_same_run(config, folder)
    return records.is_finished(folder)


def check_not_foreign(folder: Path) -> None:
    """Raise ``ValueError`` if ``folder`` holds something other than a run."""
    if not folder.exists() or records.config_path(folder).exists():
        return
    # A process that is killed before it has written the settings leaves only names with a dot.
    if not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and not a run folder: choose another --out.")


def begin(
    config: RunConfig,
    folder: Path,
    environment: dict[str, Any],
    *,
    rerun: bool,
    check: Callable[[dict[str, Any]], None] | None = None,
    most: int = MOST_BYTES,
) -> tuple[bytes | None, int]:
    """Make the locked ``folder`` ready for training, from the beginning or from its last checkpoint.

    Args:
        environment: of this process, as ``records.environment`` gives it.
        rerun: start from the beginning, even if the folder holds a run.
        check, most: as ``read_checkpoint`` takes them.

    Returns:
        The checkpoint to resume from, for ``from_bytes``, or None at the beginning; and how often the run
        has been resumed, this time included.

    Warns:
        UserWarning: a checkpoint is damaged, or the run was begun on another machine or version.
    """
    sweep(folder)
    for path in folder.glob(".*.tmp"):  # an earlier version left these
        if path.is_file():
            path.unlink(missing_ok=True)
    last_good_path(folder).unlink(missing_ok=True)
    unfinished = not rerun and records.config_path(folder).exists()
    checkpoint = read_checkpoint(folder, check, most) if unfinished else None
    if checkpoint is None:
        _clear(folder)
        records.write_yaml(records.config_path(folder), {"version": records.VERSION, **resolved(config)})
        records.write_json(records.environment_path(folder), {**environment, "resumed": 0})
        return None, 0
    state = from_bytes(checkpoint)
    before = state["environment"]
    if other := [key for key in _ALIKE if before.get(key) != environment.get(key)]:
        changes = ", ".join(f"{key} {before.get(key)} → {environment.get(key)}" for key in other)
        warn(
            f"{folder}: the run goes on under other conditions ({changes}): its result need not be the same "
            "bit for bit."
        )
    resumed = _resumed(folder, state) + 1
    records.write_json(records.environment_path(folder), {**environment, "resumed": resumed})
    records.write_lines(records.epochs_path(folder), state["epochs"])
    records.write_lines(records.events_path(folder), state["events"])
    return checkpoint, resumed


def _resumed(folder: Path, state: dict[str, Any]) -> int:
    """How often the run was resumed before; times after the checkpoint count if they can still be read."""
    before = int(state["environment"]["resumed"])
    with suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
        there = from_json(read_file(records.environment_path(folder), _MOST_BYTES))
        before = max(before, int(there["resumed"]))
    return before


def _clear(folder: Path) -> None:
    # Remove the result first: without it the folder is an unfinished run, whatever else it still holds.
    for path in (
        records.result_path(folder),
        records.epochs_path(folder),
        records.events_path(folder),
        records.weights_path(folder),
        *records.curve_paths(folder),
    ):
        path.unlink(missing_ok=True)
    analysed.remove(folder)
    remove_checkpoints(folder)


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    """Write ``state`` and its checksum as safetensors, whole or not at all."""
    write_bytes(path, save(state, {CHECKSUM: checksum(None, state)}))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an error in writing, raised in the block, into one that says what it means for the run.

    Raises:
        OSError: the error, in one line.
    """
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written to: {error.strerror or error}. Nothing that was there is damaged: "
            "make it writable or make room, and give the same command again."
        ) from error
