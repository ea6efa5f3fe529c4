"""Tensors of a file, held against the model that they are for and against the checksum of what was saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from regrow.short import short
from regrow.suggest import nearest

# The entry in a safetensors file's metadata that holds the checksum.
CHECKSUM = "regrow-sha256"


def checksum(described: Any, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal digits, of ``described`` and of ``tensors``: names, types, shapes and bytes.

    Args:
        described: JSON-able data that is stored with the tensors.
        tensors: contiguous, on the CPU.
    """
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            digest.update(cast(Any, tensor.detach().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def check_stored(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` unless ``found`` has the names, shapes and types of ``expected``, a model's state.

    Values are not read.
    """
    if missing := [name for name in expected if name not in found]:
        raise ValueError(
            f"the model has {short(missing[0])}, which the file lacks{nearest(missing[0], found)}"
        )
    if extra := [name for name in found if name not in expected]:
        raise ValueError(
            f"the file has {short(extra[0])}, which the model lacks{nearest(extra[0], expected)}"
        )
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise ValueError(
                f"{short(name)} has shape {list(found[name].shape)} in the file and {list(tensor.shape)} in "
                "the model cut as the file says."
            )
        if tensor.dtype != found[name].dtype:
            raise ValueError(
                f"{short(name)} is {found[name].dtype} in the file and {tensor.dtype} in the model: bring "
                f"the model to that precision first, as with model.to({found[name].dtype})."
            )
