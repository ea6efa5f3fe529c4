"""Where the teacher of a run lies, from the setting ``teacher``. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from regrow.short import line
from regrow.study import records
from regrow.study.config import RunConfig


def teacher_folder(teacher: str, seed: int) -> Path:
    """The folder of the finished run that teaches the run with ``seed``.

    Args:
        teacher: a run folder; a folder with runs that end in ``-seedN``, or such folders without that ending,
            as "runs/digits/standard": the run with ``seed`` is taken.
        seed: of the run that learns.

    Raises:
        ValueError: there is no such run, several, or it is not finished.
    """
    place, ending = Path(teacher), f"-seed{seed}"
    if records.config_path(place).exists():
        found = [place]
    elif place.is_dir():
        found = sorted(each for each in place.iterdir() if _is_run(each) and each.name.endswith(ending))
    else:
        found = [each for each in [place.with_name(place.name + ending)] if _is_run(each)]
    if not found:
        raise ValueError(
            f"teacher: {line(place)} is no run folder, and holds no run folder whose name ends in {ending}: "
            "train the teacher first."
        )
    if len(found) > 1:
        names = ", ".join(each.name for each in found[:4])
        stem = place / found[0].name.removesuffix(ending)
        raise ValueError(
            f"teacher: {line(place)} holds {len(found)} runs that end in {ending} ({line(names)}): say "
            f"which, as in {line(stem)}."
        )
    if not records.is_finished(found[0]):
        raise ValueError(f"teacher: the run in {line(found[0])} is not finished: finish it first.")
    return found[0]


def check_teachers(configs: Iterable[RunConfig]) -> None:
    """Raise ``ValueError`` if one of the runs has no teacher and needs one, before the first run would."""
    for config in configs:
        if "distillation" in config.method.split("+") and config.teacher is not None:
            teacher_folder(config.teacher, config.seed)


def _is_run(folder: Path) -> bool:
    return records.config_path(folder).exists()
