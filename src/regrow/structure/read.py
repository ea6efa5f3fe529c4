"""Which layers read which channels, confirmed by forward passes on a copy; the model is not touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.log import gave_up
from regrow.looking.calls import (
    GradientKept,
    PassFailed,
    call,
    checkpoints_open,
    floating,
    mapped,
    switch,
    undisturbed,
)
from regrow.looking.copies import NotCopied, copied
from regrow.looking.hooks import hooked
from regrow.looking.noise import noise_like
from regrow.looking.small_inputs import Way, smaller_picture, step
from regrow.modules import Convolution, channel_layers, channels_read, unwrap
from regrow.structure.confirm import confirm, rule_out
from regrow.structure.escapes import Followed, follow
from regrow.structure.graph import Graph, LostCount
from regrow.structure.mixing import has_mixers, rule_out_mixing
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
        example_inputs: its input; smaller pictures than the caller gave, where they take the same way.
        readers: {qualified name: readers}, as ``read_structure`` gives them.
    """

    model: nn.Module
    example_inputs: Any
    readers: dict[str, Readers]

    def confirmed(self) -> dict[str, Readers]:
        """The readers without claims that forward passes contradict; they are changed in place."""
        probe = copied(self.model).eval()
        with undisturbed(probe), torch.no_grad():
            confirm(probe, self.example_inputs, self.readers)
        return self.readers


def propose_structure(model: nn.Module, example_inputs: Any) -> Proposal:
    """The first half of ``read_structure``: a forward pass with a gradient, and what the graph makes of it.

    Raises:
        ValueError: as ``read_structure``.
    """
    model = unwrap(model)
    try:
        probe = switch(copied(model, requires_grad=True), False)
    except NotCopied as error:
        raise ValueError(
            f"{error}. Build regrow's objects before a forward pass leaves tensors with a gradient on the "
            "model, and take weight_norm from torch.nn.utils.parametrizations."
        ) from error
    # Autograd takes no tensor that was made under torch.inference_mode.
    example_inputs = mapped(example_inputs, lambda x: x.clone() if x.is_inference() else x)
    quiet = switch(copied(model, requires_grad=False), False)
    followed, seen_on = Followed(), None

    def look(_probe: nn.Module, pictures: Tensor) -> Way:
        nonlocal followed, seen_on
        found: Way = []

        def after(name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
            found.append(step(name, output))

        followed, seen_on = follow(quiet, pictures, after=after), pictures
        return found

    example_inputs = smaller_picture(probe, example_inputs, look)
    modules: dict[str, Any] = dict(probe.named_modules())
    norms, reason, graph, output = NormFinder(), "", None, None
    try:
        if example_inputs is not seen_on:
            followed = follow(quiet, example_inputs)
    except PassFailed as error:
        raise PassFailed(
            f"the model's forward pass fails on example_inputs: {error.__cause__}. Pass what the model "
            "takes, for example one batch of your loader, x[:1]; a tuple for several arguments, a dict for "
            "keywords."
        ) from error.__cause__

    def outputs(_model: nn.Module, _inputs: Any) -> list[Tensor]:
        nonlocal norms, output
        norms, ends = NormFinder(), []

        def after(name: str, module: nn.Module, inputs: Any, made: Tensor) -> None:
            norms.note(name, module, inputs, made)
            if name in followed.escapes:  # the model may return it without its gradient, or not at all
                ends.append(made)

        with hooked(channel_layers(probe), after), GradientKept(), checkpoints_open():
            output = call(probe, example_inputs)
        return [tensor for tensor in (*floating(output), *ends) if tensor.requires_grad]

    with undisturbed(probe), torch.enable_grad():
        try:
            graph = Graph(probe, example_inputs, outputs)
        except LostCount as error:
            gave_up("the graph", error)
            reason = str(error)
            if output is None:
                outputs(probe, example_inputs)
    readers = {}
    for name, behind in norms.behind().items():
        conv = modules[name]
        if not isinstance(conv, Convolution):
            continue
        found = None if graph is None else graph.readers(conv)
        if found is None or (graph is not None and not graph.has(conv)):
            lost = "torch-pruning could not follow its channels"
            why = reason or (lost if found is None else found.blocked)
            every = range(conv.out_channels)
            alike = [norm for norm in behind if channels_read(modules[norm]) == len(every)]
            found = Readers(norms={norm: Reads(every, every) for norm in alike}, mixed=why, blocked=why)
            found.unsilenced = next((norm for norm in behind if norm not in alike), "")
        readers[name] = found
    if graph is not None:
        graph.close()
    rule_out(probe, readers)
    if not followed.apart or has_mixers(model):
        rule_out_mixing(model, example_inputs, readers)
    for name, why in (_escapes_in_training(quiet, example_inputs) | followed.escapes).items():
        if name in readers:
            readers[name].output = why
    return Proposal(model, example_inputs, readers)


def _escapes_in_training(probe: nn.Module, example_inputs: Any) -> dict[str, str]:
    """What ``follow`` finds in train mode, in which a model may return more."""
    for inputs in (example_inputs, noise_like(example_inputs, 2)):  # norms may need two pictures to train
        try:
            return follow(probe, inputs, training=True).escapes
        except PassFailed as error:
            failure = error
    gave_up("looking for outputs in train mode", failure)  # a model that needs targets to train, say
    return {}
