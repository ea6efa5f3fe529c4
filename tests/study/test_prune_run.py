"""``regrow prune`` from trained digits to small files, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import forking
from regrow.cli import app
from regrow.pruning.accuracy import top1
from regrow.pruning.report import count, size
from regrow.shipping.checkpoint import load
from regrow.study import records, trained
from regrow.study.config import make_config
from regrow.study.libraries import LibraryModel
from regrow.study.train import train
from regrow.study.trained import by_name, from_run
from regrow.surgery.cut import cut


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "one"
    train(make_config({"epochs": 4, "width": 8, "train_size": 300, "threads": 1, "device": "cpu"}), folder)
    return folder


def prune(*arguments: object):
    return CliRunner().invoke(app, ["prune", *map(str, arguments)])


def test_from_a_run_folder_to_small_files(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    settings = ["--fraction", "0.25", "--criterion", "l2", "--out", out, "--threads", 1]
    done = forking.regrow("prune", run, *settings, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "a progress bar outside a terminal"
    assert sorted(path.name for path in out.iterdir()) == [
        "prune.json",
        "pruned.safetensors",
        "report.html",
    ]
    lines = done.stdout.splitlines()
    assert lines[-2] == f"Written: pruned.safetensors, report.html, prune.json in {out}"
    assert lines[-1] == f"report: {out / 'report.html'}"
    assert max(map(len, lines[:-2])) <= 80
    report = json.loads((out / "prune.json").read_text())
    assert report["version"] == 1
    assert report["target"] == {"kind": "fraction", "value": 0.25, "reached": 0.25}
    assert report["layers"] == {f"features.{i}.conv": {"before": 8, "after": 6} for i in range(3)}
    assert report["compensation"]["images"] == 300
    assert report["source"] == {"run": str(run), "weights": records.weights_hash(run), "data": "digits"}
    assert report["environment"]["command"].startswith("regrow prune")

    before = from_run(run)
    result = records.read_run(run).result
    assert report["test_accuracy"]["before"] == pytest.approx(result["test_accuracy"], abs=0.003)
    assert report["accuracy"]["before"] == pytest.approx(result["validation_accuracy"], abs=0.003)
    small = load(before.model, out / "pruned.safetensors")
    assert small.features[0].conv.out_channels == 6
    assert top1(small, before.test) == (report["test_accuracy"]["after"], report["test_accuracy"]["images"])


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longer") / "one"
    train(make_config({"epochs": 20, "width": 32, "threads": 1, "device": "cpu"}), folder)
    return folder


def test_ends_in_the_table_of_uncut_cut_and_reconstructed(longer: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    done = prune(longer, "--macs", 0.5, "--out", out, "--threads", 1)
    assert done.exit_code == 0, done.output
    report = json.loads((out / "prune.json").read_text())
    uncut, plain, made_up = report["networks"]
    assert [row["network"] for row in report["networks"]] == ["uncut", "cut", "cut and reconstructed"]
    assert plain["validation_accuracy"] < uncut["validation_accuracy"] - 0.05
    assert made_up["validation_accuracy"] > uncut["validation_accuracy"] - 0.02
    for row, when in ((uncut, "before"), (made_up, "after")):
        assert row["validation_accuracy"] == report["accuracy"][when]
        assert row["test_accuracy"] == report["test_accuracy"][when]
        assert row["macs"] == report["macs"][when]
        assert row["latency"] == report["latency"][when]["median"]
    for key in ("macs", "latency", "file_size"):
        assert plain[key] == made_up[key]
    assert made_up["file_size"] == (out / "pruned.safetensors").stat().st_size < uncut["file_size"]

    # The row in the middle is what cut makes of the network.
    network = from_run(longer)
    keep = {
        name: torch.tensor([i not in gone for i in range(report["layers"][name]["before"])])
        for name, gone in report["dropped"].items()
    }
    cut(network.model, keep, example_inputs=network.example)
    assert plain["validation_accuracy"] == top1(network.model, network.validation)[0]
    assert plain["test_accuracy"] == top1(network.model, network.test)[0]

    lines = [" ".join(line.split()) for line in done.output.splitlines()]
    for line, row in zip(lines[-6:-3], report["networks"], strict=True):
        assert line.startswith(f"{row['network']} {row['test_accuracy']:.2%} {count(row['macs'])} ")
        assert line.endswith(f" ms {size(row['file_size'])}")
    assert lines[-2].startswith("Written")
    assert "\x1b" not in done.output, "colours outside a terminal"


def test_the_table_has_two_rows_where_nothing_is_made_up_for(run: Path, tmp_path: Path) -> None:
    done = prune(run, "--fraction", 0.25, "--no-compensate", "--out", tmp_path, "--threads", 1)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "prune.json").read_text())
    assert [row["network"] for row in report["networks"]] == ["uncut", "cut"]
    assert report["networks"][1]["test_accuracy"] == report["test_accuracy"]["after"]
    assert "reconstructed" not in done.output


def test_timed_as_deployed_too(run: Path, tmp_path: Path) -> None:
    done = prune(run, "--fraction", 0.25, "--deploy", "bfloat16", "--out", tmp_path, "--device", "cpu")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "prune.json").read_text())
    assert report["settings"]["deployed"] == {"dtype": "bfloat16", "channels_last": True, "mode": "auto"}
    rows = report["deployed"]["rows"]
    kinds = [("before", False), ("before", True), ("after", False), ("after", True)]
    assert [(row["network"], row["deployed"]) for row in rows] == kinds
    assert rows[0]["accuracy"] == report["test_accuracy"]["before"]
    assert rows[2]["accuracy"] == report["test_accuracy"]["after"]
    assert rows[3]["accuracy"] == pytest.approx(rows[2]["accuracy"], abs=0.02)
    assert set(rows[3]["latency"]) == {"1", "32"}
    assert "after, deployed" in done.output


def test_within_a_drop_that_the_validation_pictures_decide(run: Path, tmp_path: Path) -> None:
    done = prune(run, "--max-drop", 20, "--out", tmp_path, "--scope", "global", "--exclude", "features.0")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "prune.json").read_text())
    accuracy = report["accuracy"]
    assert report["target"]["reached"] == pytest.approx(100 * (accuracy["before"] - accuracy["after"]))
    assert report["target"]["reached"] <= 20
    assert report["layers"]["features.0.conv"] == {"before": 8, "after": 8}
    assert report["left_out"] == {"features.0.conv": "excluded"}
    assert report["filters"]["after"] < report["filters"]["before"] == 16
    tried = report["tried"]
    assert len(tried) > 1
    for row in tried:
        assert 0 < row["macs"] < 1
        assert row["value"] == pytest.approx(100 * (accuracy["before"] - row["accuracy"]))
    gone = report["filters"]["before"] - report["filters"]["after"]
    [found] = [row for row in tried if row["filters"] == gone]
    assert found["accuracy"] == pytest.approx(accuracy["after"])
    assert found["macs"] == pytest.approx(report["macs"]["after"] / report["macs"]["before"], abs=0.05)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('<i class="dot tried" style') == len(tried)


def test_a_library_network_without_pictures(tmp_path: Path) -> None:
    given = ["torchvision:squeezenet1_1", "--weights", "none", "--image-size", 48, "--out", tmp_path / "o"]
    refused = prune(*given, "--params", 0.5)
    assert "pass --data (and --data-dir), or switch it off with --no-compensate" in str(refused.exception)
    assert not (tmp_path / "o").exists()
    done = prune(*given, "--fraction", 0.5, "--no-compensate", "--round-to", 8, "--device", "cpu")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "o" / "prune.json").read_text())
    assert report["accuracy"] is report["test_accuracy"] is report["compensation"] is None
    assert report["networks"] is None
    assert all(pair["after"] % 8 == 0 for pair in report["layers"].values())
    small = load(by_name("squeezenet1_1", weights="none").model, tmp_path / "o" / "pruned.safetensors")
    assert small.eval()(torch.zeros(1, 3, 48, 48)).shape == (1, 1000)


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """``library_model`` gives a network of 10 classes for pictures of any size, without a download."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]

    def found(*_given: str) -> LibraryModel:
        return LibraryModel(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 10)), None, None, None)

    monkeypatch.setattr(trained, "library_model", found)


@pytest.mark.usefixtures("small_network")
def test_a_drop_of_a_network_by_name(tmp_path: Path) -> None:
    done = prune("any", "--max-drop", 90, "--data", "digits", "--out", tmp_path, "--device", "cpu")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "prune.json").read_text())
    assert report["target"]["kind"] == "max_drop"
    assert report["accuracy"]["images"] > 0
    assert report["test_accuracy"]["images"] > 0


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("criterion", ["apoz", "taylor"])
def test_a_criterion_that_reads_pictures(tmp_path: Path, criterion: str) -> None:
    given = ["any", "--criterion", criterion, "--fraction", 0.5, "--out", tmp_path / "out", "--device", "cpu"]
    refused = prune(*given, "--no-compensate")
    assert f"criterion {criterion!r} reads pictures: pass --data (and --data-dir)" in str(refused.exception)
    done = prune(*given, "--data", "digits", "--no-compensate")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "prune.json").read_text())
    assert report["settings"]["criterion"] == criterion
    assert report["compensation"] is None


@pytest.mark.usefixtures("small_network")
def test_pictures_of_other_classes_are_named_as_the_reason(tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["any", "--data", "folder", "--device", "cpu", "--out", out]
    for flag, value in _folder(tmp_path).items():
        given += [f"--{flag.replace('_', '-')}", value]
    reason = "the network tells 10 classes apart, and the pictures have 2"
    refused = prune(*given, "--max-drop", 1)
    assert refused.exit_code == 1
    assert reason in str(refused.exception)
    assert "pass --data (" not in str(refused.exception).lower()
    refused = prune(*given, "--fraction", 0.5, "--criterion", "taylor")
    assert f"'taylor' needs labelled pictures of the network's classes: {reason}" in str(refused.exception)
    assert not out.exists()
    with pytest.warns(UserWarning, match=f"accuracy is not measured: {reason}"):
        done = prune(*given, "--fraction", 0.5)
    assert done.exit_code == 0, done.output
    report = json.loads((out / "prune.json").read_text())
    assert report["accuracy"] is report["test_accuracy"] is report["networks"] is None
    assert report["compensation"]["images"] > 0


def test_shares_of_layers(run: Path, tmp_path: Path) -> None:
    shares = "features.0=0.5,features.2.conv=0.25"
    done = prune(run, "--fraction", shares, "--out", tmp_path, "--threads", 1)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "prune.json").read_text())
    assert [pair["after"] for pair in report["layers"].values()] == [4, 8, 6]
    assert report["target"]["value"] == {"features.0": 0.5, "features.2.conv": 0.25}
    assert "gives no share" in done.output


def test_a_library_network_calibrated_on_pictures_of_other_classes(tmp_path: Path) -> None:
    found = by_name("squeezenet1_1", weights="none", data="folder", **_folder(tmp_path))
    assert found.validation is found.test is None
    assert len(found.calibration) == 1
    assert found.calibration[0].shape[1:] == (3, 40, 40)
    with pytest.raises(ValueError, match=r"does not take pictures of 8×8"):
        by_name("squeezenet1_1", weights="none", data="digits")


def _folder(tmp_path: Path) -> dict[str, object]:
    from PIL import Image

    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for number in range(10):
            picture = torch.randint(256, (40, 40, 3), dtype=torch.uint8)
            Image.fromarray(picture.numpy()).save(tmp_path / label / f"{number}.png")
    return {"data_dir": str(tmp_path), "image_size": 40}


def test_what_does_not_go_together_is_refused_and_nothing_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / "results.json").write_text("{}")
    out = ["--out", tmp_path / "out"]
    for arguments, message in (
        ([run, *out], "exactly one"),
        ([run, "--fraction", 0.5, "--macs", 0.5, *out], "got fraction and macs"),
        ([run, "--fraction", 0.5, "--out", tmp_path / "file"], "is a file"),
        ([run, "--fraction", 0.5, "--out", tmp_path / "compared"], "has the report of a comparison"),
        ([run, "--fraction", 0.5, "--data", "digits", *out], "leave --data out"),
        ([run, "--fraction", 0.5, "--weights", "default", *out], "leave --weights out"),
        ([run, "--fraction", 0.5, "--image-size", 8, *out], "leave --image-size out"),
        ([run, "--fraction", "half", *out], "layer3=0.6,layer4=0.5"),
        ([run, "--fraction", "features.9=0.5", *out], "no convolution is named 'features.9'"),
        ([run, "--fraction", "features=0.5", "--scope", "global", *out], "needs scope='layer'"),
        (["squeezenet1_1", "--fraction", 0.5, "--data-dir", tmp_path, *out], "pass --data too"),
        ([run, "--params", 0.01, "--floor", 0.5, *out], "params=0.01 cannot be met: the best cut leaves"),
        ([run, "--fraction", 0.5, "--criterion", "l3", *out], "did you mean 'l2'"),
        ([tmp_path / "empty", "--fraction", 0.5, *out], "not a run folder"),
        (["vgg", "--fraction", 0.5, *out], "give its run folder"),
        (
            [run, "--fraction", 0.5, "--deploy", "half", *out],
            "unknown precision 'half'; choose from 'float32'",
        ),
        (["alexnot", "--fraction", 0.5, *out], "did you mean 'alexnet'"),
        (
            ["squeezenet1_1", "--weights", "none", "--max-drop", 1, "--no-compensate", *out],
            "--max-drop needs",
        ),
    ):
        failed = prune(*arguments)
        assert failed.exit_code == 1, arguments
        assert message in str(failed.exception), arguments
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("threads", 0), ("threads", -1), ("threads", 10**6), ("threads", 2**64)),
        *(("image-size", 10**6), ("image-size", -3), ("data-dir", "a" * 9999)),
        *(("device", "meta"), ("device", "cpu:3"), ("device", "d" * 9999)),
    ],
)
def test_sizes_beyond_reason_are_refused_by_name_and_nothing_written(
    tmp_path: Path, flag: str, value: object
) -> None:
    done = prune(
        "resnet18", "--fraction", 0.5, "--out", tmp_path / "out", f"--{flag}", value, "--weights", "none"
    )
    assert isinstance(done.exception, ValueError)
    assert flag.replace("-", "_") in str(done.exception)
    assert len(str(done.exception)) < 400
    assert list(tmp_path.iterdir()) == []


def test_help_never_imports_pytorch() -> None:
    code = (
        "import sys; sys.argv = ['regrow', 'prune', '--help']\n"
        "from regrow.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    for word in ("--max-drop", "--latency", "--round-to", "--no-compensate", "Example:"):
        assert word in shown.stdout
