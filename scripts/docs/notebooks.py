"""A hook of mkdocs: no page of a notebook loads MathJax or diagrams from elsewhere."""

from __future__ import annotations

import re
from typing import Any

_SCRIPT = re.compile(r"<script\b[^>]*>.*?</script>", re.DOTALL)
_ELSEWHERE = ("MathJax", "cdnjs")


def on_post_page(output: str, page: Any, **_: Any) -> str:
    return without_loading(output) if page.file.src_uri.endswith(".ipynb") else output


def without_loading(output: str) -> str:
    """HTML without the scripts that name MathJax, or load from a server."""
    return _SCRIPT.sub(lambda each: "" if any(word in each[0] for word in _ELSEWHERE) else each[0], output)
