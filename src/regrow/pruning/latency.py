"""Measure how long a pass of a network takes on this machine, and whether the host or the GPU takes it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from regrow.looking.calls import call, evaluating
from regrow.modules import device_of, unwrap
from regrow.shipping.deploy import Form, in_form
from regrow.shipping.deployed import is_deployed

_WARM_UP = 3
_PASSES = (5, 200)  # at least, at most
_SECONDS = 1.5


def as_used(model: nn.Module, example_inputs: Any, form: Form | None) -> nn.Module:
    """``model`` itself without a ``form``, else a copy in that form, to be timed."""
    return model if form is None else in_form(model, example_inputs, form)[0]


def measure_latency(models: Sequence[nn.Module], example_inputs: Any) -> list[dict[str, Any]]:
    """Measure how long a pass over ``example_inputs`` takes on this machine, for each of ``models``.

    The passes run in evaluation mode without gradients, after three passes each to warm up; those that
    ``deploy`` made run as they are, all others operation by operation. On a GPU the time is that between two
    CUDA events around the pass. The models take turns, so that a slowdown of the machine affects all of
    them. Each model runs 5 to 200 passes, as many as fit into about 1.5 seconds for all models together.

    Returns:
        A JSON-able dict per model: median, lowest and highest time of a pass in seconds, number of passes.
    """
    models = [model if is_deployed(model) else unwrap(model) for model in models]
    times: list[list[float]] = [[] for _ in models]
    warm = [_seconds(model, example_inputs) for _ in range(_WARM_UP) for model in models]
    least, most = _PASSES
    passes = min(most, max(least, int(_SECONDS / max(sum(warm[-len(models) :]), 1e-9))))
    for _ in range(passes):
        for model, taken in zip(models, times, strict=True):
            taken.append(_seconds(model, example_inputs))
    return [
        {"median": statistics.median(taken), "lowest": min(taken), "highest": max(taken), "passes": passes}
        for taken in times
    ]


def launching(model: nn.Module, example_inputs: Any) -> float | None:
    """The share of a pass on a GPU during which the host still launches operations; None on a CPU.

    Near 1 the GPU waits for the host all along, and a smaller network takes as long: the launches are as
    many. The share is the median of five passes.
    """
    device = device_of(model)
    if device.type != "cuda":
        return None
    shares = []
    with _running(model):
        for turn in range(_WARM_UP + 5):
            torch.cuda.synchronize(device)
            begun = time.perf_counter()
            call(model, example_inputs)
            launched = time.perf_counter() - begun
            torch.cuda.synchronize(device)
            if turn >= _WARM_UP:
                shares.append(launched / (time.perf_counter() - begun))
    return statistics.median(shares)


@contextmanager
def _running(model: nn.Module) -> Iterator[None]:
    """Passes run in evaluation mode without gradients, and by no compiled code but that of ``deploy``."""
    if is_deployed(model):
        with torch.no_grad():  # code compiled under it is compiled anew for torch.inference_mode
            yield
    else:
        with torch.inference_mode(), evaluating(model):
            yield


def _seconds(model: nn.Module, example_inputs: Any) -> float:
    device = device_of(model)
    with _running(model):
        if device.type == "cuda":
            with torch.cuda.device(device):
                begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                begun.record()
                call(model, example_inputs)
                ended.record()
                ended.synchronize()
                return begun.elapsed_time(ended) / 1e3
        _wait(device)
        started = time.perf_counter()
        call(model, example_inputs)
        _wait(device)
        return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
