import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regrow.criteria.select import select

TWO = {"a": torch.tensor([5.0, 1.0, 4.0, 2.0]), "b": torch.tensor([3.0, 9.0, 8.0, 7.0])}


def alive(keep):
    return {name: mask.int().tolist() for name, mask in keep.items()}


def test_global_drops_the_lowest_of_all_layers():
    # 3 of 8 filters: scores 1 and 2 in a, 3 in b.
    assert alive(select(TWO, 3 / 8)) == {"a": [1, 0, 1, 0], "b": [0, 1, 1, 1]}


def test_layer_drops_the_same_share_of_each():
    assert alive(select(TWO, 0.5, scope="layer")) == {"a": [1, 0, 1, 0], "b": [0, 1, 1, 0]}


def test_the_floor_spares_the_best_of_a_layer_and_the_next_lowest_elsewhere_goes():
    # 4 of 8: without a floor 1, 2, 4 of a and 3 of b go. Half of a must live: 5 and 4; so 7 of b goes.
    assert alive(select(TWO, 0.5, floor=0)) == {"a": [1, 0, 0, 0], "b": [0, 1, 1, 1]}
    assert alive(select(TWO, 0.5, floor=0.5)) == {"a": [1, 0, 1, 0], "b": [0, 1, 1, 0]}


def test_one_filter_of_a_layer_always_lives():
    scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([8.0, 9.0])}
    assert alive(select(scores, 0.5, floor=0)) == {"a": [0, 1], "b": [0, 1]}


def test_excluded_layers_are_neither_dropped_nor_counted():
    assert alive(select(TWO, 0.25, exclude=["a"])) == {"b": [0, 1, 1, 1]}
    assert alive(select(TWO, 0.25, exclude="a")) == {"b": [0, 1, 1, 1]}
    inside = {"block.a": TWO["a"], "c": TWO["b"]}
    assert alive(select(inside, 0.25, exclude=["block"])) == {"c": [0, 1, 1, 1]}


def test_equal_scores_fall_in_order_of_layer_and_index():
    scores = {"a": torch.ones(3), "b": torch.ones(3)}
    assert alive(select(scores, 0.5, floor=0)) == {"a": [0, 0, 1], "b": [0, 1, 1]}


def test_infinite_scores_keep_the_floor():
    scores = {"a": torch.full((2,), math.inf), "b": torch.full((2,), math.inf)}
    assert alive(select(scores, 0.5)) == {"a": [0, 1], "b": [0, 1]}


def test_counts_round_to_the_nearest_filter():
    scores = {"a": torch.arange(10.0)}
    for fraction, dropped in ((0, 0), (0.04, 0), (0.05, 1), (0.3, 3), (0.35, 4), (0.89, 9)):
        assert (~select(scores, fraction, floor=0)["a"]).sum() == dropped


def test_a_floor_of_seven_in_a_hundred_protects_seven():
    # 0.07 · 100 = 7.000000000000001 in binary.
    with pytest.warns(UserWarning, match="leaves 93 of the 99"):
        keep = select({"a": torch.arange(100.0)}, 0.99, floor=0.07)
    assert keep["a"].sum() == 7


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_floor_out_of_reach_warns_and_drops_what_can_be(scope):
    with pytest.warns(UserWarning, match=r"floor=0\.75 leaves 2 of the 4 filters.*Lower the floor"):
        keep = select(TWO, 0.5, scope=scope, floor=0.75)
    assert alive(keep) == {"a": [1, 0, 1, 1], "b": [0, 1, 1, 1]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": -0.1}, "0 <= fraction < 1, got -0.1"),
        ({"fraction": 1.0}, r"got 1\.0\. For 30 % write fraction=0\.3"),
        ({"fraction": math.nan}, "got nan"),
        ({"fraction": "0.3"}, "got '0.3'"),
        ({"fraction": 0.3, "floor": 1.5}, r"0 <= floor <= 1, got 1\.5"),
        ({"fraction": 0.3, "scope": "globl"}, "unknown scope 'globl'; did you mean 'global'"),
        ({"fraction": 0.3, "exclude": ["A"]}, "no convolution is named 'A'"),
        ({"fraction": 0.3, "exclude": ["a", "b"]}, "no layer is left"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        select(TWO, **arguments)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.tensor([1.0, math.nan]), r"scores\['a'\] holds NaN"),
        (torch.ones(2, 2), r"one number per filter, got \[2, 2\]"),
        (torch.ones(0), r"one number per filter, got \[0\]"),
    ],
)
def test_bad_scores(values, message):
    with pytest.raises(ValueError, match=message):
        select({"a": values}, 0.5)


def greedy(scores, fraction, floor):
    """Walk the ranking upwards and drop whatever its layer can still spare."""
    asked = math.floor(fraction * sum(map(len, scores.values())) + 0.5 + 1e-9)
    room = {n: len(v) - max(1, math.ceil(floor * len(v) - 1e-9)) for n, v in scores.items()}
    keep = {n: [True] * len(v) for n, v in scores.items()}
    ranking = sorted(
        (value, layer, index, name)
        for layer, (name, values) in enumerate(scores.items())
        for index, value in enumerate(values.tolist())
    )
    for _, _, index, name in ranking:
        if asked and room[name]:
            keep[name][index] = False
            room[name] -= 1
            asked -= 1
    return keep


layers = st.lists(
    st.lists(st.sampled_from([-1.0, 0.0, 0.25, 1.0, 2.5, math.inf]), min_size=1, max_size=9),
    min_size=1,
    max_size=5,
)


@given(layers, st.floats(0, 1, exclude_max=True), st.floats(0, 1))
def test_global_selection_is_the_greedy_walk(values, fraction, floor):
    scores = {f"layer{i}": torch.tensor(v) for i, v in enumerate(values)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keep = select(scores, fraction, floor=floor)
    assert {name: mask.tolist() for name, mask in keep.items()} == greedy(scores, fraction, floor)


@given(layers, st.floats(0, 1, exclude_max=True), st.floats(0, 1), st.sampled_from(["global", "layer"]))
def test_counts_and_floors_hold(values, fraction, floor, scope):
    scores = {f"layer{i}": torch.tensor(v) for i, v in enumerate(values)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keep = select(scores, fraction, scope=scope, floor=floor)
    room = {n: len(v) - max(1, math.ceil(floor * len(v) - 1e-9)) for n, v in scores.items()}
    dropped = {n: int((~mask).sum()) for n, mask in keep.items()}
    nearest = {n: math.floor(fraction * len(v) + 0.5 + 1e-9) for n, v in scores.items()}
    if scope == "layer":
        assert dropped == {n: min(nearest[n], room[n]) for n in scores}
    else:
        asked = math.floor(fraction * sum(map(len, values)) + 0.5 + 1e-9)
        assert sum(dropped.values()) == min(asked, sum(room.values()))
    for name, mask in keep.items():
        assert mask.sum() >= max(1, floor * len(mask) - 1e-6)
        if dropped[name] and not mask.all():
            assert scores[name][mask].min() >= scores[name][~mask].max()
    if scope == "global":  # what was kept though its layer could spare it scores no lower than what went
        spare = [scores[n][mask].min() for n, mask in keep.items() if dropped[n] < room[n]]
        gone = [scores[n][~mask].max() for n, mask in keep.items() if dropped[n]]
        assert not spare or not gone or min(spare) >= max(gone)
