"""A run's state on disk: safetensors files with JSON, checked byte by byte. The last two are kept.

A checkpoint is one file, ``checkpoint-{number}-{digest}.safetensors``. Its header holds the state as
JSON, which refers to tensors by name. The digest in the file's name is the start of the SHA-256 of its bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from regrow.atomic import write_bytes
from regrow.callers import warn
from regrow.reading import from_json, read_file
from regrow.short import line, short

VERSION = 1
_KEPT = 2
_HEADER = "regrow-checkpoint"
# The states of all networks that can be trained here are smaller.
MOST_BYTES = 1 << 36
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


def read_checkpoint(
    folder: Path, check: Callable[[dict[str, Any]], None] | None = None, most: int = MOST_BYTES
) -> bytes | None:
    """The bytes of the last good checkpoint, for ``from_bytes``; None when there is none.

    Args:
        folder: of the run.
        check: raises ``ValueError`` for a state that does not fit the run.
        most: the size in bytes that no checkpoint of the run can exceed.

    Warns:
        UserWarning: a checkpoint is damaged, of another version or does not fit; the one before it is tried.
    """
    paths = find_checkpoints(folder)
    for path in paths:
        try:
            data = read_file(path, most)
            match = _NAME.fullmatch(path.name)
            assert match is not None
            if _digest(data) != match[2]:
                raise ValueError("its bytes are not those that were written")
            state = from_bytes(data)
            if check is not None:
                check(state)
        except (OSError, ValueError) as error:
            rest = "trying the one before it" if path != paths[-1] else "starting from the beginning"
            warn(f"{path} is damaged ({line(error)}): {rest}.")
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
        tree = from_json(from_json(data[8 : 8 + size])["__metadata__"][_HEADER], constants=True)
        version, packed = tree["version"], tree["state"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"it is not a checkpoint: {type(error).__name__}: {line(error)}") from error
    if version != VERSION:
        raise ValueError(f"it is of version {short(version)}, and this regrow reads version {VERSION}")
    state = _unpack(packed, tensors)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__} in place of a state")
    if tensors:
        raise ValueError(f"nothing refers to its tensor {short(min(tensors))}")
    return state


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # A copy, because safetensors takes only contiguous tensors that share no memory with others.
        tensors[name] = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
        # A kernel may round differently when the strides change.
        kept = not (value.is_contiguous() and _plain(value)) and _dense(value.shape, value.stride())
        return {"$tensor": name, **({"strides": list(value.stride())} if kept else {})}
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


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that ``_pack`` made ``value`` of; each tensor is taken out of ``tensors``.

    A tensor that stood at many places could make a small file fill the memory.
    """
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    special = [key for key in value if key.startswith("$")]
    if not special:
        return {key: _unpack(item, tensors) for key, item in value.items()}
    kind, rest = special[0], value[special[0]]
    if kind == "$tensor" and value.keys() <= {"$tensor", "strides"}:
        if not isinstance(rest, str) or rest not in tensors:
            raise ValueError(f"it has no tensor {short(rest)}, or refers to it twice")
        tensor = tensors.pop(rest)
        return _strided(tensor, value["strides"]) if "strides" in value else tensor
    if kind == "$tuple" and len(value) == 1 and isinstance(rest, list):
        return tuple(_unpack(item, tensors) for item in rest)
    if kind == "$pairs" and len(value) == 1 and isinstance(rest, list):
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in rest):
            raise ValueError(f"its pairs are not pairs: {short(rest)}")
        pairs = [(_unpack(key, tensors), _unpack(item, tensors)) for key, item in rest]
        if not all(key is None or isinstance(key, bool | int | float | str) for key, _ in pairs):
            raise ValueError("it has a list, a mapping or a tensor for a key")
        return dict(pairs)
    raise ValueError(f"it holds {short(value)}, which regrow does not write")


def _strided(tensor: Tensor, strides: Any) -> Tensor:
    if not isinstance(strides, list) or not _dense(tensor.shape, strides):
        raise ValueError(
            f"a tensor of shape {short(list(tensor.shape))} cannot have strides {short(strides)}"
        )
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)


def _dense(shape: Sequence[int], strides: Sequence[Any]) -> bool:
    """Whether a tensor of ``shape`` with ``strides`` fills its memory, without gaps and without overlaps."""
    if len(strides) != len(shape) or not all(type(each) is int and 0 <= each < 2**40 for each in strides):
        return False
    filled = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1
    ):
        if stride != filled:
            return False
        filled *= size
    return 0 not in shape


def _plain(tensor: Tensor) -> bool:
    """Whether ``tensor`` has the strides of a new tensor; ``is_contiguous`` ignores dimensions of size 1."""
    return tensor.stride() == torch.empty(tensor.shape, device="meta").stride()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _number(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1
