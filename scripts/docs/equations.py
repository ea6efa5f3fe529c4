"""A hook of mkdocs: equations become MathML at build time, so that no page needs a script for them.

Pages have them between dollars, as code hosts do: ``$x^2$`` in a line, ``$$x^2$$`` on lines of its own.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_MARKED = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    return with_equations(content)


def with_equations(content: str) -> str:
    """HTML with each equation that arithmatex has marked as MathML."""
    return _MARKED.sub(_as_mathml, content)


def _as_mathml(found: re.Match[str]) -> str:
    tag, bracket, latex = found.groups()
    display = "block" if bracket == "[" else "inline"
    return f'<{tag} class="equation">{convert(html.unescape(latex).strip(), display=display)}</{tag}>'
