"""Whether the state in a checkpoint fits a run, found out before anything of the run is changed."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regrow.shipping.stored import check_stored
from regrow.short import line, short
from regrow.study.methods.method import Method
from regrow.study.records import check_accuracies, check_epochs, check_events
from regrow.study.rounds import Rounds
from regrow.study.snapshot import state_of

_KEYS = ("epoch", "epochs", "events", "measured", "seconds", "environment", "trained", "random")
# The tensors that an optimizer keeps of each parameter: of its shape, or of one number.
_SLOTS = {"SGD": {"momentum_buffer"}, "Adam": {"step", "exp_avg", "exp_avg_sq"}}
_SLOTS["AdamW"] = _SLOTS["Adam"]


def check_epoch(done: Any, epochs: int) -> int:
    """How many epochs ``done``, the state in a checkpoint, has trained; ``ValueError`` if that cannot be."""
    _mapping(done, _KEYS, "the state")
    epoch: int = done["epoch"]
    _whole(epoch, 1, epochs, "epoch")
    return epoch


def check_fits(
    done: Any,
    rounds: Rounds,
    steps: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    method: Method,
) -> None:
    """Raise ``ValueError`` unless ``done``, the state in a checkpoint, can be resumed with the other objects.

    Names, shapes, types and ranges are checked; the values of weights may be any.

    Args:
        done: what ``from_bytes`` returned.
        rounds: of the whole run.
        steps: of an epoch of the round that goes on.
        model, optimizer, scheduler, scaler, method: built from the run's settings, in the round that goes on;
            nothing of them is changed.
    """
    epoch = check_epoch(done, rounds.epochs)
    trained = rounds.trained(epoch)
    check_epochs(done["epochs"], epoch)
    check_events(done["events"], epoch)
    measured = _mapping(done["measured"], ("loss", "accuracy"), "measured")
    _real(measured["loss"], "the measured loss", finite=False)
    _real(measured["accuracy"], "the measured accuracy", most=1)
    _real(done["seconds"], "seconds")
    accuracies = done.get("task_accuracies", [])
    check_accuracies(accuracies, "the accuracies of tasks")
    if len(accuracies) != rounds.task(rounds.after(epoch)):
        raise ValueError(f"{len(accuracies)} accuracies of tasks do not fit epoch {epoch}")
    environment = _mapping(done["environment"], ("resumed",), "environment")
    _whole(environment["resumed"], 0, 2**31, "resumed")
    fresh = state_of(model, optimizer, scheduler, scaler, method)
    state = _mapping(done["trained"], tuple(fresh), "trained")
    check_stored(fresh["model"], _tensors(state["model"], "model"))
    _check_optimizer(state["optimizer"], fresh["optimizer"], optimizer)
    _check_scheduler(state["scheduler"], fresh["scheduler"], trained * steps)
    _check_scaler(state["scaler"], fresh["scaler"])
    _check_bridgeout(state["bridgeout"], fresh["bridgeout"])
    try:
        method.check_state_dict(state["method"], trained)
    except ValueError as error:
        raise ValueError(line(error, 300)) from None
    if not isinstance(done["random"], list) or not done["random"]:
        raise ValueError("random must list the state of each process's generators")
    for each in done["random"]:
        _check_random(each)


def _check_optimizer(state: Any, fresh: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    _mapping(state, ("state", "param_groups"), "optimizer")
    groups, ours = state["param_groups"], fresh["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(ours):
        raise ValueError(f"the optimizer has {len(ours)} groups of parameters")
    for group, own in zip(groups, ours, strict=True):
        _mapping(group, tuple(own), "a group of the optimizer's parameters")
        _real(group["lr"], "the learning rate")
        for key, value in own.items():
            if key == "capturable" and type(group[key]) is bool:  # the run may go on on another device
                continue
            if key != "lr" and not _same(group[key], value):
                raise ValueError(f"the optimizer's {key} is {short(group[key])}, and here {short(value)}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots = _SLOTS[type(optimizer).__name__]
    for number, kept in _mapping(state["state"], (), "the optimizer's state").items():
        _whole(number, 0, len(parameters) - 1, "the number of a parameter")
        _mapping(kept, tuple(slots), "an optimizer's slots")
        for name, slot in kept.items():
            if slot is None and name == "momentum_buffer":
                continue
            shape = () if name == "step" else parameters[number].shape
            fits = isinstance(slot, Tensor) and slot.shape == shape and slot.is_floating_point()
            if name not in slots or not fits:
                raise ValueError(f"the optimizer's {short(name)} of parameter {number} does not fit it")
            if name == "step" and not 0 <= float(slot) < 2**53:
                raise ValueError(f"the optimizer's step cannot be {short(float(slot))}")


def _check_scheduler(state: Any, fresh: Mapping[str, Any], steps: int) -> None:
    _mapping(state, tuple(fresh), "scheduler")
    if unknown := state.keys() - fresh.keys():
        raise ValueError(f"the scheduler has no {short(min(unknown, key=str))}")
    for key, value in fresh.items():
        found = state[key]
        if key in ("last_epoch", "_step_count"):
            wanted: Any = steps + (key == "_step_count")
        elif key == "_last_lr":
            fits = isinstance(found, list) and len(found) == len(value)
            if not fits or not all(type(rate) is float and 0 <= rate < math.inf for rate in found):
                raise ValueError(f"the scheduler's {key} cannot be {short(found)}")
            continue
        else:
            wanted = value
        if key == "_is_initial" and type(found) is bool:
            continue
        if not _same(found, wanted):
            raise ValueError(f"the scheduler's {key} is {short(found)}, and must be {short(wanted)}")


def _check_scaler(state: Any, fresh: Mapping[str, Any]) -> None:
    _mapping(state, tuple(fresh), "scaler")
    for key, value in state.items():
        if key not in fresh:
            raise ValueError(f"the scaler has no {short(key)}")
        if key == "scale":
            _real(value, "the scaler's scale")
        elif key == "_growth_tracker":
            _whole(value, 0, 2**31 - 1, "the scaler's _growth_tracker")
        elif not _same(value, fresh[key]):
            raise ValueError(f"the scaler's {key} is {short(value)}, and here {short(fresh[key])}")


def _check_bridgeout(state: Any, fresh: Mapping[str, Any] | None) -> None:
    if fresh is None or state is None:
        if state is not fresh:
            raise ValueError("only a run with Bridgeout has a state of it")
        return
    _mapping(state, tuple(fresh), "bridgeout")
    _whole(state["passes"], 0, 2**63 - 1, "Bridgeout's number of passes")
    for key in fresh.keys() - {"passes"}:
        if not _same(state[key], fresh[key]):
            raise ValueError(f"Bridgeout's {key} are {short(state[key])}, and here {short(fresh[key])}")


def _check_random(state: Any) -> None:
    """Load the states into generators of their own: some states are refused only there."""
    _mapping(state, ("torch", "cuda", "numpy", "python"), "random")
    _check_generator(state["torch"], "cpu")
    if not isinstance(state["cuda"], list) or len(state["cuda"]) > 1024:
        raise ValueError("random's cuda must list the state of each GPU")
    for each in state["cuda"]:
        _check_generator(each, "cuda" if torch.cuda.is_available() else None)
    numbers = state["numpy"]
    if not isinstance(numbers, tuple) or len(numbers) != 5:
        raise ValueError(f"NumPy's generator has no state {short(numbers)}")
    name, key, position, has_gauss, gauss = numbers
    if (
        not _same(name, "MT19937")
        or not isinstance(key, Tensor)
        or key.shape != (624,)
        or key.dtype != torch.int64
    ):
        raise ValueError("NumPy's generator takes 624 numbers of type int64")
    if bool((key < 0).any()) or bool((key >= 2**32).any()):
        raise ValueError("NumPy's generator takes numbers of 32 bits")
    _whole(position, 0, 624, "the position of NumPy's generator")
    _whole(has_gauss, 0, 1, "NumPy's has_gauss")
    _real(gauss, "NumPy's gauss", least=-math.inf)
    python = state["python"]
    fits = isinstance(python, tuple) and len(python) == 3 and type(python[0]) is int
    if not fits or not isinstance(python[1], tuple) or not all(type(each) is int for each in python[1]):
        raise ValueError(f"Python's generator has no state {short(python)}")
    try:
        np.random.RandomState().set_state((name, key.numpy().astype(np.uint32), *numbers[2:]))
        random.Random().setstate(state["python"])
    except (TypeError, ValueError, OverflowError, IndexError) as error:
        raise ValueError(f"a random generator does not take its state: {line(error)}") from None
    if state["python"][2] is not None:
        _real(state["python"][2], "Python's gauss_next", least=-math.inf)


def _check_generator(state: Any, device: str | None) -> None:
    if (
        not isinstance(state, Tensor)
        or state.dtype != torch.uint8
        or state.dim() != 1
        or len(state) > 1 << 16
    ):
        raise ValueError("PyTorch's generators take their state as bytes")
    if device is not None:
        try:
            torch.Generator(device).set_state(state)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"PyTorch's generator does not take its state: {line(error)}") from None


def _mapping(value: Any, keys: tuple[Any, ...], where: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping, not {short(value)}")
    for key in keys:
        if key not in value:
            raise ValueError(f"{where} has no {short(key)}")
    return value


def _tensors(value: Any, where: str) -> Mapping[str, Tensor]:
    for name, each in _mapping(value, (), where).items():
        if not isinstance(name, str) or not isinstance(each, Tensor):
            raise ValueError(f"{where} must hold tensors by name, not {short(each)} for {short(name)}")
    return value


def _same(one: Any, other: Any) -> bool:
    """Whether two plain values are equal; tensors among them would be compared element by element."""
    return type(one) is type(other) and repr(one) == repr(other)


def _whole(value: Any, least: int, most: int, what: str) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} must be a whole number from {least:,} to {most:,}, not {short(value)}")


def _real(value: Any, what: str, *, least: float = 0, most: float = math.inf, finite: bool = True) -> None:
    if type(value) is not float and not (type(value) is int and abs(value) < 2**53):
        raise ValueError(f"{what} must be a number, not {short(value)}")
    if finite and not (least <= value <= most and math.isfinite(value)):
        raise ValueError(f"{what} cannot be {short(value)}")
