import pytest

from regrow.study.seeds import as_ranges, parse_methods, parse_seeds, seeds_of


def test_seeds_as_people_type_them() -> None:
    assert parse_seeds("3") == [3]
    assert parse_seeds("0,1, 5") == [0, 1, 5]
    assert parse_seeds("0-2,7") == [0, 1, 2, 7]


def test_seeds_as_a_file_has_them() -> None:
    assert seeds_of(3) == [3]
    assert seeds_of("0-2") == [0, 1, 2]
    assert seeds_of([5, "1-2", 0]) == [5, 1, 2, 0]


def test_seeds_as_ranges() -> None:
    assert as_ranges([4, 0, 1, 2, 7, 8]) == "0-2, 4, 7-8"
    assert as_ranges([]) == ""


@pytest.mark.parametrize("text", ["", "a", "1,", "2-0", "-1", "0..3", "1.5"])
def test_what_is_no_seed_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="0-4"):
        parse_seeds(text)


@pytest.mark.parametrize("value", [None, True, 1.5, {"a": 1}, [None], [[1]], -1])
def test_what_is_no_seed_in_a_file_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"seeds takes numbers such as 0"):
        seeds_of(value)


def test_a_range_that_is_no_range_of_seeds_is_refused_at_once() -> None:
    assert len(parse_seeds("0-9999")) == 10_000
    for text in ("0-10000", "0-9999,10000", "1-99999999999999"):
        with pytest.raises(ValueError, match="more than 10,000"):
            parse_seeds(text)


def test_a_pair_is_not_counted_twice() -> None:
    with pytest.raises(ValueError, match="1 twice"):
        parse_seeds("0-2,1")
    with pytest.raises(ValueError, match="1, 2 twice"):
        seeds_of(["0-2", "1-3"])
    with pytest.raises(ValueError, match="repr twice"):
        parse_methods("repr,standard,repr")
    with pytest.raises(ValueError, match="standard twice"):
        parse_methods("standard,backprop")


def test_methods() -> None:
    assert parse_methods("standard, repr") == ["standard", "repr"]
    assert parse_methods("backprop,bridgeout") == ["standard", "bridgeout"]
    with pytest.raises(ValueError, match="standard,repr"):
        parse_methods(" , ")


@pytest.mark.parametrize(
    "text", ["9" * 5000, "0-" + "9" * 5000, "1" * 31, "0," * 50_000 + "x", "0-3" * 10**6]
)
def test_seeds_of_any_length_are_refused_in_a_short_line(text: str) -> None:
    for read in (parse_seeds, seeds_of):
        with pytest.raises(ValueError, match="seeds") as refused:
            read(text)
        assert len(str(refused.value)) < 300


def test_of_many_seeds_that_are_there_twice_some_are_shown() -> None:
    with pytest.raises(ValueError, match=r"names 0, 1, 2.* twice") as refused:
        parse_seeds("0-4999,0-4999")
    assert len(str(refused.value)) < 400
