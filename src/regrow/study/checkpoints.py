"""A run's state on disk: safetensors files with JSON, checked byte by byte. The last two are kept.

A checkpoint is one file, ``checkpoint-{number}-{digest}.safetensors``. Its header holds the state as
JSON, which refers to tensors by name. The digest in the file's name is the start of the SHA-256 of its bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from regrow.atomic import write_bytes

VERSION = 1
_KEPT = 2
_HEADER = "regrow-checkpoint"
_NAME = re.compile(r"checkpoint-(\d+)-([0-9a-f]{16})\.safetensors")


def write_checkpoint(folder: Path, number: int, state: Mapping[str, Any]) -> Path:
    """Write ``state`` as checkpoint ``number``, then remove all others but the one before it.

    Args:
        folder: of the run; it exists.
        number: higher than the number of every checkpoint that is still good.
        state: dicts, lists, tuples, numbers, strings, None and tensors, nested to any depth.

    Raises:
        ValueError: ``state`` holds anything else.
        OSError: the file cannot be written. Earlier checkpoints stay as they were.
    """
    data = to_bytes(state)
    path = folder / f"checkpoint-{number:05d}-{_digest(data)}.safetensors"
    write_bytes(path, data)
    earlier = [each for each in find_checkpoints(folder) if _number(each) < number]
    for other in find_checkpoints(folder):
        if other != path and other not in earlier[: _KEPT - 1]:
            other.unlink(missing_ok=True)
    return path


def read_checkpoint(folder: Path) -> bytes | None:
    """The bytes of the last good checkpoint, for ``from_bytes``; None when there is none.

    Warns:
        UserWarning: a checkpoint is damaged or of another version; the one before it is tried.
    """
    paths = find_checkpoints(folder)
    for path in paths:
        try:
            data = path.read_bytes()
            match = _NAME.fullmatch(path.name)
            assert match is not None
            if _digest(data) != match[2]:
                raise ValueError("its bytes are not those that were written")
            from_bytes(data)
        except (OSError, ValueError) as error:
            rest = "trying the one before it" if path != paths[-1] else "starting from the beginning"
            warnings.warn(f"{path} is damaged ({error}): {rest}.", stacklevel=2)
        else:
            return data
    return None


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, good or not, the last one first."""
    found = [path for path in folder.glob("checkpoint-*.safetensors") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_number(path), path.name), reverse=True)


def remove_checkpoints(folder: Path) -> None:
    """Remove every checkpoint in ``folder``, the oldest first: an interruption leaves the latest."""
    for path in reversed(find_checkpoints(folder)):
        path.unlink(missing_ok=True)


def to_bytes(state: Mapping[str, Any]) -> bytes:
    """``state`` as one safetensors file. Raises ``ValueError`` for values that it cannot hold."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps({"version": VERSION, "state": _pack(state, tensors)}, separators=(",", ":"))
    return save(tensors, {_HEADER: tree})


def from_bytes(data: bytes) -> dict[str, Any]:
    """The state in ``data``, on the CPU; every tensor has the strides it had.

    Raises:
        ValueError: ``data`` is not a checkpoint, is damaged, or is of another version.
    """
    try:
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        tree = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_HEADER])
        version, packed = tree["version"], tree["state"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"it is not a checkpoint: {type(error).__name__}: {error}") from error
    if version != VERSION:
        raise ValueError(f"it is of version {version!r}, and this regrow reads version {VERSION}")
    state: dict[str, Any] = _unpack(packed, tensors)
    return state


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # A copy, because safetensors takes only contiguous tensors that share no memory with others.
        tensors[name] = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
        # A kernel may round differently when the strides change.
        strides = {} if value.is_contiguous() and _plain(value) else {"strides": list(value.stride())}
        return {"$tensor": name, **strides}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _pack(item, tensors) for key, item in value.items()}
        return {"$pairs": [[_pack(key, tensors), _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"$tuple": [_pack(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_pack(item, tensors) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"a checkpoint cannot hold a {type(value).__name__}: {value!r:.80}")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        tensor = tensors[value["$tensor"]]
        if "strides" in value:
            return torch.empty_strided(tensor.shape, value["strides"], dtype=tensor.dtype).copy_(tensor)
        return tensor
    if "$pairs" in value:
        return {_unpack(key, tensors): _unpack(item, tensors) for key, item in value["$pairs"]}
    if "$tuple" in value:
        return tuple(_unpack(item, tensors) for item in value["$tuple"])
    return {key: _unpack(item, tensors) for key, item in value.items()}


def _plain(tensor: Tensor) -> bool:
    """Whether ``tensor`` has the strides of a new tensor; ``is_contiguous`` ignores dimensions of size 1."""
    return tensor.stride() == torch.empty(tensor.shape, device="meta").stride()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _number(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1
