"""Which room of the library imports which, floor by floor: ``python scripts/floors.py``.

A file may import from its own room and from rooms on lower floors, and no files may import each other in a
circle. The command prints the floors, and ends with 1 and the offending imports where that is not so. Imports
inside functions count too.
"""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "regrow"
# The ground floor first. docs/architecture.md says what each room is for.
FLOORS = (
    ("short", "torch_private"),
    (
        "atomic",
        "callers",
        "given",
        "interrupts",
        "log",
        "memory",
        "numbers",
        "reading",
        "suggest",
        "terminal",
    ),
    ("indexing", "together"),
    ("modules",),
    ("marks",),
    ("filters", "looking"),
    ("least_squares", "losses", "structure"),
    ("criteria", "surgery"),
    ("compensation", "repr"),
    ("analysis", "noise", "restarts", "shipping"),
    ("pruning",),
    ("integrations",),
    ("study",),
    ("cli",),
    ("__main__",),
)
LEVELS = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def imports(source: Path = SOURCE) -> dict[str, set[str]]:
    """{file: the files of the library that it imports}, by dotted name, without ``regrow.``."""
    names = {".".join(path.relative_to(source).with_suffix("").parts): path for path in source.rglob("*.py")}
    names = {name.removesuffix(".__init__"): path for name, path in names.items() if name != "__init__"}
    found = {}
    for name, path in names.items():
        asked = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("regrow"):
                home = (node.module or "").removeprefix("regrow").removeprefix(".")
                inner = {f"{home}.{alias.name}".removeprefix(".") for alias in node.names}
                asked |= {each if each in names else home for each in inner}
            elif isinstance(node, ast.Import):
                asked |= {
                    alias.name.removeprefix("regrow.") for alias in node.names if "regrow." in alias.name
                }
        found[name] = {each for each in asked if each in names and each != name}
    return found


def upward(found: dict[str, set[str]]) -> list[str]:
    """The imports of a room that stands on the same floor or above, each as a sentence."""
    wrong = []
    for name, asked in sorted(found.items()):
        room = name.partition(".")[0]
        for other in sorted(asked):
            theirs = other.partition(".")[0]
            if theirs != room and LEVELS[theirs] >= LEVELS[room]:
                wrong.append(f"{name} imports {other}, which is not on a lower floor")
    return wrong


def circle(found: dict[str, set[str]]) -> list[str]:
    """Files that import each other in a circle; empty if there are none."""
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def main() -> int:
    found = imports()
    for level in reversed(range(len(FLOORS))):
        for room in FLOORS[level]:
            files = [name for name in found if name.partition(".")[0] == room]
            below = {other.partition(".")[0] for name in files for other in found[name]} - {room}
            print(f"{level:2}  {room:14}{len(files):3} files  {', '.join(sorted(below))}")
    wrong = upward(found)
    if around := circle(found):
        wrong.append("in a circle: " + " → ".join(around))
    print("\n".join(wrong) or "no import goes upwards, and none in a circle")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
