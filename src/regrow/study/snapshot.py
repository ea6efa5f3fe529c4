"""Save everything that a run's next step depends on as plain data, and load it again."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from regrow.marks import states_of
from regrow.noise.layers import bridgeout_state, load_bridgeout_state
from regrow.study.methods.method import Method


def state_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    method: Method,
) -> dict[str, Any]:
    """The state of the objects that train, for ``load_state``; ``random_state`` has the random generators."""
    return {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict(),
        "method": method.state_dict(),
        "bridgeout": bridgeout_state(model) if "bridgeout" in states_of(model) else None,
    }


def load_state(
    state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    method: Method,
) -> None:
    """Load what ``state_of`` returned into objects that were built from the same settings."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(_of_this_device(state["optimizer"], optimizer))
    scheduler.load_state_dict(state["scheduler"])
    scaler.load_state_dict(state["scaler"])
    method.load_state_dict(state["method"])
    if state["bridgeout"] is not None:
        load_bridgeout_state(model, state["bridgeout"])


def as_now(done: dict[str, Any]) -> dict[str, Any]:
    """``done``, the state in a checkpoint, which an earlier version may have written, as this one would."""
    trained = done["trained"]
    if not isinstance(trained, dict) or "method" in trained or "repr" not in trained:
        return done
    method = {} if trained["repr"] is None else {"repr": trained["repr"]}
    rest = {key: value for key, value in trained.items() if key != "repr"}
    return {**done, "trained": {**rest, "method": method}}


def _of_this_device(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``state``, but ``optimizer`` stays capturable or not: a run may go on on another device."""
    groups = [
        {**saved, "capturable": own["capturable"]} if "capturable" in own else saved
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**state, "param_groups": groups}


def keeper(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A function that puts back, in place, what training steps change; it can be called several times.

    It puts back parameters, buffers, the number of Bridgeout's draws, the random generators and the
    optimizer's slots. A slot that did not exist becomes 0, from which SGD and Adam start as without one.

    Args:
        model: in its wrappers or without.
        optimizer: SGD, Adam or AdamW of PyTorch, whose slots are tensors or None.
    """
    tensors = [*model.parameters(), *model.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]
    slots = {
        parameter: {key: value.clone() for key, value in held.items() if value is not None}
        for parameter, held in optimizer.state.items()
    }
    noise = bridgeout_state(model) if "bridgeout" in states_of(model) else None
    drawn = random_state()

    @torch.no_grad()
    def put_back() -> None:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
        for parameter, held in optimizer.state.items():
            before = slots.get(parameter, {})
            for key, slot in held.items():
                if key in before:
                    slot.copy_(before[key])
                elif slot is not None:
                    slot.zero_()
        if noise is not None:
            load_bridgeout_state(model, noise)
        load_random_state(drawn)

    return put_back


def random_state() -> dict[str, Any]:
    """The state of every global random generator: PyTorch's on the CPU and all GPUs, NumPy's, Python's."""
    # regrow itself draws nothing from NumPy's global generator, but a user's model may.
    name, key, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": (name, torch.from_numpy(np.asarray(key).astype(np.int64)), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def load_random_state(state: dict[str, Any]) -> None:
    """Set every generator to the state that ``random_state`` returned."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():  # a run may go on on a machine with fewer GPUs
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    name, key, *rest = state["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
