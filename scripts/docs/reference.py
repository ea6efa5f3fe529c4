"""A hook of mkdocs: the page of the public names, which mkdocstrings fills from their docstrings."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# {room: what its names are for}, in the order of the page. Names of other rooms come behind these.
TITLES = {
    "repr": "RePr and restarts of filters",
    "criteria": "Which filters matter",
    "pruning": "Cut within a budget",
    "surgery": "Cut by hand",
    "compensation": "Make up for what was cut",
    "shipping": "Keep and ship",
    "noise": "Batch Bridgeout",
    "restarts": "Start parts of a network anew",
    "losses": "Losses to add",
    "analysis": "What a network has learnt",
    "study": "Records",
}
_HEAD = """\
# Public names

Everything here is `regrow.NAME`. The integrations at the end are imported by their own names.
"""


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "reference.md", content=page_of(homes(), integrations())))
    return files


def homes() -> dict[str, str]:
    """{public name: its module}."""
    import regrow

    return {name: regrow._HOMES[name] for name in regrow.__all__}


def integrations() -> list[str]:
    """The modules of ``regrow.integrations`` that an extra of the package has its name from."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folder = ROOT / "src" / "regrow" / "integrations"
    return [name for name in project["optional-dependencies"] if (folder / f"{name}.py").is_file()]


def page_of(homes: Mapping[str, str], integrations: list[str]) -> str:
    """Markdown in which mkdocstrings finds each public name under the title of its room."""
    rooms: dict[str, list[str]] = {room: [] for room in TITLES}
    for name, home in homes.items():
        rooms.setdefault(home.split(".")[1], []).append(f"{home}.{name}")
    parts = [_HEAD]
    for room, names in rooms.items():
        if names:
            parts.append(f"## {TITLES.get(room, room.capitalize())}")
            parts += [f"::: {name}" for name in names]
    for name in integrations:
        parts.append(f"## regrow.integrations.{name}")
        parts += [f"::: regrow.integrations.{name}.{each}" for each in public(name)]
    return "\n\n".join(parts) + "\n"


def public(integration: str) -> list[str]:
    """The classes and functions of an integration whose names do not begin with an underscore."""
    path = ROOT / "src" / "regrow" / "integrations" / f"{integration}.py"
    body = ast.parse(path.read_text(encoding="utf-8")).body
    kinds = ast.ClassDef | ast.FunctionDef
    return [node.name for node in body if isinstance(node, kinds) and not node.name.startswith("_")]
