"""Which run teaches, of the folders that a person may name."""

import re
from pathlib import Path

import pytest

from regrow.study import records
from regrow.study.config import make_config
from regrow.study.teachers import check_teachers, teacher_folder


def run(folder: Path, *, finished: bool = True) -> Path:
    records.write_yaml(records.config_path(folder), {"version": 3, "method": "standard", "seed": 0})
    if finished:
        records.write_json(records.result_path(folder), {"version": 3})
    return folder


def test_a_run_folder_teaches_every_seed(tmp_path: Path) -> None:
    one = run(tmp_path / "one")
    assert teacher_folder(str(one), 0) == teacher_folder(str(one), 5) == one


def test_of_several_runs_the_one_of_the_seed(tmp_path: Path) -> None:
    runs = [run(tmp_path / f"standard-seed{seed}") for seed in (1, 11)]
    assert [teacher_folder(str(tmp_path), seed) for seed in (1, 11)] == runs
    run(tmp_path / "repr-seed1")
    with pytest.raises(ValueError, match=r"holds 2 runs that end in -seed1 \(repr-seed1, standard-seed1\)"):
        teacher_folder(str(tmp_path), 1)
    assert teacher_folder(str(tmp_path / "standard"), 1) == runs[0]


@pytest.mark.parametrize("place", ["nowhere", "empty", "file"])
def test_what_holds_no_teacher(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty" / "x-seed2").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"is no run folder, .*ends in -seed2: train the teacher first"):
        teacher_folder(str(tmp_path / place), 2)


def test_a_teacher_has_finished(tmp_path: Path) -> None:
    one = run(tmp_path / "one", finished=False)
    with pytest.raises(ValueError, match=re.escape(f"the run in {one} is not finished: finish it first")):
        teacher_folder(str(one), 0)


def test_all_runs_are_checked_before_the_first(tmp_path: Path) -> None:
    run(tmp_path / "standard-seed0")
    configs = [
        make_config({"method": method, "seed": seed, "teacher": str(tmp_path)})
        for seed in (0, 1)
        for method in ("standard", "repr+distillation")
    ]
    check_teachers(configs[:3])
    with pytest.raises(ValueError, match="-seed1"):
        check_teachers(configs)
