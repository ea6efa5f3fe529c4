import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest

from regrow.study import launch, records
from regrow.study.config import RunConfig, make_config
from regrow.study.launch import choose_launcher, local, run_comparison, run_study

ROOT = Path(__file__).parents[2]
SMALL = {"width": 4, "train_size": 200, "epochs": 4, "threads": 1}
STUDY = """
methods:
  standard:
  repr: {fraction: [0.2, 0.3]}
seeds: 0-1
settings: {width: 4, train_size: [150, 200], epochs: 3, threads: 1}
"""


def configs(seeds: int) -> list[RunConfig]:
    pairs = [(seed, method) for seed in range(seeds) for method in ("standard", "repr")]
    return [make_config({**SMALL, "method": method, "seed": seed}) for seed, method in pairs]


def count_runs(runs: list, path: Path, **_: object) -> Path:
    """Write a report in no time, where the report is not what a test is about."""
    path.write_text(f"{len(runs)} runs")
    return path


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "write_report", count_runs)


def written(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}


def test_a_comparison_trains_what_is_missing_prints_a_table_and_writes_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_comparison(configs(2), tmp_path)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "RePr" in printed
    assert "95 %" in printed
    assert "[4/4] " in printed
    assert json.loads((tmp_path / "comparison.json").read_text()) == {
        "version": records.VERSION,
        "baseline": "standard",
        "methods": ["standard", "repr"],
        "seeds": [0, 1],
        "runs": ["standard-seed0", "repr-seed0", "standard-seed1", "repr-seed1"],
    }
    before = written(tmp_path)

    monkeypatch.setattr(launch, "write_report", count_runs)
    assert run_comparison(configs(3), tmp_path)
    assert "4 of 6 runs finished before" in capsys.readouterr().out
    assert (tmp_path / "report.html").read_text() == "6 runs"
    assert len(records.find_runs(tmp_path)) == 6
    assert before.items() <= written(tmp_path).items()


@pytest.mark.usefixtures("no_figures")
def test_a_comparison_goes_on_showing_the_runs_that_it_had_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_comparison(configs(1), tmp_path)
    added = [make_config({**SMALL, "method": method, "seed": 0}) for method in ("dropout", "standard")]
    assert run_comparison(added, tmp_path)
    assert (tmp_path / "report.html").read_text() == "3 runs"
    assert "Standard training: " in capsys.readouterr().out.split("dropout-seed0: test")[1], (
        "dropout is first"
    )
    about = json.loads((tmp_path / "comparison.json").read_text())
    assert about["baseline"] == "dropout"
    assert about["runs"] == ["dropout-seed0", "standard-seed0", "repr-seed0"]
    (tmp_path / "repr-seed0" / "config.yaml").write_text("torn: [")
    assert run_comparison(added, tmp_path)
    assert (tmp_path / "report.html").read_text() == "2 runs"


@pytest.mark.usefixtures("no_figures")
def test_runs_that_cannot_be_compared_with_those_before_are_refused_before_any_is_trained(
    tmp_path: Path,
) -> None:
    assert run_comparison(configs(1)[:1], tmp_path)
    other = make_config({**SMALL, "epochs": 6, "method": "dropout", "seed": 0})
    with pytest.raises(
        ValueError, match=r"holds another comparison: choose another --out.*epochs is 6 and 4"
    ):
        run_comparison([other], tmp_path)
    assert not (tmp_path / "dropout-seed0").exists()
    assert json.loads((tmp_path / "comparison.json").read_text())["runs"] == ["standard-seed0"]


def test_what_is_compared_is_recorded_before_it_is_trained(tmp_path: Path) -> None:
    def stop(_jobs: object, _watch: object) -> dict[Path, str]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_comparison(configs(1), tmp_path, launcher=nullcontext(stop))
    assert json.loads((tmp_path / "comparison.json").read_text())["baseline"] == "standard"


def test_folders_that_are_not_for_a_comparison(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("method: repr")
    (tmp_path / "study" / "grid").mkdir(parents=True)
    for name in ("study.yaml", "study.json"):
        (tmp_path / "study" / name).write_text("")
    for name, message in (
        ("file", "is a file"),
        ("run", "is the folder of one run"),
        ("study", "holds a study"),
        ("study/grid", "study holds a study"),
    ):
        with pytest.raises(ValueError, match=f"{message}: choose another --out"):
            run_comparison(configs(1), tmp_path / name)


@pytest.mark.usefixtures("no_figures")
def test_a_study_records_how_its_variants_are_drawn_and_new_ones_change_none(tmp_path: Path) -> None:
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    for fractions in ("[0.3]", "[0.2, 0.3]", "[0.1, 0.2, 0.3]"):
        file.write_text(
            f"methods: {{standard: , repr: {{fraction: {fractions}}}}}\nseeds: 0\n"
            "settings: {width: 4, train_size: 150, epochs: 3, threads: 1}\n"
        )
        assert run_study(file, out)
    (comparison,) = json.loads((out / "study.json").read_text())["comparisons"]
    assert comparison["title"] == "convnet on digits"
    numbers = {"standard": 0, "RePr, fraction 0.3": 0, "RePr, fraction 0.2": 1, "RePr, fraction 0.1": 2}
    assert comparison["numbers"] == numbers


def test_a_comparison_with_other_settings_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "standard-seed0").mkdir()
    settings = {**SMALL, "epochs": 9, "method": "standard", "seed": 0, "device": "elsewhere"}
    records.write_yaml(tmp_path / "standard-seed0" / "config.yaml", {"version": 1, **settings})
    for name, data in {
        "environment": {**records.environment("cpu", 1)},
        "result": {
            "version": 1,
            "test_accuracy": 0.5,
            "test_loss": 1.0,
            "validation_accuracy": 0.5,
            "train_seconds": 1.0,
            "seconds": 1.0,
            "parameters": 1,
            "filters": {},
        },
    }.items():
        records.write_json(tmp_path / "standard-seed0" / f"{name}.json", data)
    with pytest.raises(
        ValueError, match=r"standard-seed0 holds a finished run with .*epochs=9 .asked for: 4"
    ):
        run_comparison(configs(1), tmp_path)
    assert not (tmp_path / "repr-seed0").exists()


@pytest.mark.usefixtures("no_figures")
def test_a_study_runs_reports_and_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(STUDY)
    assert run_study(file, out, dry_run=True)
    assert "12 runs, 0 done, 12 to run" in capsys.readouterr().out
    assert not out.exists(), "--dry-run writes nothing"

    assert run_study(file, out)
    printed = capsys.readouterr().out
    assert "RePr, fraction 0.2" in printed
    names = {path.parent.relative_to(out).as_posix() for path in out.rglob("result.json")}
    assert names == {
        f"convnet-digits-train_size{size}/{method}-seed{seed}"
        for size in (150, 200)
        for method in ("standard", "repr-fraction0.2", "repr-fraction0.3")
        for seed in (0, 1)
    }
    assert (out / "study.yaml").read_text() == STUDY
    pages = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.html"))
    assert pages == [
        "convnet-digits-train_size150/report.html",
        "convnet-digits-train_size200/report.html",
        "index.html",
    ]
    index = (out / "index.html").read_text()
    assert all(f'href="{page}"' in index for page in pages[:2])
    assert not list(out.rglob("logs"))
    before = written(out)

    file.write_text(STUDY.replace("0-1", "0-2").replace("[0.2, 0.3]", "0.2").replace("[150, 200]", "200"))
    assert run_study(file, out)
    printed = capsys.readouterr().out
    assert "6 runs, 4 done, 2 to run" in printed
    assert {path.parent.name for path in written(out).keys() - before.keys()} == {
        "standard-seed2",
        "repr-fraction0.2-seed2",
    }
    assert before.items() <= written(out).items()


def test_a_model_that_does_not_exist_is_refused_before_anything_runs(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("methods: standard\nseeds: 0\nmodels: [convnet, resnt]\n")
    with pytest.raises(ValueError, match="resnet"):
        run_study(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def histories(out: Path) -> list[Path]:
    """The files with a run's epochs; none if a temporary folder vanishes while it is looked through."""
    try:
        return list(out.rglob("epochs.jsonl"))
    except FileNotFoundError:
        return []


@pytest.mark.parametrize(
    ("number", "send"),
    [
        (signal.SIGINT, os.killpg),  # what a terminal does: every process of the command gets it
        (signal.SIGTERM, os.kill),
    ],
)
def test_an_interrupt_stops_the_workers_and_the_same_command_goes_on(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: int,
    send: Callable[[int, int], None],
) -> None:
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(
        "methods: [standard]\nseeds: 0-1\nsettings: {width: 4, train_size: 300, epochs: 2000, threads: 1}\n"
    )
    command = [sys.executable, "-m", "regrow", "study", str(file), "--out", str(out), "--jobs", "2"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell starts what runs in its background with interrupts ignored, and that is inherited.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while len(histories(out)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        send(process.pid, number)
        printed, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert "regrow: stopped; give the same command again to continue." in printed
    assert "Traceback" not in printed
    lengths = [path.stat().st_size for path in out.rglob("epochs.jsonl")]
    assert len(lengths) == 2
    time.sleep(0.3)
    assert [path.stat().st_size for path in out.rglob("epochs.jsonl")] == lengths, "a worker goes on"
    assert run_study(file, out, dry_run=True)
    assert "2 runs, 0 done, 2 to run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("local", {"jobs": 0}, "1 or more"),
        ("local", {"jobs": 10**12}, "1024 at most"),
        ("local", {"address": "auto"}, "--address are for --launcher ray"),
        ("ray", {"jobs": 2}, "--jobs is for local"),
        ("rai", {}, "did you mean 'ray'"),
    ],
)
def test_options_that_do_not_fit_the_launcher(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_launcher(name, **options)


@pytest.mark.usefixtures("no_figures")
def test_one_job_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_comparison(configs(1), tmp_path, launcher=local(1))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert [line.split(":")[0] for line in lines] == ["[1/2] standard-seed0", "[2/2] repr-seed0"]


@pytest.mark.usefixtures("no_figures")
def test_the_example_is_what_the_page_shows_and_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = (ROOT / "examples" / "study.yaml").read_text()
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert blocks[0] == example
    assert run_study(ROOT / "examples" / "study.yaml", tmp_path / "out")
    assert "12 runs, 0 done, 12 to run" in capsys.readouterr().out
    for name in ("convnet-digits-train_size200/repr-fraction0.4-seed1", "convnet-digits-train_size500"):
        assert (tmp_path / "out" / name).is_dir()
    (tmp_path / "study.yaml").write_text(blocks[1])
    assert run_study(tmp_path / "study.yaml", tmp_path / "two", dry_run=True)
    assert "90 runs" in capsys.readouterr().out  # 3 variants × 5 seeds × 3 nets × 2 data sets


@pytest.mark.usefixtures("no_figures")
def test_the_example_of_changing_data_is_what_the_page_shows_and_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = (ROOT / "examples" / "changing_data.yaml").read_text()
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert f"```yaml\n{example}```" in page
    assert run_study(ROOT / "examples" / "changing_data.yaml", tmp_path / "out", dry_run=True)
    assert "12 runs, 0 done, 12 to run" in capsys.readouterr().out
    short = example.replace("epochs: 60", "epochs: 4").replace("seeds: 0-2", "seeds: 0")
    (tmp_path / "short.yaml").write_text(short)
    assert run_study(tmp_path / "short.yaml", tmp_path / "short")
    shown = capsys.readouterr().out
    assert "convnet on digits, 4 tasks of permuted labels" in shown
    assert "after switches: mean test accuracy in tasks 2 to 4" in shown
