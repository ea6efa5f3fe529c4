"""Write numbers and names the way people read them, in the terminal, in the page and in sentences."""

from __future__ import annotations

from regrow.study.paired import Paired, Spread

_LABELS = {
    "standard": "Standard training",
    "repr": "RePr",
    "bridgeout": "Bridgeout",
    "targeted-bridgeout": "Targeted Bridgeout",
    "dropout": "Dropout",
    "targeted-dropout": "Targeted dropout",
    "orthogonal-loss": "Orthogonal loss",
    "distillation": "Distillation",
    "dsd": "Dense-Sparse-Dense",
    "ban": "Born-Again networks",
    "shrink-and-perturb": "Shrink and perturb",
    "continual-backprop": "Continual backprop",
    "later-layer-forgetting": "Later-layer forgetting",
    "knowledge-evolution": "Knowledge Evolution",
    "restart": "Restart of filters",
    "new-head": "New head",
    "last-layers": "Last layers new",
    "from-scratch": "From scratch",
    "redo": "ReDo",
    "shrink-and-perturb+new-head": "Shrink and perturb, new head",
    "continual-backprop+new-head": "Continual backprop, new head",
    "restart+new-head": "Restart of filters, new head",
    "restart+last-layers": "Restart of filters, last layers new",
    "restart+shrink-and-perturb+new-head": "Restart of filters, shrink and perturb, new head",
    "redo+new-head": "ReDo, new head",
    "repr+orthogonal-loss": "RePr with orthogonal loss",
    "repr+distillation": "RePr with distillation",
    "repr+orthogonal-loss+distillation": "RePr with orthogonal loss and distillation",
    "repr+bridgeout": "RePr with Bridgeout",
}
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def label(method: str) -> str:
    """The name of ``method`` as people write it; a variant's name is returned unchanged."""
    return _LABELS.get(method, method)


def mention(method: str) -> str:
    """The name of ``method`` inside a sentence."""
    return "standard training" if method == "standard" else label(method)


def percent(accuracy: Spread) -> str:
    """A fraction as "88.10 ± 0.42 %"; without ± for a single seed."""
    tail = "" if accuracy.deviation is None else f" ± {100 * accuracy.deviation:.2f}"
    return f"{100 * accuracy.mean:.2f}{tail} %"


def signed(value: float, places: int = 2) -> str:
    """A number with its sign, a true minus sign, and no minus before zero."""
    return f"{round(value, places) + 0.0:+.{places}f}".replace("-", "−")


def bounds(low: float | None, high: float | None, places: int = 2) -> str:
    """An interval as "[−0.30, +2.70]", or nothing where there is none."""
    return "" if low is None or high is None else f"[{signed(low, places)}, {signed(high, places)}]"


def interval(difference: Paired, places: int = 2) -> str:
    """The t interval of ``difference``, as :func:`bounds`."""
    return bounds(difference.low, difference.high, places)


def p_value(p: float | None) -> str:
    """As "0.034" or "< 0.001"; a dash for None."""
    if p is None:
        return "—"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: Spread) -> str:
    """Time in the unit that suits its size, as "12.1 ± 0.3 s", "4.2 min" or "5.0 h"."""
    size, unit = (1, "s") if seconds.mean < 120 else (60, "min") if seconds.mean < 7200 else (3600, "h")
    tail = "" if seconds.deviation is None else f" ± {seconds.deviation / size:.1f}"
    return f"{seconds.mean / size:.1f}{tail} {unit}"


def prefixed(value: float) -> tuple[float, str]:
    """The factor and prefix that bring ``value`` between 1 and 1000: (1e12, "T") for 3.1e12."""
    rank = 0
    while value >= 1000 ** (rank + 1) and rank + 1 < len(_PREFIXES):
        rank += 1
    return float(1000**rank), _PREFIXES[rank]


def flops(count: Spread) -> str:
    """Floating-point operations as "3.10 ± 0.02 TFLOPs"."""
    size, prefix = prefixed(count.mean)
    tail = "" if not count.deviation else f" ± {count.deviation / size:.2f}"
    return f"{count.mean / size:.2f}{tail} {prefix}FLOPs"
