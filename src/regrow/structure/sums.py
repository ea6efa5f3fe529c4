"""Norms behind sums: channels that no filter writes to any more are silenced there.

A norm turns a channel of zeros into its bias. Right behind a convolution ``silence`` prevents that; a norm
behind a sum serves several convolutions, and can be silenced in a channel once all of them have lost it. A
channel without writers does harm: its variance is 0, so the norm multiplies gradients by 1/√eps, and a few
such norms in a row leave nothing but rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.indexing import index_tensor, index_tensors
from regrow.log import gave_up
from regrow.looking.calls import PassFailed, call, mapped, undisturbed
from regrow.looking.copies import copied
from regrow.looking.hooks import hooked
from regrow.looking.noise import Noise, unsettle
from regrow.modules import Norm, channel_dim, channel_layers, device_of, per_channel, tied_modules
from regrow.structure.confirm import are_silent, loudness_of
from regrow.structure.readers import Readers, affine, silence, zero_channels

Channels = Mapping[str, Sequence[int]]


def norms_without_writers(
    model: nn.Module, readers: Mapping[str, Readers], gone: Channels, example_inputs: Any
) -> dict[str, list[int]]:
    """The channels of norms behind sums that removed filters alone write to: {norm: channels}.

    Args:
        model: it is only read.
        readers: the result of ``read_structure``. Its ``reached`` is confirmed here, by passes in which the
            other filters' outputs are noise.
        gone: the removed filters, {convolution: indices}.
    """
    found = _proposed(model, readers, gone)
    while found:
        loud = _loud(model, readers, gone, found, example_inputs)
        if not loud:
            break
        found = {norm: channels for norm, channels in found.items() if norm not in loud}
    return found


@torch.no_grad()
def silence_norms(model: nn.Module, channels: Channels) -> None:
    """Have norms return 0 in ``channels``, which carry nothing, in train and eval mode."""
    for name, those in zip(channels, index_tensors(list(channels.values()), device_of(model)), strict=True):
        zero_channels(model.get_submodule(name), those)


def _proposed(model: nn.Module, readers: Mapping[str, Readers], gone: Channels) -> dict[str, list[int]]:
    """The graph's proposal: channels that removed filters reach, and no others."""
    modules = dict(model.named_modules())
    lost: dict[str, set[int]] = {}
    for name, indices in gone.items():
        for layer, reads in readers[name].reached.items():
            # Those in norms see the convolution's channels alone, and go silent with them.
            if layer not in readers[name].norms and isinstance(modules[layer], Norm):
                lost.setdefault(layer, set()).update(reads.of(indices))
    tied = tied_modules(model)
    found = {}
    for layer, channels in lost.items():
        norm = modules[layer]
        if not per_channel(norm) or not affine(norm) or layer in tied:
            continue
        for name, those in readers.items():
            if channels and layer in those.reached:
                reads = those.reached[layer]
                channels = channels.difference(reads.of(set(reads.filters).difference(gone.get(name, ()))))
        if channels:
            found[layer] = sorted(channels)
    return found


def _loud(
    model: nn.Module, readers: Mapping[str, Readers], gone: Channels, found: Channels, example_inputs: Any
) -> set[str]:
    """The norms in ``found`` that read something in their channels, when removed filters are silent."""
    probe = copied(model, requires_grad=False).eval()
    indices = index_tensors(list(found.values()), device_of(probe))
    channels = {name: (index, max(found[name])) for name, index in zip(found, indices, strict=True)}
    noise = Noise(4)
    calls: list[tuple[str, list[list[Tensor]]]] = []

    def after(sign: int, name: str, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if isinstance(module, Norm):
            if name in found:
                calls.append((name, loudness_of(module, inputs, output, *channels[name])))
            return None
        silent = index_tensor(gone[name]) if gone.get(name) else None
        return noise.among(output, channel_dim(module, output), silent, sign)

    with undisturbed(probe), torch.no_grad():
        unsettle(probe, torch.Generator().manual_seed(0))
        silence(probe, readers, gone)
        silence_norms(probe, found)
        layers = channel_layers(probe)
        try:
            for sign in (1, -1):  # see Noise
                with hooked(layers, functools.partial(after, sign)):
                    call(probe, mapped(example_inputs, torch.rand_like))
        except PassFailed as error:  # noise may be more than the model's own code bears
            gave_up("silencing norms behind sums", error)
            return set(found)
    silent = are_silent([loudness for _, loudness in calls])
    loud = {name for (name, _), is_silent in zip(calls, silent, strict=True) if not is_silent}
    return loud | (set(found) - {name for name, _ in calls})
