"""Which layers read which channels, confirmed by forward passes on a copy; the model is not touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.log import gave_up
from regrow.looking.calls import PassFailed, call, floating, mapped, undisturbed
from regrow.looking.copies import NotCopied, copied
from regrow.looking.small_inputs import Way, idle_way, shrunk, smaller_picture, watched
from regrow.modules import Convolution, unwrap
from regrow.structure.confirm import confirm, rule_out
from regrow.structure.graph import Graph, LostCount
from regrow.structure.norms import NormFinder
from regrow.structure.readers import Readers, Reads


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
    return propose_structure(model, example_inputs).confirmed()


@dataclass(frozen=True)
class Proposal:
    """What torch-pruning's graph says of a model, which nothing has confirmed yet.

    Attributes:
        model: the model, which is not touched.
        probe: a copy of it, in evaluation mode, for the first caller that needs one.
        example_inputs: what the model takes; of large pictures two at most.
        small: the same, shrunk; None where there is nothing to shrink. The model may fail on them.
        way: the way that ``example_inputs`` take.
        readers: {qualified name: readers}, as ``read_structure`` gives them.
    """

    model: nn.Module
    probe: nn.Module
    example_inputs: Any
    small: Tensor | None
    way: Way
    readers: dict[str, Readers]

    def confirmed(self) -> dict[str, Readers]:
        """The readers without claims that forward passes contradict; they are changed in place."""
        probe = copied(self.model).eval()
        with undisturbed(probe), torch.no_grad():
            confirm(probe, smaller_picture(probe, self.example_inputs, self.way), self.readers)
        return self.readers


def propose_structure(model: nn.Module, example_inputs: Any) -> Proposal:
    """The first half of ``read_structure``: a single forward pass, and what the graph makes of it.

    Raises:
        ValueError: as ``read_structure``.
    """
    model = unwrap(model)
    try:
        probe = copied(model, requires_grad=True).eval()
    except NotCopied as error:
        raise ValueError(
            f"{error}. Build regrow's objects before a forward pass leaves tensors with a gradient on the "
            "model, and take weight_norm from torch.nn.utils.parametrizations."
        ) from error
    # Autograd takes no tensor that was made under torch.inference_mode.
    example_inputs = mapped(example_inputs, lambda x: x.clone() if x.is_inference() else x)
    with undisturbed(probe), torch.enable_grad():
        small = shrunk(example_inputs)
        if small is not None:
            example_inputs = example_inputs[: len(small)]
        tracing = _Tracing(probe)
        if small is None or not tracing.run_small(example_inputs, small):
            tracing.run(example_inputs)
    modules: dict[str, Any] = dict(probe.named_modules())
    readers = {}
    for name, norms in tracing.behind().items():
        conv = modules[name]
        found = None if tracing.graph is None else tracing.graph.readers(conv)
        if found is None:
            reason = tracing.reason or "torch-pruning could not follow its channels"
            filters = range(conv.out_channels)
            found = Readers(
                norms={norm: Reads(filters, filters) for norm in norms}, mixed=reason, blocked=reason
            )
        readers[name] = found
    if tracing.graph is not None:
        tracing.graph.close()
    rule_out(probe, readers)
    return Proposal(model, probe, example_inputs, small, tracing.way, readers)


class _Tracing:
    """One forward pass of a probe, by which torch-pruning builds its graph.

    Attributes:
        graph: None where torch-pruning could not trace the model.
        reason: why it could not.
        way: the way that the pass took.
    """

    def __init__(self, probe: nn.Module) -> None:
        self._probe = probe
        self.graph: Graph | None = None
        self.reason = ""
        self.way: Way = []
        self._norms = NormFinder()
        self._done = False

    def run(self, example_inputs: Any) -> None:
        """Trace the probe. ``ValueError`` if its forward pass fails."""
        try:
            self.graph = Graph(self._probe, example_inputs, self._outputs)
        except LostCount as error:
            gave_up("the graph", error)
            self.graph, self.reason = None, str(error)
            if not self._done:
                self._pass(self._probe, example_inputs)

    def run_small(self, example_inputs: Tensor, small: Tensor) -> bool:
        """``run`` with the ``small`` pictures; whether they take the way that the large ones do."""
        try:
            known = idle_way(self._probe, example_inputs)
            self.run(small)
        except PassFailed as error:  # a model of one size, or a failure that large pictures bring about too
            gave_up("smaller pictures", error)
            return False
        return self.way == known

    def behind(self) -> dict[str, list[str]]:
        """{convolution: the norms behind it}, in order of execution."""
        modules = dict(self._probe.named_modules())
        found = self._norms.behind()
        return {name: norms for name, norms in found.items() if isinstance(modules[name], Convolution)}

    def _outputs(self, model: nn.Module, inputs: Any) -> list[Tensor]:
        return [tensor for tensor in floating(self._pass(model, inputs)) if tensor.requires_grad]

    def _pass(self, model: nn.Module, inputs: Any) -> Any:
        self._norms, self._done = NormFinder(), False
        try:
            with watched(self._probe, self._norms.note) as self.way:
                output = call(model, inputs)
        except PassFailed as error:
            raise PassFailed(
                f"the model's forward pass fails on example_inputs: {error.__cause__}. Pass what the model "
                "takes, for example one batch of your loader, x[:1]; a tuple for several arguments, a dict "
                "for keywords."
            ) from error.__cause__
        self._done = True
        return output
