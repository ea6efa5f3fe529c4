import pytest

from regrow.study.seeds import parse_methods, parse_seeds


def test_seeds_as_people_type_them() -> None:
    assert parse_seeds("3") == [3]
    assert parse_seeds("0,1, 5") == [0, 1, 5]
    assert parse_seeds("0-2,7") == [0, 1, 2, 7]


@pytest.mark.parametrize("text", ["", "a", "1,", "2-0", "-1", "0..3", "1.5"])
def test_what_is_no_seed_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="0-4"):
        parse_seeds(text)


def test_a_pair_is_not_counted_twice() -> None:
    with pytest.raises(ValueError, match="1 twice"):
        parse_seeds("0-2,1")
    with pytest.raises(ValueError, match="repr twice"):
        parse_methods("repr,standard,repr")
    with pytest.raises(ValueError, match="standard twice"):
        parse_methods("standard,backprop")


def test_methods() -> None:
    assert parse_methods("standard, repr") == ["standard", "repr"]
    assert parse_methods("backprop,bridgeout") == ["standard", "bridgeout"]
    with pytest.raises(ValueError, match="standard,repr"):
        parse_methods(" , ")
