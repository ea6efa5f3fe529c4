import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from regrow.study import records
from regrow.study.pruned import (
    Curve,
    CurveSet,
    Estimate,
    area,
    curve_sets,
    estimate,
    heading,
    margin_rows,
    percent,
    read_measured,
    sets_of,
    tables,
    to_dict,
)

# Accuracies at 0, 25, 50 and 75 % by method and seed.
FRACTIONS = (0.0, 0.25, 0.5, 0.75)
ACCURACY = {
    "standard": {0: (0.9, 0.6, 0.3, 0.1), 1: (0.8, 0.5, 0.2, 0.1)},
    "bridgeout": {0: (0.9, 0.9, 0.6, 0.2), 1: (0.8, 0.8, 0.8, 0.3)},
}


def make_run(folder: Path, method: str, seed: int) -> records.RunRecord:
    records.write_text(records.weights_path(folder), f"weights {method} {seed}")
    return records.RunRecord(folder, {"method": method, "seed": seed}, {}, [], [], {})


def make_curve(run: records.RunRecord, curves=None, *, criterion="l2", **changes) -> None:
    """A curve record of ``run``: {reading: {fraction: accuracy}}, ACCURACY as zeroed by default."""
    if curves is None:
        curves = {"zeroed": dict(zip(FRACTIONS, ACCURACY[run.method][run.seed], strict=True))}
    records.write_json(
        records.curve_path(run.folder, "test", criterion, "layer"),
        {
            "version": 1,
            "split": "test",
            "criterion": criterion,
            "scope": "layer",
            "seed": None,
            "weights": records.weights_hash(run.folder),
            "classes": 4,
            "images": 100,
            "calibration_images": 50,
            "layers": {"conv": 4},
            "left_out": {},
            "points": [
                {"reading": reading, "fraction": fraction, "dropped": 1, "accuracy": accuracy}
                for reading, values in curves.items()
                for fraction, accuracy in values.items()
            ],
        }
        | changes,
    )


@pytest.fixture
def runs(tmp_path):
    found = [
        make_run(records.run_folder(tmp_path, method, seed), method, seed)
        for method in ("bridgeout", "standard")
        for seed in (0, 1)
    ]
    for run in found:
        make_curve(run)
    return found


def test_estimate_by_hand():
    assert estimate([0.5]) == Estimate(0.5, None)
    # Deviations ±1 around 3: the standard deviation is √2, the error √2/√2.
    assert estimate([2, 4]) == Estimate(3, pytest.approx(1))


def test_curve_numbers_by_hand():
    curve = Curve("standard", "zeroed", FRACTIONS, ACCURACY["standard"])
    assert curve.n == 2
    assert [point.mean for point in curve.points] == pytest.approx([0.85, 0.55, 0.25, 0.1])
    assert [point.error for point in curve.points] == pytest.approx([0.05, 0.05, 0.05, 0])
    assert curve.half_means == {0: pytest.approx(0.6), 1: pytest.approx(0.5)}
    assert curve.mean_0_50 == Estimate(pytest.approx(0.55), pytest.approx(0.05))
    # 0.25 · (0.75 + 0.45 + 0.2) and 0.25 · (0.65 + 0.35 + 0.15)
    assert curve.areas == {0: pytest.approx(0.35), 1: pytest.approx(0.2875)}
    assert curve.area == Estimate(pytest.approx(0.31875), pytest.approx(0.03125))


@pytest.mark.parametrize("fractions", [(0.0, 0.25), (0.25, 0.5), (0.0, 0.9)])
def test_the_mean_over_0_to_50_needs_both_ends(fractions):
    assert Curve("standard", "zeroed", fractions, {0: (0.9, 0.6)}).mean_0_50 is None


def test_a_single_point_has_no_area_and_a_single_seed_no_error():
    point = Curve("standard", "zeroed", (0.0,), {0: (0.9,)})
    assert (point.area, point.points) == (None, (Estimate(0.9, None),))


def test_curves_are_read_by_method_with_the_baseline_first(runs):
    (curves,) = curve_sets(runs)
    assert (curves.split, curves.criterion, curves.scope) == ("test", "l2", "layer")
    assert (curves.baseline, curves.chance) == ("standard", 0.25)
    assert curves.methods == ["standard", "bridgeout"]
    assert curves.curve("bridgeout", "zeroed") == Curve(
        "bridgeout", "zeroed", FRACTIONS, ACCURACY["bridgeout"]
    )
    assert curves.curve("bridgeout", "removed") is None
    assert curve_sets(runs, baseline="dropout")[0].baseline == "bridgeout"


def test_the_margin_is_paired_over_seeds(runs):
    (curves,) = curve_sets(runs)
    margin = curves.margin("bridgeout", "zeroed")
    assert margin.differences == {0: pytest.approx(20), 1: pytest.approx(30)}
    # t(1, 0.975) = 12.7062, and the standard error of 20 and 30 is 5.
    assert (margin.mean, margin.low) == (pytest.approx(25), pytest.approx(25 - 5 * 12.7062, abs=1e-3))
    assert curves.margin("standard", "zeroed") is None
    assert curves.margin("standard", "zeroed", "bridgeout").mean == pytest.approx(-25)
    assert curves.margin("bridgeout", "removed") is None


def test_no_margin_without_a_shared_seed_or_an_end_of_the_range():
    def curves(fractions, seed):
        both = (
            Curve("a", "zeroed", fractions, {0: (0.9, 0.5)}),
            Curve("b", "zeroed", fractions, {seed: (0.9, 0.6)}),
        )
        return CurveSet("test", "l2", "layer", "a", 0.1, both)

    assert curves((0.0, 0.5), 0).margin("b", "zeroed").mean == pytest.approx(5)
    assert curves((0.0, 0.5), 1).margin("b", "zeroed") is None
    assert curves((0.0, 0.4), 0).margin("b", "zeroed") is None


def test_only_fractions_that_all_runs_have_are_compared(runs):
    make_curve(runs[0], {"removed": {0.5: 0.4}, "zeroed": {0.75: 0.1, 0.1: 0.5, 0.0: 0.9, 0.5: 0.3}})
    (curves,) = curve_sets(runs)
    assert curves.readings == ["zeroed", "removed"]
    assert {curve.fractions for curve in curves.curves if curve.reading == "zeroed"} == {(0.0, 0.5, 0.75)}
    assert curves.curve("bridgeout", "zeroed").accuracies[0] == (0.9, 0.3, 0.1)
    assert curves.curve("bridgeout", "removed") == Curve("bridgeout", "removed", (0.5,), {0: (0.4,)})
    (some,) = curve_sets(runs, fractions=[0.0, 0.5, 0.6], readings=["zeroed"])
    assert some.readings == ["zeroed"]
    assert some.curves[0].fractions == (0.0, 0.5)
    assert curve_sets(runs, fractions=[0.6]) == []


def test_what_was_measured_differently_is_apart(runs):
    make_curve(runs[0], criterion="ortho")
    sets = curve_sets(runs)
    assert [each.criterion for each in sets] == ["l2", "ortho"]
    assert [curve.n for curve in sets[1].curves] == [1]


def test_curves_of_other_weights_are_left_out_and_named(runs):
    records.weights_path(runs[3].folder).write_text("trained again")
    (curves,) = curve_sets(runs)
    assert curves.curve("standard", "zeroed").accuracies == {0: ACCURACY["standard"][0]}
    assert read_measured(runs).outdated == [runs[3]]
    records.weights_path(runs[2].folder).unlink()  # deleted to save room: they have not changed
    assert curve_sets(runs)[0].curve("standard", "zeroed").n == 1
    assert read_measured(runs).outdated == [runs[3]]


def test_runs_without_curves_have_no_sets(tmp_path):
    run = make_run(tmp_path / "run", "standard", 0)
    assert curve_sets([run]) == read_measured([run]).outdated == []


def test_a_malformed_record_is_named_and_the_others_are_read(runs):
    broken = records.curve_path(runs[0].folder, "test", "l2", "layer")
    broken.write_text('{"version": 1')
    measured = read_measured(runs)
    assert list(measured.broken) == [broken]
    assert "is not valid JSON" in measured.broken[broken]
    (curves,) = sets_of(measured)
    assert curves.curve("bridgeout", "zeroed").accuracies == {1: ACCURACY["bridgeout"][1]}
    with pytest.raises(ValueError, match="is not valid JSON"):
        curve_sets(runs)


def test_variants_of_a_method_have_curves_of_their_own(runs):
    variants = {runs[0].folder: "Bridgeout, p 0.1", runs[1].folder: "Bridgeout, p 0.2"}
    (curves,) = curve_sets(runs, variants=variants)
    assert curves.methods == ["standard", "Bridgeout, p 0.1", "Bridgeout, p 0.2"]
    assert curves.curve("Bridgeout, p 0.2", "zeroed").accuracies == {1: ACCURACY["bridgeout"][1]}


def test_to_dict_is_json_and_complete(runs, tmp_path):
    (curves,) = curve_sets(runs)
    written = to_dict(curves)
    records.write_json(tmp_path / "curve.json", written)
    first = written["curves"][0]
    assert (first["method"], first["reading"], first["n"], first["seeds"]) == (
        "standard",
        "zeroed",
        2,
        [0, 1],
    )
    assert first["fractions"] == list(FRACTIONS)
    assert first["mean_0_50"] == pytest.approx(0.55)
    assert first["mean_0_50_error"] == pytest.approx(0.05)
    assert first["area"] == pytest.approx(0.31875)
    assert first["by_seed"]["1"] == list(ACCURACY["standard"][1])
    there, back = margin_rows(curves)
    assert (there["method"], there["over"], back["method"], back["over"]) == (
        "standard",
        "bridgeout",
        "bridgeout",
        "standard",
    )
    assert there["points"] == pytest.approx(-back["points"]) == pytest.approx(-25)
    assert (back["pairs"], back["gains"], back["verdict"]) == (2, 2, "no gain shown")


def printed(curves):
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        for table in tables(curves):
            console.print(table)
    return capture.get()


def test_the_tables_by_hand(runs):
    lines = [" ".join(line.split()) for line in printed(curve_sets(runs)[0]).splitlines()]
    assert heading(curve_sets(runs)[0]) == "test accuracy, %, with the filters of lowest l2 in each layer cut"
    assert "cut 0 % 25 % 50 % 75 %" in lines
    assert "Standard training 85.0 55.0 25.0 10.0" in lines
    (bridgeout,) = [line for line in lines if line.startswith("Bridgeout 2")]
    assert bridgeout.startswith("Bridgeout 2 80.00 ± 0.00 % 0.525 ± 0.01")
    assert bridgeout.endswith("+25.0 [−38.5, +88.5]")
    assert "points over" not in printed(curve_sets(runs[:2])[0])  # one method: nothing to be over
    assert "Standard training 2 55.00 ± 5.00 % 0.319 ± 0.031" in lines


@pytest.mark.parametrize(("count", "shown"), [(10, 10), (19, 10), (40, 10), (45, 9)])
def test_ten_fractions_fit_into_80_columns_and_of_more_some_are_shown(count, shown):
    fractions = tuple(2 * index / 100 for index in range(count))
    methods = ("standard", "targeted-bridgeout", "targeted-dropout")
    curves = tuple(Curve(method, "compensated", fractions, {0: (0.987,) * count}) for method in methods)
    text = printed(CurveSet("validation", "ortho-corrected", "global", "standard", 0.1, curves))
    assert max(map(len, text.splitlines())) <= 80
    row = next(line for line in text.splitlines() if "Targeted Bridgeout" in line)
    assert row.count("98.7") == shown


def test_numbers_as_text():
    assert percent(None) == area(None) == "—"
    assert percent(Estimate(0.8783, 0.00421)) == "87.83 ± 0.42 %"
    assert percent(Estimate(0.8783, None)) == "87.83 %"
    assert area(Estimate(0.51234, 0.00421)) == "0.512 ± 0.004"
    assert area(Estimate(0.51234, None)) == "0.512"


def test_it_imports_neither_torch_nor_what_draws():
    code = (
        "import sys, regrow.study.pruned, regrow.study.fractions;"
        "print([name for name in ('torch', 'matplotlib', 'scipy', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
