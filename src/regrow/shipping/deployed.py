"""Modules around a network in use: numbers of one precision, and one launch for a whole pass on a GPU."""

from __future__ import annotations

import threading
from typing import Any, Self

import torch
from torch import Tensor, nn

from regrow.looking.calls import call, mapped, tensors
from regrow.modules import device_of
from regrow.torch_private import tree_flatten, tree_leaves, tree_map

_WARM_UP = 3


class Deployed(nn.Module):
    """A network in another precision or memory format that takes and gives what it did before.

    Args:
        network: in evaluation mode, already in its precision and format.
        dtype: of ``network``, into which floating-point inputs are cast; None leaves them as they are.
        given: of the outputs: those in ``dtype`` are cast into it.
        channels_last: whether pictures (four dimensions) are put into this memory format.
    """

    def __init__(
        self, network: nn.Module, dtype: torch.dtype | None, given: torch.dtype | None, channels_last: bool
    ) -> None:
        super().__init__()
        self.network = network
        self.channels_last = channels_last
        self._dtypes = (dtype, given)
        self.eval()

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(self._cast, (args, kwargs))
        return tree_map(self._back, self.network(*args, **kwargs))

    def _cast(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        dtype = leaf.dtype if self._dtypes[0] is None else self._dtypes[0]
        if self.channels_last and leaf.dim() == 4:
            return leaf.to(dtype, memory_format=torch.channels_last)
        return leaf.to(dtype)

    def _back(self, leaf: Any) -> Any:
        dtype, given = self._dtypes
        cast = isinstance(leaf, Tensor) and given is not None and leaf.dtype == dtype
        return leaf.to(given) if cast else leaf


class Graphed(nn.Module):
    """A network on a GPU that runs inputs of one shape as a captured CUDA graph, in one launch.

    Inputs of other shapes, and all inputs of a copy or of a network that was moved or cast, run operation by
    operation. Outputs are copies, so the next call leaves them alone.

    Args:
        network: its passes must be launches alone: no number may be read from the GPU.
        example_inputs: of the shape of the graph.

    Raises:
        ValueError: the network returns tensors in objects where they could not be copied.
        RuntimeError: a pass cannot be captured.
    """

    def __init__(self, network: nn.Module, example_inputs: Any) -> None:
        super().__init__()
        self.network = network
        self._graph: Any = None
        self._output: Any = None
        self._stream: Any = None
        # A pass writes to tensors that it shares with all others.
        self._lock = threading.Lock()
        self.eval()
        self._capture(example_inputs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        if self._graph is None or (spec, [_kind(leaf) for leaf in leaves]) != self._shape:
            return self.network(*args, **kwargs)
        with self._lock, torch.no_grad(), torch.cuda.device(self._device):
            here = torch.cuda.current_stream()
            if here != self._stream:
                here.wait_stream(self._stream)
                self._stream = here
            for mine, theirs in zip(self._inputs, leaves, strict=True):
                if isinstance(mine, Tensor):
                    mine.copy_(theirs)
            self._graph.replay()
            return tree_map(_copied, self._output)

    def _capture(self, example_inputs: Any) -> None:
        # Other numbers than the example's: whoever compares its outputs sees whether a call takes its inputs.
        example = tree_map(_copied, mapped(example_inputs, lambda leaf: leaf / 2))
        as_called = ((), example) if isinstance(example, dict) else (_positional(example), {})
        self._inputs, spec = tree_flatten(as_called)
        self._shape = spec, [_kind(leaf) for leaf in self._inputs]
        self._device = device_of(self.network)
        with torch.no_grad(), torch.cuda.device(self._device):
            self._stream, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(self._stream)
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UP):
                    output = call(self.network, example)
            self._stream.wait_stream(aside)
            known = {id(leaf) for leaf in tree_leaves(output)}
            if any(id(tensor) not in known for tensor in tensors(output)):
                raise ValueError(f"its output, of the class {type(output).__name__}, holds tensors unseen")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._output = call(self.network, example)
        self._graph = graph

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_graph": None, "_lock": None, "_stream": None, "_inputs": [], "_output": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.Lock()

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._graph = None  # it would go on reading the memory that held the parameters
        return super()._apply(*args, **kwargs)


def is_deployed(model: nn.Module) -> bool:
    """Whether ``deploy`` made ``model``."""
    return isinstance(model, Deployed | Graphed)


def _positional(example: Any) -> tuple[Any, ...]:
    return tuple(example) if isinstance(example, tuple | list) else (example,)


def _kind(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
