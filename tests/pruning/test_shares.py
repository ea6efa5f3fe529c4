"""Shares of layers: which layer gets which, and what is refused."""

import pytest

from regrow.pruning.shares import check_reach, check_shares, layer_shares

NAMES = ["stem", "layer1.0.a", "layer1.0.b", "layer1.1.a", "layer10.a", "head"]


def test_the_longest_name_counts_whatever_the_order() -> None:
    shares = {"layer1.0.b": 0.0, "layer1": 0.6, "layer1.0": 0.2, "stem": 0}
    expected = {"stem": 0.0, "layer1.0.a": 0.2, "layer1.0.b": 0.0, "layer1.1.a": 0.6}
    assert layer_shares(shares, NAMES) == layer_shares(dict(reversed(shares.items())), NAMES) == expected


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("layer2", "did you mean 'layer1'"),
        ("layer1.2", "did you mean 'layer1.1'"),
        ("layer1.0.c", "'layer1.0.a'"),
        ("stam", "did you mean 'stem'"),
        ("layer", "did you mean 'layer1'"),
        ("", "choose from 'stem'"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"no convolution is named '{name}'.*{hint}"):
        layer_shares({"stem": 0.1, name: 0.5}, NAMES)


@pytest.mark.parametrize("share", [1, 1.0, -0.1, float("nan"), "0.5", None, [0.5], {"a": 0.5}, 30])
def test_a_share_out_of_range_is_refused_with_its_name(share: object) -> None:
    with pytest.raises(ValueError, match=r"fraction\['layer3'\]: .*0 <= fraction < 1"):
        check_shares({"layer1": 0.5, "layer3": share}, "layer")


@pytest.mark.parametrize(
    ("shares", "scope", "message"),
    [
        ({}, "layer", "names no layer"),
        ({3: 0.5}, "layer", "qualified names, got a int"),
        ({"a": 0.5}, "global", "needs scope='layer', got scope='global'"),
        ({"a": 0.5}, "isomorphic", "needs scope='layer'"),
    ],
)
def test_what_shares_cannot_be(shares: dict, scope: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_shares(shares, scope)


def test_a_name_that_means_only_whole_layers_is_refused_with_the_reasons() -> None:
    whole = {"stem": "excluded", "head": "the output", "layer1.0.a": "grouped"}
    check_reach({"layer1": 0.5, "layer1.0": 0.5}, NAMES, whole)
    for name, reason in (("stem", "'stem': excluded"), ("head", "'head': the output")):
        with pytest.raises(ValueError, match=f"fraction names '{name}', where .*{reason}"):
            check_reach({"layer1": 0.5, name: 0.1}, NAMES, whole)
