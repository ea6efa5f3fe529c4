"""Weights from a file of the user's own, for a network of the user's own."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from regrow.callers import warn
from regrow.given import kind_of
from regrow.modules import unwrap
from regrow.reading import check_plain
from regrow.shipping.checkpoint import load
from regrow.shipping.stored import CHECKSUM
from regrow.short import line, listed, said, short
from regrow.study.own_names import parts_for, same_shape
from regrow.study.typed import Mistyped

_PICKLED = (".pth", ".pt", ".ckpt", ".bin", ".tar")
SUFFIXES = (".safetensors", *_PICKLED)
_AVERAGED = "n_averaged"  # of torch.optim.swa_utils.AveragedModel
_NAMED = 3  # keys of each kind that a message names


def check_file(weights: Path) -> None:
    """Raise ``ValueError`` unless ``weights`` is a plain file with a name that ``load_own_weights`` takes."""
    if weights.suffix not in SUFFIXES:
        raise Mistyped(
            f"--weights {line(weights)} is no file of weights: its name must end in .safetensors, "
            f"{', '.join(_PICKLED[:-1])} or {_PICKLED[-1]}."
        )
    try:
        check_plain(weights, os.stat(weights))
    except FileNotFoundError:
        raise Mistyped(f"there is no file --weights {line(weights)}.") from None
    except OSError as error:
        raise said(error, weights, "read") from None


def load_own_weights(model: nn.Module, weights: Path, name: str) -> None:
    """Load the file ``weights`` into ``model``, which ``name`` made.

    Args:
        weights: safetensors, also as ``regrow.save`` writes them, with cuts; or what ``torch.save`` wrote: a
            state dict, or a dict that has it somewhere in it. It is read with ``weights_only``. A prefix of
            all the network's names is taken off, such as ``module.`` or ``_orig_mod.``.

    Raises:
        ValueError: the file cannot be read, or does not fit; the message names the first keys.
    """
    if weights.suffix in _PICKLED:
        state: Mapping[str, Any] = _pickled(weights)
    else:
        try:
            with safe_open(weights, framework="pt") as file:
                described = file.metadata() or {}
                names = file.keys()
                state = {each: file.get_tensor(each) for each in names}
        except SafetensorError as error:
            raise ValueError(f"{line(weights)} is not a whole safetensors file: {line(error)}.") from None
        if CHECKSUM in described and "regrow" in described:
            load(model, weights)
            return
    network = unwrap(model)
    expected = network.state_dict()
    state = _part_for(state, expected, weights)
    wrong = [
        f"{short(each)} has shape {list(state[each].shape)} in the file and {list(tensor.shape)} in the "
        "network"
        for each, tensor in expected.items()
        if each in state and not same_shape(state[each], tensor)
    ]
    reasons = wrong[:_NAMED]
    if len(wrong) > _NAMED:
        reasons.append(f"{len(wrong) - _NAMED} more have other shapes")
    if not wrong:
        found = network.load_state_dict(state, strict=False)
        if found.missing_keys:
            reasons.append(f"it lacks {listed(found.missing_keys)}")
        if found.unexpected_keys:
            reasons.append(f"the network has no {listed(found.unexpected_keys)}")
    if reasons:
        raise ValueError(f"{line(weights)} does not fit the network of {name}: {'; '.join(reasons)}.")


def _part_for(content: Mapping[str, Any], expected: Mapping[str, Any], weights: Path) -> Mapping[str, Any]:
    """The state dict in ``content`` that is the network's, by the network's own names."""
    parts = parts_for(content, expected)
    if not parts:
        raise ValueError(
            f"{line(weights)} holds a dict with {listed(list(map(str, content)))}, and no state dict in it."
        )
    if len(parts) > 1:
        raise ValueError(
            f"{line(weights)} holds weights for the network more than once, under "
            f"{listed([part.place for part in parts])}: save the one that you mean in a file by itself."
        )
    part = parts[0]
    if part.others and part.others != [_AVERAGED]:
        warn(
            f"{line(weights)} holds more than the network: what begins with {short(part.prefix)} is loaded, "
            f"and {listed(part.others)} left out."
        )
    return part.state


def _pickled(weights: Path) -> Mapping[str, Any]:
    try:
        with warnings.catch_warnings():  # of TorchScript, and of protocols of pickle
            warnings.simplefilter("ignore")
            found = torch.load(weights, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{line(weights)} is damaged, or holds more than tensors{_more_than_tensors(weights)}, which "
            "could run code: save model.state_dict() and nothing else."
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        if "TorchScript" in str(error):
            raise ValueError(
                f"{line(weights)} holds a program of TorchScript: save the state_dict() of the network that "
                "was scripted or traced."
            ) from None
        raise ValueError(f"{line(weights)} is not a whole file of torch.save: {line(error)}.") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"{line(weights)} holds {kind_of(found)}, and not a state dict.")
    return found


def _more_than_tensors(weights: Path) -> str:
    """The classes and functions that the file names, in brackets; empty where the file cannot be read."""
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(weights)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError):
        return ""
    return f" ({', '.join(sorted(named)[:_NAMED])})" if named else ""
