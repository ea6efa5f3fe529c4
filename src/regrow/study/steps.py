"""A training step, and one pass over the pictures, for training or for measuring accuracy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from regrow.modules import device_of
from regrow.study.feeding import Batches
from regrow.study.methods.method import Method
from regrow.study.progress import Progress
from regrow.study.ranks import Ranks

# Losses are checked every 16 steps, because reading a loss makes a GPU wait.
_LOOK_EVERY = 16


class BadLoss(Exception):
    """A loss was not finite. It holds the loss, its step in the epoch (from 1) and its learning rate."""

    def __init__(self, loss: float, step: int, rate: float) -> None:
        self.loss, self.step, self.rate = loss, step, rate


class Step:
    """A training step on a batch: forward, backward and the optimizer's step, launched one by one.

    Args:
        model: in train mode when the step is called; in its DDP wrapper, if there are several processes.
        optimizer: of the parameters of ``model``.
        scaler: scales the loss, if it is enabled.
        dtype: the type that autocast computes in; with float32 autocast is off.
        processes: how many processes train together.
        method: gives the loss and what is added to it (default: cross entropy alone).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        dtype: torch.dtype = torch.float32,
        processes: int = 1,
        method: Method | None = None,
    ) -> None:
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.dtype, self.processes = dtype, processes
        self.method = Method() if method is None else method
        self.device = device_of(model)

    def __call__(self, images: Tensor, labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Train on a batch.

        Args:
            images: float32 [batch, channels, height, width].
            labels: int64 [batch].
            share: this process's share of the pictures of the whole batch.

        Returns:
            ``share`` times the loss [], which is a mean over the pictures, and how many of these were
            classified correctly, int64 []. The next call may overwrite them.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            images = images.contiguous(memory_format=torch.channels_last)
            logits = self.model(images)
            loss = batch_loss(self.method, logits, images, labels)
        # Not under autocast: a sum over all filters' products loses too much in half precision.
        if (penalty := self.method.penalty()) is not None:
            loss = loss + penalty
        # DDP takes the mean of all processes' gradients, and each has its share of the whole batch's mean.
        scaled = loss * (share * self.processes) if self.processes > 1 else loss
        self.scaler.scale(scaled).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach() * share, (logits.detach().argmax(1) == labels).sum()

    def renew(self) -> None:
        """To be called when the method has changed the network: the next step runs other operations."""


def batch_loss(method: Method, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """The loss [] of ``method``, without its penalty: cross entropy, if it has none of its own."""
    loss = method.loss(logits, images, labels)
    return nn.functional.cross_entropy(logits, labels) if loss is None else loss


def train_epoch(
    step: Step,
    batches: Batches,
    epoch: int,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    ranks: Ranks,
    progress: Progress,
    after_step: Callable[[], object] | None = None,
) -> tuple[float, float]:
    """Train one epoch on ``batches``; the scheduler steps with every batch. Returns mean loss and accuracy.

    Args:
        epoch: its number, which fixes order and augmentation.
        after_step: called after each step, while its gradients are still there.

    Raises:
        BadLoss: a loss is not finite, in every process.
    """
    step.model.train()
    device, steps = step.device, len(batches)
    losses = torch.zeros(steps, device=device)
    sizes = torch.tensor([batches.size_of(number) for number in range(steps)], dtype=torch.float32)
    rates = []
    correct = torch.zeros((), dtype=torch.long, device=device)
    looked = 0
    for number, (images, labels) in enumerate(batches.epoch(epoch)):
        rates.append(step.optimizer.param_groups[0]["lr"])
        with _skipped_steps(step.scaler):
            loss, right = step(images, labels, len(labels) / batches.size_of(number))
            step.method.after_step()
            scheduler.step()
        if after_step is not None:
            after_step()
        losses[number] = loss
        correct += right
        if number + 1 == steps or number + 1 - looked == _LOOK_EVERY:
            recent = ranks.add(losses[looked : number + 1]).cpu()
            if not torch.isfinite(recent).all():
                first = int((~torch.isfinite(recent)).nonzero()[0])
                raise BadLoss(float(recent[first]), looked + first + 1, rates[looked + first])
            progress.advance(number + 1 - looked, float(recent.mean()))
            looked = number + 1
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
    found, seen = [], 0
    for images, labels in batches.epoch(0):
        if len(labels) == 0:
            continue
        logits = model(images.contiguous(memory_format=torch.channels_last))
        total = nn.functional.cross_entropy(logits, labels, reduction="sum")
        found.append((total, (logits.argmax(1) == labels).sum()))
        seen += len(labels)
    loss, correct = 0.0, 0
    for total, right in found:  # not in the loop above: reading a number makes a GPU wait
        loss += float(total)
        correct += int(right)
    if ranks is not None and ranks.count > 1:
        loss, correct, seen = ranks.add(torch.tensor([loss, correct, seen], dtype=torch.float64)).tolist()
    return {"loss": loss / seen, "accuracy": correct / seen}


def state_of_weights(model: nn.Module) -> dict[str, Tensor]:
    """Contiguous copies of everything in ``state_dict()``, on the CPU, as safetensors needs them."""
    return {name: tensor.detach().clone().cpu().contiguous() for name, tensor in model.state_dict().items()}
