import logging
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.log import first_line, gave_up


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one"), "one"),
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one  \r\ntwo"), "one  "),
        (ValueError(), "ValueError"),
        (KeyError("name"), "'name'"),
        (RuntimeError(" \n\t"), "RuntimeError"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_the_first_line_by_hand(error, line):
    assert first_line(error) == line


# Everything that ends a line in Python, and what stands beside it.
@given(message=st.text("ab \t\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"))
def test_the_first_line_is_one_line_that_says_something(message):
    line = first_line(ValueError(message))
    assert len(line.splitlines()) == 1
    assert line.strip()
    assert line in message or not message.strip()


@pytest.mark.gives_up
def test_what_was_given_up_is_in_the_log_at_level_info(caplog):
    with caplog.at_level(logging.INFO, logger="regrow"):
        gave_up("smaller pictures", ValueError("a size\nis fixed"))
    assert caplog.record_tuples == [("regrow", logging.INFO, "gave up smaller pictures: a size")]


def test_by_default_it_is_not_shown():
    code = "from regrow.log import gave_up; gave_up('the graph', ValueError('no'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
