"""Tests marked ``devices`` run on the CPU, and again on the device that ``REGROW_TEST_DEVICE`` names.

    REGROW_TEST_DEVICE=cuda make test

What the test itself makes is then on the device: its tensors and the layers of its nets, with the values
that they have on the CPU. What regrow makes is left where regrow puts it, so that a tensor of regrow's on the
wrong device is an error, as it is for a user.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

VARIABLE = "REGROW_TEST_DEVICE"
_TESTS = f"{Path(__file__).parent}{os.sep}"
_INSTALLED = Path(torch.__file__).parents[1]
_LAYERS = tuple(f"{_INSTALLED / name}{os.sep}" for name in ("torch/nn", "torchvision", "timm"))

_MAKES = {
    torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand, torch.randint,
    torch.randn, torch.randperm, torch.tensor, torch.zeros,
}  # fmt: skip
_DRAWS_IN_PLACE = {
    Tensor.bernoulli_, Tensor.exponential_, Tensor.normal_, Tensor.random_, Tensor.uniform_,
}  # fmt: skip
_DRAWS_LIKE = {torch.rand_like, torch.randn_like}


def device_wanted() -> tuple[torch.device | None, str]:
    """The device to test on beside the CPU; if there is none, None and the reason.

    Raises:
        pytest.UsageError: the variable names nothing that PyTorch knows, the CPU, or a number too many.
    """
    wanted = os.environ.get(VARIABLE, "")
    if not wanted:
        return None, f"runs on a GPU: set {VARIABLE}=cuda"
    try:
        device = torch.device(wanted)
        count = (
            int(torch.get_device_module(device).device_count()) if device.type not in ("cpu", "meta") else -1
        )
    except (RuntimeError, AttributeError):
        count = -1
    if count < 0:
        raise pytest.UsageError(
            f"{VARIABLE}={wanted} names no device that tests can run on beside the CPU: write cuda or cuda:1."
        )
    if count == 0:
        return None, f"runs on a GPU: {VARIABLE}={wanted}, and PyTorch finds no such device here"
    if (device.index or 0) >= count:
        raise pytest.UsageError(
            f"{VARIABLE}={wanted}: PyTorch finds {count} such devices; the first has number 0."
        )
    return device, ""


def places(name: str, *, cuda: bool = False) -> list[Any]:
    """The parameters of a test marked ``devices``; the device is skipped by ``name`` where there is none.

    Args:
        cuda: as for a test marked ``cuda``: the device alone, and a GPU of CUDA's only.
    """
    device, reason = device_wanted()
    if cuda and device is not None and device.type != "cuda":
        device, reason = None, f"runs on a GPU of CUDA's only, and {VARIABLE}={device}"
    marks = [] if device else [pytest.mark.skip(reason=f"{name}: {reason}")]
    there = pytest.param(device, id="device", marks=marks)
    return [there] if cuda else [pytest.param(None, id="cpu"), there]


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """What tests make, and the tensors that test files hold as constants, are on ``device``."""
    with pytest.MonkeyPatch.context() as patch:
        # TF32 rounds to 10 bits: tests compare with tolerances of float32.
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        patch.setattr(torch.backends.cudnn, "deterministic", True)
        for module in list(sys.modules.values()):
            if (getattr(module, "__file__", None) or "").startswith(_TESTS):
                _move_constants(module, device, patch)
        with _OnDevice(device):
            yield


def _move_constants(module: ModuleType, device: torch.device, patch: pytest.MonkeyPatch) -> None:
    for name, value in list(vars(module).items()):
        if isinstance(value, Tensor):
            patch.setattr(module, name, value.to(device))
        elif isinstance(value, FunctionType) and value.__defaults__:
            moved = (each.to(device) if isinstance(each, Tensor) else each for each in value.__defaults__)
            patch.setattr(value, "__defaults__", tuple(moved))


class _OnDevice(TorchFunctionMode):
    """Sends what a test makes to a device. Random numbers are drawn on the CPU, as without a device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MAKES:
            if kwargs.get("device") is None and _asked_by_a_test():
                trains = kwargs.pop("requires_grad", False)
                made = func(*args, **kwargs).to(self.device)
                return made.requires_grad_() if trains else made
        elif func in _DRAWS_LIKE:
            if _asked_by_a_test():
                return func(args[0].cpu(), *args[1:], **kwargs).to(self.device)
        elif (
            func in _DRAWS_IN_PLACE or getattr(func, "__module__", "") == "torch.nn.init"
        ) and _asked_by_a_test():
            given = args[0] if args else kwargs.pop("tensor")
            drawn = func(given.detach().cpu(), *args[1:], **kwargs)
            with torch.no_grad():
                return given.copy_(drawn)
        return func(*args, **kwargs)


def _asked_by_a_test() -> bool:
    """Whether a test made this call, itself or by building a net."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith((*_LAYERS, torch.overrides.__file__)):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code.co_filename.startswith(_TESTS)
