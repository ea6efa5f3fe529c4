"""The command that says which room of the library imports which, on made-up rooms and on the library."""

import runpy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

SCRIPT = Path(__file__).parents[1] / "scripts" / "floors.py"
floors = SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def test_imports_of_lower_floors_and_of_the_own_room_are_right():
    found = {
        "log": set(),
        "modules": {"log", "torch_private"},
        "surgery.cut": {"surgery.plan", "structure.read", "modules"},
        "surgery.plan": set(),
        "cli": {"study.records", "surgery.cut"},
    }
    assert floors.upward(found) == []


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("log", "modules"),  # the floor above
        ("atomic", "log"),  # the same floor
        ("structure.read", "surgery.cut"),
        ("looking", "filters"),
        ("study.train", "__main__"),
    ],
)
def test_an_import_of_the_same_floor_or_a_higher_one_is_named(name, other):
    assert floors.upward({name: {other}}) == [f"{name} imports {other}, which is not on a lower floor"]


def test_every_import_that_goes_upwards_is_named_in_order():
    found = {
        "repr.cycle": {"study.train", "noise.layers", "marks"},
        "marks": {"cli"},
    }
    assert floors.upward(found) == [
        "marks imports cli, which is not on a lower floor",
        "repr.cycle imports noise.layers, which is not on a lower floor",
        "repr.cycle imports study.train, which is not on a lower floor",
    ]


rooms = st.sampled_from(sorted(floors.LEVELS))


@given(one=rooms, other=rooms)
def test_of_two_rooms_at_most_one_may_import_the_other(one, other):
    forth, back = floors.upward({one: {other}}), floors.upward({other: {one}})
    if one == other:
        assert forth == []
    elif floors.LEVELS[one] == floors.LEVELS[other]:
        assert forth
        assert back
    else:
        assert bool(forth) != bool(back)


def test_circles_by_hand():
    assert floors.circle({}) == []
    assert floors.circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert set(floors.circle({"a": {"b"}, "b": {"a"}})) == {"a", "b"}
    around = floors.circle({"a": {"b"}, "b": {"c"}, "c": {"d", "b"}, "d": set()})
    assert sorted(around[:-1]) == ["b", "c"]
    assert around[0] == around[-1]


@given(st.dictionaries(st.integers(0, 6), st.sets(st.integers(0, 6), max_size=3), max_size=7))
def test_a_circle_is_one_and_none_is_missed(drawn):
    found = {str(i): {str(j) for j in asked} for i, asked in drawn.items()}
    around = floors.circle(found)
    if around:  # each file imports another of the circle, in one direction
        pairs = list(pairwise(around))
        forth = all(other in found.get(one, ()) for one, other in pairs)
        back = all(one in found.get(other, ()) for one, other in pairs)
        assert pairs
        assert around[0] == around[-1]
        assert forth or back
        return
    left = dict(found)  # files that import none of those that are left, taken away again and again
    while leaves := [name for name, asked in left.items() if not asked & left.keys()]:
        for name in leaves:
            del left[name]
    assert not left


def test_imports_are_found_wherever_they_stand(tmp_path):
    texts = {
        "__init__.py": "from regrow.cli import main\n",
        "log.py": "import logging\n",
        "modules.py": "def late():\n    from regrow import log\n    return log\n",
        "looking/__init__.py": "",
        "looking/calls.py": "import regrow.log\nfrom regrow.looking import hooks\nimport os.path\n",
        "looking/hooks.py": "from regrow.modules import unwrap\nfrom regrow.looking import hooks\n",
        "surgery/__init__.py": "",
        "surgery/cut.py": "from regrow.looking import copied\nfrom regrow import __version__\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert floors.imports(tmp_path) == {
        "log": set(),
        "modules": {"log"},
        "looking": set(),
        "looking.calls": {"log", "looking.hooks"},
        "looking.hooks": {"modules"},
        "surgery": set(),
        "surgery.cut": {"looking"},
    }


def test_every_room_of_the_library_stands_on_one_floor():
    there = {name.partition(".")[0] for name in floors.imports()}
    assert there == set(floors.LEVELS)
    assert sum(map(len, floors.FLOORS)) == len(floors.LEVELS)


def test_no_import_of_the_library_goes_upwards_and_none_in_a_circle():
    found = floors.imports()
    assert len(found) > 50
    assert floors.upward(found) == []
    assert floors.circle(found) == []


def test_the_command_ends_with_0_and_says_so():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert lines[-1] == "no import goes upwards, and none in a circle"
    assert [line.split()[1] for line in lines[:2]] == ["__main__", "cli"]
    assert len(lines) == len(floors.LEVELS) + 1


def test_the_command_ends_with_1_where_something_is_wrong(capsys, monkeypatch):
    names = floors.main.__globals__
    monkeypatch.setitem(names, "imports", lambda: {"log": {"modules"}, "modules": {"log"}})
    assert floors.main() == 1
    said = capsys.readouterr().out.splitlines()[-2:]
    assert said[0] == "log imports modules, which is not on a lower floor"
    assert said[1] in ("in a circle: log → modules → log", "in a circle: modules → log → modules")
