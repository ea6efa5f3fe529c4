"""How much arithmetic a training step takes."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from regrow.noise.layers import bridgeout_state, load_bridgeout_state
from regrow.study.methods.method import Method
from regrow.study.parts import Parts
from regrow.study.steps import batch_loss

_PICTURES = 4


def epoch_flops(run: Parts) -> int | None:
    """FLOPs of an epoch of ``run`` as it trains now; None when they cannot be counted."""
    images = run.calibration[0].contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    counted = step_flops(run.model, images, labels, run.method)
    added = penalty_flops(run.model, run.method)
    if counted is None or added is None:
        return None
    pictures = sum(run.train.size_of(number) for number in range(len(run.train)))
    return counted[0] * pictures // counted[1] + added * len(run.train)


def step_flops(
    model: nn.Module, images: Tensor, labels: Tensor, method: Method | None = None
) -> tuple[int, int] | None:
    """FLOPs of the forward and backward passes over the first few of ``images``, those of a teacher included.

    ``torch.utils.flop_counter`` counts a multiply-add as two, and convolutions and matrix products only:
    Bridgeout's noise, norms, activations and the optimizer's step are not counted. The buffers, gradients and
    noise of ``model`` stay as they were, and so do the global random generators.

    Args:
        model: the model that trains, without a data-parallel wrapper.
        images: [2 or more, channels, height, width], on the device of ``model``.
        labels: int64 [as many].
        method: gives the loss (default: cross entropy); its penalty is not counted here.

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
            model.train()
            method = Method() if method is None else method
            return _counted(lambda: batch_loss(method, model(images), images, labels)), len(images)
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


def penalty_flops(model: nn.Module, method: Method) -> int | None:
    """FLOPs that the penalty of ``method`` adds to each step, forward and backward, counted as above."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    try:
        return _counted(method.penalty)
    except Exception:  # as above
        return None
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]


def _counted(loss: Callable[[], Tensor | None]) -> int:
    with warnings.catch_warnings(), FlopCounterMode(display=False) as counter:
        warnings.simplefilter("ignore")
        if (found := loss()) is not None:
            found.backward()
    return int(counter.get_total_flops())
