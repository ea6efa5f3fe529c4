import os
from pathlib import Path

import pytest

from regrow.study.cpus import available_cpus


@pytest.fixture(autouse=True)
def _sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))


def cpus(root: Path, group: str, **files: str) -> int:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("cpu_", "cpu.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "own").write_text(group)
    return available_cpus(cgroups=root, own=root / "own")


def test_affinity_counts_where_there_is_no_limit(tmp_path: Path) -> None:
    assert cpus(tmp_path, "0::/\n") == 16
    assert cpus(tmp_path, "0::/\n", cpu_max="max 100000\n") == 16
    assert available_cpus(cgroups=tmp_path, own=tmp_path / "none") == 16


@pytest.mark.parametrize(("quota", "count"), [("400000 100000", 4), ("150000 100000", 1), ("2000 100000", 1)])
def test_a_quota_in_whole_cpus_and_at_least_one(tmp_path: Path, quota: str, count: int) -> None:
    assert cpus(tmp_path, "0::/\n", cpu_max=quota) == count


def test_the_groups_above_limit_too(tmp_path: Path) -> None:
    files = {"a__b__cpu_max": "800000 100000", "a__cpu_max": "300000 100000", "c__cpu_max": "100000 100000"}
    assert cpus(tmp_path, "0::/a/b\n", **files) == 3


def test_a_group_named_as_the_host_sees_it(tmp_path: Path) -> None:
    assert cpus(tmp_path, "0::/system/container\n", cpu_max="200000 100000") == 2


def test_version_1(tmp_path: Path) -> None:
    own = "5:memory:/x\n4:cpu,cpuacct:/x\n"
    files = {"cpu__x__cpu_cfs_quota_us": "250000", "cpu__x__cpu_cfs_period_us": "100000"}
    assert cpus(tmp_path, own, **files) == 2
    files["cpu__x__cpu_cfs_quota_us"] = "-1"
    assert cpus(tmp_path, own, **files) == 16
