"""One pass over the pictures, for training or for measuring accuracy."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from regrow.modules import device_of
from regrow.study.feeding import Batches
from regrow.study.progress import Progress
from regrow.study.ranks import Ranks

# Losses are checked every 16 steps, because reading a loss makes a GPU wait.
_LOOK_EVERY = 16


class BadLoss(Exception):
    """A loss was not finite. It holds the loss, its step in the epoch (from 1) and its learning rate."""

    def __init__(self, loss: float, step: int, rate: float) -> None:
        self.loss, self.step, self.rate = loss, step, rate


def train_epoch(
    model: nn.Module,
    batches: Batches,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    dtype: torch.dtype,
    ranks: Ranks,
    progress: Progress,
) -> tuple[float, float]:
    """Train one epoch on ``batches``; the scheduler steps with every batch. Returns mean loss and accuracy.

    Args:
        model: in its DDP wrapper, if there are several processes.
        epoch: its number, which fixes order and augmentation.
        dtype: the type that autocast computes in; with float32 autocast is off.

    Raises:
        BadLoss: a loss is not finite, in every process.
    """
    model.train()
    device, steps = device_of(model), len(batches)
    losses = torch.zeros(steps, device=device)
    sizes = torch.tensor([batches.size_of(step) for step in range(steps)], dtype=torch.float32)
    rates = []
    correct = torch.zeros((), dtype=torch.long, device=device)
    looked = 0
    for step, (images, labels) in enumerate(batches.epoch(epoch)):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(images.contiguous(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(logits, labels)
        # This process's share of the whole batch's mean; DDP takes the mean of all processes' gradients.
        share = len(labels) / batches.size_of(step)
        with _skipped_steps(scaler):
            scaler.scale(loss * (share * ranks.count) if ranks.count > 1 else loss).backward()
            rates.append(optimizer.param_groups[0]["lr"])
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
        losses[step] = loss.detach() * share
        correct += (logits.detach().argmax(1) == labels).sum()
        if step + 1 == steps or step + 1 - looked == _LOOK_EVERY:
            recent = ranks.add(losses[looked : step + 1]).cpu()
            if not torch.isfinite(recent).all():
                first = int((~torch.isfinite(recent)).nonzero()[0])
                raise BadLoss(float(recent[first]), looked + first + 1, rates[looked + first])
            progress.advance(step + 1 - looked, float(recent.mean()))
            looked = step + 1
    seen = float(sizes.sum())
    return float((losses.cpu() * sizes).sum()) / seen, int(ranks.add(correct)) / seen


@contextmanager
def _skipped_steps(scaler: torch.amp.GradScaler) -> Iterator[None]:
    # The scaler finds its scale by skipping steps that overflow, which PyTorch's schedulers warn about.
    if not scaler.is_enabled():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        yield


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Batches, ranks: Ranks | None = None) -> dict[str, float]:
    """Mean cross-entropy ``loss`` and ``accuracy`` (0 to 1) of ``model`` in eval mode, in float32.

    Args:
        batches: without shuffling; with ``ranks``, the part of this process.
        ranks: the processes that measure together; their weights must be equal.
    """
    model.eval()
    loss, correct, seen = 0.0, 0, 0
    for images, labels in batches.epoch(0):
        if len(labels) == 0:
            continue
        logits = model(images.contiguous(memory_format=torch.channels_last))
        loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        correct += int((logits.argmax(1) == labels).sum())
        seen += len(labels)
    if ranks is not None and ranks.count > 1:
        loss, correct, seen = ranks.add(torch.tensor([loss, correct, seen], dtype=torch.float64)).tolist()
    return {"loss": loss / seen, "accuracy": correct / seen}


def state_of_weights(model: nn.Module) -> dict[str, Tensor]:
    """Contiguous copies of everything in ``state_dict()``, on the CPU, as safetensors needs them."""
    return {name: tensor.detach().clone().cpu().contiguous() for name, tensor in model.state_dict().items()}
