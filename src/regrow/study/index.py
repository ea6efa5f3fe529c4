"""The page that links the reports of a study with more than one comparison. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from urllib.parse import quote

from regrow.study.records import write_text


@dataclass(frozen=True)
class IndexRow:
    """One comparison: its title, its report, the findings, and how many of its runs are finished."""

    title: str
    page: Path
    headline: str
    finished: int
    runs: int


def write_index(path: Path, title: str, rows: Sequence[IndexRow], *, file: str) -> Path:
    """Write the page to ``path``: ``rows`` in their order, and a link to the study's ``file`` beside it.

    Returns:
        ``path``.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("regrow.study").joinpath("index.html.j2").read_text(encoding="utf-8")
    shown = [
        {
            "title": row.title,
            "page": quote(row.page.relative_to(path.parent).as_posix()),
            "headline": row.headline,
            "finished": row.finished,
            "runs": row.runs,
        }
        for row in rows
    ]
    write_text(path, environment.from_string(source).render(title=title, file=file, rows=shown))
    return path
