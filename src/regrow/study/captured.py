"""Training steps of a small net on a GPU: recorded once as a CUDA graph, then launched as a whole.

A step of a small net is about a hundred short kernels, and it takes longer to launch them one by one than to
run them. A CUDA graph repeats the same kernels on the same memory. So the batch is copied to where the
recorded step reads it, and the learning rate is a tensor that is set before each launch. Whatever else a step
does in Python happens only while it is recorded: therefore a graph is used only after it has given the losses
that the same steps give one launch after another.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from regrow.log import gave_up, log
from regrow.modules import device_of
from regrow.study.methods.method import Method
from regrow.study.snapshot import keeper
from regrow.study.steps import Step

Work = Callable[[], tuple[Tensor, Tensor]]

# Launched one by one before the capture: lazily made things are made then, and kernels are chosen.
_REHEARSALS = 3
# By how much the losses of a graph may differ from those of the rehearsal, relatively or in all.
_TOLERANCE, _LEAST = 1e-3, 1e-6


class NotCaptured(Exception):
    """A step cannot be a CUDA graph; the message says why."""


class Graph(Protocol):
    """The recording of a step. The methods raise ``NotCaptured``."""

    def rehearse(self, work: Work, times: int) -> list[Tensor]:
        """Do ``work`` several times, one launch after another; return the first tensor of each time."""

    def capture(self, work: Work) -> tuple[Tensor, Tensor]:
        """Record ``work``, which computes nothing now; each ``replay`` writes to the tensors returned."""

    def replay(self) -> None:
        """Do the recorded work."""


class CudaGraph:
    """A ``Graph`` of PyTorch's; all that only a GPU can run is in this class."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()

    def rehearse(self, work: Work, times: int) -> list[Tensor]:
        with torch.cuda.device(self._device), _not_captured():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            here, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(here)
            try:
                with torch.cuda.stream(side):  # a capture needs another stream than the default one
                    seen = [work()[0].clone() for _ in range(times - 1)]
                    with _no_waiting():
                        seen.append(work()[0].clone())
            finally:
                here.wait_stream(side)
            # The graph keeps the memory of a step for itself, and evaluation and smaller batches need theirs.
            needed, free = torch.cuda.max_memory_allocated() - before, torch.cuda.mem_get_info()[0]
            if needed > free:
                raise NotCaptured(f"it needs {needed:,} bytes more, and the device has {free:,}")
        return seen

    def capture(self, work: Work) -> tuple[Tensor, Tensor]:
        here = torch.cuda.current_stream(self._device)
        # A capture that fails leaves its own stream behind: the outer context sets this one again.
        with (
            torch.cuda.device(self._device),
            torch.cuda.stream(here),
            _not_captured(),
            torch.cuda.graph(self._graph),
        ):
            return work()

    def replay(self) -> None:
        self._graph.replay()


@contextmanager
def _not_captured() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # PyTorch has no class of its own for what a graph does not allow
        raise NotCaptured(str(error) or type(error).__name__) from error


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Raise ``RuntimeError`` where the CPU would wait for the GPU: within a capture, it breaks more."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    dtype: torch.dtype,
    processes: int,
    *,
    size: int,
    method: Method | None = None,
) -> Step:
    """The step that a run trains with: captured where that is possible.

    Args:
        model, optimizer, scaler, dtype, processes, method: as ``Step`` takes them.
        size: pictures in a whole batch.
    """
    method = Method() if method is None else method
    why = _why_not(device_of(model), scaler, processes, method)
    if why is None:
        return CapturedStep(model, optimizer, scaler, dtype, method, size=size)
    log.debug("training steps are launched kernel by kernel: %s", why)
    return Step(model, optimizer, scaler, dtype, processes, method)


def _why_not(
    device: torch.device, scaler: torch.amp.GradScaler, processes: int, method: Method
) -> str | None:
    if device.type != "cuda":
        return f"CUDA graphs are for GPUs, and the device is {device.type}"
    if processes > 1:
        return "several processes train together"
    if scaler.is_enabled():
        return "float16's scaler decides after every step whether it counts"
    if not method.captured:
        return "the method looks at every pass"
    return None


class CapturedStep(Step):
    """A ``Step`` that records itself at its first whole batch, and again after ``renew``.

    Batches of another size are trained one launch after another, and so are all if the capture fails, which
    the log tells once. Recording leaves weights, buffers, the optimizer's slots and the random generators as
    they were, so it does not matter to a run when it happens.

    Args:
        size: pictures in a whole batch.
        make_graph: makes a recording for a device (default: ``CudaGraph``).
        model, optimizer, scaler, dtype, method: as ``Step`` takes them; the scaler is not enabled.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        dtype: torch.dtype = torch.float32,
        method: Method | None = None,
        *,
        size: int,
        make_graph: Callable[[torch.device], Graph] | None = None,
    ) -> None:
        super().__init__(model, optimizer, scaler, dtype, method=method)
        self._size, self._make_graph = size, make_graph or CudaGraph
        self._graph: Graph | None = None
        # Of the type that SGD's kernel reads.
        self._rates = [
            torch.zeros((), dtype=torch.float32, device=self.device) for _ in optimizer.param_groups
        ]
        for group in optimizer.param_groups:
            if "capturable" in group and self.device.type == "cuda":
                group["capturable"] = True  # Adam counts its steps on the GPU then

    def __call__(self, images: Tensor, labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
        if len(labels) == self._size and self._graph is None:
            try:
                self._capture(images, labels)
            except NotCaptured as error:
                gave_up("the CUDA graph of a training step", error)
                self._size = 0
        if len(labels) != self._size or self._graph is None:
            return super().__call__(images, labels, share)
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._set_rates()
        self._graph.replay()
        return self._result

    def renew(self) -> None:
        self._graph = None

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        self._images = images.clone(memory_format=torch.channels_last)
        self._labels = labels.clone()
        self._set_rates()
        graph = self._make_graph(self.device)
        put_back = keeper(self.model, self.optimizer)
        try:
            with self._rates_in_tensors(), warnings.catch_warnings():
                # Adam warns, once, when it steps outside of a capture.
                warnings.filterwarnings("ignore", ".*capturable=True")
                seen = graph.rehearse(self._work, _REHEARSALS)
                put_back()
                self.optimizer.zero_grad(set_to_none=True)
                self._result = graph.capture(self._work)
                put_back()  # what Python counts has moved on
                again = []
                for _ in seen:
                    graph.replay()
                    again.append(self._result[0].clone())
        finally:
            put_back()
        for one, other in zip(torch.stack(seen).tolist(), torch.stack(again).tolist(), strict=True):
            if not math.isclose(one, other, rel_tol=_TOLERANCE, abs_tol=_LEAST):
                raise NotCaptured(f"its loss is {other:.6g}, and one launch after another it is {one:.6g}")
        self._graph = graph

    def _work(self) -> tuple[Tensor, Tensor]:
        return super().__call__(self._images, self._labels, 1.0)

    def _set_rates(self) -> None:
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])

    @contextmanager
    def _rates_in_tensors(self) -> Iterator[None]:
        """Have the optimizer read its learning rates from ``_rates``; outside they are the numbers they were,
        for schedulers, checkpoints and records."""
        groups = self.optimizer.param_groups
        before = [(group["lr"], group["fused"]) for group in groups]
        hook = self.optimizer.register_step_pre_hook(_align)
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate
                # SGD's other kernels read the rate on the CPU. Adam's do not, where it is capturable.
                group["fused"] = isinstance(self.optimizer, torch.optim.SGD) or group["fused"]
            yield
        finally:
            hook.remove()
            for group, (rate, fused) in zip(groups, before, strict=True):
                group["lr"], group["fused"] = rate, fused


def _align(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Give gradients and slots the strides of their parameters, without which fused kernels refuse them.

    A gradient's stride in a dimension of one entry may be any.
    """
    for parameter in (each for group in optimizer.param_groups for each in group["params"]):
        if parameter.grad is not None:
            parameter.grad = _strided_as(parameter.grad, parameter)
        for key, slot in optimizer.state.get(parameter, {}).items():
            if isinstance(slot, Tensor) and slot.shape == parameter.shape:
                optimizer.state[parameter][key] = _strided_as(slot, parameter)


def _strided_as(tensor: Tensor, parameter: Tensor) -> Tensor:
    same = tensor.stride() == parameter.stride()
    return tensor if same else torch.empty_like(parameter, requires_grad=False).copy_(tensor)
