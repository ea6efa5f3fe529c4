"""What the pages share: their style, and how their templates are filled in. Imports no PyTorch."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from regrow.study import drawing

if TYPE_CHECKING:
    import jinja2


def environment() -> jinja2.Environment:
    """Templates that escape all text and leave control characters out of it; a missing value is an error."""
    import jinja2

    return jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: drawing.printable(value) if type(value) is str else value,
    )


def resource(name: str) -> str:
    """The text of a file that lies beside this one."""
    return resources.files("regrow.study").joinpath(name).read_text(encoding="utf-8")
