"""Arguments in the library's messages, as the command has them: ``fraction=0.5`` → ``--fraction 0.5``."""

from __future__ import annotations

import re

_ARGUMENTS = (
    *("fraction", "max_drop", "macs", "params", "latency"),
    *("criterion", "scope", "coupled", "round_to", "floor", "exclude"),
)
# A number, a text, a dict of shares or nothing; no part of a path such as runs/fraction=0.5/one.
_GIVEN = re.compile(
    rf"""(?<![^\s(\[])(?P<name>{"|".join(_ARGUMENTS)})=
    (?:(?P<value>\d+(?:\.\d+)?)|'(?P<text>\w[\w-]*)'|{{(?P<shares>[^{{}}]*)}}|(?=[\s,.;:)]|$))
    (?![\w/]|\.\w)""",
    re.VERBOSE,
)
_SHARE = re.compile(r"""['"](?P<layer>[^'"]*)['"]:\s*(?P<share>[\d.]+)""")


def in_flags(message: str) -> str:
    """``message`` with the arguments of ``regrow.prune`` as flags."""
    return _GIVEN.sub(_flag, message).replace("compensate=False", "--no-compensate")


def _flag(found: re.Match[str]) -> str:
    shares = _SHARE.sub(r"\g<layer>=\g<share>", found["shares"] or "").replace(", ", ",")
    value = found["value"] or found["text"] or shares
    return f"--{found['name'].replace('_', '-')}{' ' if value else ''}{value}"
