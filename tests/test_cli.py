"""The command as a person calls it, in a process of its own where that matters."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import forking
from regrow.cli import app, main

SMALL = ["--width", "4", "--train-size", "100", "--threads", "1"]


def test_the_sentence_of_the_readme_trains_and_leaves_a_run_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    sentence = "train --data digits --model convnet --method repr --seed 3 --epochs 14 --out"
    arguments = sentence.split(" ")
    command = [sys.executable, "-m", "regrow", *arguments, str(out), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("test accuracy ")
    assert done.stderr == "", "a progress bar outside a terminal"
    assert sorted(path.name for path in out.iterdir()) == [
        "config.yaml",
        "environment.json",
        "epochs.jsonl",
        "events.jsonl",
        "result.json",
        "weights.safetensors",
    ]
    assert len((out / "epochs.jsonl").read_text().splitlines()) == 14
    again = CliRunner().invoke(app, [*arguments, str(out), *SMALL])
    assert again.output.startswith("already finished")


def test_an_error_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    failed = forking.regrow("train", "--model", "vg", "--out", tmp_path / "run", folder=tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.startswith("regrow: ")
    assert "vgg" in failed.stderr
    assert failed.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [[], ["train"], ["compare"], ["study"], ["report"], ["curve"]])
def test_help_explains_and_never_imports_pytorch(command: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['regrow', *{command}, '--help']\n"
        "from regrow.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'scipy', 'matplotlib'} & set(sys.modules), 'imported for --help'"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    words = {
        "train": ["--data", "--out", "Example:"],
        "compare": ["--seeds", "--methods", "--jobs"],
        "study": ["--dry-run", "--jobs", "--launcher", "Example:"],
        "curve": ["--criterion", "--fractions", "Example:"],
    }
    for word in words.get("".join(command), ["report"]):
        assert word in shown.stdout


def test_flags_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("epochs: 5\nmethod: repr\nexclude: [features.1]\nskip_first: false\n")
    out = tmp_path / "run"
    done = CliRunner().invoke(
        app, ["train", "--config", str(file), "--epochs", "3", "--out", str(out), *SMALL]
    )
    assert done.exit_code == 0, done.output
    recorded = (out / "config.yaml").read_text()
    assert "epochs: 3" in recorded
    assert "method: repr" in recorded
    assert "- features.1" in recorded
    assert "skip_first: false" in recorded


def test_compare_and_report(tmp_path: Path) -> None:
    runner = CliRunner()
    arguments = ["compare", "--seeds", "0,1", "--epochs", "3", "--out", str(tmp_path / "cmp"), *SMALL]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "cmp" / "report.html").exists()
    page = tmp_path / "page.html"
    done = runner.invoke(app, ["report", str(tmp_path / "cmp"), "--out", str(page)])
    assert done.exit_code == 0, done.output
    assert page.read_text().count("<html") == 1


def test_a_study_that_fails_in_part_exits_with_1_and_reports_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        "methods: standard\nseeds: 0\nmodels: {convnet: {width: 4}, vgg: {depth: 12}}\n"
        "settings: {train_size: 100, epochs: 1, threads: 1}\n"
    )
    arguments = ["study", str(file), "--out", str(tmp_path / "out")]
    planned = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "2 runs, 0 done, 2 to run" in planned.output
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "1 run failed; the same command tries them again:" in done.output
    assert (tmp_path / "out" / "convnet-digits" / "report.html").exists()


def test_curve_measures_two_runs_and_the_report_shows_it(tmp_path: Path) -> None:
    runs = [tmp_path / "cmp" / name for name in ("standard-seed0", "repr-seed0")]
    for run in runs:
        method = run.name.split("-")[0]
        trained = CliRunner().invoke(
            app, ["train", "--method", method, "--epochs", "3", "--out", str(run), *SMALL]
        )
        assert trained.exit_code == 0, trained.output
    measured = ["--criterion", "random", "--fractions", "0,50", "--split", "validation"]
    done = forking.regrow("curve", *runs, *measured, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "a progress bar outside a terminal"
    assert "2 of 2 runs measured." in done.stdout
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    written = [path.name for path in (tmp_path / "cmp").iterdir() if path.is_file()]
    assert sorted(written) == ["curve.json", "curve.png", "curve.svg"]
    assert all((run / "curve-validation-random-layer.json").exists() for run in runs)
    again = CliRunner().invoke(
        app,
        [
            "curve",
            str(tmp_path / "cmp"),
            "--criterion",
            "random",
            "--fractions",
            "50",
            "--split",
            "validation",
        ],
    )
    assert "0 of 2 runs measured" in again.output
    done = CliRunner().invoke(app, ["report", str(tmp_path / "cmp")])
    assert done.exit_code == 0, done.output
    assert 'id="pruned"' in (tmp_path / "cmp" / "report.html").read_text()


def test_unknown_values_are_refused(tmp_path: Path) -> None:
    typo = tmp_path / "study.yaml"
    typo.write_text("methods: standard\nseeds: 0\nsettings: {epoch: 3}\n")
    for arguments, message in (
        (["compare", "--methods", "standard,rper"], "rper"),
        (["compare", "--seeds", "x"], "0-4"),
        (["train", "--config", str(tmp_path / "none.yaml")], "no configuration file"),
        (["report", str(tmp_path)], "no run found"),
        (["study", str(typo)], "unknown setting 'epoch'; did you mean 'epochs'"),
        (["study", str(typo), "--launcher", "rya"], "did you mean 'ray'"),
        (["compare", "--jobs", "0"], "1 or more"),
        (["curve", str(tmp_path)], "no run found"),
        (["curve", str(tmp_path), "--fractions", "0.3"], "write 30"),
        (["curve", str(tmp_path), "--readings", "zeroed,remved"], "did you mean 'removed'"),
        (["curve", str(tmp_path), "--criterion", "l3"], "did you mean 'l2'"),
        (["curve", str(tmp_path), "--scope", "layers"], "did you mean 'layer'"),
        (["curve", str(tmp_path), "--split", "train"], "choose from 'test', 'validation'"),
    ):
        out = [] if arguments[0] in ("report", "curve") else ["--out", str(tmp_path / "o")]
        failed = CliRunner().invoke(app, [*arguments, *out])
        assert failed.exit_code == 1
        assert message in str(failed.exception)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x]\nb: *a", "anchor &a"),
        ("seed: 18446744073709551616", "seed: "),
        ("threads: 1000000000000", "threads: "),
        ("device: meta", "device 'meta' cannot be used here"),
        ("width: 10000\nmodel: vgg", "parameters"),
        ("- " * 10_000, "nested deeper than 20"),
        ("epochs: " + "9" * 5000, "characters"),
        ("model: " + "x" * 9000, "model: "),
    ],
)
def test_hostile_settings_end_in_one_short_line(
    tmp_path: Path,
    text: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    command = ["regrow", "train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert message in said
    assert said.startswith("regrow: ")
    assert said.count("\n") == 1
    assert len(said) < 500
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
