"""Whether a restore makes the outputs of a model much larger."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from regrow.log import gave_up
from regrow.looking.calls import PassFailed, floating, run
from regrow.looking.copies import NotCopied, copied

# A restore that makes an output so many times as large sends gradients of that size through the network.
_JUMP = 10


def largest_outputs(model: nn.Module, inputs: Any) -> list[float]:
    """The largest value of each output of ``model`` on ``inputs``, in evaluation mode; [] if a pass fails."""
    try:
        # The user's own hooks may count the passes of the model, so that a copy runs.
        output, _ = run(copied(model), inputs, training=False)
    except (NotCopied, PassFailed) as error:
        gave_up("comparing the output before and after a restore", error)
        return []
    return [float(tensor.detach().abs().max()) for tensor in floating(output) if tensor.numel()]


def jump(before: list[float], after: list[float], consumers: str, what: str, advice: str) -> str:
    """A warning if an output is more than ten times as large after a restore; empty if none is.

    Args:
        before, after: what ``largest_outputs`` gave.
        consumers: the choice that the user has made.
        what: what was done, such as "restore".
        advice: the call that the user should write in another way, such as "build RePr".
    """
    for small, large in zip(before, after, strict=False):
        if 0 < small < math.inf and not large <= _JUMP * small:
            others = " or consumers='zero'" if consumers != "zero" else ""
            return (
                f"the {what} made the largest output on example_inputs {large / small:.3g} times as "
                f"large ({small:.3g} before, {large:.3g} after), and training may diverge or collapse: "
                f"{advice} with a smaller fraction{others}, or train at a lower rate."
            )
    return ""
