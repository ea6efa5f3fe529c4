import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.reading import from_json, read_file

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda part: st.lists(part) | st.dictionaries(st.text(), part),
)


def test_a_plain_file_up_to_the_limit_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_file(tmp_path / "a", 5) == b"12345"
    with pytest.raises(ValueError, match="a is larger than 4 bytes"):
        read_file(tmp_path / "a", 4)


def test_a_file_of_a_terabyte_is_refused_unread(tmp_path):
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="huge is larger than 64 MiB"):
        read_file(tmp_path / "huge", 1 << 26)


def test_what_is_no_plain_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ValueError, match=f"{path} is not a plain file"):
            read_file(path, 1 << 20)
    with pytest.raises(ValueError, match="is a folder"):
        read_file(tmp_path, 1 << 20)


def test_a_file_that_the_system_makes_up_is_held_to_the_limit():
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        read_file("/proc/self/status", 10)


def test_files_that_cannot_be_opened_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no.txt cannot be read: No such file"):
        read_file(tmp_path / "no.txt", 10)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match=r"loop cannot be read: Too many levels"):
        read_file(tmp_path / "loop", 10)
    with pytest.raises(OSError, match="cannot be read: File name too long") as refused:
        read_file(tmp_path / ("x" * 3000), 10)
    assert len(str(refused.value)) < 300
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises(OSError, match="socket cannot be read"):
            read_file(tmp_path / "socket", 10)


@given(JSON)
def test_json_comes_back_as_it_was(value):
    assert from_json(json.dumps(value)) == value
    assert from_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting"),
        (b"NaN", "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        (b'[{"x": {"b": 2, "b": 2}}]', "the key 'b' is there twice"),
        (b"[" * 101 + b"]" * 101, "nested deeper than 100"),
        (b'{"a":' * 150 + b"1" + b"}" * 150, "nested deeper than 100"),
        (b"[" * 1_000_000, "nested deeper than 100"),
        (b'{"a":' * 1_000_000, "nested deeper than 100"),
        (b"9" * 5000, "digits"),
        (b'{"a": -' + b"1" * 100_000 + b"}", "digits"),
        (b'"\xff"', "byte 2 is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "byte 1 is not UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b"\x00", "Expecting value"),
        (b'{"a": "\x00"}', "control character"),
        (b'{"' + b"k" * 100_000 + b'": 1, "' + b"k" * 100_000 + b'": 1}', "is there twice"),
    ],
)
def test_hostile_json_is_refused_in_one_short_line(text, message):
    with pytest.raises(ValueError, match=message) as refused:
        from_json(text)
    assert len(str(refused.value)) < 300
    assert "\n" not in str(refused.value)


def test_a_hundred_levels_are_read_and_so_are_constants_where_asked():
    assert from_json("[" * 100 + "1" + "]" * 100)
    assert from_json("[Infinity, -Infinity]", constants=True) == [float("inf"), -float("inf")]
