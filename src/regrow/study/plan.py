"""Where the runs of a study lie on disk, and which of them are done. Imports no PyTorch.

A run is found by its settings, which the ``config.yaml`` of each run folder holds; the name of a folder is
only for people. So no run is trained again because its folder would get another name today.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regrow.reading import from_json, read_file
from regrow.short import line, short
from regrow.study import records
from regrow.study.config import RunConfig, make_config
from regrow.study.identity import (
    WHERE,
    describe,
    differing,
    normalised,
    own_settings,
    resolved,
    run_key,
    shown,
    unresolved,
)
from regrow.study.lineup import title_of
from regrow.study.recorded import find_recorded
from regrow.study.studyfile import Study, Wanted, read_study
from regrow.study.variants import known_numbers, variant_names, variant_numbers
from regrow.study.yamls import read_yaml

# File names of a study folder, beside the comparisons' folders.
STUDY_FILE = "study.yaml"
STUDY_RECORD = records.study_path("").name
_LONGEST = 120
# Settings that ``title_of`` mentions.
_IN_TITLES = ("regime", "tasks", "second_data")
_VERSION = 1
_MOST_BYTES = 1 << 26


@dataclass(frozen=True)
class Job:
    """A run and its folder; ``state`` is "done", "unfinished" or "new"."""

    config: RunConfig
    folder: Path
    state: str


@dataclass(frozen=True)
class Comparison:
    """Runs that are compared with each other, in their own report.

    Attributes:
        folder: for the report; the runs' folders are in it.
        jobs: by seed, then method, the baseline first.
        variants: {run folder: name of the job's method}.
        baseline: the name of the method that the others are compared with.
        title: model and data, and the settings that tell the comparison from others of the study.
    """

    folder: Path
    jobs: tuple[Job, ...]
    variants: dict[Path, str]
    baseline: str
    title: str


@dataclass
class _Found:
    """A run on disk."""

    config: RunConfig
    folder: Path
    finished: bool


@dataclass
class _Disk:
    """The runs that are in a study's folder already, by key, and the run folders that cannot be read."""

    runs: dict[str, _Found] = field(default_factory=dict)
    unreadable: list[Path] = field(default_factory=list)


def plan(study: Study, folder: Path) -> tuple[list[Comparison], list[Path]]:
    """Find the folder of each run of ``study`` below ``folder``, or choose one; nothing is written.

    An existing run keeps its folder. A new run goes to ``COMPARISON/METHOD-seedN``. The first part is
    named after model and data, the second after the method, and both end with the settings that tell them
    from others in the study or in the folder. Names that are in use stay: further seeds of a method are
    named like its existing seeds.

    Returns:
        The comparisons, and the run folders that could not be read and are left as they are.
    """
    disk = _scan(folder)
    wanted: dict[str, list[Wanted]] = {}
    for each in study.runs:
        wanted.setdefault(run_key(each.comparison), []).append(each)
    homes = _homes(folder, wanted, disk)
    comparisons = []
    placed: dict[str, Job] = {}  # two comparisons may share a run
    for comparison, runs in wanted.items():
        home = homes[comparison]
        for run, name in zip(runs, _names(home, runs, disk), strict=True):
            key = run_key(run.config)
            if key not in placed:
                placed[key] = _job(run.config, home / name, disk.runs.get(key))
        jobs = tuple(placed[run_key(run.config)] for run in runs)
        variants = variant_names({job.folder: job.config.model_dump(mode="json") for job in jobs})
        title = _title(runs[0].comparison, [other[0].comparison for other in wanted.values()])
        comparisons.append(Comparison(home, jobs, variants, variants[jobs[0].folder], title))
    return comparisons, disk.unreadable


def jobs_of(comparisons: Iterable[Comparison]) -> list[Job]:
    """Every job once: by comparison, then seed, then method."""
    return list({job.folder: job for each in comparisons for job in each.jobs}.values())


def check_folder(study: Study, folder: Path) -> None:
    """Raise ``ValueError`` unless ``folder`` is empty, not there, or belongs to ``study``.

    It belongs to ``study`` if the study in it has the same name, and its copy of the study's file has at
    least one run in common with ``study``.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another --out.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / STUDY_FILE).is_file() or not (folder / STUDY_RECORD).is_file():
        raise ValueError(f"{folder} is not empty and holds no study: choose another --out.")
    name = _recorded_name(folder / STUDY_RECORD)
    if name != study.name:
        raise ValueError(
            f"{folder} holds another study, {short(name)}, not {short(study.name)}: choose another --out; "
            f"or, if it is the same one under a new file name, write 'name: {line(name)}' into it."
        )
    there = {run_key(each.config) for each in read_study(folder / STUDY_FILE, name).runs}
    if there.isdisjoint(run_key(each.config) for each in study.runs):
        raise ValueError(
            f"{folder} holds another study: no run of it is in this one. Choose another --out, or give this "
            "study another name."
        )


def claim(study: Study, folder: Path, comparisons: Sequence[Comparison]) -> None:
    """Record that ``folder`` belongs to ``study``: write the study's file and the list of its runs."""
    about = {
        "version": _VERSION,
        "name": study.name,
        "comparisons": [
            {
                "folder": each.folder.name,
                "title": each.title,
                "baseline": each.baseline,
                "numbers": _numbers(each),
                "runs": {_below(folder, job): each.variants[job.folder] for job in each.jobs},
            }
            for each in comparisons
        ],
    }
    records.write_json(folder / STUDY_RECORD, about)
    records.write_bytes(folder / STUDY_FILE, study.text)


def _numbers(comparison: Comparison) -> dict[str, int]:
    """The numbers of the variants: those that a run of the variant has had in the folder before stay."""
    recorded, _ = find_recorded(job.folder for job in comparison.jobs)
    names = {folder.resolve(): name for folder, name in comparison.variants.items()}
    settings = {
        comparison.variants[job.folder]: job.config.model_dump(mode="json") for job in comparison.jobs
    }
    return variant_numbers(settings, known_numbers(recorded, names, settings))


def _below(folder: Path, job: Job) -> str:
    return job.folder.relative_to(folder).as_posix()


def _recorded_name(path: Path) -> str:
    try:
        about = from_json(read_file(path, _MOST_BYTES))
        if int(about["version"]) <= _VERSION:
            return str(about["name"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is damaged ({short(error)}): choose another --out.") from None
    raise ValueError(f"{path} was written by a newer regrow: upgrade regrow.")


def _job(config: RunConfig, folder: Path, found: _Found | None) -> Job:
    if found is None:
        return Job(config, folder, "new")
    return Job(config, found.folder, "done" if found.finished else "unfinished")


def _scan(folder: Path) -> _Disk:
    disk = _Disk()
    for path in sorted(folder.glob("*/*/config.yaml")):
        try:
            config = make_config(read_yaml(path)[0])
        except (ValueError, TypeError, AttributeError, OSError):
            disk.unreadable.append(path.parent)
            continue
        found = _Found(config, path.parent, records.is_finished(path.parent))
        key = run_key(config)
        if key not in disk.runs or (found.finished and not disk.runs[key].finished):
            disk.runs[key] = found
    return disk


def _homes(folder: Path, wanted: dict[str, list[Wanted]], disk: _Disk) -> dict[str, Path]:
    """The folder of each comparison: the one that holds a run of it, or a new one named by its settings."""
    homes: dict[str, Path] = {}
    others = dict(disk.runs)
    for key, runs in wanted.items():
        for run in runs:
            found = others.pop(run_key(run.config), None)
            if found is not None:
                homes.setdefault(key, found.folder.parent)
    for found in others.values():  # runs of methods and seeds that the study no longer has
        key = run_key(_comparison_of(found.config))
        if key in wanted and found.folder.parent not in homes.values():
            homes.setdefault(key, found.folder.parent)
    told_apart = [
        *(runs[0].comparison for runs in wanted.values()),
        *(_comparison_of(found.config) for found in others.values()),
    ]
    taken = {
        path.name.lower() for path in _entries(folder) if path.is_file() or any(path.glob("*/config.yaml"))
    }
    for key, runs in wanted.items():
        if key not in homes:
            this = runs[0].comparison
            alike = [unresolved(c) for c in told_apart if (c.model, c.data) == (this.model, this.data)]
            keys = [name for name in differing(alike) if name not in WHERE]
            homes[key] = folder / _free(_named(f"{this.model}-{this.data}", resolved(this), keys), taken)
    return homes


def _title(this: RunConfig, others: Sequence[RunConfig]) -> str:
    alike = [unresolved(each) for each in others if (each.model, each.data) == (this.model, this.data)]
    settings = resolved(this)
    keys = [key for key in differing(alike) if key not in _IN_TITLES]
    return ", ".join(filter(None, [title_of(settings), describe(settings, keys)]))


def _comparison_of(config: RunConfig) -> RunConfig:
    return normalised(config.model_copy(update={"method": "standard", "seed": 0}))


def _names(home: Path, runs: Sequence[Wanted], disk: _Disk) -> list[str]:
    """A folder name for each run of one comparison; an empty name for runs that have a folder."""
    there = {found.folder.name: found.config for found in disk.runs.values() if found.folder.parent == home}
    stems: dict[str, str] = {}  # by variant
    for name, config in there.items():
        stem = name.removesuffix(f"-seed{config.seed}")
        if stem != name:
            stems.setdefault(_variant(config), stem)
    by_method: dict[str, list[dict[str, Any]]] = {}
    for config in [*there.values(), *(run.config for run in runs)]:
        by_method.setdefault(config.method, []).append(_own(config))
    keys = {method: differing(settings) for method, settings in by_method.items()}
    taken_stems = {stem.lower() for stem in stems.values()}
    # A process that is killed before it has written the settings leaves only names with a dot.
    taken = {path.name.lower() for path in _entries(home) if path.is_file() or any(path.glob("[!.]*"))}
    names = []
    for run in runs:
        variant, method = _variant(run.config), run.config.method
        if variant not in stems:
            stems[variant] = _free(_named(method, _own(run.config), keys[method]), taken_stems)
        names.append(
            ""
            if run_key(run.config) in disk.runs
            else _free(f"{stems[variant]}-seed{run.config.seed}", taken)
        )
    return names


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _own(config: RunConfig) -> dict[str, Any]:
    own = own_settings(config.method)
    return {key: value for key, value in config.model_dump(mode="json").items() if key in own}


def _variant(config: RunConfig) -> str:
    return f"{config.method} {sorted(_own(config).items())}"


def _named(first: str, settings: dict[str, Any], keys: Sequence[str]) -> str:
    """``"repr-fraction0.2-criterion-l2"``: safe characters only, and not too long for a file system."""
    parts = [first]
    for key in keys:
        value = shown(settings[key])
        parts.append(f"{key}{'' if value[0].isdigit() else '-'}{value}")
    name = re.sub(r"[^A-Za-z0-9._+-]+", "_", "-".join(parts)).lstrip(".-")
    return name if len(name) <= _LONGEST else name[:_LONGEST].rstrip("._+-")


def _free(name: str, taken: set[str]) -> str:
    """``name``, or the first of ``name-2``, ``name-3`` … not in ``taken`` (lower case); adds it there."""
    free, number = name, 1
    while free.lower() in taken:
        number += 1
        free = f"{name}-{number}"
    taken.add(free.lower())
    return free
