import json
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.surgery.plan import CutPlan

PARTS = ("rows", "columns", "channels", "groups", "placed", "picked", "spread", "masked")
names, numbers = st.text("ab.1é", max_size=5), st.integers(0, 1 << 40)
indices = st.lists(numbers, max_size=4, unique=True).map(sorted)
VALUES = dict.fromkeys(PARTS, indices) | {
    "groups": numbers,
    "placed": st.tuples(numbers, indices),
    "masked": st.text("ab ", max_size=5),
}
plans = st.builds(
    CutPlan, **{part: st.dictionaries(names, value, max_size=3) for part, value in VALUES.items()}
)


@given(plan=plans)
def test_a_plan_goes_to_plain_data_and_back(plan):
    data = plan.to_dict()
    assert tuple(data) == PARTS
    assert CutPlan.from_dict(data) == plan
    again = CutPlan.from_dict(json.loads(json.dumps(data)))
    assert again == plan
    assert again.layers() == plan.layers()
    assert json.loads(json.dumps(again.to_dict())) == json.loads(json.dumps(data))


def test_the_plain_data_by_hand():
    plan = CutPlan(
        rows={"a": [0, 2]}, groups={"a": 2}, placed={"n": (3, [0, 2])}, masked={"b": "not confirmed"}
    )
    assert plan.to_dict() == {
        "rows": {"a": [0, 2]},
        "columns": {},
        "channels": {},
        "groups": {"a": 2},
        "placed": {"n": [3, [0, 2]]},
        "picked": {},
        "spread": {},
        "masked": {"b": "not confirmed"},
    }


def test_the_layers_in_the_order_of_the_parts_each_once():
    plan = CutPlan(
        rows={"b": [0], "a": [0]},
        columns={"a": [1], "c": [0]},
        channels={"n": [0]},
        groups={"b": 1, "g": 1},
        placed={"n": (2, [0]), "p": (2, [0])},
        picked={"q": [0], "c": [0]},
        spread={"s": [0]},
        masked={"m": "why"},
    )
    assert plan.layers() == ["b", "a", "c", "n", "g", "p", "q", "s"]  # one that is masked stays as it is
    assert CutPlan().layers() == CutPlan(masked={"m": "why"}).layers() == []


@given(plan=plans)
def test_every_layer_of_which_something_else_is_left_is_listed(plan):
    named = [set(getattr(plan, part)) for part in PARTS if part != "masked"]
    listed = plan.layers()
    assert set(listed) == set().union(*named)
    assert len(listed) == len(set(listed))


INDICES = ("rows", "columns", "channels", "picked", "spread")
NO_INDICES = [None, 1, "01", (0, 1), {0: 1}, [-1], [0, -1], [0.0], ["0"], [True], [[0]], [None]]
NO_NUMBER = [None, -1, 1.0, "1", True, [1], {}]
WRONG = [
    *((part, value) for part in INDICES for value in NO_INDICES),
    *(("groups", value) for value in NO_NUMBER),
    *(("placed", [value, [0]]) for value in NO_NUMBER),
    *(("placed", [3, value]) for value in NO_INDICES),
    *(("placed", value) for value in (None, 3, [3], [3, [0], [1]], [], "30", {3: [0]})),
    *(("masked", value) for value in (None, 1, ["why"], b"why", True)),
]


@pytest.mark.parametrize(("part", "value"), WRONG)
def test_a_wrong_value_is_refused_and_its_part_and_layer_are_named(part, value):
    data = CutPlan(rows={"right": [0]}, masked={"right": "why"}).to_dict()
    data[part]["layer"] = value
    with pytest.raises(ValueError, match=rf"'{part}' of a cut plan cannot hold .* for 'layer'"):
        CutPlan.from_dict(data)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", [None, [], [["a", [0]]], "a", 3])
def test_a_part_that_maps_nothing_is_refused(part, value):
    with pytest.raises(ValueError, match=f"'{part}' of a cut plan maps names to values, got "):
        CutPlan.from_dict(CutPlan().to_dict() | {part: value})


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", [1, None, ("a",), b"a"])
def test_a_layer_whose_name_is_no_text_is_refused(part, name):
    right = {"groups": 1, "placed": [1, [0]], "masked": "why"}.get(part, [0])
    assert CutPlan.from_dict(CutPlan().to_dict() | {part: {"a": right}}).layers() == ["a"] * (
        part != "masked"
    )
    with pytest.raises(ValueError, match=f"'{part}' of a cut plan cannot hold"):
        CutPlan.from_dict(CutPlan().to_dict() | {part: {name: right}})


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing_or_unknown_is_refused(part):
    data = CutPlan().to_dict()
    without = {name: value for name, value in data.items() if name != part}
    for wrong in (without, without | {f"{part}s": {}}, data | {"": {}}, data | {1: {}}):
        with pytest.raises(ValueError, match=f"a cut plan has the parts {', '.join(PARTS)}; got "):
            CutPlan.from_dict(wrong)


@pytest.mark.parametrize("data", [None, [], "rows", 1, {}, [("rows", {})], set(PARTS)])
def test_what_is_no_mapping_is_refused(data):
    with pytest.raises(ValueError, match="a cut plan has the parts"):
        CutPlan.from_dict(data)


def test_an_error_shows_the_beginning_of_what_is_long():
    data = CutPlan().to_dict() | {"rows": {"a": list(range(10_000, -2, -1))}}
    with pytest.raises(ValueError, match=r"cannot hold \[10000, 9999, .*… for 'a'\.$") as caught:
        CutPlan.from_dict(data)
    assert len(str(caught.value)) < 200


def test_a_plan_is_given_no_other_parts_and_shares_none():
    with pytest.raises(FrozenInstanceError):
        CutPlan().rows = {}
    one, other = CutPlan(), CutPlan()
    one.rows["a"] = [0]
    assert other == CutPlan() != one
