"""Weights from a file of the user's own, for a network of the user's own."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from regrow.given import kind_of
from regrow.reading import check_plain
from regrow.shipping.checkpoint import load
from regrow.shipping.stored import CHECKSUM
from regrow.short import line, listed, said, short
from regrow.study.typed import Mistyped

_PICKLED = (".pth", ".pt")
_PARALLEL = "module."
_NAMED = 3  # keys of each kind that a message names


def check_file(weights: Path) -> None:
    """Raise ``ValueError`` unless ``weights`` is a plain file with a name that ``load_own_weights`` takes."""
    if weights.suffix not in (".safetensors", *_PICKLED):
        raise Mistyped(
            f"--weights {line(weights)} is no file of weights: its name must end in .safetensors, .pth or "
            ".pt."
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
            state dict, or a dict that has it as "state_dict" or "model". It is read with ``weights_only``.
            Where all names begin with ``module.``, as ``DataParallel`` makes them, that is taken off.

    Raises:
        ValueError: the file cannot be read, or does not fit; the message names the first keys.
    """
    if weights.suffix in _PICKLED:
        state = _pickled(weights)
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
    expected = model.state_dict()
    if not all(each.startswith(_PARALLEL) for each in expected):
        consume_prefix_in_state_dict_if_present(state, _PARALLEL)
    wrong = [
        f"{short(each)} has shape {list(state[each].shape)} in the file and {list(tensor.shape)} in the "
        "network"
        for each, tensor in expected.items()
        if each in state and isinstance(tensor, Tensor) and state[each].shape != tensor.shape
    ]
    reasons = wrong[:_NAMED]
    if len(wrong) > _NAMED:
        reasons.append(f"{len(wrong) - _NAMED} more have other shapes")
    if not wrong:
        found = model.load_state_dict(state, strict=False)
        if found.missing_keys:
            reasons.append(f"it lacks {listed(found.missing_keys)}")
        if found.unexpected_keys:
            reasons.append(f"the network has no {listed(found.unexpected_keys)}")
    if reasons:
        raise ValueError(f"{line(weights)} does not fit the network of {name}: {'; '.join(reasons)}.")


def _pickled(weights: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(weights, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{line(weights)} is damaged, or holds more than tensors, which could run code: save "
            "model.state_dict() instead of the model."
        ) from None
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{line(weights)} is not a whole file of torch.save: {line(error)}.") from None
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()
    ):
        kind = (
            f"a dict with {listed(list(map(str, found)))}" if isinstance(found, Mapping) else kind_of(found)
        )
        raise ValueError(
            f'{line(weights)} holds {kind}, and not a state dict, nor one under "state_dict" or "model".'
        )
    return found
