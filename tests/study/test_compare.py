import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from regrow.study.compare import (
    MethodSummary,
    best_table,
    check_comparable,
    group_of,
    headline,
    overview,
    summarise,
    table,
    task_table,
)
from regrow.study.paired import Paired, Spread
from regrow.study.records import RunRecord
from regrow.study.sequences import mean_after_switch


def run(method, seed, test=0.8, seconds=10.0, *, validation=0.7, finished=True, **settings):
    result = {"test_accuracy": test, "validation_accuracy": validation, "train_seconds": seconds}
    return RunRecord(
        folder=Path(f"{method}-seed{seed}"),
        config={"version": 1, "method": method, "seed": seed, "epochs": 30} | settings,
        environment={},
        epochs=[],
        events=[],
        result=result if finished else None,
    )


def test_summarise_by_hand():
    runs = [
        run("repr", 1, test=0.84, seconds=12, validation=0.75, fraction=0.3),
        run("repr", 0, test=0.82, seconds=11, fraction=0.3),
        run("standard", 0, test=0.80, seconds=10),
        run("standard", 1, test=0.81, seconds=8),
        run("standard", 2, test=0.85, seconds=12),
        run("repr", 2, finished=False, epochs=99),
    ]
    standard, other = summarise(runs)
    assert (standard.method, standard.n, standard.seeds) == ("standard", 3, (0, 1, 2))
    assert standard.test_accuracy.mean == pytest.approx(0.82)
    assert standard.test_accuracy.deviation == pytest.approx(math.sqrt(0.0014 / 2))
    assert (standard.difference, standard.time_ratio, standard.verdict) == (None, None, "baseline")
    assert (other.method, other.seeds) == ("repr", (0, 1))
    assert other.validation_accuracy.mean == pytest.approx(0.725)
    assert other.difference is not None
    assert other.difference.mean == pytest.approx(2.5)  # percentage points: (2 + 3) / 2
    assert other.difference.high == pytest.approx(2.5 + 12.7062 * 0.5, abs=1e-3)
    assert other.seconds.mean == 11.5
    assert other.time_ratio == pytest.approx((1.1 + 1.5) / 2)
    assert other.verdict == "no gain shown"
    assert (other.sign_p, other.bootstrap) == (0.5, None)  # two gains: 2 · 1/4; too few for a bootstrap
    assert other.needed is None  # two seeds say next to nothing about the spread
    assert (other.compared, other.adjusted_p) == (1, other.difference.p)


def test_verdicts_rest_on_the_p_values_corrected_by_holm():
    # Differences of 1 and 2 points, the mean 1.5 over an error of 0.5: t = 3; their p is 0.2048 and doubles.
    runs = [run("standard", seed, test=0.8) for seed in range(4)]
    runs += [run("a", seed, test=0.8 + 0.01 * points) for seed, points in enumerate((1, 2, 1, 2))]
    runs += [run("b", seed, test=0.8 + 0.01 * points) for seed, points in enumerate((0, 1, 2, 1.7))]
    alone = summarise([each for each in runs if each.method != "a"])[1]
    assert alone.difference.low < 0 < alone.difference.mean
    _, a, b = summarise(runs)
    # t = 1.5 / (0.57735 / 2) = 5.196 with 3 degrees of freedom: p = 0.01385.
    assert a.difference.p == pytest.approx(0.013847, abs=1e-5)
    assert a.adjusted_p == pytest.approx(2 * 0.013847, abs=2e-5)
    assert b.adjusted_p == b.difference.p
    assert (a.compared, a.verdict, b.verdict) == (2, "gain", "no gain shown")
    runs += [run(name, seed, test=0.8 + 0.0001 * seed) for name in "cdef" for seed in range(4)]
    _, a, *_ = summarise(runs)
    assert a.adjusted_p == pytest.approx(6 * 0.013847, abs=1e-4)
    assert a.difference.low > 0  # the interval stays the plain one
    assert a.verdict == "no gain shown"
    assert "(95 % interval +0.6 to +2.4, n = 4 seeds, p = 0.083 corrected for 6 comparisons)" in headline(
        summarise(runs)
    )


def test_one_seed_gives_a_difference_and_nothing_else():
    _, other = summarise([run("standard", 0), run("repr", 0, test=0.9)])
    assert other.difference.mean == pytest.approx(10)
    assert (other.adjusted_p, other.bootstrap, other.needed, other.sign_p) == (None, None, None, 1.0)
    assert other.verdict == "no gain shown"


def test_seeds_that_all_differ_by_the_same_amount_have_no_interval():
    runs = [run("standard", seed, test=0.8 + 0.01 * seed) for seed in range(5)]
    runs += [run("repr", seed, test=0.81 + 0.01 * seed) for seed in range(5)]
    _, other = summarise(runs)
    assert (other.bootstrap, other.needed, other.adjusted_p) == (None, None, 0.0625)
    assert "(n = 5 seeds with the same difference each, so no interval): no gain shown." in headline([other])


def trained(method, seed, accuracies, seconds, flops=None, test=0.8, **settings):
    """A run with an epoch for each of ``accuracies``, of ``seconds`` and ``flops`` each."""
    epochs = [
        {"epoch": number, "validation_accuracy": value, "seconds": seconds, "flops": flops}
        for number, value in enumerate(accuracies, start=1)
    ]
    made = run(method, seed, test, seconds * len(accuracies), validation=accuracies[-1], **settings)
    total = None if flops is None else flops * len(accuracies)
    return replace(made, epochs=epochs, result={**made.result, "train_flops": total})


def test_equal_compute_by_hand():
    runs = [
        trained("standard", 0, [0.5, 0.7, 0.6], 1.0, 10),
        trained("standard", 1, [0.5, 0.6, 0.8], 1.0, 10),
        trained("repr", 0, [0.4, 0.8, 0.9], 1.0, 15),
        trained("repr", 1, [0.5, 0.7, 0.9], 3.0, 15),
    ]
    standard, other = summarise(runs)
    # 30 FLOPs: all of standard training, two epochs of repr.
    assert (standard.unit, standard.flops.mean, other.flops_ratio, other.time_ratio) == ("flops", 30, 1.5, 2)
    assert standard.at_equal_compute == Spread(pytest.approx(0.75), pytest.approx(math.sqrt(0.005)))
    assert other.at_equal_compute.mean == pytest.approx(0.75)
    assert other.difference_at_equal_compute.differences == {0: pytest.approx(10), 1: pytest.approx(-10)}
    assert standard.difference_at_equal_compute is None


def sequence(method, seed, *accuracies, **settings):
    """A run that has trained a task for each of ``accuracies``."""
    made = trained(method, seed, [0.5] * len(accuracies), 1.0, 10, test=accuracies[-1], **settings)
    more = {"task_accuracies": [*accuracies], "mean_accuracy_after_switch": mean_after_switch(accuracies)}
    return replace(made, result={**made.result, **more})


SEQUENCES = [
    sequence("standard", 0, 0.95, 0.80, 0.70),
    sequence("standard", 1, 0.96, 0.82, 0.72),
    sequence("repr", 0, 0.90, 0.84, 0.72),
    sequence("repr", 1, 0.91, 0.83, 0.75),
]


def test_of_a_sequence_the_mean_without_the_first_task_is_compared():
    standard, other = summarise(SEQUENCES)
    assert standard.accuracy.mean == pytest.approx(0.76)
    assert standard.test_accuracy.mean == pytest.approx(0.71)  # of the last task
    assert other.difference.differences == {0: pytest.approx(3), 1: pytest.approx(2)}
    assert other.measure == "mean test accuracy in tasks 2 to 3"
    assert [point.difference.mean for point in other.tasks] == pytest.approx([-5, 2.5, 2.5])
    assert [point.difference for point in standard.tasks] == [None] * 3
    # The epochs of different tasks have no common measure.
    assert (other.at_equal_compute, other.unit, other.flops_ratio) == (None, None, 1.0)
    assert headline([standard, other]).startswith(
        "RePr: +2.5 points mean test accuracy in tasks 2 to 3 over standard training (95 % interval"
    )
    assert "in mean test accuracy in tasks 2 to 3:" in overview([standard, other])


def test_runs_with_one_task_are_compared_by_test_accuracy():
    one, other = summarise([sequence("standard", 0, 0.9), sequence("repr", 0, 0.8)])
    assert (one.after_switch, one.tasks, one.measure) == (None, (), "test accuracy")
    assert other.difference.mean == pytest.approx(-10)
    assert other.at_equal_compute is not None
    assert task_table([one, other]) is None


def test_other_tasks_are_not_comparable():
    runs = [sequence("standard", 0, 0.9, 0.8, tasks=2), sequence("repr", 0, 0.9, tasks=1)]
    with pytest.raises(ValueError, match="tasks is 2 and 1"):
        summarise(runs)
    with pytest.raises(ValueError, match="regime is 'same' and 'new-pictures'"):
        check_comparable([run("standard", 0), run("repr", 0, regime="new-pictures")])


def shown(what, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(what)
    return console.export_text()


def test_tables_of_a_sequence():
    summaries = summarise(SEQUENCES)
    text = shown(table(summaries))
    assert "after switches" in text
    assert "after switches: mean test accuracy in tasks 2 to 3" in text
    assert "76.00 ± 1.41 %" in text
    lines = [line.split() for line in shown(task_table(summaries)).splitlines()]
    assert ["Standard", "training", "95.5", "81.0", "71.0"] in lines
    assert ["RePr", "90.5", "83.5", "73.5"] in lines
    assert ["−5.0", "+2.5", "+2.5"] in lines


def test_of_many_tasks_eight_are_shown_and_fit_a_terminal():
    runs = [sequence(method, 0, *([0.9] * 29), 0.1) for method in ("standard", "targeted-bridgeout")]
    text = shown(task_table(summarise(runs)))
    assert "task 1      5      9     13     18     22     26     30" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "10.0" in text


def test_records_without_flops_have_no_ratio_of_them():
    standard, other = summarise([trained("standard", 0, [0.5], 1.0), trained("repr", 0, [0.5], 1.5, 10)])
    assert (standard.unit, standard.flops, other.flops_ratio, other.time_ratio) == (
        "seconds",
        None,
        None,
        1.5,
    )


def test_summarise_with_another_baseline_puts_it_first():
    summaries = summarise([run("a", 0), run("b", 0, test=0.9), run("c", 0)], baseline="b")
    assert [summary.method for summary in summaries] == ["b", "a", "c"]
    assert summaries[1].difference.mean == pytest.approx(-10)


def test_summarise_without_the_baseline_has_no_differences():
    (only,) = summarise([run("repr", 0)])
    assert (only.difference, only.verdict) == (None, "nothing to pair with")


def test_summarise_refuses_when_nothing_is_finished():
    with pytest.raises(ValueError, match="none of the 1 runs is finished"):
        summarise([run("repr", 0, finished=False)])


def test_runs_with_other_settings_are_not_comparable():
    with pytest.raises(ValueError, match=r"standard-seed0 and repr-seed0 .*: epochs is 30 and 40; data is"):
        check_comparable([run("standard", 0, data="digits"), run("repr", 0, epochs=40, data="cifar10")])
    with pytest.raises(ValueError, match=r"speed is not set and 0\.1"):
        check_comparable([run("standard", 0), run("repr", 0, speed=0.1)])


def test_methods_may_differ_in_their_own_settings_but_seeds_of_one_may_not():
    runs = [
        run("standard", 0),
        run("repr", 0, fraction=0.3),
        run("repr", 1, fraction=0.3),
    ]
    check_comparable(runs)
    with pytest.raises(ValueError, match=r"fraction is 0\.3 and 0\.2.*differ in the seed only"):
        check_comparable([*runs, run("repr", 2, fraction=0.2)])


def test_each_method_may_have_the_weight_decay_that_suits_it():
    runs = [run("standard", 0, weight_decay=5e-3), run("dropout", 0, weight_decay=5e-4, p=0.1)]
    check_comparable(runs)
    with pytest.raises(ValueError, match="weight_decay is"):
        check_comparable([*runs, run("standard", 1, weight_decay=5e-4)])


def test_cycles_of_other_lengths_are_another_learning_rate_for_every_method():
    with pytest.raises(ValueError, match="cycles is 3 and 2"):
        check_comparable([run("standard", 0, cycles=3), run("repr", 0, cycles=2)])


def test_the_same_method_and_seed_twice_is_refused():
    with pytest.raises(ValueError, match="both 'repr' with seed 3: leave one out"):
        check_comparable([run("repr", 3), run("repr", 3)])


def test_variants_of_a_method_are_groups_of_their_own():
    runs = [
        run("standard", 0),
        replace(run("repr", 0, test=0.9, fraction=0.2), folder=Path("a")),
        replace(run("repr", 0, test=0.7, fraction=0.3), folder=Path("b")),
    ]
    with pytest.raises(ValueError, match="both 'repr' with seed 0"):
        check_comparable(runs)
    variants = {Path("a"): "RePr, fraction 0.2", Path("b"): "RePr, fraction 0.3"}
    assert [group_of(each, variants) for each in runs] == ["standard", *variants.values()]
    standard, low, high = summarise(runs, variants=variants)
    assert (standard.method, low.method, high.method) == ("standard", *variants.values())
    assert (low.difference.mean, high.difference.mean) == (pytest.approx(10), pytest.approx(-10))
    assert headline([standard, low]).startswith("RePr, fraction 0.2: +10.0 points")


def test_variants_may_not_differ_in_what_is_not_a_methods_own():
    runs = [run("repr", 0), replace(run("repr", 0, batch_size=64), folder=Path("b"))]
    with pytest.raises(ValueError, match="batch_size is 128 and 64"):
        check_comparable(runs, {Path("b"): "RePr, batch size 64"})
    with pytest.raises(ValueError, match="two variants would both be shown as 'RePr'"):
        check_comparable([runs[0], replace(runs[0], folder=Path("b"))], {Path("b"): "RePr"})


def test_the_baseline_may_be_named_by_its_variant_or_by_its_method_if_that_has_only_one():
    runs = [run("standard", 0), run("repr", 0, fraction=0.3)]
    named = {runs[0].folder: "Standard, long"}
    assert [each.method for each in summarise(runs, "standard", named)] == ["Standard, long", "repr"]
    assert summarise(runs, "Standard, long", named)[1].difference is not None
    runs.append(replace(run("standard", 0, weight_decay=0.1), folder=Path("b")))
    with pytest.raises(
        ValueError, match=r"'standard' has 2 variants here: say which .* 'Standard, long', 'x'"
    ):
        summarise(runs, "standard", {**named, Path("b"): "x"})


def test_a_setting_that_older_records_do_not_have_is_at_its_default():
    old, new = run("standard", 0), run("standard", 1, version=2, momentum=0.9)
    check_comparable([old, new])
    with pytest.raises(ValueError, match=r"momentum is 0\.9 and 0\.8"):
        check_comparable([old, run("standard", 1, momentum=0.8)])


def summary(method, difference=None, time_ratio=None, n=3):
    return MethodSummary(
        method=method,
        baseline="standard",
        seeds=tuple(range(n)),
        test_accuracy=Spread(0.88123, 0.0042),
        validation_accuracy=Spread(0.9, None),
        difference=difference,
        adjusted_p=None if difference is None else difference.p,
        seconds=Spread(10.0, 0.5),
        time_ratio=time_ratio,
    )


@pytest.mark.parametrize(
    ("difference", "ratio", "expected"),
    [
        (
            Paired({0: 1.0, 1: 1.2, 2: 1.4}, 1.2, -0.3, 2.7, 0.074),
            1.02,
            "RePr: +1.2 points test accuracy over standard training (95 % interval −0.3 to +2.7, "
            "n = 3 seeds): no gain shown. It took 1.02 × the training time.",
        ),
        (
            Paired({0: -1.0, 1: -1.0}, -1.0, -1.5, -0.5, 0.01),
            0.7,
            "RePr: −1.0 points test accuracy against standard training (95 % interval −1.5 to −0.5, "
            "n = 2 seeds): a loss. It took 0.70 × the training time.",
        ),
        (
            Paired({0: 0.5, 1: 0.5}, 0.5, 0.04, 0.96, 0.04),
            None,
            "RePr: +0.50 points test accuracy over standard training (95 % interval +0.04 to +0.96, "
            "n = 2 seeds): a gain.",
        ),
        (
            Paired({0: 0.0}, 0.0, None, None, None),
            None,
            "RePr: +0.0 points test accuracy over standard training (n = 1 seed, too few for an interval): "
            "no gain shown.",
        ),
    ],
)
def test_headline_is_a_sentence(difference, ratio, expected):
    assert headline([summary("standard"), summary("repr", difference, ratio)]) == expected


def test_headline_says_how_many_seeds_and_flops_it_takes():
    difference = Paired({0: 1.0, 1: 3.0}, 2.0, -10.7, 14.7, 0.295)
    one = replace(summary("repr", difference, 1.5, n=2), needed=1234, flops_ratio=0.9)
    assert headline([one]).endswith(
        "no gain shown. A difference of this size would take about 1,234 seeds to show. It took 1.50 × the "
        "training time and 0.90 × the training FLOPs."
    )
    assert "seeds to show" not in headline([replace(one, needed=2)])


def test_headline_has_a_line_per_method():
    one = Paired({0: 1.0}, 1.0, None, None, None)
    lines = headline([summary("standard"), summary("repr", one), summary("dsd", one)]).split("\n")
    assert [line.split(":")[0] for line in lines] == ["RePr", "Dense-Sparse-Dense"]


def test_overview_counts_verdicts_and_names_methods():
    gain, loss = Paired({0: 1.0}, 1.0, 0.5, 1.5, 0.01), Paired({0: -1.0}, -1.0, -1.5, -0.5, 0.01)
    neither = Paired({0: 0.0}, 0.0, None, None, None)
    found = [summary("standard"), *(summary(name, gain) for name in "ab"), summary("repr", loss)]
    assert overview(found) == (
        "3 methods compared with standard training in test accuracy: 2 gains (a, b), 1 loss (RePr)."
    )
    assert overview([*found, summary("x", neither)]).endswith("1 loss (RePr), no gain shown for 1.")
    assert overview([summary("standard"), *(summary(name, neither) for name in "abcd")]).endswith(
        "4 methods compared with standard training in test accuracy: no gain shown for any."
    )


def test_headline_of_one_method_gives_its_accuracy():
    assert headline([summary("standard")]) == (
        "Standard training: 88.12 ± 0.42 % test accuracy (n = 3 seeds), with no run of another method to "
        "compare with."
    )


def test_table_shows_the_numbers_and_no_markup():
    difference = Paired({0: 1.0, 1: 3.0}, 2.0, -10.7, 14.7, 0.3)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table([summary("standard"), summary("[red]x[/red]", difference, 1.5)]))
    text = console.export_text()
    standard, other = (line for line in text.splitlines() if "88.12 ± 0.42 %" in line)
    assert "Standard training" in standard
    assert "baseline" in standard
    for cell in ("[red]x[/red]", "+2.00 [−10.70, +14.70]", "10.0 ± 0.5 s", "1.50"):
        assert cell in other


def test_table_fits_a_terminal_of_80_columns():
    difference = Paired({0: 1.0, 1: 3.0}, 2.0, -10.7, 14.7, 0.3)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table([summary("standard", n=10), summary("repr", difference, 1.5, n=10)]))
    text = console.export_text()
    assert (
        len([line for line in text.splitlines() if "88.12 ± 0.42 %" in line and "10.0 ± 0.5 s" in line]) == 2
    )
    assert "…" not in text


def at_best(method, seed, test, best, epoch=5):
    mine = run(method, seed, test=test)
    return replace(mine, result=mine.result | {"best_test_accuracy": best, "best_epoch": epoch})


def test_the_best_epoch_by_hand():
    runs = [
        *(at_best("standard", seed, 0.6, 0.64) for seed in (0, 1, 2)),
        *(at_best("repr", seed, 0.7, 0.64 + 0.01 * seed, epoch=seed) for seed in (0, 1, 2)),
        run("dropout", 0),  # of an older regrow
    ]
    standard, other, older = summarise(runs)
    assert (standard.best_test_accuracy, standard.difference_at_best) == (Spread(0.64, 0), None)
    assert other.best_test_accuracy.mean == pytest.approx(0.65)
    assert other.best_epoch.mean == 1
    assert other.difference_at_best.mean == pytest.approx(1)
    assert other.difference_at_best.high == pytest.approx(1 + 4.3027 / math.sqrt(3), abs=1e-3)
    assert other.difference.mean == pytest.approx(10)
    assert (older.best_test_accuracy, older.best_epoch, older.difference_at_best) == (None, None, None)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(best_table([standard, other, older]))
    lines = console.export_text().splitlines()
    assert any(
        "RePr" in line and "65.00 ± 1.00 %" in line and "+1.00 [−1.48, +3.48]" in line for line in lines
    )
    assert any(
        "Standard training" in line and "baseline" in line and line.strip().endswith("5") for line in lines
    )
    assert any("Dropout" in line and line.count("—") == 3 for line in lines)


def test_without_best_epochs_there_is_no_table_of_them():
    assert best_table(summarise([run("standard", 0), run("repr", 0)])) is None
