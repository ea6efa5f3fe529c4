"""How many CPUs this process may use, by its affinity and its control group. Imports no PyTorch."""

from __future__ import annotations

import os
from pathlib import Path


def available_cpus(*, cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """The number of whole CPUs that this process may use, at least 1.

    It is the number of CPUs that the process may be scheduled on, or the quota of its control group or of
    a group above it (version 2, and the cpu controller of version 1), whichever is smallest. A quota of
    1.5 CPUs counts as 1, because threads that wait for a core spin.

    Args:
        cgroups: where control groups are mounted.
        own: the file that names the groups of this process.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([float(count), *_quotas(cgroups, own)])))


def _quotas(cgroups: Path, own: Path) -> list[float]:
    """The CPU quotas on this process, in CPUs."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top = cgroups
        elif "cpu" in controllers.split(","):
            top = cgroups / "cpu"
        else:
            continue
        # In a container the group has the name that the host gives it, but is mounted at the top.
        path = top / group.lstrip("/")
        for folder in [path, *path.parents]:
            if folder != top and top not in folder.parents:
                break
            found += _quota(folder)
    return found


def _quota(folder: Path) -> list[float]:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        share = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # no limit here: no file, or "max"
        return []
    return [share] if share > 0 else []
