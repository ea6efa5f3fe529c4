"""What a mistyped name was probably meant to be. No PyTorch here: the command line uses it too."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: what ``word`` was probably meant to be, and what there is."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(name) for name in close) + "?"
    shown = ", ".join(repr(name) for name in known[:12])
    return f"; choose from {shown}{', …' if len(known) > 12 else ''}"
