"""Which filters go: scopes, units, widths."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from regrow.pruning.choosing import (
    Choice,
    check_choice,
    choose,
    coupled_filters,
    falls_short,
    families_of,
    merged,
    renumbered,
    settled,
)
from regrow.structure.read import read_structure


class ResidualAndDepthwise(nn.Module):
    """stem + second(first(stem)), a depthwise layer behind, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.first = nn.Conv2d(4, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.last = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.second(self.first(x).relu())
        x = x + self.last(self.depthwise(x).relu())
        return self.head(x.mean((2, 3)))


def alive(keep):
    return {name: mask.nonzero().flatten().tolist() for name, mask in keep.items()}


A = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7])
B = torch.tensor([10.0, 11, 12, 13])


def test_scopes_by_hand():
    scores = {"a": A, "b": B}
    each = alive(choose(scores, 0.5, Choice(scope="layer")))
    assert each == {"a": [4, 5, 6, 7], "b": [2, 3]}
    together = alive(choose(scores, 0.5, Choice(scope="global")))
    assert together == {"a": [6, 7], "b": [0, 1, 2, 3]}
    families = Choice(scope="isomorphic", families=[["b"], ["a"]])
    assert alive(choose(scores, 0.5, families)) == {"a": [4, 5, 6, 7], "b": [2, 3]}


@pytest.mark.parametrize(
    ("fraction", "round_to", "kept"),
    [(0.375, 4, 4), (0.25, 4, 8), (0.3, 3, 6), (0.6, 4, 4), (0.85, 4, 4), (0.5, 16, 8), (0.5, 1, 4)],
)
def test_widths_are_the_nearest_multiple_but_one_at_least(fraction, round_to, kept):
    # 5 of 8 stay -> 4; 6 -> 8; 6 -> 6; 3 -> 4; 1 -> 4; a layer narrower than the multiple stays whole.
    keep = choose({"a": A}, fraction, Choice(scope="layer", round_to=round_to))
    assert alive(keep) == {"a": list(range(8 - kept, 8))}


@pytest.mark.parametrize(
    ("filters", "fraction", "kept"),
    [
        (64, 0.3, 48),  # 45 stay
        (64, 0.5, 32),
        (128, 0.3, 88),  # 90
        (256, 0.3, 176),  # 179
        (98, 0.0, 98),  # no multiple of 8, but it loses none
        (98, 0.01, 96),  # 97
        (64, 0.02, 64),  # 63
        (63, 0.3, 44),
        (16, 0.3, 11),
        (64, 0.99, 8),  # the floor asks for 7
    ],
)
def test_by_default_wide_layers_keep_multiples_of_8(filters, fraction, kept):
    keep = choose({"a": torch.arange(float(filters))}, fraction, Choice())
    assert alive(keep) == {"a": list(range(filters - kept, filters))}


def test_shares_are_taken_layer_by_layer():
    shares = {"b": 0.25, "a": 0.75, "c": 0.0}
    keep = choose({"a": A, "b": B, "c": B}, shares, Choice())
    assert alive(keep) == {"a": [6, 7], "b": [1, 2, 3], "c": [0, 1, 2, 3]}
    # Coupled to a layer that is to keep more, it keeps as many.
    units = [{"b": [i], "c": [i]} for i in range(4)]
    assert alive(choose({"a": A, "b": B, "c": B}, shares, Choice(units=units)))["b"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("filters", "dropped", "fraction", "round_to", "short"),
    [
        (64, 16, 0.3, None, False),  # 19.2 asked for: 48 is the nearest multiple of 8
        (64, 14, 0.3, None, True),
        (64, 16, 0.3, 8, True),  # who asks for multiples is told what they cost
        (64, 19, 0.3, 1, False),
        (64, 0, 0.03, None, True),
        (64, 0, 0.0, None, False),
        (8, 2, 0.3, None, False),
        (8, 1, 0.3, None, True),
    ],
)
def test_when_less_goes_than_was_asked_for(filters, dropped, fraction, round_to, short):
    keep = {"a": torch.arange(filters) >= dropped}
    assert falls_short(keep, fraction, Choice(round_to=round_to)) is short


def test_the_floor_outweighs_rounding_down():
    # 5 of 8 stay; the nearest multiple of 4 would be 4, and the floor asks for 5.
    keep = choose({"a": A}, 0.375, Choice(scope="layer", round_to=4, floor=0.6))
    assert int(keep["a"].sum()) == 8


def test_a_unit_falls_by_its_mean_or_not_at_all():
    scores = {"a": torch.tensor([0.0, 5, 6, 7]), "b": torch.tensor([9.0, 1, 6, 7])}
    units = [{"a": [i], "b": [i]} for i in range(4)]
    # Means 4.5, 3, 6, 7: the second goes first, though a's first filter has the lowest score.
    assert alive(choose(scores, 0.25, Choice(scope="layer", units=units))) == {"a": [0, 2, 3], "b": [0, 2, 3]}
    # Three of eight: the half of the second unit that a global ranking would take stays.
    keep = alive(choose(scores, 3 / 8, Choice(scope="global", units=units)))
    assert keep == {"a": [0, 2, 3], "b": [0, 2, 3]}


@given(
    widths=st.lists(st.integers(2, 20) | st.integers(60, 140), min_size=1, max_size=3),
    round_to=st.sampled_from([None, 1, 2, 4, 8]),
    scope=st.sampled_from(["layer", "global"]),
    fractions=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(sorted),
    seed=st.integers(0, 99),
)
def test_larger_fractions_drop_what_smaller_ones_do(widths, round_to, scope, fractions, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {f"l{i}": torch.rand(width, generator=generator) for i, width in enumerate(widths)}
    units = [{"l0": [0], f"l{len(widths) - 1}": [1]}]
    choice = Choice(scope=scope, round_to=round_to, units=units)
    less, more = (choose(scores, fraction, choice) for fraction in fractions)
    for name, width in zip(scores, widths, strict=True):
        assert (less[name] | ~more[name]).all()
        assert more[name].any()
        assert int(more[name].sum()) % choice.step(width) == 0 or more[name].all()
        assert len(more[name]) == width


def test_what_is_added_is_coupled_also_through_a_depthwise_layer():
    model = ResidualAndDepthwise()
    readers = read_structure(model, torch.randn(1, 3, 8, 8))
    units = coupled_filters(model, readers, ["stem", "first", "second", "last"])
    assert units == [{"stem": [i], "second": [i], "last": [i]} for i in range(4)]
    # Alone among its kind a filter is no unit.
    assert coupled_filters(model, readers, ["first", "second"]) == []


def test_families_are_of_one_kind_and_units_join_them():
    model = ResidualAndDepthwise()
    readers = read_structure(model, torch.randn(1, 3, 8, 8))
    names = ["stem", "first", "second", "last"]
    families = families_of(model, readers, names)
    assert sorted(map(sorted, families)) != [sorted(names)]
    assert ["last"] in families  # the only 1×1
    assert [family for family in families if "first" in family] == [["first"]]  # the only private one
    units = coupled_filters(model, readers, names)
    assert sorted(map(sorted, merged(families, units))) == [["first"], ["last", "second", "stem"]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scope": "locale"}, "unknown scope 'locale'"),
        ({"coupled": "together"}, "unknown way to cut coupled filters"),
        ({"floor": 2}, "floor is the share"),
        ({"round_to": 0}, "round_to=8"),
        ({"round_to": 2.0}, "whole number"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_choice(**{"scope": "layer", "floor": 0.1, "round_to": 1, "coupled": "jointly", **settings})


def test_units_of_what_cuts_have_left():
    units = [{"a": [0, 1], "b": [2]}, {"a": [2], "b": [0]}, {"c": [1], "b": [1]}]
    left = {"a": torch.tensor([True, False, True]), "c": torch.tensor([True, True, False])}
    # c holds a filter at zero and goes on counting it.
    scores = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(3)}
    assert renumbered(units, left, scores) == [
        {"a": [0], "b": [2]},
        {"a": [1], "b": [0]},
        {"c": [1], "b": [1]},
    ]
    left["b"], scores["b"] = torch.tensor([True, False, True]), torch.zeros(2)
    assert renumbered(units, left, scores) == [{"a": [0], "b": [1]}, {"a": [1], "b": [0]}]


def test_balanced_by_hand():
    # a saves 4 a filter, b 16: 0, ¼, ½, … 1¾ beside ⅝, 11/16, ¾, 13/16.
    costs = {"a": torch.full((8,), 4.0), "b": torch.full((4,), 16.0)}
    choice = Choice(scope="balanced", costs=costs)
    assert alive(choose({"a": A, "b": B}, 7 / 12, choice)) == {"a": [4, 5, 6, 7], "b": [3]}
    assert alive(choose({"a": A, "b": B}, 0.25, choice)) == {"a": [3, 4, 5, 6, 7], "b": [0, 1, 2, 3]}
    # At the same cost it is the scope "global".
    alike = Choice(scope="balanced", costs={"a": torch.ones(8), "b": torch.ones(4)})
    for fraction in (0.1, 0.5, 0.9):
        together = choose({"a": A, "b": B}, fraction, Choice(scope="global"))
        assert alive(choose({"a": A, "b": B}, fraction, alike)) == alive(together)


def test_the_errors_of_a_unit_add_up_and_so_does_what_it_saves():
    scores = {"a": torch.tensor([2.0, 3, 3, 9]), "b": torch.tensor([2.0, 5, 9, 9])}
    unit = [{"a": [0], "b": [0]}]
    mean = choose(scores, 0.25, Choice(scope="global", units=unit))
    assert alive(mean) == {"a": [1, 2, 3], "b": [1, 2, 3]}
    added = choose(scores, 0.25, Choice(scope="global", units=unit, added=True))  # 4, and so behind both 3s
    assert alive(added) == {"a": [0, 3], "b": [0, 1, 2, 3]}
    costs = {"a": torch.tensor([3.0, 1, 1, 1]), "b": torch.tensor([1.0, 1, 1, 1])}
    balanced = choose(scores, 0.25, Choice(scope="balanced", units=unit, costs=costs))  # 4 for 4
    assert alive(balanced) == {"a": [1, 2, 3], "b": [1, 2, 3]}


@pytest.mark.parametrize(
    ("criterion", "scope", "reconstructs", "shares", "expected"),
    [
        (None, None, True, False, ("reconstruction", "balanced")),
        (None, None, False, False, ("l2", "layer")),
        (None, None, True, True, ("reconstruction", "layer")),
        ("l1", None, True, False, ("l1", "layer")),
        ("reconstruction", None, False, False, ("reconstruction", "balanced")),
        (None, "global", True, False, ("reconstruction", "global")),
        ("l2", "balanced", True, False, ("l2", "balanced")),
    ],
)
def test_what_is_left_open(criterion, scope, reconstructs, shares, expected):
    assert settled(criterion, scope, reconstructs=reconstructs, shares=shares) == expected


def test_scores_below_0_cannot_be_divided_by_what_filters_cost():
    with pytest.raises(ValueError, match="the scores of 'ortho' are below 0: write scope='layer'"):
        settled("ortho", "balanced", reconstructs=True, shares=False)
