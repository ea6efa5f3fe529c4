"""Which layers read which channels: the one adapter to torch-pruning's dependency graph.

The graph takes every operation it does not know for an element-wise one, so what it says is a proposal:
``read_structure`` gives it out only after forward passes with silenced and with scrambled filters have
confirmed it. All of it happens on a copy; the model is not touched.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.filters import convolutions, unwrap
from regrow.readers import Consumer, Norm, Readers, Reads, column_mask, silence
from regrow.shrinking import smaller_picture

# Steps per filter; in DenseNet-201, where each channel has hundreds of readers, it takes 1500.
_LONGEST_WALK, _LEAST_WALK = 6000, 400
_SUMS = ("AddBackward", "SubBackward", "AddcmulBackward")


def call(model: nn.Module, example_inputs: Any) -> Any:
    """``model`` applied to a tensor, to a tuple or list of arguments, or to a dict of keywords."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, tuple | list):
        return model(*example_inputs)
    return model(example_inputs)


def read_structure(model: nn.Module, example_inputs: Any) -> dict[str, Readers]:
    """Find what reads the channels of each convolution that ``example_inputs`` reach.

    Args:
        model: any module; wrappers are looked through.
        example_inputs: what ``model`` takes: a tensor, a tuple of arguments or a dict of keywords; one
            picture is enough.

    Returns:
        {qualified name: readers}, in the order the forward pass reaches the convolutions.

    Raises:
        ValueError: the model cannot be copied, or its forward pass fails on ``example_inputs``.
    """
    try:
        probe = copy.deepcopy(unwrap(model)).eval().requires_grad_(True)
    except Exception as error:
        raise ValueError(
            f"the model cannot be copied to read its structure ({error}). Build regrow's objects before a "
            "forward pass leaves tensors with a gradient on the model, and take weight_norm from "
            "torch.nn.utils.parametrizations."
        ) from error
    device = next((p.device for p in probe.parameters()), torch.device("cpu"))
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.enable_grad(),
        # Autocast remembers its copies of the weights, and would not see what is silenced here.
        torch.autocast(device.type, enabled=False),
    ):
        example_inputs = smaller_picture(probe, example_inputs)
        order, behind = _direct_norms(probe, example_inputs)
        readers = {}
        names = {module: name for name, module in probe.named_modules()}
        graph, reason = None, ""
        try:
            graph = _trace(probe, example_inputs)
        except Exception as error:  # torch-pruning raises whatever it stumbled over
            reason = f"torch-pruning could not trace the model ({type(error).__name__})"
        patience = _Patience()
        for name in order:
            conv = probe.get_submodule(name)
            found = None if graph is None else _walked(graph, conv, names, patience)
            if found is None:
                reason = reason or "torch-pruning could not follow its channels"
                filters = list(range(convolutions(probe)[name].out_channels))
                norms = {norm: Reads(filters, filters) for norm in behind[name]}
                found = Readers(norms=norms, mixed=reason, blocked=reason)
            readers[name] = found
        with torch.no_grad():
            _confirm(probe, example_inputs, readers)
    return readers


def _direct_norms(probe: nn.Module, example_inputs: Any) -> tuple[list[str], dict[str, list[str]]]:
    """Convolutions in order of execution, and the norms whose input is a convolution's own output."""
    produced: dict[int, tuple[str, Tensor]] = {}
    behind: dict[str, list[str]] = {}

    def made(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            behind.setdefault(name, [])
            produced[id(output)] = (name, output)  # holding the tensor keeps its id from being used again

        return hook

    def read(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: Any) -> None:
            if inputs and id(inputs[0]) in produced:
                behind[produced[id(inputs[0])][0]].append(name)

        return hook

    handles = [conv.register_forward_hook(made(name)) for name, conv in convolutions(probe).items()]
    handles += [
        module.register_forward_pre_hook(read(name))
        for name, module in probe.named_modules()
        if isinstance(module, Norm)
    ]
    try:
        call(probe, example_inputs)
    except Exception as error:
        raise ValueError(
            f"the model's forward pass fails on example_inputs: {error}. Pass what the model takes, for "
            "example one batch of your loader, x[:1]; a tuple for several arguments, a dict for keywords."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return list(behind), behind


def _trace(probe: nn.Module, example_inputs: Any) -> Any:
    import torch_pruning  # it imports timm and torchvision where they are installed: seconds

    def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
        return [tensor for tensor in floating(call(model, inputs)) if tensor.requires_grad]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch_pruning.DependencyGraph().build_dependency(
            probe, example_inputs=example_inputs, forward_fn=outputs, verbose=False
        )


class _Patience:
    """How many steps per filter a walk over the graph may take.

    An operation that multiplies indices makes some walks endless, and others of the model mostly lead to
    it too: after each that took all its steps, those that follow get fewer.
    """

    def __init__(self) -> None:
        self.steps = _LONGEST_WALK

    def lose(self) -> None:
        self.steps = max(self.steps // 4, _LEAST_WALK)


def _walked(graph: Any, conv: Any, names: Mapping[nn.Module, str], patience: _Patience) -> Readers | None:
    """``_walk``, or None where torch-pruning stumbles or loses count of the channels."""
    readers = Readers()
    try:
        _walk(graph, conv, names, readers, patience)
    except Exception:  # torch-pruning raises whatever it stumbled over
        return None
    return readers


def _channels(module: Any) -> float:
    """How many channels a layer reads; without limit for one that takes any number."""
    if isinstance(module, nn.PReLU):
        return module.num_parameters if module.num_parameters > 1 else math.inf
    counts = ("in_features", "in_channels", "num_features", "num_channels")
    known = next((vars(module)[count] for count in counts if count in vars(module)), None)
    weight = getattr(module, "weight", None)
    return known if known is not None else math.inf if weight is None else len(weight)


def _walk(
    graph: Any, conv: Any, names: Mapping[nn.Module, str], readers: Readers, patience: _Patience
) -> None:
    """Follow a convolution's channels forward until something multiplies them by weights or adds to them."""
    from torch_pruning._helpers import _HybridIndex

    if conv not in graph.module2node:
        readers.mixed = readers.blocked = "its output does not reach the network's"
        return
    start = graph.module2node[conv]
    readers.norm_first = bool(start.outputs) and all(_hides(node.module) for node in start.outputs)
    stack = [(start, [_HybridIndex(idx=i, root_idx=i) for i in range(conv.weight.shape[0])])]
    sums: list[tuple[Any, list[Any]]] = []
    for node, indices in _visits(stack, len(conv.weight), patience):
        if not node.outputs:
            readers.output = True
            readers.mixed = readers.mixed or "it is part of the network's output"
            readers.blocked = readers.blocked or readers.mixed
        for target_node, mapped in _steps(node, indices):
            target = target_node.module
            if isinstance(target, Norm | Consumer):
                _note(readers.norms if isinstance(target, Norm) else readers.consumers, target, mapped, names)
                if isinstance(target, Norm) and not per_channel(target):
                    readers.mixed = readers.mixed or f"{names[target]!r} normalises several channels together"
            elif _weighs(target, names):
                readers.mixed = readers.mixed or f"it is read by a {type(target).__name__}"
            elif len(target_node.inputs) > 1 and str(getattr(target, "_grad_fn", "")).startswith(_SUMS):
                readers.mixed = readers.mixed or "it is added to other channels"
                sums.append((target_node, mapped))
                continue
            if _reach(readers, target, mapped, names):
                stack.append((target_node, mapped))
    try:
        for node, indices in _visits(sums, len(conv.weight), patience):
            if not node.outputs:
                readers.blocked = readers.blocked or "it is part of the network's output"
            sums += [
                (target, mapped)
                for target, mapped in _steps(node, indices)
                if _reach(readers, target.module, mapped, names)
            ]
    except Exception:  # torch-pruning raises whatever it stumbled over
        readers.reached, readers.blocked = {}, "torch-pruning could not follow its channels"


def _visits(
    stack: list[tuple[Any, list[Any]]], filters: int, patience: _Patience
) -> Iterator[tuple[Any, list[Any]]]:
    """What is on ``stack``, to which the caller adds, each channel of each node once."""
    visited: dict[int, set[Any]] = {}
    left = patience.steps * filters
    while stack:
        node, indices = stack.pop()
        seen = visited.setdefault(id(node), set())
        # Channel by channel: the ways through splits and sums are more than can be walked one by one.
        fresh = [index for index in dict.fromkeys(indices) if index not in seen]
        if fresh or not indices:
            seen.update(fresh)
            left -= len(fresh)
            if left < 0:
                patience.lose()
                raise ValueError("torch-pruning has lost count of the channels: there is no end of them")
            yield node, fresh


def _steps(node: Any, indices: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """The nodes that read ``node``, each with the places where it reads ``indices``."""
    for edge in node.dependencies:
        if edge.source is not node or not any(edge.target is output for output in node.outputs):
            continue
        mapped = indices
        for mapping in edge.index_mapping:
            mapped = mapped if mapping is None else mapping(mapped)
        if mapped:
            yield edge.target, mapped


def _note(found: dict[str, Reads], layer: Any, mapped: list[Any], names: Mapping[nn.Module, str]) -> None:
    if max(index.idx for index in mapped) >= _channels(layer):
        # A split into uneven parts, a tensor that is folded.
        raise ValueError(f"torch-pruning has lost count of the channels that {names[layer]!r} reads")
    entry = found.setdefault(names[layer], Reads())
    entry.filters += [index.root_idx for index in mapped]
    entry.indices += [index.idx for index in mapped]


def _weighs(target: Any, names: Mapping[nn.Module, str]) -> bool:
    """Whether something that is neither norm nor consumer has weights that meet the channels."""
    known = isinstance(target, Norm | Consumer | nn.PReLU)
    return isinstance(target, nn.Parameter) or (
        target in names and not known and any(True for _ in target.parameters())
    )


def _reach(readers: Readers, target: Any, mapped: list[Any], names: Mapping[nn.Module, str]) -> bool:
    """Note that the channels reach ``target``; whether they go on behind it."""
    if isinstance(target, Norm | Consumer | nn.PReLU):
        _note(readers.reached, target, mapped, names)
    if isinstance(target, Norm) and not per_channel(target):
        readers.blocked = readers.blocked or f"{names[target]!r} normalises several channels together"
    if _weighs(target, names):
        readers.blocked = readers.blocked or f"they are read by a {type(target).__name__}"
        return False
    return not isinstance(target, Consumer)


def per_channel(norm: nn.Module) -> bool:
    """Whether a norm's output in one channel depends on that channel alone."""
    return not isinstance(norm, nn.LayerNorm) and (
        not isinstance(norm, nn.GroupNorm) or norm.num_groups == norm.num_channels
    )


def _hides(module: Any) -> bool:
    """Whether a weight of 0 in this module hides a channel from everything behind it."""
    return isinstance(module, Norm) and per_channel(module) and module.weight is not None


def _revives(norm: Any) -> bool:
    """Whether a norm turns a channel of 0 into something else and has no weight to prevent it."""
    return not per_channel(norm) and norm.weight is None


def _confirm(probe: nn.Module, example_inputs: Any, readers: Mapping[str, Readers]) -> None:
    """Take back whatever forward passes on ``probe`` (which is changed for good) contradict."""
    generator = torch.Generator().manual_seed(0)
    unsettle(probe, generator)
    some, rest = {}, {}
    for name in readers:
        order = torch.randperm(convolutions(probe)[name].out_channels, generator=generator).tolist()
        some[name], rest[name] = order[: max(1, len(order) // 2)], order[max(1, len(order) // 2) :]
    state = copy.deepcopy(probe.state_dict())
    tied = tied_modules(probe)

    while True:
        loud = set()
        # Silenced together, layers that share a reader could hide each other's mistakes.
        for group in _apart(readers):
            for dropped in (some, rest):
                loud |= _loud(probe, example_inputs, {name: readers[name] for name in group}, dropped)
                probe.load_state_dict(state)
        lost = [(name, reader) for name, reader in loud if reader in readers[name].norms]
        for name, found in readers.items():
            lost += [(name, n) for n in found.norms if n in tied or _revives(probe.get_submodule(n))]
        if not lost:
            break
        for name, norm in lost:  # without it other readers may see something: look again
            readers[name].norms.pop(norm, None)
            readers[name].unsilenced, readers[name].norm_first = norm, False
    for name, found in readers.items():
        for consumer in found.consumers:
            if consumer in tied:
                found.mixed = found.mixed or f"{consumer!r} shares its weight with another layer"
            elif (name, consumer) in loud:
                found.mixed = found.mixed or f"a silenced channel does not reach {consumer!r} as 0"

    hidden = [name for name, found in readers.items() if not found.mixed]
    for group in [hidden, *([name] for name in hidden)]:
        moved = _moves(probe, example_inputs, readers, {name: some[name] for name in group})
        probe.load_state_dict(state)
        if not moved and group is hidden:
            break
        if moved and group is not hidden:
            readers[group[0]].mixed = "forward passes did not confirm which layers read it"


def tied_modules(probe: nn.Module) -> set[str]:
    """The modules that hold a parameter which another module holds too."""
    holders: dict[nn.Parameter, list[str]] = {}
    for name, module in probe.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, []).append(name)
    return {name for names in holders.values() if len(names) > 1 for name in names}


def _apart(readers: Mapping[str, Readers]) -> list[list[str]]:
    """The convolutions in groups, in each of which no two have an index of a reader in common."""
    groups: list[tuple[list[str], set[tuple[str, int]]]] = []
    for name, found in readers.items():
        both = [*found.norms.items(), *found.consumers.items()]
        used = {(reader, index) for reader, reads in both for index in reads.indices}
        for names, taken in groups:
            if taken.isdisjoint(used):
                names.append(name)
                taken.update(used)
                break
        else:
            groups.append(([name], used))
    return [names for names, _ in groups]


def unsettle(probe: nn.Module, generator: torch.Generator) -> None:
    """Give tensors values at which a mistake shows: a fresh norm, or a scale of 0, passes 0 on as 0."""

    def uniform(tensor: Tensor | None, low: float, high: float) -> None:
        if tensor is not None:
            tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    for tensor in [*probe.parameters(), *probe.buffers()]:
        if tensor.is_floating_point() and tensor.numel() and bool((tensor == tensor.flatten()[0]).all()):
            uniform(tensor, 0.5, 1.5)
    for module in probe.modules():
        if isinstance(module, Norm):
            uniform(module.weight, 0.5, 1.5)
            uniform(module.bias, 0.2, 0.5)
            uniform(getattr(module, "running_mean", None), -0.1, 0.1)
            uniform(getattr(module, "running_var", None), 0.5, 1.5)
        elif isinstance(module, Consumer):
            uniform(module.bias, -0.1, 0.1)


def _loud(
    probe: nn.Module,
    example_inputs: Any,
    readers: Mapping[str, Readers],
    dropped: Mapping[str, Sequence[int]],
) -> set[tuple[str, str]]:
    """Silence ``dropped`` on ``probe`` and find the (convolution, reader) pairs where a silenced channel is
    not 0: where it reaches the reader, and for a norm where it leaves it too."""
    for name, found in readers.items():
        silence(probe, name, found, dropped[name])
    loud = set()

    def watch(name: str, reader: str, indices: list[int]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            seen = [*inputs[:1], output] if isinstance(module, Norm) else [*inputs[:1]]
            if not inputs or not any(
                all(_is_silent(tensor, dim, indices) for tensor in seen)
                for dim in _channel_dims(module, inputs[0])
            ):
                loud.add((name, reader))

        return hook

    handles = []
    for name, found in readers.items():
        for reader, reads in [*found.norms.items(), *found.consumers.items()]:
            if indices := reads.of(dropped[name]):
                module = probe.get_submodule(reader)
                handles.append(module.register_forward_hook(watch(name, reader, indices)))
    try:
        call(probe, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return loud


def _channel_dims(module: nn.Module, seen: Tensor) -> list[int]:
    """Where ``module`` may expect the channels of its input: layer norms come in two layouts."""
    if isinstance(module, nn.Linear):
        return [seen.dim() - 1]
    if isinstance(module, nn.LayerNorm):
        return [seen.dim() - 1, 1]
    if isinstance(module, Consumer):
        return [seen.dim() - module.weight.dim() + 1]
    return [1]


def _is_silent(tensor: Tensor, dim: int, indices: list[int]) -> bool:
    if dim >= tensor.dim() or max(indices) >= tensor.shape[dim]:
        return False
    return not tensor.index_select(dim, torch.tensor(indices, device=tensor.device)).any()


def _moves(
    probe: nn.Module,
    example_inputs: Any,
    readers: Mapping[str, Readers],
    dropped: Mapping[str, Sequence[int]],
) -> bool:
    """Whether scrambling the channels ``dropped`` moves the output though their columns are zeroed."""
    for name, indices in dropped.items():
        for consumer, reads in readers[name].consumers.items():
            layer: Any = probe.get_submodule(consumer)
            layer.weight[column_mask(layer, reads.of(indices))] = 0
    before = floating(call(probe, example_inputs))
    generator = torch.Generator().manual_seed(1)

    def scramble(indices: Sequence[int]) -> Callable[..., Tensor]:
        def hook(module: Any, _inputs: Any, output: Tensor) -> Tensor:
            dim = output.dim() - module.weight.dim() + 1
            noise = torch.randn(output.shape, generator=generator).to(output)
            index = torch.tensor(indices, device=output.device)
            return output.index_copy(dim, index, noise.index_select(dim, index))

        return hook

    handles = [probe.get_submodule(n).register_forward_hook(scramble(i)) for n, i in dropped.items()]
    try:
        after = floating(call(probe, example_inputs))
    finally:
        for handle in handles:
            handle.remove()
    return not all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max() if a.numel() else 0))
        for a, b in zip(before, after, strict=True)
    )


def floating(output: Any) -> list[Tensor]:
    """The floating tensors in a nested output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, tuple | list):
        return [tensor for part in output for tensor in floating(part)]
    return []
