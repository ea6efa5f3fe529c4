import json
import shutil
from pathlib import Path

import pytest

from regrow.study import records
from regrow.study.config import make_config
from regrow.study.lineup import line_up
from regrow.study.measure import run_curves
from regrow.study.train import train
from regrow.study.variants import variant_styles

SMALL = {"width": 4, "train_size": 200, "epochs": 1, "threads": 1}
SETTINGS = {
    "fractions": [0, 0.5],
    "readings": ["zeroed", "compensated"],
    "criterion": "l2",
    "scope": "layer",
    "split": "test",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("measure")
    for method, seed in (("standard", 0), ("dropout", 0), ("standard", 1)):
        train(
            make_config({**SMALL, "method": method, "seed": seed}), records.run_folder(folder, method, seed)
        )
    return folder


@pytest.fixture
def comparison(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "comparison"))


def test_a_comparison_is_measured_once_printed_and_drawn(comparison, capsys):
    curves = run_curves([comparison], **SETTINGS)
    assert curves.methods == ["standard", "dropout"]
    assert [(curve.method, curve.reading, curve.n) for curve in curves.curves] == [
        ("standard", "zeroed", 2),
        ("dropout", "zeroed", 1),
        ("standard", "compensated", 2),
        ("dropout", "compensated", 1),
    ]
    printed = capsys.readouterr()
    assert "3 of 3 runs measured." in printed.out
    assert "Standard training" in printed.out
    assert printed.err == ""
    written = json.loads((comparison / "curve.json").read_text())
    uncut = written["curves"][0]["by_seed"]["1"][0]
    assert uncut == records.read_run(comparison / "standard-seed1").result["test_accuracy"]
    assert (comparison / "curve.svg").read_text().count("<svg") == 1
    assert (comparison / "curve.png").read_bytes().startswith(b"\x89PNG")
    before = (comparison / "curve.json").read_bytes(), (comparison / "curve.svg").read_bytes()

    run_curves([comparison], **SETTINGS)
    assert "0 of 3 runs measured, the others were measured before." in capsys.readouterr().out
    assert before == ((comparison / "curve.json").read_bytes(), (comparison / "curve.svg").read_bytes())


def test_only_what_is_asked_for_is_shown(comparison):
    run_curves([comparison], **SETTINGS)
    curves = run_curves([comparison], **SETTINGS | {"fractions": [0.5], "readings": ["zeroed"]})
    assert {(curve.reading, curve.fractions) for curve in curves.curves} == {("zeroed", (0.5,))}


def test_where_it_writes(comparison, tmp_path):
    runs = [comparison / "standard-seed0", comparison / "dropout-seed0"]
    run_curves(runs, **SETTINGS)
    assert (comparison / "curve.png").exists()
    run_curves(runs, **SETTINGS, out=tmp_path / "new" / "out")
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == [
        "curve.json",
        "curve.png",
        "curve.svg",
    ]
    elsewhere = shutil.copytree(comparison / "standard-seed1", tmp_path / "far" / "away")
    with pytest.raises(ValueError, match="pass --out FOLDER"):
        run_curves([runs[0], elsewhere], **SETTINGS)


def test_variants_have_their_names_and_the_colours_of_the_report(comparison, capsys):
    """Two variants of dropout, two of standard training, in folders of any name."""
    for source, name, change in (
        ("dropout-seed0", "other", ("p: 0.3", "p: 0.05")),
        ("standard-seed0", "third", ("weight_decay: 0.0005", "weight_decay: 0.1")),
    ):
        config = records.config_path(shutil.copytree(comparison / source, comparison / name))
        config.write_text(config.read_text().replace(*change))
    curves = run_curves([comparison], **SETTINGS)
    names = [
        "Standard training, weight decay 0.0005",
        "Dropout, p 0.05",
        "Dropout, p 0.3",
        "Standard training, weight decay 0.1",
    ]
    assert sorted(curves.methods) == sorted(names)
    assert [curves.curve(name, "zeroed").n for name in names] == [2, 1, 1, 1]
    printed = capsys.readouterr().out
    assert "5 of 5 runs measured." in printed
    assert all(f" {name}" in printed for name in names[1:3])
    drawn = (comparison / "curve.svg").read_text()
    shown = line_up(records.find_runs(comparison))
    looks = variant_styles({shown.names[run.folder]: run.config for run in shown.runs})
    assert all(looks[name].color.lower() in drawn for name in names)
    rows = json.loads((comparison / "curve.json").read_text())["curves"]
    assert {row["method"] for row in rows} == set(names)


def test_unfinished_runs_are_left_out_unless_they_are_asked_for(comparison, capsys):
    unfinished = comparison / "standard-seed1"
    records.result_path(unfinished).unlink()
    assert [curve.n for curve in run_curves([comparison], **SETTINGS).curves] == [1, 1, 1, 1]
    assert "1 unfinished of 3 runs left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is unfinished and has no final weights"):
        run_curves([comparison / "standard-seed0", unfinished], **SETTINGS)
    for run in comparison.glob("*-seed0"):
        records.result_path(run).unlink()
    with pytest.raises(ValueError, match="none of the 3 runs is finished"):
        run_curves([comparison], **SETTINGS)


def test_what_cannot_be_compared_is_refused_before_anything_is_measured(comparison, tmp_path):
    config = records.config_path(comparison / "standard-seed1")
    config.write_text(config.read_text().replace("split_seed: 0", "split_seed: 1"))
    with pytest.raises(ValueError, match="split_seed is 0 and 1"):
        run_curves([comparison], **SETTINGS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no run found"):
        run_curves([comparison / "standard-seed0", tmp_path / "empty"], **SETTINGS, out=tmp_path)
    with pytest.raises(ValueError, match="unknown criterion"):
        run_curves([comparison], **SETTINGS | {"criterion": "l22"})
    assert not list(comparison.rglob("*curve*"))
