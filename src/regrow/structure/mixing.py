"""Code between layers that lets a channel change other channels: passes find it, whatever its strength.

A norm over neighbouring channels, a softmax or a maximum over channels hold no weights, so torch-pruning's
graph takes them for element-wise operations. Here noise stands for the outputs of all weighted layers, and is
then drawn anew in some filters. Element-wise operations give the other channels again bit by bit, so the
smallest effect shows, and the size of the numbers in ``example_inputs`` plays no part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.filters import convolutions
from regrow.log import gave_up, log
from regrow.looking.calls import PassFailed, run
from regrow.looking.copies import copied, inputs_as
from regrow.looking.hooks import hooked, idle
from regrow.looking.noise import Stream, noise_values, unsettle
from regrow.modules import CONSUMER_CLASSES, channel_dim, device_of, is_stock
from regrow.structure.confirm import disjoint_groups
from regrow.structure.flows import Flows
from regrow.structure.readers import Readers
from regrow.torch_private import own_buffers, own_parameters

# Each channel that they make depends on several that they read, whatever the numbers are.
MIXERS = (nn.LocalResponseNorm, nn.CrossMapLRN2d, nn.Softmax2d)
_NONE = torch.zeros(0, dtype=torch.int64)


def has_mixers(model: nn.Module) -> bool:
    """Whether a layer of ``model`` is known to compute each channel from several."""
    return any(isinstance(module, MIXERS) for module in model.modules())


def rule_out_mixing(model: nn.Module, example_inputs: Any, readers: Mapping[str, Readers]) -> None:
    """Note in ``readers`` that channels change others on their way: they must stay in their places.

    Args:
        model: it is only read.
        readers: the graph's proposal; ``mixed`` and ``blocked`` of such convolutions then say where.
    """
    asked = [name for name, found in readers.items() if not found.blocked]
    if not asked:
        return
    precise = [] if device_of(model).type == "mps" else [torch.float64]  # a device without double precision
    for dtype in (*precise, None):
        try:
            mixed = _Passes(model, example_inputs, readers, dtype).mixed(asked)
            break
        except PassFailed as error:  # a type written into the model's code, or noise that it does not bear
            log.debug("mixing was not looked for in %s: %s", dtype, error)
            failure = error
    else:
        gave_up("looking for channels that change others", failure)
        return
    for name, why in mixed.items():
        readers[name].mixed = readers[name].mixed or why
        readers[name].blocked = why


class _Passes:
    """Passes of a copy of ``model`` in which noise stands for the outputs of weighted layers.

    Raises:
        PassFailed: the model's code does not bear noise, or numbers of type ``dtype``.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, readers: Mapping[str, Readers], dtype: torch.dtype | None
    ) -> None:
        self._model = _probe(model, dtype)
        # One picture will do; whatever else a model takes it is given whole.
        one = example_inputs[:1] if isinstance(example_inputs, Tensor) and dtype else example_inputs
        self._inputs = inputs_as(one, dtype)
        self._values = noise_values(6, True).to(dtype or torch.float32).to(device_of(self._model))
        self._flows = Flows(model, readers)
        kinds = (*CONSUMER_CLASSES, *MIXERS)
        self._layers = [each for each in self._model.named_modules() if isinstance(each[1], kinds)]
        self._thirds = _thirds(model)
        self._expected = self._reads({})
        self._steady: set[str] | None = None

    def mixed(self, names: Sequence[str]) -> dict[str, str]:
        """{convolution in ``names`` whose channels change others: what shows that}."""
        found: dict[str, set[str]] = {}
        for group in self._apart(names) if self._disturbed(names) else []:
            shown = self._disturbed(group)
            found |= {name: shown.intersection(self._flows.reached[name]) for name in group}
            if shown.difference(
                *(found[name] for name in group)
            ):  # the graph knows no way from here to there
                found |= {name: self._disturbed([name]) for name in group}
        return {name: self._why(shown) for name, shown in found.items() if shown}

    def _apart(self, names: Sequence[str]) -> list[list[str]]:
        """The convolutions in groups; no two convolutions of a group reach the same layer."""
        return disjoint_groups({name: set(self._flows.reached[name]) for name in names})

    def _why(self, shown: set[str]) -> str:
        mixers = [each for each in self._layers if isinstance(each[1], MIXERS) and each[0] in shown]
        if mixers:
            name, module = mixers[0]
            return f"{name!r}, a {type(module).__name__}, computes each channel from several"
        reader = next(name for name, _ in self._layers if name in shown)
        return f"its channels change others that {reader!r} reads"

    def _disturbed(self, names: Sequence[str]) -> set[str]:
        """The layers in which drawing filters of ``names`` anew changes channels that it should not."""
        found = set()
        for third in self._thirds:
            found |= self._changed({name: third[name] for name in names})
        if found and self._steady is None:
            # A model may compute something else from the same numbers, on a GPU for instance.
            self._steady = {name for name, _ in self._layers} - self._changed({})
        return found if self._steady is None else found & self._steady

    def _changed(self, drawn: Mapping[str, Tensor]) -> set[str]:
        """The layers whose input changes in channels that none of the filters ``drawn`` anew reaches."""
        emitted = torch.zeros(len(self._flows.owner), dtype=torch.bool)
        for name, filters in drawn.items():
            emitted[filters + self._flows.filters[name].start] = True
        arriving = self._flows.arriving(emitted)
        reached = {name: arriving[where] for name, where in self._flows.channels.items()}
        found = set()
        for (name, before), (other, after) in zip(self._expected, self._reads(drawn), strict=False):
            if name != other or before.shape != after.shape:
                break  # the data decide which layers run; the probe of a cut finds that out
            if name in found:
                continue
            module = self._model.get_submodule(name)
            if isinstance(module, CONSUMER_CLASSES) and name in reached:
                dim = channel_dim(module, before)
                if dim < before.dim() and before.shape[dim] == len(reached[name]):
                    others = (~reached[name]).nonzero().flatten().to(before.device)
                    before, after = before.index_select(dim, others), after.index_select(dim, others)
            if not _same(before, after):
                found.add(name)
        return found

    def _reads(self, drawn: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """What each layer reads in a pass, call by call, with the filters ``drawn`` anew."""
        read: list[tuple[str, Tensor]] = []
        noise, other = Stream(self._values), Stream(self._values, len(self._values) // 6)

        def after(name: str, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            if inputs and isinstance(inputs[0], Tensor):
                read.append((name, inputs[0].detach().clone()))  # the model may write to its tensor later
            if isinstance(module, MIXERS):
                return None
            made = noise.like(output)
            index = drawn.get(name, _NONE).to(output.device)
            dim = channel_dim(module, output)
            # A layer of the user's own may make other channels than it has filters.
            if len(index) and dim < output.dim() and int(index.max()) < output.shape[dim]:
                made.index_copy_(dim, index, other.like(output).index_select(dim, index))
            return made

        with idle(self._layers), hooked(self._layers, after):
            run(self._model, self._inputs, training=False)
        return read


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether they hold the same numbers, bit by bit, or none in the same places."""
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def _thirds(model: nn.Module) -> list[dict[str, Tensor]]:
    """The filters of every convolution in three parts, drawn at random: {name: int64} each.

    Convolutions with as many filters have the same parts, for their filters may be added to each other.
    """
    thirds: list[dict[str, Tensor]] = [{}, {}, {}]
    for name, conv in convolutions(model).items():
        order = torch.randperm(conv.out_channels, generator=torch.Generator().manual_seed(7))
        for third, filters in zip(thirds, order.tensor_split(3), strict=True):
            third[name] = filters
    return thirds


def _probe(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy of ``model`` in numbers of ``dtype``, but for weights that no pass computes with."""
    probe = copied(model, requires_grad=False).eval()
    unsettle(probe, torch.Generator().manual_seed(0))
    for module in probe.modules():
        for tensor in (*own_parameters(module).values(), *own_buffers(module).values()):
            if dtype and tensor is not None and tensor.is_floating_point() and not is_stock(module):
                tensor.data = tensor.data.to(dtype)
    return probe
