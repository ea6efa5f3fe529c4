"""A model taken apart: its pass as a list of operations, their results, and what depends on what."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.utils.fusion import fuse_conv_bn_eval

from regrow.log import first_line
from regrow.modules import CHANNEL_LAYERS, filter_dim, is_stock

_IN_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}  # fmt: skip
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_SHAPES = ("size", "dim", "numel", "ndimension", "stride", "device", "dtype")


class NotTakenApart(ValueError):
    """The pass of a model, or what follows a layer in it, cannot be repeated operation by operation."""


class Parts:
    """The operations of a model in evaluation mode, with norms folded into the convolutions ahead of them.

    Args:
        model: a copy that nobody else uses, in evaluation mode; it is changed.
        silenced: {convolution: the norms that are silenced with its filters}. Only these norms are folded.

    Raises:
        NotTakenApart: torch.fx cannot trace the model, as where an ``if`` asks for the values of a tensor, or
            the model writes to tensors that are used again.
    """

    def __init__(self, model: nn.Module, silenced: Mapping[str, Iterable[str]]) -> None:
        try:
            graph = _Tracer().trace(model)
        except Exception as error:  # the user's code may raise anything
            raise NotTakenApart(f"its pass cannot be traced: {first_line(error)}") from error
        self.modules: dict[str, Any] = dict(model.named_modules())
        self._model = model
        _without_writes(graph, self.modules)
        _fold(graph, self.modules, silenced)
        self.nodes = list(graph.nodes)
        self._numbers = _shape_numbers(self.nodes)

    def module(self, node: fx.Node) -> Any:
        """The layer that ``node`` calls; None for a function or a method."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def calls_of(self, layer: str) -> list[fx.Node]:
        """The calls of a layer, by qualified name, in order."""
        return [node for node in self.nodes if node.op == "call_module" and node.target == layer]

    def values(self, inputs: Any) -> dict[fx.Node, Any]:
        """What every operation returns for ``inputs``: a tensor, a tuple of arguments or a dict of keywords.

        Raises:
            NotTakenApart: an operation fails, or ``inputs`` are not what the model takes.
        """
        given = iter(inputs if isinstance(inputs, tuple | list) else [inputs])
        found: dict[fx.Node, Any] = {}
        for node in self.nodes:
            if node.op == "placeholder":
                default = node.args[0] if node.args else None
                if isinstance(inputs, Mapping):
                    found[node] = inputs.get(str(node.target), default)
                else:
                    found[node] = next(given, default)
            else:
                found[node] = self.evaluate(node, found.__getitem__)
        return found

    def evaluate(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        """The result of one operation, whose arguments are the values of earlier ones.

        Raises:
            NotTakenApart: the operation fails.
        """
        args, kwargs = map_arg(node.args, value_of), map_arg(node.kwargs, value_of)
        target: Any = node.target
        try:
            if node.op == "call_module":
                return self.modules[target](*args, **kwargs)
            if node.op == "call_function":
                return target(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            if node.op == "get_attr":
                return functools.reduce(getattr, target.split("."), self._model)
        except Exception as error:  # layers of the user may raise anything
            raise NotTakenApart(f"the operation {node.name!r} fails: {first_line(error)}") from error
        return args[0]  # the output

    def numbers(self, node: fx.Node, clean: Mapping[fx.Node, Any], pictures: int, cases: int) -> Any:
        """The result of an operation on shapes, with ``cases`` in place of ``pictures``."""

        def value_of(other: fx.Node) -> Any:
            value = clean[other]
            if other in self._numbers:
                return self.numbers(other, clean, pictures, cases)
            if isinstance(value, Tensor) and value.dim() and len(value) == pictures:
                return value[:1].expand(cases, *value.shape[1:])
            return value

        return self.evaluate(node, value_of)

    def is_number(self, node: fx.Node) -> bool:
        """Whether the result of ``node`` is computed from the shapes of tensors alone."""
        return node in self._numbers

    def affected(self, first: Iterable[fx.Node]) -> list[fx.Node]:
        """The operations that depend on the values of ``first``, with these, in order; the output is last."""
        reached = set(first)
        for node in self.nodes:
            if not reached.isdisjoint(node.all_input_nodes) and node not in self._numbers:
                reached.add(node)
        return [node for node in self.nodes if node in reached]


class _Tracer(fx.Tracer):
    """Stops at layers whose channels regrow knows, the user's own kinds of them too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, CHANNEL_LAYERS) or super().is_leaf_module(m, module_qualified_name)


def _without_writes(graph: fx.Graph, modules: Mapping[str, Any]) -> None:
    """Have operations that write to their input make a new tensor.

    Raises:
        NotTakenApart: the input is used again afterwards, or there is no such operation.
    """
    order = {node: number for number, node in enumerate(graph.nodes)}
    writers = {module for module in modules.values() if getattr(module, "inplace", False) is True}
    for node in graph.nodes:
        if node.op == "call_module":
            wrote = modules[str(node.target)] in writers
        else:
            wrote = node.op in ("call_function", "call_method") and _made_plain(node)
        if wrote and any(order[user] > order[node] for user in node.all_input_nodes[0].users):
            raise NotTakenApart(f"the operation {node.name!r} writes to a tensor that is used again")
    for module in writers:
        module.inplace = False


def _made_plain(node: fx.Node) -> bool:
    """Whether a call of a function or method wrote to its input; if so, it does not any more."""
    target: Any = node.target
    name = target if isinstance(target, str) else str(getattr(target, "__name__", ""))
    if target is operator.setitem or node.kwargs.get("out") is not None:
        raise NotTakenApart(f"the operation {node.name!r} writes to a tensor")
    if target in _IN_PLACE:
        node.target = _IN_PLACE[target]
        return True
    if name.endswith("_") and not name.endswith("__"):
        home = Tensor if node.op == "call_method" else inspect.getmodule(target) or torch
        plain = getattr(home, name[:-1], None)
        if plain is None:
            raise NotTakenApart(f"the operation {node.name!r} writes to a tensor")
        node.target = name[:-1] if node.op == "call_method" else plain
        return True
    return _without_argument(node)


def _without_argument(node: fx.Node) -> bool:
    """Whether ``inplace=True`` was among the arguments of a call of a function, which has it False now."""
    try:
        place = list(inspect.signature(node.target).parameters).index("inplace")  # type: ignore[arg-type]
    except (ValueError, TypeError):  # no such argument, or a function without a signature
        return False
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
    elif len(node.args) > place and node.args[place]:
        node.args = (*node.args[:place], False, *node.args[place + 1 :])
    else:
        return False
    return True


def _fold(graph: fx.Graph, modules: dict[str, Any], silenced: Mapping[str, Iterable[str]]) -> None:
    """Fold norms into convolutions, where nothing else reads the convolution and both are called once."""
    calls: dict[Any, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[modules[node.target]] = calls.get(modules[node.target], 0) + 1
    for node in list(graph.nodes):
        source = (
            node.all_input_nodes[0] if node.op == "call_module" and len(node.all_input_nodes) == 1 else None
        )
        if source is None or source.op != "call_module" or len(source.users) > 1:
            continue
        norm, conv = modules[node.target], modules[str(source.target)]
        if type(norm) not in _NORMS or not is_stock(conv) or filter_dim(conv) or norm.running_mean is None:
            continue
        if calls[norm] == calls[conv] == 1 and node.target in silenced.get(str(source.target), ()):
            modules[str(source.target)] = fused = fuse_conv_bn_eval(conv, norm)
            calls[fused] = 1
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _shape_numbers(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The operations whose results are computed from the shapes of tensors alone."""
    found: set[fx.Node] = set()
    for node in nodes:
        asks = node.op == "call_method" and node.target in _SHAPES
        if node.op == "call_function" and node.target is getattr:
            asks = node.args[1] in ("shape", "ndim", *_SHAPES)
        others = node.all_input_nodes
        derived = node.op == "call_function" and bool(others) and found.issuperset(others)
        if asks or derived:
            found.add(node)
    return found
