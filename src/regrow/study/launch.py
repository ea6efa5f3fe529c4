"""Many runs, one after another, and the report about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from regrow.study import records
from regrow.study.compare import headline, summarise, table
from regrow.study.config import RunConfig
from regrow.study.progress import Progress
from regrow.study.report import write_report
from regrow.study.train import train


def run_comparison(configs: Sequence[RunConfig], folder: Path, *, rerun: bool = False) -> Path:
    """Train what ``configs`` say and is not finished yet, print the comparison and write the report.

    Args:
        configs: one for every run; the first one's method is the baseline.
        folder: run folders go below it, named by method and seed, beside ``comparison.json``.
        rerun: train finished runs again.

    Returns:
        The report's path.

    Raises:
        ValueError, Diverged: as ``train``; runs that were finished before stay.
    """
    console = Console()
    folders = [records.run_folder(folder, config.method, config.seed) for config in configs]
    for number, (config, run) in enumerate(zip(configs, folders, strict=True), start=1):
        ran = train(config, run, rerun=rerun, progress=Progress())
        result = records.read_run(run).result or {}
        console.print(
            f"[{number}/{len(configs)}] {run.name}: test accuracy {result['test_accuracy']:.2%}, "
            + (f"trained in {result['train_seconds']:.1f} s" if ran else "finished before"),
            markup=False,
            highlight=False,
        )
    baseline = configs[0].method
    records.write_json(
        records.comparison_path(folder),
        {
            "version": records.VERSION,
            "baseline": baseline,
            "methods": list(dict.fromkeys(config.method for config in configs)),
            "seeds": sorted({config.seed for config in configs}),
            "runs": [run.name for run in folders],
        },
    )
    runs = [records.read_run(run) for run in folders]
    summaries = summarise(runs, baseline)
    page = write_report(
        runs, folder / "report.html", baseline=baseline, title=f"{configs[0].model} on {configs[0].data}"
    )
    console.print(table(summaries))
    console.print(headline(summaries), highlight=False)
    console.print(f"report: {page}", highlight=False)
    return page
