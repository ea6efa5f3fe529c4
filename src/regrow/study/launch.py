"""Plan many runs, train them, and report on them. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from regrow.short import short
from regrow.study import records
from regrow.study.compare import check_comparable, headline, summarise, table, task_table
from regrow.study.config import RunConfig, make_config
from regrow.study.gather import read_each
from regrow.study.identity import check_same_run, resolved
from regrow.study.index import IndexRow, write_index
from regrow.study.lineup import line_up, title_of
from regrow.study.live import LiveTable
from regrow.study.local import run_local
from regrow.study.names import MODEL_FAMILIES
from regrow.study.plan import STUDY_FILE, STUDY_RECORD, Comparison, Job, check_folder, claim, jobs_of, plan
from regrow.study.records import RunRecord
from regrow.study.report import write_report
from regrow.study.seeds import as_ranges
from regrow.study.studyfile import read_study
from regrow.study.teachers import check_teachers
from regrow.study.watching import LOGS, Watch
from regrow.study.words import label
from regrow.suggest import nearest

# A context that yields a function, which trains jobs and returns {folder: error} of those that failed.
Launcher = AbstractContextManager[Callable[[Sequence[Job], Watch], dict[Path, str]]]

REPORT = "report.html"
_MOST_AT_A_TIME = 1024


def local(workers: int | None = None, *, rerun: bool = False) -> Launcher:
    """Train in processes of this machine, ``workers`` at a time (default: as many as there are CPUs).

    Raises:
        ValueError: ``workers`` is below 1 or above 1,024.
    """
    if workers is not None and not 1 <= workers <= _MOST_AT_A_TIME:
        raise ValueError(
            f"--jobs is how many runs to train at a time, 1 or more and {_MOST_AT_A_TIME} at most, not "
            f"{short(workers)}."
        )
    return nullcontext(partial(run_local, workers=workers, rerun=rerun))


def choose_launcher(
    name: str,
    *,
    jobs: int | None = None,
    address: str | None = None,
    cpus_per_run: int | None = None,
    gpus_per_run: float | None = None,
) -> Launcher:
    """Choose the launcher that the options of the command ask for.

    Raises:
        ValueError: an unknown launcher, an option that belongs to the other one, or a bad value.
    """
    options = {"--address": address, "--cpus-per-run": cpus_per_run, "--gpus-per-run": gpus_per_run}
    given = [option for option, value in options.items() if value is not None]
    if name == "local":
        if given:
            raise ValueError(f"{', '.join(given)} are for --launcher ray.")
        return local(jobs)
    if name != "ray":
        raise ValueError(f"unknown launcher {short(name)}{nearest(name, ['local', 'ray'])}")
    if jobs is not None:
        raise ValueError("--jobs is for local processes: with Ray, --cpus-per-run says how many runs fit.")
    from regrow.study.cluster import ray_cluster

    return ray_cluster(address, cpus=1 if cpus_per_run is None else cpus_per_run, gpus=gpus_per_run or 0)


def run_study(
    file: Path, folder: Path | None = None, *, dry_run: bool = False, launcher: Launcher | None = None
) -> bool:
    """Show which runs of the study in ``file`` are done, train the rest, and write a report per comparison.

    Args:
        file: the study, as in ``docs/study.md``.
        folder: for runs and reports (default: runs/NAME).
        dry_run: only show what would run.
        launcher: where to train (default: ``local()``).

    Returns:
        Whether every run is finished and every report written; failures have been printed.

    Raises:
        ValueError: the file, the folder or the launcher's settings are invalid; nothing has been written
            then.
    """
    console = Console()
    study = read_study(file)
    folder = Path("runs") / study.name if folder is None else folder
    check_folder(study, folder)
    comparisons, unreadable = plan(study, folder)
    jobs = jobs_of(comparisons)
    check_models({job.config.model for job in jobs})
    check_teachers(job.config for job in jobs if job.state != "done")
    for path in unreadable:
        _say(console, f"{path} cannot be read: it is left as it is.", "yellow")
    console.print(plan_table(comparisons))
    rest = [job for job in jobs if job.state != "done"]
    done = len(jobs) - len(rest)
    _say(console, f"{study.name}: {len(jobs)} runs, {done} done, {len(rest)} to run; in {folder}")
    if dry_run:
        return True
    failed: dict[Path, str] = {}
    if rest:
        with launcher or local() as train:
            claim(study, folder, comparisons)
            failed = _train(train, rest, folder, console)
    else:
        claim(study, folder, comparisons)
    reported = [_report(each, console) for each in comparisons]
    if len(comparisons) > 1:
        rows = [row for row in reported if row is not None]
        page = write_index(folder / "index.html", study.name, rows, file=STUDY_FILE)
        _say(console, f"all reports: {page}")
    return _told(failed, console) and None not in reported


def run_comparison(
    configs: Sequence[RunConfig], folder: Path, *, rerun: bool = False, launcher: Launcher | None = None
) -> bool:
    """Train the runs of ``configs`` that are not finished, print the comparison and write the report.

    Args:
        configs: one for every run; the method of the first is the baseline.
        folder: the run folders are made in it, named by method and seed, beside ``comparison.json``.
        rerun: train finished runs again.
        launcher: where to train (default: ``local()``).

    Returns:
        Whether every run is finished and the report written; failures have been printed.

    Raises:
        ValueError: a run that is finished in ``folder`` has other settings, or a model's name is unknown.
    """
    console = Console()
    _check_home(folder)
    jobs = [_comparison_job(config, folder, rerun) for config in configs]
    check_models({config.model for config in configs})
    check_teachers(job.config for job in jobs if job.state != "done")
    compared = jobs + _compared_before(jobs, folder)
    rest = [job for job in jobs if job.state != "done"]
    if len(rest) < len(jobs):
        _say(console, f"{len(jobs) - len(rest)} of {len(jobs)} runs finished before")
    failed = {}
    if rest:
        with launcher or local(rerun=rerun) as train:
            _record(folder, compared)
            failed = _train(train, rest, folder, console)
    else:
        _record(folder, compared)
    title = title_of(configs[0].model_dump())
    variants: dict[Path, str] = {job.folder: job.config.method for job in compared}
    reported = _report(Comparison(folder, tuple(compared), variants, configs[0].method, title), console)
    return _told(failed, console) and reported is not None


def plan_table(comparisons: Sequence[Comparison]) -> Table:
    """A table for the terminal: the seeds that are done and to run, by comparison and method."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("comparison", "method", "done", "unfinished", "to run"):
        shown.add_column(column, overflow="fold")
    for each in comparisons:
        first = each.folder.name
        for variant in dict.fromkeys(each.variants.values()):
            seeds: dict[str, list[int]] = {"done": [], "unfinished": [], "new": []}
            for job in each.jobs:
                if each.variants[job.folder] == variant:
                    seeds[job.state].append(job.config.seed)
            cells = [first, label(variant), *map(as_ranges, seeds.values())]
            shown.add_row(*map(Text, cells))
            first = ""
    return shown


def _train(
    train: Callable[[Sequence[Job], Watch], dict[Path, str]],
    jobs: Sequence[Job],
    root: Path,
    console: Console,
) -> dict[Path, str]:
    try:
        with LiveTable(jobs, root, console=console) as shown:
            return train(jobs, shown)
    finally:
        for logs in {job.folder.parent / LOGS for job in jobs}:
            if logs.is_dir() and not any(logs.iterdir()):
                logs.rmdir()


def _told(failed: dict[Path, str], console: Console) -> bool:
    if not failed:
        return True
    count = f"{len(failed)} run{'s' if len(failed) > 1 else ''} failed"
    _say(console, f"{count}; the same command tries them again:", "red")
    for folder, error in failed.items():
        _say(console, f"  {folder}: {error}")
    return False


def _report(comparison: Comparison, console: Console) -> IndexRow | None:
    """Print the findings and write the page; if there can be no page, print why and return None."""
    finished = [job.folder for job in comparison.jobs if records.is_finished(job.folder)]
    if not finished:
        _say(console, f"{comparison.folder}: no run is finished, so there is no report.")
        return None
    try:
        runs, left_out = read_each(finished)
        shown = line_up(runs)
        left_out |= shown.left_out
        for why in left_out.values():
            _say(console, f"left out: {why}", "yellow")
        summaries = summarise(shown.runs, shown.baseline, shown.names)
        page = write_report(
            shown.runs,
            comparison.folder / REPORT,
            title=comparison.title,
            baseline=shown.baseline,
            variants=shown.names,
            numbers=shown.numbers,
            left_out=left_out,
        )
    except ValueError as error:
        _say(console, f"{comparison.folder}: no report: {error}", "red")
        return None
    _say(console, f"\n{comparison.title}", "bold")
    console.print(table(summaries))
    if (by_task := task_table(summaries)) is not None:
        console.print(by_task)
    found = headline(summaries)
    console.print(found, markup=False, highlight=False)
    _say(console, f"report: {page}")
    return IndexRow(comparison.title, page, found, len(finished), len(comparison.jobs))


def _say(console: Console, text: str, style: str | None = None) -> None:
    """Print ``text`` unchanged: a folder's name is not markup, and a path must stay on one line."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _check_home(folder: Path) -> None:
    """Raise ``ValueError`` if ``folder`` is not one for a comparison."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another --out.")
    if records.config_path(folder).exists():
        raise ValueError(f"{folder} is the folder of one run: choose another --out.")
    for home in (folder, folder.resolve().parent):
        if (home / STUDY_FILE).exists() and (home / STUDY_RECORD).exists():
            raise ValueError(f"{home} holds a study: choose another --out, or add to {home / STUDY_FILE}.")


def _comparison_job(config: RunConfig, folder: Path, rerun: bool) -> Job:
    run = records.run_folder(folder, config.method, config.seed)
    if rerun or not records.config_path(run).exists():
        return Job(config, run, "new")
    check_same_run(config, run)
    return Job(config, run, "done" if records.is_finished(run) else "unfinished")


def _compared_before(jobs: Sequence[Job], folder: Path) -> list[Job]:
    """The other runs of the comparison in ``folder``: its report goes on showing them.

    Raises:
        ValueError: ``jobs`` cannot be compared with them.
    """
    if not records.comparison_path(folder).is_file():
        return []
    new = {job.folder.name for job in jobs}
    before = []
    for name in records.read_comparison(records.comparison_path(folder))["runs"]:
        run = folder / str(name)
        if name in new:
            continue
        with suppress(ValueError):  # a run that was removed, or cannot be read
            before.append(Job(make_config(records.read_config(run)), run, "done"))
    try:
        check_comparable(
            [RunRecord(job.folder, resolved(job.config), {}, [], [], None) for job in [*jobs, *before]]
        )
    except ValueError as error:
        raise ValueError(f"{folder} holds another comparison: choose another --out. {error}") from None
    return before


def _record(folder: Path, jobs: Sequence[Job]) -> None:
    """Write down what is compared in ``folder``, for ``regrow report`` and ``regrow curve``."""
    records.write_json(
        records.comparison_path(folder),
        {
            "version": records.VERSION,
            "baseline": jobs[0].config.method,
            "methods": list(dict.fromkeys(job.config.method for job in jobs)),
            "seeds": sorted({job.config.seed for job in jobs}),
            "runs": [job.folder.name for job in jobs],
        },
    )


def check_models(names: Iterable[str]) -> None:
    """Raise ``ValueError`` for an unknown model, before the first run would."""
    rest = [name for name in names if name not in MODEL_FAMILIES]
    if rest:
        from regrow.study.models import model_channels

        for name in rest:
            model_channels(name, 3)
