import pytest

from regrow.study.variants import fits, variant_names, variant_numbers


def test_a_method_alone_keeps_its_name() -> None:
    settings = {
        1: {"method": "standard", "seed": 0, "fraction": 0.1},
        2: {"method": "standard", "seed": 1, "fraction": 0.2},
        3: {"method": "repr", "seed": 0, "fraction": 0.2},
    }
    assert variant_names(settings) == {1: "standard", 2: "standard", 3: "repr"}


def test_variants_are_called_after_what_differs() -> None:
    repr_ = {"method": "repr", "fraction": 0.2, "criterion": "ortho", "skip_first": True, "p": 0.1}
    settings = {
        "a": repr_,
        "b": {**repr_, "fraction": 0.5, "p": 0.7, "seed": 1},
        "c": {**repr_, "fraction": 0.5, "skip_first": False},
        "d": {"method": "dropout", "p": 0.1, "weight_decay": 0.01},
        "e": {"method": "dropout", "p": 0.1, "weight_decay": 0.0},
    }
    assert variant_names(settings) == {
        "a": "RePr, fraction 0.2, skip first yes",
        "b": "RePr, fraction 0.5, skip first yes",
        "c": "RePr, fraction 0.5, skip first no",
        "d": "Dropout, weight decay 0.01",
        "e": "Dropout, weight decay 0",
    }


def test_a_setting_that_an_old_record_lacks_has_its_default() -> None:
    old, new = {"method": "repr", "fraction": 0.3}, {"method": "repr", "fraction": 0.3, "skip_first": True}
    assert variant_names({1: old, 2: new | {"exclude": []}}) == {1: "repr", 2: "repr"}
    names = variant_names({1: old, 2: new | {"exclude": ["a", "b"]}})
    assert names == {1: "RePr, exclude none", 2: "RePr, exclude a+b"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("repr", True),
        ("RePr, fraction 0.2", True),
        ("RePr, fraction 0.2, skip first yes", True),
        ("RePr, fraction 0.3", False),
        ("RePr, p 0.3", False),
        ("Dropout, fraction 0.2", False),
        ("standard", False),
    ],
)
def test_which_names_fit_a_run(name: str, expected: bool) -> None:
    assert fits(name, {"method": "repr", "fraction": 0.2, "p": 0.3}) is expected


def test_numbers_go_by_value_within_each_method() -> None:
    groups = {
        "c": {"method": "repr", "fraction": 0.5},
        "d": {"method": "dropout", "p": 0.1},
        "a": {"method": "repr", "fraction": 0.05},
        "b": {"method": "repr", "fraction": 0.1},
    }
    assert variant_numbers(groups) == {"a": 0, "b": 1, "c": 2, "d": 0}
    assert variant_numbers(dict(reversed(groups.items()))) == {"a": 0, "b": 1, "c": 2, "d": 0}
    # What has a number keeps it, and the others take the lowest free ones.
    assert variant_numbers(groups, {"c": 0, "a": 7, "gone": 1}) == {"a": 7, "b": 1, "c": 0, "d": 0}
