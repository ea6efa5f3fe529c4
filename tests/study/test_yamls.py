import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from regrow.study.yamls import from_yaml, read_yaml

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    LEAVES, lambda part: st.lists(part) | st.dictionaries(st.text() | st.integers(), part), max_leaves=10
)


LAUGHS = "\n".join(
    ["a0: &a0 [lol]", *(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))]
).encode()


@given(VALUES)
def test_what_yaml_writes_without_anchors_comes_back(value: object) -> None:
    written = yaml.safe_dump(value, allow_unicode=True)
    assert from_yaml(written.encode("utf-8", errors="replace")) == yaml.safe_load(
        written.encode("utf-8", errors="replace")
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "line 1 has the anchor &a0"),
        (b"b: 1\na: *b", r"line 2 has the alias \*b"),
        (b"- &x 1\n- *x", "line 1 has the anchor &x"),
        (b"base: &base {a: 1}\nb:\n  <<: *base", "line 1 has the anchor &base"),
        (b"<<: {epochs: 3}", "line 1 has the merge key <<"),
        (b"- 1\n- {<<: [{a: 1}, {b: 2}]}", "line 2 has the merge key <<"),
        (b"&a [*a]", "line 1 has the anchor"),
        (b"a: !!int ''", "line 1 has the tag"),
        (b"a: !!timestamp x", "line 1 has the tag"),
        (b"!!python/object/apply:os.system [ls]", "line 1 has the tag"),
        (b"a: !mine 3", "line 1 has the tag !mine"),
        (b"a: 1\nb: 2\na: 3", "line 3 has 'a' for the second time"),
        (b"x: {k: 1, k: 1}", "line 1 has 'k' for the second time"),
        (b"1: a\n0x1: b", "a key twice in two spellings"),
        (b"? [a]\n: b", "line 1 has a list or a mapping for a key"),
        (b"? {a: 1}\n: b", "line 1 has a list or a mapping for a key"),
        (b"[" * 500_000, "line 1"),
        (b"{a: " * 200_000, "line 1 is nested deeper than 20"),
        (b"- " * 400_000, "line 1 is nested deeper than 20"),
        (b"a: " + b"9" * 5000, "line 1 has a number of more than 1,000"),
        (b"a: 0x" + b"f" * 9000, "line 1 has a number of more than 1,000"),
        (b"a: " + b"1:" * 4000 + b"1", "line 1 has a number of more than 1,000"),
        (b"a: " + b"1:" * 400_000 + b"1", "line 1 has a value of more than 10,000 characters"),
        (b"a: '" + b"x" * 10_001 + b"'", "line 1 has a value of more than 10,000 characters"),
        (b"[" + b"1," * 50_000 + b"1]", "more than 50,000 values"),
        (b"a: 2001-99-99", "month"),
        (b"a: 2001-12-14t21:59:43-99:99", "offset"),
        (b"a: 0b_", "invalid literal"),
        (b"a: =", "tag:yaml.org,2002:value"),
        (b"a: [", "line"),
        (b"a: 'b", "line"),
        (b"a: b: c", "line 1"),
        (b"\ta: 1", "line 1"),
        (b"---\na: 1\n---\nb: 2", "another document"),
        (b"%YAML 9.9\n---\na: 1", "line 1"),
        (b"a: \x00", "control characters"),
        (b"a: \x07", "control characters"),
        (b"a: \xff", "byte 4 is not UTF-8"),
        ("a: 1".encode("utf-16"), "byte 1 is not UTF-8"),
        ("a: ä".encode("latin-1"), "byte 4 is not UTF-8"),
    ],
    ids=lambda value: repr(value[:24]),
)  # fmt: skip
def test_hostile_yaml_is_refused_in_one_short_line(tmp_path: Path, text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_yaml(text)
    (tmp_path / "run.yaml").write_bytes(text)
    with pytest.raises(ValueError, match=message) as refused:
        read_yaml(tmp_path / "run.yaml")
    assert str(refused.value).startswith(f"{tmp_path / 'run.yaml'} is not YAML: ")
    assert len(str(refused.value)) < 400
    assert "\n" not in str(refused.value)


def test_windows_files_and_comments_are_read() -> None:
    assert from_yaml(b"\xef\xbb\xbfa: 1\r\n# & * << ! in a comment\r\nb: 'x & *y << !z'\r\n") == {
        "a": 1,
        "b": "x & *y << !z",
    }


def test_files_that_are_too_large_or_no_files(tmp_path: Path) -> None:
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ValueError, match=r"huge.yaml is larger than 1 MiB"):
        read_yaml(tmp_path / "huge.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ValueError, match=r"pipe.yaml is not a plain file"):
        read_yaml(tmp_path / "pipe.yaml")
    with pytest.raises(ValueError, match="is a folder"):
        read_yaml(tmp_path)
