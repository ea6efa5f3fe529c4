"""Suggestions for mistyped names. This module does not import PyTorch: the command line uses it too."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from regrow.short import short

_LONGEST = 200


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message: the known names nearest to ``word``, or a list of what is known."""
    known = list(known)
    close = difflib.get_close_matches(word[:_LONGEST], known, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(map(short, close)) + "?"
    shown = ", ".join(map(short, known[:12]))
    return f"; choose from {shown}{', …' if len(known) > 12 else ''}"
