"""A hook of mkdocs: the files outside of docs/ that pages link to become part of the site.

The pages of docs/ link to measurements and examples as they lie in the repository: ``../benchmarks/gpu.md``.
Such Markdown becomes a page, a script or YAML file a page that shows it, anything else is copied.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
_DOCS = "docs/"
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")
_LANGUAGES = {".py": "python", ".yaml": "yaml"}
_homes: dict[str, str] = {}  # {place on the site: place in the repository} of files outside of docs/


def on_files(files: Files, config: Any) -> Files:
    _homes.clear()
    left = [_DOCS + file.src_uri for file in files.documentation_pages() if _is_there(_DOCS + file.src_uri)]
    while left:
        page = left.pop()
        if not page.endswith(".md"):
            continue
        for path in linked(page):
            place = place_of(path)
            if not path.startswith(_DOCS) and place not in _homes:
                _homes[place] = path
                files.append(_file(path, place, config))
                left.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    place = page.file.src_uri
    return with_links(markdown, _homes.get(place, _DOCS + place), place)


def linked(page: str) -> list[str]:
    """The files of the repository that ``page``, one of its Markdown files, links to."""
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = [target(page, link) for link in _LINK.findall(text)]
    return [path for path in dict.fromkeys(paths) if path is not None]


def target(page: str, link: str) -> str | None:
    """The file of the repository that a link on ``page`` names; None where there is none."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return path if "://" not in link and not path.startswith("..") and _is_there(path) else None


def place_of(path: str) -> str:
    """The place of a file of the repository among the pages of the site."""
    place = path.removeprefix(_DOCS)
    return f"{place}.md" if posixpath.splitext(place)[1] in _LANGUAGES else place


def with_links(markdown: str, page: str, place: str) -> str:
    """The text of ``page`` with its links to files as the site has them, where ``page`` is at ``place``."""

    def moved(link: re.Match[str]) -> str:
        path = target(page, link[0])
        return link[0] if path is None else posixpath.relpath(place_of(path), posixpath.dirname(place) or ".")

    return _LINK.sub(moved, markdown)


def _file(path: str, place: str, config: Any) -> File:
    language = _LANGUAGES.get(posixpath.splitext(path)[1])
    if language is None:
        return File.generated(config, place, abs_src_path=str(ROOT / path))
    text = (ROOT / path).read_text(encoding="utf-8")
    return File.generated(config, place, content=f"# {path}\n\n````{language}\n{text}````\n")


def _is_there(path: str) -> bool:
    return (ROOT / path).is_file()
