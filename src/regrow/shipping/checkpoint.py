"""Store a cut model in one safetensors file: its weights, and the cuts that made it small. No pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from regrow.atomic import replacing
from regrow.given import check_path
from regrow.looking.copies import NotCopied, copied
from regrow.marks import check
from regrow.modules import unwrap
from regrow.reading import check_plain, from_json
from regrow.shipping.stored import CHECKSUM, check_stored, checksum
from regrow.short import line, said, short
from regrow.suggest import nearest
from regrow.surgery.layers import apply_plan
from regrow.surgery.plan import CutPlan

_VERSION = 1
_METADATA = "regrow"
_CUTS = "_regrow_cuts"


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write ``model``'s weights and its cuts to one safetensors file, for ``load``.

    The file holds everything in ``state_dict()``, tensors that share memory once. Its metadata (JSON,
    versioned) says which filters and channels the cuts left, and has a SHA-256 of all that is stored, by
    which ``load`` notices damage. A model that was never cut can be saved too.

    Args:
        model: any module; wrappers are looked through, so names in the file carry no prefix of a wrapper.
        path: of the file. It is replaced in one step: a reader finds the old file or the new one.

    Raises:
        ValueError: ``state_dict()`` holds an entry that safetensors cannot store (a sparse or quantized
            tensor, a layer without weights yet, an object that is not a tensor), the model and a part of
            it were both cut, or its norms are folded. Nothing is written then.
        FileNotFoundError: the folder of ``path`` does not exist.
        OSError: it cannot be written; the message names ``path``.
    """
    check(model, "save")
    check_path(path, "save")
    model = unwrap(model)
    tensors, shared = _tensors(model)
    described = {"version": _VERSION, "cuts": _cuts(model), "shared": shared}
    text = json.dumps(described, separators=(",", ":"))
    metadata = {_METADATA: text, CHECKSUM: checksum(described, tensors)}
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
            _order_header(temporary)
        except SafetensorError as error:
            raise OSError(f"{line(path)} cannot be written: {line(error)}") from error
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"the model cannot be stored as safetensors: {line(error)}") from error


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Cut a freshly built ``model`` as the saved one was, in place, load the stored weights, and return it.

    The values are copied into the model's tensors, which keep their device and memory format. Parameters
    that were tied when saved are tied again. All steps are tried on a copy first: a file that does not fit
    leaves the model as it was.

    Args:
        model: built as the saved one was before its first cut, in the same precision; or already cut by the
            same cuts. Build optimizers and data-parallel wrappers afterwards: a cut makes new parameters.
        path: of a file that ``save`` wrote.

    Raises:
        ValueError: the file is damaged, was not written by ``save``, has a newer version, or does not fit
            the model; the message says where. Files from before there was a checksum are loaded without one.
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
    """
    check(model, "load")
    check_path(path, "load")
    inner = unwrap(model)
    stored = _read(Path(path))
    present = _cuts(inner)
    if present and present != stored.cuts:
        raise ValueError(
            f"the model has been cut before, and not as the one in {line(path)} was: build it afresh, then "
            "load."
        )
    cuts = [] if present else stored.cuts
    if cuts:
        check(model, "cut", called="load")
    try:
        trial = copied(inner, torch.clone)
        _apply(trial, cuts, stored)
    except NotCopied as error:
        raise ValueError(f"{error}, so the file cannot be tried on a copy of it.") from error
    except (ValueError, RuntimeError) as error:  # load_state_dict raises RuntimeError
        raise ValueError(f"{line(path)} does not fit the model: {line(error)}") from error
    if stored.checksum not in (None, checksum(stored.described, stored.tensors)):
        raise ValueError(
            f"{line(path)} is damaged: its checksum is not that of what it holds. Nothing was loaded; save "
            "the model again, or take another copy of the file."
        )
    _apply(inner, cuts, stored)
    return model


class _Stored:
    """The content of a file with well-formed metadata. ``load`` tries on a copy whether it fits a model.

    Attributes:
        cuts: [{module: qualified name of the module cut, plan: CutPlan.to_dict()}], oldest first.
        tensors: {name: stored tensor}.
        shared: {name of a tensor that is not stored: name in ``tensors`` that it shares memory with}.
        described: the cuts, the shared tensors and the version, as they are stored.
        checksum: of ``described`` and ``tensors`` when they were saved; None in older files.
    """

    def __init__(self, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
        try:
            found = from_json(metadata[_METADATA])
        except ValueError as error:
            raise ValueError(f"its metadata is not JSON ({error})") from error
        version = found.get("version") if isinstance(found, dict) else None
        if type(version) is not int or version < 1:
            raise ValueError("its metadata has no version number")
        if version > _VERSION:
            raise ValueError(
                f"it has version {short(version)}, and this regrow reads version {_VERSION}: install a newer "
                "regrow"
            )
        if found.keys() != {"version", "cuts", "shared"}:
            raise ValueError(
                f"its metadata has the keys {short(sorted(found))}, not cuts, shared and version"
            )
        if unknown := metadata.keys() - {_METADATA, CHECKSUM}:
            raise ValueError(f"its metadata has an unknown entry {short(min(unknown))}")
        self.described = found
        self.checksum = metadata.get(CHECKSUM)
        self.cuts: list[dict[str, Any]] = found["cuts"]
        self.shared: dict[str, str] = found["shared"]
        self.tensors = tensors
        if not isinstance(self.cuts, list) or not all(map(_is_cut, self.cuts)):
            raise ValueError("its cuts are not a list of modules with their plans")
        if not isinstance(self.shared, dict) or not all(
            name not in tensors and isinstance(home, str) and home in tensors
            for name, home in self.shared.items()
        ):
            raise ValueError("its list of shared tensors does not match the stored tensors")


def _is_cut(cut: Any) -> bool:
    kinds = {"module": str, "plan": dict}
    return isinstance(cut, dict) and {key: type(value) for key, value in cut.items()} == kinds


def _read(path: Path) -> _Stored:
    try:
        check_plain(path, os.stat(path))
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _METADATA not in metadata:
                raise ValueError("it holds no cuts (plain safetensors are loaded with safetensors.torch)")
            names = file.keys()
            # The tensors are views of the mapped file: their values are read when a model copies them.
            return _Stored(metadata, {name: file.get_tensor(name) for name in names})
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{line(path)} is not a whole file written by regrow.save: {line(error)}."
        ) from error
    except OSError as error:
        raise said(error, path, "read") from error


@torch.no_grad()
def _apply(model: nn.Module, cuts: list[dict[str, Any]], stored: _Stored) -> None:
    """Cut ``model`` and load the values. A file that does not fit may raise an error half way through."""
    modules = dict(model.named_modules())
    for cut in cuts:
        if (name := cut["module"]) not in modules:
            raise ValueError(f"it cuts {short(name)}, which the model lacks{nearest(name, modules)}")
        apply_plan(modules[name], CutPlan.from_dict(cut["plan"]))
    values = {**stored.tensors, **{name: stored.tensors[home] for name, home in stored.shared.items()}}
    _check_fit(model, values, stored.shared)
    _tie(model, stored.shared)
    # The model's own state_dict also carries the versions of the layers' formats.
    state = model.state_dict()
    state.update(values)
    model.load_state_dict(state)


def _check_fit(model: nn.Module, values: Mapping[str, Tensor], shared: Mapping[str, str]) -> None:
    """Raise ``ValueError`` unless ``values`` match the model's tensors in name, shape, type and sharing."""
    expected = model.state_dict()
    for name, tensor in expected.items():
        _check_plain(name, tensor)
    check_stored(expected, values)
    homes: dict[Any, str] = {}
    for name, tensor in expected.items():
        home = shared.get(name, name)
        if (first := homes.setdefault(_place(name, tensor), home)) != home:
            raise ValueError(
                f"the model shares one tensor between {name!r} and {first!r}, and the file has two of them."
            )


def _tie(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Register one parameter, or one buffer, under both names of each pair in ``shared``."""
    for name, home in shared.items():
        (to, leaf), (source, source_leaf) = _owner(model, name), _owner(model, home)
        for kind in ("_parameters", "_buffers"):
            mine, theirs = vars(to)[kind].get(leaf), vars(source)[kind].get(source_leaf)
            if mine is not None and theirs is not None and _place(name, mine) != _place(home, theirs):
                vars(to)[kind][leaf] = theirs


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _cuts(model: nn.Module) -> list[dict[str, Any]]:
    """Return the plans that ``apply_plan`` recorded on ``model`` and its parts, as in ``_Stored.cuts``."""
    cut = {name: module for name, module in model.named_modules() if vars(module).get(_CUTS)}
    for inner in cut:
        for outer in cut:
            if inner != outer and inner.startswith(f"{outer}." if outer else ""):
                raise ValueError(
                    f"{inner!r} was cut by itself, and {repr(outer) if outer else 'the model'} around it as "
                    "well, in an order that is not known any more. Cut the whole model, or the part alone."
                )
    cuts = [{"module": name, "plan": plan} for name in cut for plan in vars(cut[name])[_CUTS]]
    plain: list[dict[str, Any]] = json.loads(json.dumps(cuts))
    return plain


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the ``tensors`` and ``shared`` of a ``_Stored`` for ``model``, in the form safetensors takes."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    homes: dict[Any, str] = {}
    memory: set[int] = set()
    for name, value in model.state_dict().items():
        _check_plain(name, value)
        if (home := homes.setdefault(_place(name, value), name)) != name:
            shared[name] = home
            continue
        value = value.cpu().contiguous()
        storage = value.untyped_storage()
        # Each of several views of one larger tensor is stored as a separate tensor.
        if storage.nbytes() != value.nbytes or storage.data_ptr() in memory:
            value = value.clone()
        memory.add(storage.data_ptr())
        tensors[name] = value
    return tensors, shared


def _order_header(path: Path) -> None:
    """Put the entries of the metadata in their order: safetensors writes them in any order."""
    with path.open("rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def _check_plain(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is an ordinary dense tensor that has values."""
    if nn.parameter.is_lazy(value):
        raise ValueError(f"{name!r} has no values before a first forward pass (a lazy layer): run one.")
    if type(value) not in (Tensor, nn.Parameter):
        raise ValueError(f"{name!r} is of type {type(value).__name__}, not an ordinary tensor.")
    if value.is_meta:
        raise ValueError(f"{name!r} has no values (it is on the meta device): build the model on a real one.")
    if value.layout is not torch.strided or value.is_quantized:
        raise ValueError(f"{name!r} is a sparse or quantized tensor, which cannot be stored.")


def _place(name: str, tensor: Tensor) -> Any:
    """Return a key that is equal for all names of one tensor; the key of an empty tensor is its name."""
    if not tensor.numel():
        return name
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
