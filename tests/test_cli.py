"""The command as a person calls it, in a process of its own where that matters."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import forking
from regrow.cli import app, main
from regrow.study import page
from regrow.study.records import read_config
from regrow.study.typed import Mistyped

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
        "gradients.jsonl",
        "result.json",
        "weights.safetensors",
    ]
    assert len((out / "epochs.jsonl").read_text().splitlines()) == 14
    again = CliRunner().invoke(app, [*arguments, str(out), *SMALL])
    assert again.output.startswith("already finished")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("train --model vg --out run", "vgg"),
        ("train --data fashon --out run", "did you mean 'fashion-mnist'?"),
        ("train --method rper --out run", "did you mean 'repr' or"),
        ("train --fraction 0.3 --out run", "--fraction belongs to the methods repr, dsd and restart"),
        ("train --method repr --epochs 2 --out run", "train for 3 epochs or more"),
        ("train --preset papr --out run", "did you mean 'paper'?"),
        ("train --model C3(8) --depth 4 --out run", "leave depth out"),
        ("compare --preset paper --epochs 50 --out run", "train for 91 epochs or more, not 50"),
        ("train --halve-every 100 --out run", "--halve-every belongs to the schedule halving"),
        ("compare --methods standard,dropuot --out run", "did you mean 'dropout'"),
        ("compare --seeds 3-1 --out run", "got '3-1'"),
        ("compare --methods standard,dropout --criterion l1 --out run", "would be ignored with standard and"),
        ("prune alexnot --fraction 0.5 --out run", "did you mean 'alexnet'"),
        ("prune alexnet --data cifar --fraction 0.5 --out run", "did you mean 'cifar10'"),
        ("prune alexnet --weights BEST --fraction 0.5 --out run", "alexnet has no weights 'BEST'"),
        ("prune alexnet --weights none --data-dir . --fraction 0.5 --out run", "pass --data too"),
        ("prune . --scope isomorph --fraction 0.5 --out run", "did you mean 'isomorphic'"),
        ("curve . --criterion l3", "did you mean 'l2' or 'l1'?"),
        ("curve . --fractions 0.5", "write 50"),
    ],
)
def test_what_is_typed_wrong_is_one_line_and_exit_code_2_before_any_work(
    tmp_path: Path, arguments: str, word: str
) -> None:
    failed = forking.regrow(*arguments.split(), folder=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.startswith("regrow: ")
    assert word in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert failed.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stderr", "stdout"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("report nowhere", "there is no folder nowhere"),
        ("train --config none.yaml --out run", "no configuration file"),
        ("prune . --fraction 0.5 --out run", "not a run folder"),
        ("compare --out stdout", "is a file"),
    ],
)
def test_another_error_is_one_line_and_exit_code_1(tmp_path: Path, arguments: str, word: str) -> None:
    failed = forking.regrow(*arguments.split(), folder=tmp_path)
    assert failed.returncode == 1
    assert word in failed.stderr
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


def test_flags_and_files_override_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("width: 4\nbatch_size: 32\nmodel: c3\n")
    flags = "--epochs 2 --train-size 100 --threads 1 --lr 0.02 --pooling max --config"
    arguments = ["train", "--preset", "paper", *flags.split(), str(file), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    config = read_config(tmp_path / "run")
    assert (config["epochs"], config["batch_size"], config["lr"]) == (2, 32, 0.02)
    assert (config["width"], config["pooling"], config["batch_norm"]) == (4, "max", False)
    assert (config["momentum"], config["augmentation"], config["schedule"]) == (0, "none", "constant")
    assert "preset" not in config


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


def looks(page: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """The headline of a report, and the names and colours of its methods, in their order."""
    text = page.read_text(encoding="utf-8")
    head = re.findall(r"<h1>.*?</h1>|<p class=\"lead\">.*?</p>", text)
    key = re.findall(r'<p class="key">.*?</p>', text, re.DOTALL)[0]
    return head, [(name, color) for color, name in re.findall(r'stroke="(#\w+)".*?</svg>(.*?)</span>', key)]


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without pictures, which take most of the time."""
    monkeypatch.setattr(page, "_uri", lambda _draw, _width: "")


def done(*arguments: object) -> str:
    """What the command prints, which ends well."""
    ended = CliRunner().invoke(app, list(map(str, arguments)))
    assert ended.exit_code == 0, ended.output
    return ended.output


@pytest.mark.usefixtures("no_figures")
def test_report_and_curve_show_a_comparison_as_compare_did(tmp_path: Path) -> None:
    out, written = tmp_path / "cmp", tmp_path / "page.html"
    compare = ["compare", "--epochs", 3, "--out", out, *SMALL]
    done(*compare, "--methods", "repr,standard,dropout", "--seeds", "0,1")
    compared = looks(out / "report.html")
    assert compared[0][0] == "<h1>convnet on digits</h1>"
    assert [name for name, _ in compared[1]] == ["RePr", "Standard training", "Dropout"]
    assert compared[1][1] == ("Standard training", "#000000")
    done("report", out, "--out", written)
    assert written.read_text().count("<html") == 1
    assert looks(written) == compared

    done("curve", out, "--fractions", "0,50", "--readings", "zeroed")
    drawn = (out / "curve.svg").read_text()
    assert all(color.lower() in drawn for _, color in compared[1])
    killed = shutil.copytree(out / "dropout-seed1", out / "dropout-seed2")
    (killed / "config.yaml").write_text((killed / "config.yaml").read_text().replace("seed: 1", "seed: 2"))
    (killed / "result.json").unlink()
    for runs in ([out], [out / "dropout-seed0", out], sorted(out.glob("*-seed*"), reverse=True)):
        done("report", *runs, "--out", written)
        assert looks(written) == compared

    # Another baseline: other sentences, the same colours.
    done("report", out, "--out", written, "--baseline", "dropout")
    assert looks(written)[1][0][0] == "Dropout"
    assert dict(looks(written)[1]) == dict(compared[1])
    written.unlink()
    refused = CliRunner().invoke(app, ["report", str(out), "--out", str(written), "--baseline", "standrd"])
    assert isinstance(refused.exception, Mistyped)
    assert "did you mean 'standard'?" in str(refused.exception)
    assert not written.exists()

    # Other seeds and methods: the report is about all runs, and no method changes its colour.
    done(*compare, "--methods", "repr,bridgeout", "--seeds", 2)
    again = looks(out / "report.html")
    assert dict(again[1]).items() > dict(compared[1]).items()
    done("report", out, "--out", written)
    assert looks(written) == again


@pytest.mark.usefixtures("no_figures")
def test_report_and_curve_show_a_study_as_the_study_did(tmp_path: Path) -> None:
    file, out, written = tmp_path / "study.yaml", tmp_path / "out", tmp_path / "page.html"
    colors: dict[str, str] = {}
    for fractions in ("[0.4, 0.2]", "[0.4, 0.3, 0.2]"):
        file.write_text(
            f"methods: {{dropout: {{p: [0.3, 0.1]}}, standard: , repr: {{fraction: {fractions}}}}}\n"
            "seeds: 0\nsettings: {width: 4, train_size: 100, epochs: 3, threads: 1}\n"
        )
        done("study", file, "--out", out)
        reported = looks(out / "convnet-digits" / "report.html")
        for folder in (out, out / "convnet-digits"):
            done("report", folder, "--out", written)
            assert looks(written) == reported
        found = dict(reported[1])
        assert len(set(found.values())) == len(found)
        assert found.items() >= colors.items()
        colors = found
    assert list(colors)[:3] == ["Dropout, p 0.3", "Dropout, p 0.1", "Standard training"]
    moved = out.rename(tmp_path / "moved") / "convnet-digits"
    printed = done("curve", moved, "--fractions", "0,50", "--readings", "removed")
    assert "6 of 6 runs measured." in printed
    assert all(name in printed for name in colors)
    drawn = (moved / "curve.svg").read_text()
    assert all(color.lower() in drawn for color in colors.values())


def test_a_saved_configuration_has_settings_of_all_methods_and_is_taken(tmp_path: Path) -> None:
    first = tmp_path / "first"
    done("train", "--epochs", 1, "--out", first, *SMALL)
    saved = first / "config.yaml"
    assert "fraction: 0.3" in saved.read_text()
    done("train", "--config", saved, "--method", "dropout", "--out", tmp_path / "again")
    own = tmp_path / "own.yaml"
    own.write_text("fraction: 0.3\np: 0.1\n")
    for method, other in (("repr", "p"), ("dropout", "fraction"), ("standard", "fraction")):
        arguments = ["train", "--config", str(own), "--method", method, "--out", str(tmp_path / "x")]
        failed = CliRunner().invoke(app, arguments)
        assert f"'{other}' in {own} belongs to the method" in str(failed.exception)
    assert not (tmp_path / "x").exists()


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
    ("text", "message", "code"),
    [
        ("a: &a [x]\nb: *a", "anchor &a", 1),
        ("seed: 18446744073709551616", "seed: ", 2),
        ("threads: 1000000000000", "threads: ", 2),
        ("device: meta", "device 'meta' cannot be used here", 1),
        ("width: 10000\nmodel: vgg", "parameters", 1),
        ("- " * 10_000, "nested deeper than 20", 1),
        ("epochs: " + "9" * 5000, "characters", 1),
        ("model: " + "x" * 9000, "model: ", 2),
    ],
)
def test_hostile_settings_end_in_one_short_line(
    tmp_path: Path,
    text: str,
    message: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    command = ["regrow", "train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == code
    assert message in said
    assert said.startswith("regrow: ")
    assert said.count("\n") == 1
    assert len(said) < 500
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
