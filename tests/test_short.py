import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.short import by_reason, line, said, short

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda part: (
        st.lists(part, max_size=20) | st.dictionaries(st.text(), part, max_size=20) | st.tuples(part)
    ),
    max_leaves=40,
)


@given(VALUES)
def test_every_value_is_one_printable_line_of_80_characters_at_most(value):
    text = short(value)
    assert len(text) <= 80
    assert text.isprintable()


@pytest.mark.parametrize("value", ["many", 1.5, -3, True, None, [1, "a"], {"a": 1}, (1,), b"x", float("nan")])
def test_a_short_value_is_shown_as_python_writes_it(value):
    assert short(value) == repr(value)


def test_a_value_of_any_size_costs_little():
    assert short(10**4999) == "(a number of 5,000 digits)"
    assert short(-(2**64)) == "-18446744073709551616"
    assert short(-(10**200)) == "-(a number of 201 digits)"
    around = []
    around.append(around)
    assert short(around) == "[[[[...]]]]"
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert len(short(deep)) < 80
    assert len(short("x" * 50_000_000)) <= 80
    assert len(short(["x" * 1000] * 1000)) <= 80


def test_a_text_becomes_one_line_that_keeps_both_ends():
    assert line("a\n  b\tc\x1b[31m") == "a b c [31m"
    cut = line("begin" + "x" * 10_000_000 + "end", 60)
    assert (len(cut), cut[:6], cut[-4:]) == (60, "beginx", "xend")
    assert line("q" * 200) == "q" * 200
    assert len(line("q" * 201)) == 200


def test_a_reason_is_given_once_with_the_first_names_that_have_it():
    reasons = {"a": "frozen", "b": "grouped", **dict.fromkeys("cdef", "frozen")}
    assert by_reason(reasons) == "'a', 'c', 'd' and 2 more: frozen; 'b': grouped"
    assert by_reason({name: name.upper() for name in "abcde"}) == "'a': A; 'b': B; 'c': C; and 2 more reasons"


def test_an_error_of_the_system_names_the_users_file_and_no_number():
    error = said(PermissionError(errno.EACCES, "Permission denied", "/tmp/.a.1.tmp"), "/tmp/a", "written")
    assert type(error) is PermissionError
    assert str(error) == "/tmp/a cannot be written: Permission denied."


def test_an_error_that_was_written_for_people_stays():
    error = OSError("the net cannot be stored")
    assert said(error, "/tmp/a", "written") is error
