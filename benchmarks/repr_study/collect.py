"""Make the tables of this study from the runs: `python benchmarks/repr_study/collect.py runs/plastic …`.

For each study folder it writes, beside this file, `NAME.json` with the numbers of every run, and `NAME.md`
with a table for each comparison. A method that regrows filters is held against every other method, paired by
seed; p values are corrected by Holm's method over all these pairs of a comparison.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regrow.study import records
from regrow.study.paired import Paired, holm, paired, spread
from regrow.study.words import bounds, label, mention, p_value, percent, signed

HERE = Path(__file__).parent
_REGROWN = ("repr", "restart")


def main(folders: Sequence[Path], out: Path) -> None:
    """Write the tables of the studies in ``folders`` to the folder ``out``."""
    for folder in folders:
        study = json.loads(records.study_path(folder).read_text())
        found = [_comparison(folder, each) for each in study["comparisons"]]
        found = [each for each in found if each["runs"]]
        records.write_text(
            out / f"{folder.name}.json", json.dumps({"version": 1, "comparisons": found}) + "\n"
        )
        records.write_text(out / f"{folder.name}.md", _page(folder.name, found))


def _comparison(folder: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of all finished runs of a comparison, with its title and baseline."""
    runs = []
    for place, name in about["runs"].items():
        if not records.is_finished(folder / place):
            continue
        run = records.read_run(folder / place)
        result = run.result or {}
        runs.append(
            {
                "name": name,
                "method": run.method,
                "seed": run.seed,
                "machine": [run.environment[key] for key in ("processor", "device", "torch", "regrow")],
                **{
                    key: result[key]
                    for key in (
                        *("test_accuracy", "validation_accuracy", "best_epoch", "best_validation_accuracy"),
                        *("best_test_accuracy", "task_accuracies", "mean_accuracy_after_switch"),
                        *("train_seconds", "train_flops"),
                    )
                },
            }
        )
    return {"title": about["title"], "baseline": about["baseline"], "runs": runs}


def _page(name: str, comparisons: Sequence[Mapping[str, Any]]) -> str:
    machines = sorted({", ".join(map(str, run["machine"])) for each in comparisons for run in each["runs"]})
    hours = sum(run["train_seconds"] for each in comparisons for run in each["runs"]) / 3600
    count = sum(len(each["runs"]) for each in comparisons)
    lines = [
        f"# {name}",
        "",
        f"{count} runs, {hours:.1f} hours of training in all (runs shared the machine), on "
        f"{'; '.join(machines)} (processor, device, torch, regrow). Accuracies are test %, mean ± standard "
        "deviation over seeds; differences are points, paired by seed, with 95 % t intervals.",
    ]
    for each in comparisons:
        sequence = any(run["mean_accuracy_after_switch"] is not None for run in each["runs"])
        lines += ["", f"## {each['title']}", ""]
        if sequence:
            lines += ["Accuracy is the mean over all tasks but the first.", ""]
        lines += _table(each, "mean_accuracy_after_switch" if sequence else "test_accuracy")
        if not sequence and all(run["best_test_accuracy"] is not None for run in each["runs"]):
            lines += ["", "The same for the epoch that validates best:", ""]
            lines += _table(each, "best_test_accuracy")
    return "\n".join(lines) + "\n"


def _table(comparison: Mapping[str, Any], key: str) -> list[str]:
    values: dict[str, dict[int, float]] = {}
    methods: dict[str, str] = {}
    for run in comparison["runs"]:
        values.setdefault(run["name"], {})[run["seed"]] = 100 * run[key]
        methods[run["name"]] = run["method"]
    baseline = comparison["baseline"]
    regrown = [name for name in values if methods[name].split("+")[0] in _REGROWN]
    controls = [name for name in values if name not in regrown]
    pairs = [(name, control) for name in regrown for control in controls if _shared(values, name, control)]
    tests = {pair: paired(values[pair[1]], values[pair[0]]) for pair in pairs}
    adjusted = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    lines = [
        f"| method | n | accuracy | against {mention(baseline)} | against the best other method |",
        "|---|--:|--:|--:|---|",
    ]
    best = max(controls, key=lambda name: statistics.fmean(values[name].values()), default="")
    for name, mine in values.items():
        accuracy = spread([value / 100 for value in mine.values()])
        row = [label(name), str(len(mine)), percent(accuracy)]
        if name == baseline or not _shared(values, name, baseline):
            row.append("")
        else:
            row.append(_difference(paired(values[baseline], mine)))
        if (name, best) in tests:
            test, p = tests[name, best], adjusted[name, best]
            row.append(f"{_difference(test)}, p {_said(p)} ({label(best)})")
        else:
            row.append("")
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _shared(values: Mapping[str, Mapping[int, float]], one: str, other: str) -> bool:
    return one in values and other in values and bool(values[one].keys() & values[other].keys())


def _said(p: float | None) -> str:
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def _difference(test: Paired) -> str:
    return f"{signed(test.mean)} {bounds(test.low, test.high)}".rstrip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="study folders")
    parser.add_argument("--out", type=Path, default=HERE, help="where to write (default: beside this file)")
    arguments = parser.parse_args()
    main(arguments.folders, arguments.out)
