"""Canonical correlation between layers, of one network or of two."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from regrow.analysis.canonical import Directions, TooFewSamples, check_variance, correlate, directions_of
from regrow.filters import convolutions
from regrow.looking.calls import evaluating, undisturbed
from regrow.looking.hooks import hooked
from regrow.looking.images import check_batches, forward, inputs_of
from regrow.marks import check_whole
from regrow.modules import unwrap
from regrow.numbers import at_least_float32

VERSION = 1


def layer_correlations(
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Iterable[Any],
    *,
    variance: float = 0.99,
    grid: int = 4,
) -> dict[str, Any]:
    """The canonical correlation of the output of every convolution of one net with those of another.

    Each output [pictures, filters, …] is averaged to ``grid`` cells along each side of the picture (to fewer,
    in all layers, if a layer's output is smaller), and each cell of each picture is a sample; so layers of
    different sizes are compared on the same parts of the pictures. Both nets run in evaluation mode.

    Args:
        model_a, model_b: any modules that take the same inputs; the same module twice compares the layers of
            one net. They are not changed.
        batches: batches of inputs, or of (inputs, labels), of which the labels are not used.
        variance: as ``canonical_correlation`` takes it.
        grid: cells along each side; 1 averages over the whole picture.

    Returns:
        JSON-able record: version; layers_a, layers_b: the names; mean, weighted: for each layer of a, a list
        over the layers of b of the two means of ``canonical_correlation``, in which None says that a layer's
        output never varies, is not finite, or has too many directions for the samples; samples: how many
        there are.

    Raises:
        ValueError: no convolution, arguments out of range, or inputs that a model does not take.
    """
    for model in (model_a, model_b):
        check_whole(model, "layer_correlations")
        if not convolutions(model):
            raise ValueError("layer_correlations compares convolutions, and the model has none.")
    check_batches(batches, "batches")
    check_variance(variance)
    if not isinstance(grid, int) or isinstance(grid, bool) or grid < 1:
        raise ValueError(f"grid is a number of cells of at least 1, got {grid!r}.")
    same = unwrap(model_a) is unwrap(model_b)
    found = layer_directions([model_a] if same else [model_a, model_b], batches, variance=variance, grid=grid)
    return record_of(found[0], found[-1])


def layer_directions(
    models: Sequence[nn.Module], batches: Iterable[Any], *, variance: float, grid: int
) -> list[dict[str, Directions | None]]:
    """The directions in which the output of each convolution of each model varies, in samples as above.

    None stands for a layer whose output never varies or is not finite.
    """
    outputs = _outputs(models, batches, grid)
    cells = min(min(each.shape[2:]) for found in outputs for each in found.values())
    return [
        {name: _directions(_samples(each, cells), variance) for name, each in found.items()}
        for found in outputs
    ]


def record_of(
    first: Mapping[str, Directions | None], second: Mapping[str, Directions | None]
) -> dict[str, Any]:
    """The record of ``layer_correlations`` for the layers of two models."""
    pairs = [[correlation(a, b) for b in second.values()] for a in first.values()]
    return {
        "version": VERSION,
        "layers_a": list(first),
        "layers_b": list(second),
        "mean": [[mean for mean, _ in row] for row in pairs],
        "weighted": [[weighted for _, weighted in row] for row in pairs],
        "samples": next((len(each.basis) for each in first.values() if each is not None), 0),
    }


@torch.no_grad()
def _outputs(models: Sequence[nn.Module], batches: Iterable[Any], grid: int) -> list[dict[str, Tensor]]:
    """{name: [pictures, filters, cells, …]} of the convolutions of each model that the inputs reach."""
    found: list[dict[str, list[Tensor]]] = [{} for _ in models]
    passes: dict[str, Tensor] = {}

    def look(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        del module, inputs
        if output.dim() > 2 and name not in passes:  # a layer that runs several times shows its first run
            passes[name] = _pooled(output, grid)

    with ExitStack() as held:
        for model in dict.fromkeys(models):
            held.enter_context(evaluating(model))
            held.enter_context(undisturbed(model))
            held.enter_context(hooked(list(convolutions(model).items()), look))
        empty = True
        for batch in batches:
            for model, of_model in zip(models, found, strict=True):
                passes.clear()
                forward(unwrap(model), next(inputs_of(model, [batch])))
                for name, output in passes.items():
                    of_model.setdefault(name, []).append(output)
            empty = False
    if empty:
        raise ValueError("batches yields no batch: pass a few hundred pictures, not an iterator used before.")
    if not all(found):
        raise ValueError("the inputs reach no convolution of the model.")
    return [{name: torch.cat(parts) for name, parts in of_model.items()} for of_model in found]


def _pooled(output: Tensor, grid: int) -> Tensor:
    """``output`` [pictures, filters, …] averaged to at most ``grid`` cells a side, float64 on the CPU."""
    sides = [min(grid, side) for side in output.shape[2:]]
    pool: Any = {1: nn.functional.adaptive_avg_pool1d, 2: nn.functional.adaptive_avg_pool2d}.get(
        len(sides), nn.functional.adaptive_avg_pool3d
    )
    wide = at_least_float32(output.detach())
    pooled: Tensor = pool(wide, sides)
    return pooled.to("cpu", torch.float64)


def _samples(outputs: Tensor, cells: int) -> Tensor:
    """``outputs`` [pictures, filters, …] as a matrix [pictures · cells of each, filters]."""
    pooled = _pooled(outputs, cells)
    return pooled.movedim(1, -1).flatten(0, -2)


def _directions(samples: Tensor, variance: float) -> Directions | None:
    return directions_of(samples, variance) if bool(samples.isfinite().all()) else None


def correlation(a: Directions | None, b: Directions | None) -> tuple[float | None, float | None]:
    """The two means of a canonical correlation; None twice where there is none."""
    if a is None or b is None or len(a.basis) != len(b.basis):
        return None, None
    try:
        found = correlate(a, b)
    except TooFewSamples:
        return None, None
    return (None, None) if math.isnan(found.mean) else (found.mean, found.weighted)
