"""Read YAML that strangers may have written: plain mappings, lists and values, and nothing that expands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from regrow.reading import read_file
from regrow.short import line, short

# A study of 10,000 runs has a file of some kilobytes.
MOST_BYTES = 1 << 20
_MOST_DEEP = 20
_MOST_VALUES = 50_000
_LONGEST = 10_000  # characters of one value
_LONGEST_NUMBER = 1_000  # of a whole number
# Ten times as fast, if libyaml is there.
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: Path) -> tuple[Any, bytes]:
    """The content of the YAML file ``path``, and its bytes.

    Raises:
        ValueError: as ``from_yaml``, or the file is no plain file or too large; the message names it.
        OSError: it cannot be read.
    """
    text = read_file(path, MOST_BYTES)
    try:
        return from_yaml(text), text
    except ValueError as error:
        raise ValueError(f"{line(path)} is not YAML: {error}") from None


def from_yaml(text: bytes) -> Any:
    """The value that ``text``, which is UTF-8, holds as YAML.

    Raises:
        ValueError: it is not YAML; it has an anchor, an alias, a merge key or a tag, by which a short file
            can stand for a very large value; a key stands twice in one mapping; or it is nested too deeply.
    """
    try:
        decoded = text.decode("utf-8-sig")
        _check_events(decoded)
        return yaml.load(decoded, _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1:,} is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise ValueError(f"{where}{line(error.problem or error.context)}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # such as a day 99, or a number too long
        raise ValueError(line(error)) from None


def _check_events(text: str) -> None:
    """Read through ``text`` without making values of it."""
    depth = 0
    for values, event in enumerate(yaml.parse(text, _Base)):
        number = 1 if event.start_mark is None else event.start_mark.line + 1
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {number} has the alias *{line(anchor, 40)}: write the value out.")
        if anchor is not None:
            raise ValueError(f"line {number} has the anchor &{line(anchor, 40)}: leave it out.")
        if tag is not None:
            raise ValueError(f"line {number} has the tag {line(tag, 40)}: write the value without it.")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > _LONGEST:
            raise ValueError(f"line {number} has a value of more than {_LONGEST:,} characters.")
        if values > _MOST_VALUES:
            raise ValueError(f"it has more than {_MOST_VALUES:,} values.")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MOST_DEEP:
                raise ValueError(f"line {number} is nested deeper than {_MOST_DEEP} levels.")
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


class _Loader(_Base):
    """Refuses a key that stands twice in one mapping, where YAML takes the last, and merge keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            number = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {number} has a list or a mapping for a key: write a name.")
            if key.tag == "tag:yaml.org,2002:merge":
                raise ValueError(f"line {number} has the merge key <<: write the settings out.")
            if key.value in seen:
                raise ValueError(f"line {number} has {short(key.value)} for the second time: say it once.")
            seen.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(found) < len(seen):  # 1 and 0x1
            number = node.start_mark.line + 1
            raise ValueError(f"the mapping in line {number} has a key twice in two spellings: say it once.")
        return found


def _whole_number(loader: Any, node: yaml.ScalarNode) -> int:
    if len(node.value) > _LONGEST_NUMBER:
        raise ValueError(
            f"line {node.start_mark.line + 1} has a number of more than {_LONGEST_NUMBER:,} characters."
        )
    number: int = loader.construct_yaml_int(node)
    return number


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
