"""Forward passes: what a model takes and returns, in any containers, and what a pass leaves unchanged."""

from __future__ import annotations

import copy
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import islice
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from regrow.log import first_line
from regrow.looking.dropout import NoDropout
from regrow.looking.precision import full_precision
from regrow.modules import device_of
from regrow.torch_private import set_grad_enabled, tree_map

# What is not searched for tensors: an output may refer to the model itself.
_PLAIN = (nn.Module, type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, str, bytes, int, float)
_MOST = 10_000  # items of a generator


class PassFailed(ValueError):
    """A model's own code raised an error in a forward pass; ``__cause__`` is that error."""


def call(model: nn.Module, example_inputs: Any) -> Any:
    """``model`` applied to a tensor, to a tuple or list of arguments, or to a dict of keywords.

    Raises:
        PassFailed: the model raised an error, of whatever kind.
    """
    # Autocast keeps copies of weights until its outermost block ends, and would not see that they changed.
    torch.clear_autocast_cache()
    try:
        if isinstance(example_inputs, Mapping):
            return _settled(model(**example_inputs))
        if isinstance(example_inputs, tuple | list):
            return _settled(model(*example_inputs))
        return _settled(model(example_inputs))
    except Exception as error:  # the user's code may raise anything
        raise PassFailed(f"the model's forward pass fails: {first_line(error)}") from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode, without compiled code; afterwards every module is back in its mode.

    Code compiled before knows nothing of the hooks that are put on a model for a while.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # Without torch._dynamo nothing has been compiled, and importing it takes seconds.
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def switch(model: nn.Module, training: bool) -> nn.Module:
    """``model.train(training)``, in a third of the time; returns ``model``."""
    modules = list(model.modules())
    kinds: set[Any] = set(map(type, modules))
    if all(map(_switches_plainly, kinds)) and all("training" in vars(module) for module in modules):
        for module in modules:
            vars(module)["training"] = training
        return model
    return model.train() if training else model.eval()


@functools.lru_cache(maxsize=1024)
def _switches_plainly(kind: Any) -> bool:
    """Whether a class does no more in ``train`` and ``eval`` than PyTorch's modules do."""
    return all(
        getattr(kind, name) is getattr(nn.Module, name)
        for name in ("train", "eval", "__setattr__", "children")
    )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The random generators continue afterwards as if nothing had run; autocast is off, and computes in
    float32 where the model's own code opens it."""
    device = device_of(model)
    # Beside weights in half precision, numbers in float32 would have no partner of their type.
    whole = any(parameter.dtype == torch.float32 for parameter in model.parameters())
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
        full_precision(device.type) if whole else nullcontext(),
    ):
        yield


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers, such as running statistics, have their former values afterwards."""
    written = torch.is_inference_mode_enabled()  # nothing else writes to tensors that were made there
    saved = [(buffer, buffer.clone()) for buffer in model.buffers() if written or not buffer.is_inference()]
    try:
        yield
    finally:
        for buffer, values in saved:
            buffer.copy_(values)


def run(model: nn.Module, inputs: Any, training: bool, dropout: NoDropout | None = None) -> tuple[Any, bool]:
    """One pass that comes out the same each time: from a fixed seed, without gradients.

    Args:
        dropout: switched on for a pass in train mode.

    Returns:
        The model's output, and whether the model drew random numbers (True where that cannot be seen).

    Raises:
        PassFailed: the model raised an error.
    """
    with undisturbed(model), torch.no_grad(), dropout if training and dropout else nullcontext():
        # torch.manual_seed would reset the generators of every GPU, which ``undisturbed`` does not restore.
        (torch.default_generator if device_of(model).type == "cpu" else torch).manual_seed(0)
        if model.training != training:
            switch(model, training)
        begun = _random_state(model)
        output = call(model, copy.deepcopy(inputs))
        ended = _random_state(model)
        return output, begun is None or ended is None or not torch.equal(begun, ended)


def _random_state(model: nn.Module) -> Tensor | None:
    """The state of the generators that the model's layers draw from; None on any device but CPU and CUDA."""
    device = device_of(model)
    if device.type == "cuda":
        return torch.cat([torch.get_rng_state(), torch.cuda.get_rng_state(device)])
    return torch.get_rng_state() if device.type == "cpu" else None


def floating(output: Any) -> list[Tensor]:
    """The floating-point tensors in a nested output, in order; sparse ones made dense."""
    found = [
        part for tensor in tensors(output) for part in (tensor.unbind() if tensor.is_nested else [tensor])
    ]
    numbers = [tensor for tensor in found if tensor.is_floating_point()]
    return [tensor if tensor.layout is torch.strided else tensor.to_dense() for tensor in numbers]


def tensors(output: Any) -> list[Tensor]:
    """The tensors in an output: in containers, and in the attributes of objects that are no modules."""
    found: list[Tensor] = []
    seen: set[int] = set()
    ahead: list[Any] = [output]  # the next one last; a function that calls itself would hold all it found
    while ahead:
        value = ahead.pop()
        if isinstance(value, Tensor):
            found.append(value)
            continue
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            parts = list(value.values())
        elif isinstance(value, tuple | list | set | frozenset):
            parts = list(value)
        else:
            slots = [slot for base in type(value).__mro__ for slot in vars(base).get("__slots__", ())]
            parts = [
                *getattr(value, "__dict__", {}).values(),
                *(getattr(value, slot, None) for slot in slots),
            ]
        ahead += reversed(parts)
    return found


def _settled(output: Any) -> Any:
    """An output with its generators run to their end: until then they have not computed anything."""
    if isinstance(output, Iterator):
        return [_settled(part) for part in islice(output, _MOST)]
    if type(output) in (list, tuple):
        return type(output)(map(_settled, output))
    if type(output) is dict:
        return {key: _settled(value) for key, value in output.items()}
    return output


class GradientKept(TorchFunctionMode):
    """While it lasts, the model's own code cannot switch gradients on or off (but for inference mode)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if func is set_grad_enabled else func(*args, **(kwargs or {}))


_open = threading.RLock()


@contextmanager
def checkpoints_open() -> Iterator[None]:
    """While it lasts, parts checkpointed by ``use_reentrant=True`` run as the rest of a model does.

    Autograd has one node for such a part, which hides the operations inside from whoever reads its graph. The
    parts of models in other threads run so too, and keep their tensors, if their pass begins meanwhile.
    """
    with _open:
        before = vars(CheckpointFunction).get("apply")
        CheckpointFunction.apply = staticmethod(lambda part, _preserve, *inputs: part(*inputs))
        try:
            yield
        finally:
            if before is None:
                del CheckpointFunction.apply
            else:
                CheckpointFunction.apply = before


def mapped(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``inputs`` with every floating-point tensor in it replaced by what ``change`` returns for it."""

    def each(leaf: Any) -> Any:
        return change(leaf.detach()) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return tree_map(each, dict(inputs) if isinstance(inputs, Mapping) else inputs)
