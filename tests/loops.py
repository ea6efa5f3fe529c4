"""Training loops as people write them with PyTorch alone, around one small net: a class for each kind.

``Loop`` is the plain one. The others say only what they do otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import regrow
from cycles import X, batch, sgd
from nets import Residual
from pages import running

# method → (with RePr, with Bridgeout)
METHODS = {"RePr": (True, False), "Bridgeout": (False, True), "both": (True, True)}
FULL, SUB, EPOCHS, BATCHES = 2, 2, 5, 2  # full → sub → restored, and an epoch more


class Broken(Exception):
    """What goes wrong in the middle of a step."""


class Loop:
    """Model, optimizer and regrow on them; ``epoch`` trains for two batches and calls ``cycle.step()``.

    Args:
        method: one of ``METHODS``.
        seed: of the first weights; a run that goes on from a file has others than the one that wrote it.
    """

    # Whether the weights become those of the plain loop, up to rounding.
    as_plain = True

    def __init__(self, method: str, seed: int = 0) -> None:
        self.with_repr, self.with_noise = METHODS[method]
        torch.manual_seed(seed)
        self.model = self.build()
        if self.with_noise:
            regrow.add_bridgeout(self.model, p=0.2, seed=3)
        self.net = self.wrap(self.model)  # what the loop calls
        self.optimizer = sgd(self.model)
        # Whatever has a state, by name.
        self.parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        self.cycle: regrow.RePr | None = None
        if self.with_repr:
            self.cycle = self.parts["cycle"] = regrow.RePr(
                self.net, self.optimizer, example_inputs=X[:1], scope="layer", full=FULL, sub=SUB, cycles=1
            )
        self.prepare()
        self.breaks = False
        self.watch: Callable[[], None] = lambda: None  # called after each step of the optimizer

    def build(self) -> nn.Module:
        return Residual(8, 8)

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def prepare(self) -> None:
        """What else the loop needs."""

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        return batch(number)

    def loss(self, number: int) -> Tensor:
        x, y = self.batch(number)
        outputs = self.net(x)
        if self.breaks:
            raise Broken
        return F.cross_entropy(outputs, y)

    def step(self, numbers: range) -> None:
        """Train on the batches of an epoch."""
        for number in numbers:
            self.optimizer.zero_grad()
            self.loss(number).backward()
            self.optimizer.step()
            self.stepped()

    def stepped(self) -> None:
        """After each step of the optimizer."""
        self.watch()

    def epoch(self, number: int) -> regrow.Event | None:
        self.net.train()
        self.step(range(BATCHES * number, BATCHES * (number + 1)))
        return self.cycle.step() if self.cycle is not None else None

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """{name of a model: its weights and statistics}: the model, and the copies that follow it."""
        return {"model": self.model.state_dict()}

    def agree(self) -> None:
        """Fail if processes that train one net have parted."""

    def save(self, folder: Path) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        if self.with_noise:
            state["noise"] = regrow.bridgeout_state(self.model)
        torch.save(state, folder / "run.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "run.pt", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        if self.with_noise:
            regrow.load_bridgeout_state(self.model, state["noise"])

    def remove(self) -> None:
        if self.cycle is not None:
            self.cycle.remove()
        if self.with_noise:
            regrow.remove_bridgeout(self.model)


class Accumulated(Loop):
    """One step of the optimizer for two batches."""

    as_plain = False

    def step(self, numbers: range) -> None:
        self.optimizer.zero_grad()
        for number in numbers:
            (self.loss(number) / len(numbers)).backward()
        self.optimizer.step()
        self.stepped()


class MixedPrecision(Loop):
    """Autocast to bfloat16, and a scaler whose scale grows with every second step."""

    as_plain = False

    def prepare(self) -> None:
        self.scaler = self.parts["scaler"] = torch.amp.GradScaler("cpu", growth_interval=2)

    def loss(self, number: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().loss(number)

    def step(self, numbers: range) -> None:
        for number in numbers:
            self.optimizer.zero_grad()
            self.scaler.scale(self.loss(number)).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.stepped()


class Compiled(Loop):
    """The model in ``torch.compile``; the backend needs no compiler."""

    def wrap(self, model: nn.Module) -> nn.Module:
        return torch.compile(model, backend="eager")


class Averaged(Loop):
    """An EMA beside the model, made of it when regrow is on it already."""

    def prepare(self) -> None:
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.parts["ema"] = self.ema
        if self.cycle is not None:
            self.cycle.follow(self.ema)

    def stepped(self) -> None:
        self.ema.update_parameters(self.model)
        super().stepped()

    def weights(self) -> dict[str, dict[str, Tensor]]:
        return {**super().weights(), "ema": self.ema.module.state_dict()}

    def remove(self) -> None:
        super().remove()
        if self.with_noise:
            regrow.remove_bridgeout(self.ema.module)


class Recomputing(Residual):
    """The block of the net is computed again in the backward pass."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.relu(x + checkpoint(self.block, x, use_reentrant=self.reentrant)))

    def block(self, x: Tensor) -> Tensor:
        return self.norm_b(self.b(F.relu(self.norm_a(self.a(x)))))


class RecomputingReentrant(Recomputing):
    reentrant = True


class Checkpointed(Loop):
    """``torch.utils.checkpoint`` around the block. Its norms see each batch twice, as without regrow."""

    def build(self) -> nn.Module:
        return Recomputing(8, 8)


class CheckpointedReentrant(Checkpointed):
    def build(self) -> nn.Module:
        return RecomputingReentrant(8, 8)


class Distributed(Loop):
    """DistributedDataParallel; each process has batches of its own."""

    as_plain = False

    def wrap(self, model: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(model)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        return super().batch(dist.get_world_size() * number + dist.get_rank())

    def agree(self) -> None:
        for name, parameter in self.model.named_parameters():
            theirs = parameter.detach().clone()
            dist.broadcast(theirs, 0)
            assert torch.equal(theirs, parameter), name

    def save(self, folder: Path) -> None:
        if dist.get_rank() == 0:
            super().save(folder)
        dist.barrier()


class DistributedCheckpoint(Loop):
    """Saved and loaded as docs/resume.md shows it for torch.distributed.checkpoint."""

    def prepare(self) -> None:
        (code,) = [block for block in running("resume.md") if "distributed.checkpoint" in block]
        absent = [word for word, there in (("cycle", self.cycle), ("noise", self.with_noise)) if not there]
        lines = [line for line in code.splitlines() if not any(word in line for word in absent)]
        self.page = {
            "model": self.net, "optimizer": self.optimizer, "cycle": self.cycle, "regrow": regrow,
            "torch": torch,
        }  # fmt: skip
        exec(compile("\n".join(lines), "resume.md", "exec"), self.page)

    def save(self, folder: Path) -> None:
        self.page["save"](folder / "run")

    def load(self, folder: Path) -> None:
        self.page["load"](folder / "run")


class DistributedWithItsCheckpoint(DistributedCheckpoint, Distributed):
    """Both, in two processes."""


# name → loop. Those of the second table run in two processes.
LOOPS: dict[str, type[Loop]] = {
    "plain": Loop,
    "accumulation": Accumulated,
    "AMP": MixedPrecision,
    "compile": Compiled,
    "EMA": Averaged,
    "checkpoint": Checkpointed,
    "checkpoint, reentrant": CheckpointedReentrant,
    "distributed checkpoint": DistributedCheckpoint,
}
IN_TWO_PROCESSES: dict[str, type[Loop]] = {
    "DDP": Distributed,
    "DDP, distributed checkpoint": DistributedWithItsCheckpoint,
}
