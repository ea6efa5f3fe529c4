"""Every name of PyTorch and torch-pruning that begins with an underscore, each with its fallback.

The rest of the library calls the functions below, so a release that renames something is mended here.
``tests/test_torch_private.py`` fails when one of the names is gone, and when another file uses such a name.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode as _DispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

__all__ = ["TorchDispatchMode", "tree_flatten", "tree_leaves", "tree_map", "tree_map_only", "tree_unflatten"]


class TorchDispatchMode(_DispatchMode):
    """PyTorch's own, without the wrapper around ``__torch_dispatch__`` that keeps torch.compile out of it.

    The wrapper imports torch._dynamo at the first operation, which takes seconds; and the passes that the
    library follows are not compiled (see ``call`` in looking/calls.py).
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


# Base classes. Without them PyTorch's own subclasses are recognised, and the user's are not.
BatchNorm: Any = getattr(
    nn.modules.batchnorm, "_BatchNorm", nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
)
ConvNd: Any = getattr(
    nn.modules.conv, "_ConvNd",
    nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d,
)  # fmt: skip
DropoutNd: Any = getattr(
    nn.modules.dropout, "_DropoutNd",
    nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.AlphaDropout | nn.FeatureAlphaDropout,
)  # fmt: skip


# What torch.no_grad and its relatives call; None where it is unknown, and then they stay in force.
set_grad_enabled: Any = getattr(torch._C, "_set_grad_enabled", None)


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """The parameters of ``module`` itself by name, None where one was left out (``bias=False``)."""
    found = module.__dict__.get("_parameters")
    return dict(module.named_parameters(recurse=False)) if found is None else found


def own_buffers(module: nn.Module) -> dict[str, Any]:
    """The buffers of ``module`` itself by name, None where one was left out."""
    found = module.__dict__.get("_buffers")
    return dict(module.named_buffers(recurse=False)) if found is None else found


def own_modules(module: nn.Module) -> dict[str, Any]:
    """The direct children of ``module`` by name, a child with two names under both."""
    found = module.__dict__.get("_modules")
    return dict(module.named_children()) if found is None else found


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody registered a forward hook on ``module``; True where that cannot be seen."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return any(module.__dict__.get(kind, True) for kind in kinds)


def has_pre_hooks(module: nn.Module) -> bool:
    """Whether somebody's hook runs ahead of the forward method of ``module``; True if that is unknown."""
    return bool(module.__dict__.get("_forward_pre_hooks", True))


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each of ``sources`` to its target, in one operation."""
    together = getattr(torch, "_foreach_copy_", None)
    if together is not None:
        together(list(targets), list(sources))
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def has_gradient_hooks(tensor: Tensor) -> bool:
    """Whether somebody registered a hook on the gradient of ``tensor``; True where that cannot be seen."""
    kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return any(getattr(tensor, kind, True) for kind in kinds)


def keeps_its_address(tensor: Tensor) -> Tensor:
    """``tensor``, of which torch.compile is told that it stays where it is: CUDA graphs may then write to it.

    Where that cannot be told, code that was compiled with CUDA graphs runs without them.
    """
    # As torch._dynamo.mark_static_address does, without the second that its import takes.
    tensor._dynamo_static_input_type = "guarded"  # type: ignore[attr-defined]
    return tensor


def compiled_from(model: nn.Module) -> nn.Module | None:
    """The module inside a ``torch.compile`` wrapper; None for any other model."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called; False where that cannot be seen."""
    return module.__dict__.get("_compiled_call_impl") is not None


def takes_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``register_step_post_hook`` works: it fails on wrappers that skip ``Optimizer.__init__``."""
    try:
        optimizer.register_step_post_hook(print).remove()
    except (AttributeError, TypeError):  # the dictionary of hooks is private, and wrappers take a plain one
        return False
    return True


def lazy_copy(tensor: Tensor) -> Tensor:
    """A copy that takes memory, and time, when it or ``tensor`` is written to; else an ordinary copy."""
    try:
        return torch._lazy_clone(tensor.detach())
    except (AttributeError, RuntimeError, NotImplementedError):  # memory that PyTorch did not allocate
        return tensor.detach().clone()


def is_unwritten(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a lazy copy, or has one, and neither was written to; False if unknown."""
    known = getattr(torch._C, "_is_cow_tensor", None)
    return known is not None and bool(known(tensor))


def writes_to(tensor: Tensor) -> int:
    """How often ``tensor`` was changed in place; always 0 where PyTorch does not count (inference mode)."""
    return 0 if tensor.is_inference() else int(getattr(tensor, "_version", 0))


def storage_key(storage: torch.UntypedStorage) -> int:
    """What is equal for two tensors that share ``storage``, also for storages without a byte."""
    # Asking a lazy copy for its address would have it copy.
    key = getattr(storage, "_cdata", None)
    return int(storage.data_ptr() if key is None else key)


def _in_transform() -> bool:
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is not None and bool(active())


def transforms_run() -> bool:
    """Whether a transform of torch.func or a level of forward-mode derivatives is active; True if unknown."""
    return _in_transform() or getattr(forward_ad, "_current_level", 0) >= 0


def remember_storage(memo: dict[Any, Any], tensor: Tensor, twin: Tensor) -> None:
    """Have ``copy.deepcopy`` take the memory of ``twin`` for other tensors that lie in that of ``tensor``.

    Where its book of memories is another, they get memory of their own.
    """
    memo.setdefault("torch", {})[storage_key(tensor.untyped_storage())] = twin.untyped_storage()


def is_transformed(tensor: Tensor) -> bool:
    """Whether ``tensor`` bears a forward-mode tangent, or a transform of torch.func (grad, vmap, …) runs.

    False where transforms cannot be seen: PyTorch then refuses autograd functions without rules for them.
    """
    if _in_transform():
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None


def _is_exporting() -> bool:
    # What torch.export compiles in its strict way counts as compiled, and is refused there by its own words.
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


# Whether torch.export runs. PyTorch 2.6 has no function for it.
is_exporting: Any = getattr(torch.compiler, "is_exporting", _is_exporting)


def is_noted() -> bool:
    """Whether torch.jit.trace or torch.fx writes the operations down; of torch.fx False if unknown."""
    tracing = getattr(torch.fx, "_symbolic_trace", None)
    by_fx = getattr(tracing, "is_fx_symbolic_tracing", getattr(tracing, "is_fx_tracing", None))
    return torch.jit.is_tracing() or (by_fx is not None and bool(by_fx()))


def outside_transforms() -> Any:
    """A context manager inside of which no transform of torch.func acts; one without effect if unknown."""
    guard = getattr(torch._C, "_DisableFuncTorch", None)
    return nullcontext() if guard is None or torch.compiler.is_compiling() else guard()


def backward_node() -> Any:
    """The autograd node that runs in this thread; None outside a backward pass, or where it is unknown.

    Unknown, a checkpointed part that is computed again takes the noise of the latest pass.
    """
    current = getattr(torch._C, "_current_autograd_node", None)
    return None if current is None or torch.compiler.is_compiling() else current()


def nodes_made() -> int:
    """How many autograd nodes this thread has made."""
    count = getattr(torch.autograd, "_get_sequence_nr", None)
    return 0 if count is None else int(count())


def made_as(node: Any) -> int:
    """The number of autograd nodes made before ``node``."""
    number = getattr(node, "_sequence_nr", None)
    return 0 if number is None else int(number())


@functools.lru_cache(maxsize=1024)
def operator_arguments(operation: Any) -> tuple[tuple[str, bool], ...]:
    """The arguments of an ATen operator in order: their names, and whether it writes to them."""
    return tuple((argument.name, bool(argument.is_write)) for argument in operation._schema.arguments)


def saved_tensors_go_elsewhere() -> bool:
    """Whether autograd hands the tensors that it saves to somebody's hooks, as in a checkpointed part of a
    model."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", _hooks_are_there)
    return top(False) is not None


def _hooks_are_there(_: bool) -> bool | None:
    # PyTorch 2.6 does not show the hooks, but refuses to forbid them where there are some.
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("never seen"):
            return None
    except RuntimeError:
        return True


def modes_running() -> tuple[int, int] | None:
    """How many modes of this thread watch operations, and how many watch functions.

    None where that is unknown, where ``outside_modes`` has no effect, and while a transform of torch.func
    runs.
    """
    names = ("_len_torch_dispatch_stack", "_len_torch_function_stack", "_are_functorch_transforms_active")
    operations, functions, transforming = (getattr(torch._C, name, None) for name in names)
    if operations is None or functions is None or transforming is None or None in _guards() or transforming():
        return None
    return operations(), functions()


def _guards() -> tuple[Any, Any]:
    return getattr(torch._C, "DisableTorchFunction", None), getattr(torch._C, "_DisableTorchDispatch", None)


class outside_modes:
    """A context manager inside of which no mode sees operations or functions; without effect if unknown."""

    def __enter__(self) -> None:
        self._guards = [kind() for kind in _guards() if kind is not None]
        for guard in self._guards:
            guard.__enter__()

    def __exit__(self, *error: Any) -> None:
        for guard in reversed(self._guards):
            guard.__exit__(*error)


class _Place(NamedTuple):
    idx: int
    root_idx: int


def pruning_places(filters: int) -> list[Any]:
    """torch-pruning's indices of a convolution's channels: ``idx`` in a layer, ``root_idx`` the filter."""
    from torch_pruning import _helpers

    kind: Any = getattr(_helpers, "_HybridIndex", _Place)
    return [kind(idx=i, root_idx=i) for i in range(filters)]


def pruning_stride(mapping: Any) -> int:
    """How many places one channel becomes behind a torch-pruning index mapping (a flatten); 1 if unknown."""
    return int(getattr(mapping, "_stride", 1))


def pruning_operation(module: Any) -> str:
    """The name of the autograd operation that a torch-pruning node stands for; empty if unknown."""
    return str(getattr(module, "_grad_fn", ""))
