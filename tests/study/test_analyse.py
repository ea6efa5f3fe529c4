import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import regrow
from regrow.study import analysed, records
from regrow.study.analyse import (
    analyse_between,
    analyse_run,
    by_parent,
    moments_of,
    some_pictures,
    work_of,
)
from regrow.study.analyse_command import run_analyses
from regrow.study.analyse_summary import (
    correlation_text,
    criterion_curves,
    final_table,
    read_analyses,
    sorted_drops,
    starving,
)
from regrow.study.config import make_config
from regrow.study.report import write_report
from regrow.study.train import train
from regrow.study.trained import Trained, as_trained

PICTURES = 12
SMALL = {
    "data": "digits", "width": 4, "depth": 2, "train_size": 200, "epochs": 4, "threads": 1,
    "full": 1, "sub": 1, "cycles": 1, "snapshots": 2, "lr": 0.02,
}  # fmt: skip


def loaded(run: records.RunRecord) -> Trained:
    return as_trained(run.folder, make_config(run.config))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two finished and analysed runs of each of two methods."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        train(make_config({**SMALL, "seed": seed, "full": 1}), folder / f"standard-seed{seed}")
        settings = {**SMALL, "method": "repr", "skip_first": False, "seed": seed, "fraction": 0.5}
        train(make_config(settings), folder / f"repr-seed{seed}")
    run_analyses([folder], pictures=PICTURES)
    return folder


def runs_in(home: Path) -> dict[str, list[records.RunRecord]]:
    found: dict[str, list[records.RunRecord]] = {"standard": [], "repr": []}
    for run in records.find_runs(home):
        found[run.method].append(run)
    return found


def test_the_analysis_of_a_run(home):
    run = records.read_run(home / "repr-seed0")
    analysis = analysed.read_analysis(run.folder)
    assert analysis is not None
    assert analysis["weights"] == records.weights_hash(run.folder)
    assert analysis["pictures"] == PICTURES
    assert [moment["epoch"] for moment in analysis["moments"]] == [0, 1, 2, 4]
    assert [moment["filters"] for moment in analysis["moments"]] == [8, 8, 4, 8]
    assert {"ortho", "l2", "taylor", "random"} <= analysis["moments"][0]["criteria"].keys()
    layers = ["features.0.conv", "features.1.conv"]
    assert analysis["layers"]["layers_a"] == layers
    assert analysis["layers"]["mean"][0][0] == pytest.approx(1)
    assert {name: len(values) for name, values in analysis["drop_one"].items()} == dict.fromkeys(layers, 4)


def test_the_correlations_are_those_of_the_library(home):
    run = records.read_run(home / "standard-seed0")
    analysis = analysed.read_analysis(run.folder)
    trained = loaded(run)
    batches = some_pictures(trained, PICTURES)
    expected = regrow.criteria_against_oracle(trained.model, batches)["criteria"]
    found = analysis["moments"][-1]["criteria"]
    for name, each in expected.items():
        for kind in ("pearson", "spearman"):
            assert found[name][kind] == (each[kind] and pytest.approx(each[kind], abs=1e-6))
    trained.model.load_state_dict(load_file(analysed.snapshot_path(run.folder, 0)))
    expected = regrow.criteria_against_oracle(trained.model, batches, criteria=["taylor"])["criteria"]
    assert analysis["moments"][0]["criteria"]["taylor"]["pearson"] == pytest.approx(
        expected["taylor"]["pearson"], abs=1e-6
    )


def test_pictures_of_first_layer_filters(home):
    first = analysed.read_analysis(home / "repr-seed0")["first_layer"]
    restore = records.read_run(home / "repr-seed0").events[1]
    assert first["regrown"] == restore["filters"]["features.0.conv"]
    assert first["shape"] == [1, 3, 3]
    assert [moment["epoch"] for moment in first["moments"]] == [1, 2, 4]
    weights = load_file(analysed.snapshot_path(home / "repr-seed0", 2, "restore"))["features.0.conv.weight"]
    torch.testing.assert_close(
        torch.tensor(first["moments"][1]["filters"]), weights.flatten(1), atol=6e-5, rtol=0
    )
    assert analysed.read_analysis(home / "standard-seed0")["first_layer"] == {}


def test_what_is_analysed_is_not_analysed_again(home):
    run = records.read_run(home / "repr-seed0")
    before = analysed.analysis_path(run.folder).read_bytes()
    calls = []
    assert not analyse_run(run, pictures=PICTURES, progress=lambda: calls.append(1))
    assert len(calls) == work_of(run) == len(moments_of(run)) + 2
    assert analysed.analysis_path(run.folder).read_bytes() == before
    runs = records.find_runs(home)
    assert not analyse_between(runs, home, pictures=PICTURES)


def test_between_the_runs(home):
    record = analysed.read_between(home)
    assert [each["folder"] for each in record["runs"]] == [
        "repr-seed0", "repr-seed1", "standard-seed0", "standard-seed1",
    ]  # fmt: skip
    for row in range(4):
        assert record["mean"][row][row] == pytest.approx(1)
        for column in range(4):
            assert record["mean"][row][column] == pytest.approx(record["mean"][column][row])
    one, two = (records.read_run(home / name) for name in ("repr-seed0", "standard-seed1"))
    batches = some_pictures(loaded(one), PICTURES)
    expected = regrow.layer_correlations(
        loaded(one).model,
        loaded(two).model,
        batches,
    )["mean"]
    assert record["mean"][0][3] == pytest.approx((expected[0][0] + expected[1][1]) / 2, abs=1e-6)


def test_a_damaged_analysis_is_named(home):
    path = analysed.analysis_path(home / "repr-seed1")
    good = path.read_text()
    try:
        path.write_text('{"version": 1}')
        found = read_analyses(runs_in(home))
        assert "'weights' is missing" in found.broken[path]
        assert len(found.found["repr"]) == 1
    finally:
        path.write_text(good)


def test_the_page_shows_it_and_names_the_runs_whose_analysis_is_old(home, tmp_path):
    path = analysed.analysis_path(home / "repr-seed1")
    good = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(good), "weights": "of another run"}))
        assert [run.folder.name for run in read_analyses(runs_in(home)).outdated] == ["repr-seed1"]
        page = write_report(records.find_runs(home), tmp_path / "report.html").read_text()
    finally:
        path.write_text(good)
    for text in (
        "Are regrown filters starved?", "Criteria against the oracle", "Each filter dropped alone",
        "How alike are the layers?", "How alike are the runs?", "filters before and after regrowth",
        "trained again since they were analysed", '<a href="#analysis">',
    ):  # fmt: skip
        assert text in page


def test_tables_in_the_terminal(home, capsys):
    run_analyses([home], pictures=PICTURES)
    shown = capsys.readouterr().out
    assert "0 of 4 runs analysed, the others were analysed before" in shown
    for text in ("taylor", "filters not needed", "likeness of runs"):
        assert text in shown


def test_runs_of_other_networks_are_not_correlated(home):
    runs = records.find_runs(home)
    assert [parent for parent, _ in by_parent(runs)] == [home]
    runs[0].config["width"] = 5
    assert by_parent(runs) == []
    assert by_parent(runs[:1]) == []


def test_what_is_refused(home):
    run = records.read_run(home / "repr-seed0")
    with pytest.raises(ValueError, match="pictures is a whole number of at least 2, got 1"):
        analyse_run(run, pictures=1)
    unfinished = records.RunRecord(run.folder, run.config, run.environment, run.epochs, run.events, None)
    with pytest.raises(ValueError, match="holds an unfinished run"):
        analyse_run(unfinished)


def moment(epoch, **criteria):
    return {"epoch": epoch, "criteria": {k: {"pearson": v, "spearman": -v} for k, v in criteria.items()}}


def test_means_over_the_seeds_by_hand():
    found = [
        (None, {"moments": [moment(0, l2=0.2), moment(4, l2=0.4)]}),
        (None, {"moments": [moment(4, l2=0.8)]}),
    ]
    (curve,) = criterion_curves(found)
    assert (curve.criterion, curve.epochs) == ("l2", [0, 4])
    assert curve.pearson == pytest.approx([0.2, 0.6])
    assert curve.of("spearman") == pytest.approx([-0.2, -0.6])
    ((row),) = final_table({"a": found})
    assert row["criterion"] == "l2"
    assert row["values"] == [pytest.approx((0.6, -0.6))]


def test_a_correlation_that_is_none_does_not_count():
    none = {"pearson": None, "spearman": None}
    found = [(None, {"moments": [{"epoch": 1, "criteria": {"apoz": none}}]})]
    assert math.isnan(criterion_curves(found)[0].pearson[0])
    assert final_table({"a": found})[0]["values"] == [(None, None)]


def test_sorted_drops_by_hand():
    found = [
        (None, {"accuracy": 0.9, "drop_one": {"a": [0.5, 0.1], "b": [0.3]}}),
        (None, {"accuracy": 0.7, "drop_one": {"a": [0.2, 0.3], "b": [0.4]}}),
    ]
    lines, whole = sorted_drops(found)
    assert lines.tolist() == pytest.approx([0.15, 0.3, 0.45])
    assert whole == pytest.approx(0.8)


def test_starving_by_hand():
    one = {"steps": [1, 2], "regrown": [0.0, 1.0], "kept": [2.0, 4.0]}
    two = {"steps": [1, 2], "regrown": [1.0, None], "kept": [1.0, 4.0]}
    ((first, steps, ratios), (second, *_)) = starving([[one, one], [two]])
    assert (first, second, steps) == (1, 2, [1, 2])
    assert ratios == pytest.approx([0.5, 0.25])


@pytest.mark.parametrize(("value", "text"), [(0.384, "0.38"), (-0.5, "−0.50"), (-0.001, "0.00"), (None, "—")])
def test_correlations_in_words(value, text):
    assert correlation_text(value) == text
