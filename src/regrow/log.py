"""What regrow tried and gave up, and so why a plan is not better: ``logging.getLogger("regrow")``."""

from __future__ import annotations

import logging

log = logging.getLogger("regrow")


def gave_up(attempt: str, error: BaseException) -> None:
    """Log, at level INFO, that ``attempt`` failed with ``error`` and the caller goes on without it."""
    log.info("gave up %s: %s", attempt, first_line(error))


def first_line(error: BaseException) -> str:
    """The first line of the error's message; the name of its class where there is no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
