import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from regrow.study import figures
from regrow.study.compute import EqualCompute
from regrow.study.drawing import NARROW, WIDE, Style, png, svg
from regrow.study.figures import Series, off_map, stacked, sub_phases
from regrow.study.paired import paired
from regrow.study.pruned import Curve, CurveSet
from regrow.study.records import RunRecord
from regrow.study.sequences import mean_after_switch, task_points


def make_run(seed=0, phases="FFSSF", *, events=True, method="repr", layers=None, accuracy=0.5):
    """A finished run; one letter of ``phases`` per epoch, F for full and S for sub."""
    layers = layers or {"a": 2, "b": 3}
    return RunRecord(
        folder=Path(f"{method}-seed{seed}"),
        config={"method": method, "seed": seed},
        environment={},
        epochs=[
            {
                "epoch": number,
                "phase": "sub" if phase == "S" else "full",
                "learning_rate": 0.1,
                "validation_accuracy": accuracy,
                "overlap": 2.0,
                "seconds": 30.0,
                "flops": 2_000_000,
            }
            for number, phase in enumerate(phases, start=1)
        ],
        events=[
            {"epoch": 2, "kind": "drop", "cycle": 1, "filters": {"b": [0, 2]}},
            {"epoch": 4, "kind": "restore", "cycle": 1, "filters": {"b": [0, 2]}},
        ]
        if events
        else [],
        result={"filters": layers, "test_accuracy": 0.6},
    )


def make_sequence(seed=0, *accuracies, method="repr"):
    """A run whose epochs are each a task, tested with one of ``accuracies``."""
    run = make_run(seed, "F" * len(accuracies), method=method, events=False)
    for task, epoch in enumerate(run.epochs, start=1):
        epoch["task"] = task
    run.result.update(
        task_accuracies=list(accuracies), mean_accuracy_after_switch=mean_after_switch(accuracies)
    )
    return run


def test_off_map_by_hand():
    expected = np.zeros((5, 5), dtype=bool)
    expected[[2, 4], 2:4] = True  # filters 0 and 2 of b lie behind the two of a; off in epochs 3 and 4
    assert np.array_equal(off_map(make_run()), expected)


def test_off_map_of_a_run_without_events_is_all_on():
    assert not off_map(make_run(events=False)).any()


def test_a_filter_never_restored_stays_off_to_the_end():
    run = make_run()
    run.events.pop()
    assert off_map(run)[2].tolist() == [False, False, True, True, True]


def test_sub_phases_by_hand():
    assert sub_phases(make_run(phases="FFSSFSFS")) == [(3, 4), (6, 6), (8, 8)]
    assert sub_phases(make_run(phases="FFF")) == []


def series(method="repr", runs=2, **settings):
    return Series(
        method,
        Style("#D55E00", "s", (5, 1)),
        [make_run(seed, method=method, **settings) for seed in range(runs)],
    )


def task_figure(width, methods=("standard", "repr")):
    """Two methods, three tasks, two seeds."""
    runs = {
        "standard": {0: make_sequence(0, 0.9, 0.7, 0.6), 1: make_sequence(1, 0.9, 0.8, 0.7)},
        "repr": {0: make_sequence(0, 0.8, 0.8, 0.8), 1: make_sequence(1, 0.9, 0.8, 0.9)},
    }
    shown = [Series(name, LOOKS[name], list(runs[name].values())) for name in methods]
    points = {
        name: task_points(runs[name], runs["standard"] if name != "standard" else None) for name in methods
    }
    return figures.task_curves(shown, points, width)


CURVES = CurveSet(
    "test",
    "l2",
    "layer",
    "standard",
    0.1,
    (
        Curve("standard", "zeroed", (0.0, 0.5), {0: (0.9, 0.3), 1: (0.8, 0.4)}),
        Curve("repr", "zeroed", (0.0, 0.5), {0: (0.9, 0.5)}),
        Curve("standard", "compensated", (0.0, 0.5), {0: (0.9, 0.6), 1: (0.8, 0.7)}),
    ),
)
LOOKS = {"standard": Style("#010203", "o", ()), "repr": Style("#040506", "s", (2, 1))}

DRAWINGS = {
    "dots": lambda width: figures.dots(
        [series("standard"), series()], {"repr": paired({0: 1.0, 1: 2.0}, {0: 2.0, 1: 2.5})}, width
    ),
    "curves": lambda width: figures.learning_curves([series("standard", events=False), series()], width),
    "compute": lambda width: figures.compute_curves(
        [series("standard", events=False), series()], EqualCompute("flops", {0: 8e6}, {}), width
    ),
    "overlap": lambda width: figures.overlap_curves([series()], width),
    "map": lambda width: figures.filter_map(series(runs=3).runs, "#D55E00", width),
    "tasks": lambda width: task_figure(width),
    "pruned": lambda width: figures.pruned_curves(CURVES, LOOKS, width),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_figures_are_svg_of_the_width_asked_for_and_the_same_each_time(name):
    wide, narrow = svg(DRAWINGS[name], WIDE), svg(DRAWINGS[name], NARROW)
    assert ET.fromstring(wide).get("width") == f"{72 * WIDE:g}pt"
    assert float(ET.fromstring(narrow).get("width").removesuffix("pt")) == pytest.approx(72 * NARROW)
    assert svg(DRAWINGS[name], WIDE) == wide


def texts(drawing):
    return [
        "".join(node.itertext()) for node in ET.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")
    ]


def test_the_map_names_layers_seeds_and_axis():
    found = texts(svg(DRAWINGS["map"], WIDE))
    for text in ("a", "b", "seed 0", "seed 1", "seed 2", "epoch"):
        assert text in found


def test_sub_phases_are_labelled_where_there_is_room():
    assert "sub 1" in texts(svg(DRAWINGS["overlap"], WIDE))
    crowded = [series(phases="FFS" + "F" * 60)]
    assert not any(
        text.startswith("sub") for text in texts(svg(lambda w: figures.overlap_curves(crowded, w), 4))
    )


def test_hostile_names_are_text_and_not_markup_or_mathematics():
    hostile = "<script>$x_1$</script>\x07"
    run = make_run(layers={hostile: 2, "b": 3})
    assert any(
        text.startswith("<script>$x_1$")
        for text in texts(svg(lambda w: figures.filter_map([run], "red", w), WIDE))
    )
    drawing = svg(lambda w: figures.dots([series(hostile)], {}, w), NARROW)
    assert "<script>$x_1$</script>�" in texts(drawing)


def test_unknown_values_leave_gaps_instead_of_errors():
    broken = series()
    for run in broken.runs:
        run.epochs[2].update(validation_accuracy=None, overlap=None, learning_rate=None)
    empty = series(runs=1)
    for epoch in empty.runs[0].epochs:
        epoch.update(validation_accuracy=None, overlap=None, learning_rate=None)
    for draw in (figures.learning_curves, figures.overlap_curves):
        assert svg(lambda width, draw=draw: draw([broken, empty], width), NARROW).startswith("<svg")


def test_many_thin_layers_do_not_print_over_each_other():
    run = make_run(layers={**{f"layer{index}": 1 for index in range(300)}, "b": 3})
    drawing = ET.fromstring(svg(lambda width: figures.filter_map([run], "red", width), WIDE))
    heights = sorted(
        float(node.get("y"))
        for node in drawing.iter("{http://www.w3.org/2000/svg}text")
        if (node.text or "").startswith("layer")
    )
    assert len(heights) > 20
    assert min(np.diff(heights)) > 8


def drawn(width=WIDE, **settings):
    """The panels of the pruned curves."""
    return figures.pruned_curves(CURVES, LOOKS, width, **settings)


def test_pruned_curves_are_means_with_a_band_of_one_standard_error():
    zeroed, compensated = drawn().axes
    standard, other, chance = zeroed.get_lines()
    assert standard.get_xdata().tolist() == [0, 50]
    assert standard.get_ydata() == pytest.approx([85, 35])
    assert other.get_ydata() == pytest.approx([90, 50])
    assert list(chance.get_ydata()) == [10, 10]
    assert [line.get_color() for line in (standard, other)] == ["#010203", "#040506"]
    assert [line.get_marker() for line in (standard, other)] == ["o", "s"]
    band = zeroed.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((30, 90))  # the error of 0.8 and 0.9 is 0.05
    assert len(compensated.get_lines()[1].get_xdata()) == 0  # repr was not measured compensated
    assert zeroed.get_ylim() == compensated.get_ylim()


def test_pruned_curves_name_readings_axes_and_in_the_key_methods():
    plain, keyed = texts(svg(drawn, WIDE)), texts(svg(lambda width: drawn(width, key=True), WIDE))
    assert {"zeroed", "compensated", "filters cut, %", "test accuracy, %"} <= set(plain)
    assert set(keyed) - set(plain) == {"Standard training", "RePr", "chance"}


def test_no_curve_is_cut_off_by_the_panel_before_it():
    low, high = (
        Curve("standard", name, (0.0, 0.5), {0: (top, top)}) for name, top in (("a", 0.1), ("b", 0.9))
    )
    curves = CurveSet("test", "l2", "layer", "standard", 0.1, (low, high))
    panels = figures.pruned_curves(curves, LOOKS, WIDE).axes
    assert all(panel.get_ylim()[0] == 0 and panel.get_ylim()[1] > 90 for panel in panels)


def test_many_long_names_stay_apart_and_inside_the_figure():
    methods = [
        f"RePr, fraction 0.{number}, criterion {name}" for number in range(1, 7) for name in ("l1", "l2")
    ]
    curves = CurveSet(
        "test", "l2", "layer", methods[0], 0.1,
        tuple(Curve(method, "zeroed", (0.0, 0.5), {0: (0.9, 0.5)}) for method in methods),
    )  # fmt: skip
    figure = figures.pruned_curves(curves, dict.fromkeys(methods, LOOKS["repr"]), WIDE, key=True)
    figure.draw_without_rendering()
    (key,) = figure.legends
    assert [text.get_text() for text in key.get_texts()] == [*methods, "chance"]
    box = key.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    rows = [Series(method, LOOKS["repr"], [make_run()]) for method in methods]
    names = [text.get_text() for text in figures.dots(rows, {}, NARROW).axes[0].get_yticklabels()]
    assert [name.replace("\n", " ") for name in names] == methods
    assert max(len(line) for name in names for line in name.split("\n")) <= 26


def test_pruned_curves_stand_below_each_other_on_a_phone():
    wide, narrow = ([axes.get_position() for axes in drawn(width).axes] for width in (WIDE, NARROW))
    assert wide[0].y0 == wide[1].y0
    assert narrow[0].y0 > narrow[1].y0


def test_png_is_a_picture_of_that_width_and_opaque():
    picture = png(drawn, NARROW)
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(picture[16:20], "big") == round(200 * NARROW)
    assert png(drawn, NARROW) == picture


def test_dots_of_the_same_value_stand_beside_each_other():
    assert stacked([1.0, 2.0, 1.01, 1.0], 0.1, 0.09, 0.3).tolist() == [0, 0, 0.09, -0.09]
    assert np.abs(stacked([1.0] * 50, 0.1, 0.09, 0.3)).max() == 0.3


def test_accuracy_against_compute_by_hand():
    slow = series("repr")
    for run in slow.runs:
        for epoch in run.epochs:
            epoch.update(seconds=60.0, flops=4_000_000)
    figure = figures.compute_curves(
        [series("standard"), slow], EqualCompute("flops", {0: 8e6, 1: 4e6}, {}), 10
    )
    time, flops = figure.axes
    assert time.get_lines()[0].get_xdata() == pytest.approx([0.5, 1, 1.5, 2, 2.5])
    assert time.get_lines()[2].get_xdata() == pytest.approx([1, 2, 3, 4, 5])
    assert time.get_xlabel() == "training so far, min"
    assert flops.get_xlabel() == "training so far, MFLOPs"
    assert flops.get_lines()[2].get_xdata()[-1] == pytest.approx(20)
    assert flops.get_lines()[-1].get_xdata() == [6, 6]  # the budget


def test_without_flops_there_is_one_panel_against_time():
    one = series()
    del one.runs[0].epochs[0]["flops"]
    (panel,) = figures.compute_curves([one], None, 10).axes
    assert panel.get_xlabel() == "training so far, min"


def test_of_many_seeds_single_ones_are_not_drawn():
    few = figures.overlap_curves([series(runs=12)], 10).axes[0]
    many = figures.overlap_curves([series(runs=13)], 10).axes[0]
    assert len(few.collections) == len(many.collections) + 1


def test_accuracy_over_tasks_by_hand():
    accuracy, difference = task_figure(WIDE).axes
    means = [line for line in accuracy.get_lines() if line.get_marker() in ("o", "s")]
    assert [line.get_ydata() for line in means] == [pytest.approx([90, 75, 65]), pytest.approx([85, 80, 85])]
    for line in means:  # beside each other, so that no interval covers another
        assert np.round(line.get_xdata()).tolist() == [1, 2, 3]
    assert means[0].get_xdata()[0] < means[1].get_xdata()[0]
    # Seeds 0 and 1 of standard training are 70 and 80 in task 2: 75 ± 12.7062 · 5.
    bars = [line.get_ydata() for line in accuracy.get_lines() if line.get_color() == "#010203"]
    assert any(bar == pytest.approx([75 - 63.531, 75 + 63.531], abs=0.01) for bar in bars if len(bar) == 2)
    (mean,) = (line for line in difference.get_lines() if line.get_marker() == "s")
    assert mean.get_ydata() == pytest.approx([-5, 5, 20])
    assert accuracy.get_ylim()[1] <= 101
    assert (accuracy.get_ylabel(), difference.get_ylabel()) == ("test accuracy, %", "difference, points")


def test_one_method_alone_has_no_panel_of_differences():
    assert len(task_figure(WIDE, ["standard"]).axes) == 1


def test_the_next_task_begins_at_a_line():
    made = Series("repr", LOOKS["repr"], [make_sequence(0, 0.8, 0.7, 0.6)])
    upper, _ = figures.learning_curves([made], WIDE).axes
    assert [line.get_xdata()[0] for line in upper.get_lines() if list(line.get_ydata()) == [0, 1]] == [
        1.5,
        2.5,
    ]


def test_dots_of_a_sequence_are_means_without_the_first_task():
    runs = [make_sequence(seed, 0.9, 0.7, 0.6) for seed in (0, 1)]
    axes = figures.dots([Series("repr", LOOKS["repr"], runs)], {}, WIDE).axes[0]
    assert axes.get_xlabel() == "mean test accuracy in tasks 2 to 3, %"
    assert axes.get_lines()[0].get_xdata() == pytest.approx([65, 65])
