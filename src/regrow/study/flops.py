"""How much arithmetic a training step takes."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from regrow.noise.layers import bridgeout_state, load_bridgeout_state

_PICTURES = 4


def step_flops(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[int, int] | None:
    """FLOPs of the forward and backward passes over the first few of ``images``.

    ``torch.utils.flop_counter`` counts a multiply-add as two, and convolutions and matrix products only:
    Bridgeout's noise, norms, activations and the optimizer's step are not counted. The buffers, gradients and
    noise of ``model`` stay as they were, and so do the global random generators.

    Args:
        model: the model that trains, without a data-parallel wrapper.
        images: [2 or more, channels, height, width], on the device of ``model``.
        labels: int64 [as many].

    Returns:
        FLOPs and the number of pictures they are for; None when they cannot be counted.
    """
    images, labels = images[:_PICTURES], labels[:_PICTURES]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None  # the count must not add to it
    noise = bridgeout_state(model) if "_bridgeout_passes" in vars(model) else None
    training = model.training
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            return _counted(model, images, labels), len(images)
        except Exception:  # whatever a model raises under the counter, the run continues without a count
            return None
        finally:
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])
            for name, parameter in model.named_parameters():
                parameter.grad = gradients[name]
            if noise is not None:
                load_bridgeout_state(model, noise)
            model.train(training)


def _counted(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    model.train()
    with warnings.catch_warnings(), FlopCounterMode(display=False) as counter:
        warnings.simplefilter("ignore")
        nn.functional.cross_entropy(model(images), labels).backward()
    return int(counter.get_total_flops())
