"""Runs line up as a comparison or study has recorded them, whatever the order and names of their folders."""

import json
import random
from pathlib import Path

import pytest

from regrow.study import records
from regrow.study.lineup import line_up, title_of
from regrow.study.records import RunRecord
from regrow.study.typed import Mistyped


def run(folder: Path, method: str = "standard", seed: int = 0, *, done: bool = True, **settings) -> RunRecord:
    config = {"method": method, "seed": seed, "model": "vgg", "data": "cifar10", **settings}
    return RunRecord(folder, config, {}, [], [], {"test_accuracy": 0.5} if done else None)


def shown(runs, baseline=None):
    """Names in order, with their numbers, and the baseline; the same for each order of ``runs``."""
    found = set()
    for seed in range(3):
        lined = line_up(random.Random(seed).sample(runs, len(runs)), baseline)
        names = tuple(dict.fromkeys(lined.names[each.folder] for each in lined.runs))
        found.add((names, tuple(lined.numbers[name] for name in names), lined.baseline, lined.title))
    (one,) = found
    return one


def compared(home: Path, *names: str, baseline: str = "repr") -> Path:
    about = {"version": 2, "baseline": baseline, "methods": [], "seeds": [0], "runs": list(names)}
    records.write_json(records.comparison_path(home), about)
    return home


def studied(home: Path, runs: dict[str, str], **about) -> Path:
    first = {"folder": "grid", "baseline": next(iter(runs.values())), "runs": runs, **about}
    records.write_json(records.study_path(home), {"version": 1, "name": "study", "comparisons": [first]})
    return home


def test_without_a_record_standard_is_the_baseline_and_order_is_that_of_methods_and_values(tmp_path):
    runs = [
        run(tmp_path / "a", "repr", fraction=0.5),
        run(tmp_path / "c", "repr", fraction=0.05),
        run(tmp_path / "b", "repr", fraction=0.3),
        run(tmp_path / "z", "dropout"),
        run(tmp_path / "d"),
    ]
    names = ("dropout", "RePr, fraction 0.05", "RePr, fraction 0.3", "RePr, fraction 0.5", "standard")
    assert shown(runs) == (names, (0, 0, 1, 2, 0), "standard", "vgg on cifar10")
    # Other folders, the same line-up.
    moved = [RunRecord(tmp_path / str(place), *_rest(each)) for place, each in enumerate(runs)]
    assert shown(moved) == shown(runs)


def _rest(each: RunRecord):
    return each.config, each.environment, each.epochs, each.events, each.result


def test_a_comparisons_order_and_baseline_are_kept(tmp_path):
    compared(tmp_path, "repr-seed0", "standard-seed0", "dropout-seed0")
    runs = [run(tmp_path / f"{method}-seed0", method) for method in ("dropout", "standard", "repr")]
    assert shown(runs)[0] == ("repr", "standard", "dropout")
    assert shown(runs)[2] == "repr"
    more = [*runs, run(tmp_path / "mine", "bridgeout"), run(tmp_path / "far" / "x", "targeted-dropout")]
    assert shown(more)[0] == ("repr", "standard", "dropout", "bridgeout", "targeted-dropout")
    assert shown(more)[2] == "repr"
    assert shown(runs[:2])[2] == "standard", "the recorded baseline has no run here"
    assert shown(runs[:1])[2] == "dropout"


def test_a_variant_beside_a_comparison_leaves_its_method_its_colour(tmp_path):
    compared(tmp_path, "repr-seed0", "standard-seed0")
    runs = [
        run(tmp_path / "repr-seed0", "repr", fraction=0.3),
        run(tmp_path / "standard-seed0"),
        run(tmp_path / "mine", "repr", fraction=0.1),
    ]
    names, numbers, baseline, _ = shown(runs)
    assert names == ("RePr, fraction 0.3", "standard", "RePr, fraction 0.1")
    assert numbers == (0, 0, 1)
    assert baseline == "RePr, fraction 0.3"


def test_a_study_keeps_names_numbers_and_title(tmp_path):
    studied(
        tmp_path,
        {
            "grid/b": "RePr, fraction 0.4",
            "grid/s": "standard",
            "grid/a": "RePr, fraction 0.2",
            "grid/missing": "RePr, fraction 0.1",
        },
        title="vgg on cifar10, train size 200",
        numbers={"RePr, fraction 0.4": 1, "RePr, fraction 0.2": 2, "standard": 0},
    )
    home = tmp_path / "grid"
    runs = [run(home / "a", "repr", fraction=0.2), run(home / "b", "repr", fraction=0.4), run(home / "s")]
    names = ("RePr, fraction 0.4", "standard", "RePr, fraction 0.2")
    assert shown(runs) == (names, (1, 0, 2), names[0], "vgg on cifar10, train size 200")
    # A single variant is called as in the study, and keeps its number.
    assert shown(runs[:1]) == (names[2:], (2,), names[2], "vgg on cifar10, train size 200")
    # Another run of the method in the folder changes no name and no colour.
    killed = run(home / "k", "repr", 7, done=False, fraction=0.3)
    assert shown([*runs, killed])[0][:3] == names
    assert shown([*runs, killed])[1] == (1, 0, 2, 0)


def test_studies_of_earlier_versions_have_no_numbers_and_no_title(tmp_path):
    studied(tmp_path, {"grid/b": "RePr, fraction 0.4", "grid/a": "RePr, fraction 0.2"})
    runs = [run(tmp_path / "grid" / name, "repr", fraction=f) for name, f in (("a", 0.2), ("b", 0.4))]
    names = ("RePr, fraction 0.4", "RePr, fraction 0.2")
    assert shown(runs) == (names, (1, 0), names[0], "vgg on cifar10")


def test_a_record_that_no_longer_fits_the_runs_names_none(tmp_path):
    studied(tmp_path, {"grid/a": "RePr, fraction 0.2", "grid/b": "standard"}, baseline="standard")
    again = [run(tmp_path / "grid" / "a", "repr", fraction=0.7), run(tmp_path / "grid" / "b")]
    assert shown(again)[0] == ("repr", "standard")
    assert shown(again)[2] == "standard"


def test_two_records_of_one_number_do_not_share_it(tmp_path):
    for name, fraction in (("one", 0.5), ("two", 0.1)):
        studied(
            tmp_path / name,
            {"grid/a": f"RePr, fraction {fraction}"},
            numbers={f"RePr, fraction {fraction}": 0},
        )
    runs = [run(tmp_path / n / "grid" / "a", "repr", fraction=f) for n, f in (("one", 0.5), ("two", 0.1))]
    lined = line_up(runs)
    assert sorted(lined.numbers.values()) == [0, 1]


def test_a_damaged_record_is_named_and_the_rest_is_shown(tmp_path):
    path = records.comparison_path(compared(tmp_path, "a"))
    for text in ("torn", "[]", '{"version": 2, "baseline": 3, "runs": []}', '{"version": 99}'):
        path.write_text(text)
        lined = line_up([run(tmp_path / "a")])
        assert list(lined.left_out) == [path]
        assert lined.baseline == "standard"
    study = records.study_path(tmp_path)
    study.write_text(json.dumps({"version": 1, "comparisons": [{"baseline": "a"}]}))
    assert list(line_up([run(tmp_path / "grid" / "a")]).left_out) == [study]


@pytest.mark.parametrize("given", ["repr", "RePr"])
def test_a_baseline_may_be_given_by_name_and_label(tmp_path, given):
    assert line_up([run(tmp_path / "a"), run(tmp_path / "b", "repr")], given).baseline == "repr"


def test_a_baseline_that_is_not_there_is_refused_with_the_nearest(tmp_path):
    runs = [
        run(tmp_path / "a"),
        run(tmp_path / "b", "repr", fraction=0.1),
        run(tmp_path / "c", "repr", fraction=0.2),
        run(tmp_path / "d", "dropout", done=False),
    ]
    for given, message in (
        ("foo", "no run here is of the baseline 'foo'; choose from"),
        ("standrad", "did you mean 'standard'"),
        ("RePr, fraction 0.3", "did you mean 'RePr, fraction 0.2'"),
        ("targeted-bridgeout", "no run here is of the baseline"),
        ("", "no run here is of the baseline"),
        ("dropout", "'dropout' has no finished run"),
        ("repr", "has 2 variants here: say which is the baseline, one of 'RePr, fraction 0.1', 'RePr"),
    ):
        with pytest.raises(Mistyped, match=message):
            line_up(runs, given)
    assert line_up(runs, "RePr, fraction 0.2").baseline == "RePr, fraction 0.2"


def test_titles_name_model_and_data_and_take_defaults_for_what_old_records_lack():
    assert title_of({"model": "resnet", "data": "cifar100"}) == "resnet on cifar100"
    assert title_of({}) == "convnet on digits"
