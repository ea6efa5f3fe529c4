"""A hook of mkdocs: the page of the command, made from the texts of ``regrow --help``."""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

import typer
from mkdocs.structure.files import File, Files

_HEAD = """\
# The command

Made from the texts of `regrow --help`. Every flag of `regrow train` is also a key of the
YAML file that `--config` takes.
"""


def on_files(files: Files, config: Any) -> Files:
    from regrow.cli import app

    files.append(File.generated(config, "command.md", content=page_of(app)))
    return files


def page_of(app: typer.Typer) -> str:
    """Markdown: a part for each command of ``app``, with its arguments and options in tables."""
    whole: Any = typer.main.get_command(app)
    parts = [_HEAD]
    for name, command in whole.commands.items():
        context = typer.Context(command, info_name=f"regrow {name}")
        usage = " ".join([f"regrow {name}", *command.collect_usage_pieces(context)])
        parts += [f"## regrow {name}", _text(command.help), f"```text\n{usage}\n```"]
        shown = [(_panel(each), each.get_help_record(context)) for each in command.params]
        shown.sort(key=lambda each: each[0] != "Arguments")
        for panel, rows in groupby((each for each in shown if each[1]), key=lambda each: each[0]):
            parts.append(_table(panel, [row for _, row in rows]))
    return "\n\n".join(parts) + "\n"


def _panel(parameter: Any) -> str:
    if parameter.rich_help_panel:
        return str(parameter.rich_help_panel)
    return "Arguments" if parameter.param_type_name == "argument" else "Options"


def _table(panel: str, rows: list[tuple[str, str]]) -> str:
    lines = [f"| {panel} | |", "|---|---|"]
    for names, text in rows:
        flag, _, kind = names.partition(" <")
        kind = f" &lt;{_text(kind)}" if kind else ""
        lines.append(f"| `{flag}`{kind} | {_text(text)} |")
    return "\n".join(lines)


def _text(text: str) -> str:
    """Plain text as Markdown that shows it as it is; the paragraph that begins with "Example:" as code."""
    found = []
    for paragraph in map(str.strip, text.split("\n\n")):
        if paragraph.startswith("Example: "):
            found.append(f"Example: `{' '.join(paragraph.removeprefix('Example: ').split())}`")
        else:
            found.append(re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", paragraph))
    return "\n\n".join(found)
