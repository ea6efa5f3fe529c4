"""What is on a model: what regrow, PyTorch or the user has put there, and which operations are refused then.

``check`` asks the table ``REFUSED`` before an operation of the public API changes anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from regrow.given import check_module
from regrow.modules import unwrap
from regrow.torch_private import compiled_from, is_compiled_in_place, own_buffers, own_parameters

OPERATIONS = (
    *("RePr", "restart", "cut", "prune", "compensate", "read_as", "add_bridgeout", "remove_bridgeout"),
    *("fold_norms", "save", "load", "export_onnx", "reestimate_norms", "match_norms", "plain_layers"),
    *("shrink_and_perturb", "reinitialize", "redo", "ContinualBackprop", "KnowledgeEvolution"),
    "DenseSparseDense",
)
_RELEASE = "Call cycle.remove() first, or regrow.release(model) if the cycle is lost."
_WEIGHT_ENDS = {
    "parametrized": "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')",
    "pruning masks": "torch.nn.utils.prune.remove(layer, 'weight' or 'bias')",
    "weight hooks": "torch.nn.utils.remove_weight_norm(layer) or remove_spectral_norm(layer)",
}
# state → (what the model is or does, the call that ends it)
STATES = {
    "narrowed": ("computes without its dropped filters (the sub phase of a RePr)", _RELEASE),
    "masked": ("has its dropped filters held at 0 (the sub phase of a RePr)", _RELEASE),
    "in a cycle": ("is in a RePr that has not come to its end", _RELEASE),
    "replacing units": (
        "has units that a ContinualBackprop watches and draws anew",
        "Call the remove() of that ContinualBackprop first.",
    ),
    "sparse": (
        "has its smallest weights held at 0 (a DenseSparseDense)",
        "Call the densify() or remove() of that DenseSparseDense first.",
    ),
    "bridgeout": ("has Bridgeout", "Call remove_bridgeout(model) first."),
    "placed": (
        "was cut, and puts channels at their places among zeros",
        "Call regrow.prune(model, …), which cuts again and compensates, or compensate before the cut.",
    ),
    "folded": ("has its norms folded", "Do this before fold_norms, on the model that was given to it."),
    "observed": (
        "is prepared for quantisation, with ranges for the channels that it has",
        "Do this before prepare_qat or prepare, on the model that was given to it. Prepare it afterwards.",
    ),
    "data parallel": (
        "is wrapped in DataParallel or DistributedDataParallel, which holds on to its parameters",
        "Give model.module, in every process, and wrap it anew afterwards.",
    ),
    "sharded": ("is sharded, and regrow needs whole filters on every process", "Use DDP instead of FSDP."),
    "compiled": ("is compiled", "Give the model that was given to torch.compile."),
    "parametrized": (
        "has weights that a parametrization computes",
        f"Call {_WEIGHT_ENDS['parametrized']} first.",
    ),
    "pruning masks": (
        "has weights under a mask of torch.nn.utils.prune",
        f"Call {_WEIGHT_ENDS['pruning masks']} first. Before that, regrow.keep_of_masks(model) gives the "
        "filters that are masked as a whole, for regrow.cut.",
    ),
    "weight hooks": (
        "has weights that a hook computes before each pass",
        f"Call {_WEIGHT_ENDS['weight hooks']} first; torch.nn.utils.parametrizations has both anew.",
    ),
    "inference mode": (
        "is used under torch.inference_mode, and tensors made there can never be trained",
        "Leave the torch.inference_mode block first, or write torch.no_grad in its place.",
    ),
    "inference tensors": (
        "holds tensors that were made under torch.inference_mode",
        "Give copy.deepcopy(model), made outside of torch.inference_mode.",
    ),
    "lazy": ("has a layer without a weight before its first pass", "Run one forward pass first."),
}
_STRUCTURE = {"RePr", "restart", "cut", "prune", "compensate", "read_as"}
# What draws weights anew in place, or holds them.
_RESTARTS = {
    *("shrink_and_perturb", "reinitialize", "redo", "ContinualBackprop", "KnowledgeEvolution"),
    "DenseSparseDense",
}
# The table: state → the operations that are refused. All others go on, and their results are right. A layer
# whose weight is not a parameter of its own is left alone by name (see ``borrowed_weight``).
REFUSED: dict[str, set[str]] = {
    "narrowed": {*_STRUCTURE, *_RESTARTS, "add_bridgeout", "remove_bridgeout", "load", "match_norms"},
    "masked": {*_STRUCTURE, *_RESTARTS, "add_bridgeout", "remove_bridgeout", "load"},
    "in a cycle": {"RePr", "cut", "prune", "ContinualBackprop", "DenseSparseDense"},
    "replacing units": {"RePr", "cut", "prune", "ContinualBackprop"},
    "sparse": {*_STRUCTURE, *_RESTARTS, "load"},
    "bridgeout": {"add_bridgeout", "cut", "prune"},
    "placed": {"compensate", "read_as"},
    "folded": {*_STRUCTURE, *_RESTARTS, "add_bridgeout", "save", "load"},
    "observed": {"cut", "prune", "compensate", "read_as", "fold_norms", "export_onnx"},
    "data parallel": {"cut", "prune"},
    "sharded": {*OPERATIONS} - {"reestimate_norms", "match_norms"},
    "compiled": set(),
    "parametrized": set(),
    "pruning masks": {*_STRUCTURE, *_RESTARTS, "fold_norms", "load", "plain_layers"},
    "weight hooks": {*_STRUCTURE, *_RESTARTS, "fold_norms", "load", "plain_layers"},
    "inference mode": {*_STRUCTURE, *_RESTARTS, "add_bridgeout", "fold_norms", "load", "plain_layers"},
    "inference tensors": {
        *(*_STRUCTURE, *_RESTARTS, "add_bridgeout", "load", "export_onnx", "reestimate_norms", "match_norms"),
    },
    "lazy": {*OPERATIONS} - {"remove_bridgeout"},
}


def check(model: nn.Module, operation: str, *, called: str = "") -> None:
    """Raise ``ValueError`` if ``model`` is none, or if ``operation`` is refused in one of its states.

    Args:
        model: as the user gave it, in its wrappers.
        called: the public name that the user called, where it is another than ``operation``.
    """
    check_module(model, called or operation)
    for state, where in states_of(model).items():
        if operation in REFUSED[state]:
            raise _refusal(called or operation, state, where)


def check_whole(model: nn.Module, operation: str) -> None:
    """Raise ``ValueError`` if ``model`` is none or is sharded: for functions that are not in the table."""
    check_module(model, operation)
    for name, module in model.named_modules():
        if is_sharded(module):
            raise _refusal(operation, "sharded", name)


def _refusal(operation: str, state: str, where: str) -> ValueError:
    says, end = STATES[state]
    at = f" (see {where!r})" if where else ""
    return ValueError(f"{operation} was refused, because the model {says}{at}. {end}")


def states_of(model: nn.Module) -> dict[str, str]:
    """The states in ``STATES`` that ``model`` is in: {state: qualified name of a module that shows it}."""
    inner = unwrap(model)
    found: dict[str, str] = {}
    for name, _, mark in marks_on(inner):
        found.setdefault(mark.state(), name)
    # The wrappers around the user's own module have no name there.
    names = dict.fromkeys(model.modules(), "") | {module: name for name, module in inner.named_modules()}
    for state, shows in _SIGNS.items():
        where = [name for module, name in names.items() if shows(module)]
        if where:
            found[state] = where[0]
    if torch.is_inference_mode_enabled():
        found["inference mode"] = ""
    return {state: found[state] for state in STATES if state in found}


class Mark:
    """Something of regrow's on a module, kept among the module's attributes.

    Attributes:
        travels: whether copies and pickles of the module bear the mark too; otherwise they hold None.
    """

    travels = True

    def state(self) -> str:
        """The state that the module is in, a key of ``STATES``; empty where there is no more to say."""
        raise NotImplementedError

    def undo(self, module: nn.Module) -> None:
        """Take the mark, and what belongs to it, off ``module``."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(protocol) if self.travels else (type(None), ())


def marks_on(model: nn.Module) -> Iterator[tuple[str, nn.Module, Mark]]:
    """The marks on the modules of ``model``: (qualified name, module, mark)."""
    for name, module in model.named_modules():
        for value in list(vars(module).values()):
            if isinstance(value, Mark):
                yield name, module, value


def strip(probe: nn.Module) -> None:
    """Take all marks off ``probe``, a copy of the user's model: what regrow put on it undoes itself."""
    for _, module, mark in list(marks_on(probe)):
        mark.undo(module)


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of this very module are spread over processes (FSDP, tensor parallelism)."""
    kind: Any = type(module)
    parameters = own_parameters(module).values()
    return _is_fsdp(kind) or any(type(parameter).__name__ == "DTensor" for parameter in parameters)


@functools.lru_cache(maxsize=1024)
def _is_fsdp(kind: Any) -> bool:
    # fully_shard puts FSDPModule among the bases of the class.
    return any(base.__name__ in ("FullyShardedDataParallel", "FSDPModule") for base in kind.__mro__)


def is_placed(module: nn.Module) -> bool:
    """Whether a cut left a layer that picks channels of its input or puts its output among zeros."""
    return "_regrow_at" in vars(module)


def is_spread(module: nn.Module) -> bool:
    """Whether a cut left a layer that computes with its weight among zeros."""
    return bool(vars(module).get("_regrow_at", {}).get("_regrow_spread"))


def is_folded(module: nn.Module) -> bool:
    """Whether ``fold_norms`` folded a norm into this convolution."""
    return "_regrow_folded" in vars(module)


def is_observed(module: nn.Module) -> bool:
    """Whether this module measures ranges for quantisation, or rounds numbers as quantisation would."""
    kind: Any = type(module)
    # Known by name: torch.ao and torchao have a class each, and neither need be there.
    return any(base.__name__ in ("FakeQuantizeBase", "ObserverBase") for base in kind.__mro__)


def borrowed_weight(layer: nn.Module) -> str:
    """Empty, or why the weight of ``layer`` is no parameter of its own, and the call that ends that."""
    if own_parameters(layer).get("weight") is not None:
        return ""
    if parametrize.is_parametrized(layer, "weight"):
        state = "parametrized"
    else:
        state = "pruning masks" if _computed_by_hooks(layer, True) else "weight hooks"
    return f"its weight is computed from other parameters ({_WEIGHT_ENDS[state]} ends that)"


def _is_parallel(module: nn.Module) -> bool:
    return isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)


def _computed_by_hooks(module: nn.Module, masks: bool) -> bool:
    """Whether a hook sets the weight or bias of ``module``, as a plain tensor, before each pass.

    Args:
        masks: whether to look for masks of ``torch.nn.utils.prune``, or for other hooks.
    """
    own = own_parameters(module)
    if not any(name.endswith(("_orig", "_g")) for name in own):
        return False
    computed = [
        name
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and own.keys() & {f"{name}_orig", f"{name}_g"}
    ]
    return any((f"{name}_mask" in own_buffers(module)) is masks for name in computed)


def _has_inference_tensors(module: nn.Module) -> bool:
    tensors = (*own_parameters(module).values(), *own_buffers(module).values())
    return any(
        tensor is not None and not nn.parameter.is_lazy(tensor) and tensor.is_inference()
        for tensor in tensors
    )


def _is_lazy(module: nn.Module) -> bool:
    return any(nn.parameter.is_lazy(parameter) for parameter in own_parameters(module).values())


# state → whether a module shows it
_SIGNS: dict[str, Callable[[nn.Module], bool]] = {
    "placed": is_placed,
    "folded": is_folded,
    "observed": is_observed,
    "data parallel": _is_parallel,
    "sharded": is_sharded,
    "compiled": lambda module: compiled_from(module) is not None or is_compiled_in_place(module),
    "parametrized": parametrize.is_parametrized,
    "pruning masks": lambda module: _computed_by_hooks(module, True),
    "weight hooks": lambda module: _computed_by_hooks(module, False),
    "inference tensors": _has_inference_tensors,
    "lazy": _is_lazy,
}
