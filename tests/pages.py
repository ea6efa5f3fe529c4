"""The Python that the pages of docs/ show."""

import re
import textwrap
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
RUN, NOT_RUN = "<!-- runs as a test", "<!-- not run as a test: "
_BLOCK = re.compile(r"(?P<before>[^\n]*)\n(?P<indent> *)```python\n(?P<code>.*?)\n(?P=indent)```", re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """(the line before it, the code) of each block of Python on ``page``."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [(found["before"].strip(), textwrap.dedent(found["code"])) for found in _BLOCK.finditer(text)]


def running(page: str) -> list[str]:
    """The blocks of Python on ``page`` that run as a test."""
    return [code for before, code in blocks(page) if before.startswith(RUN)]
