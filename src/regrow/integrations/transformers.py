"""RePr and Batch Bridgeout as callbacks of the ``Trainer`` of Hugging Face's transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "regrow.integrations.transformers needs transformers: pip install 'regrow[transformers]'."
    ) from error

from regrow.atomic import write_bytes
from regrow.integrations.arguments import check_bridgeout, check_repr, warn_of_dropped
from regrow.integrations.checkpoints import as_bytes, resumed_from, saved_in
from regrow.modules import filters_first
from regrow.noise.layers import add_bridgeout, bridgeout_state, load_bridgeout_state, remove_bridgeout
from regrow.reading import from_json
from regrow.repr import cycle as own_loop
from regrow.repr.events import Event
from regrow.torch_private import tree_map_only

_Base: Any = TrainerCallback


class _Working(_Base):
    """A callback that works on the model while a training lasts, and has a file in each checkpoint."""

    _file = ""

    def give_back(self) -> None:
        """Make the model plain again."""
        raise NotImplementedError

    def _content(self) -> bytes | None:
        """What the file contains now; None while there is nothing to go on from."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.give_back()

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        folder = saved_in(args, state)
        if args.should_save and folder.is_dir() and (content := self._content()) is not None:
            write_bytes(folder / self._file, content)

    def on_push_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        # A checkpoint is sent ahead of on_save.
        self.on_save(args, state)

    def _found(self, args: Any, state: Any) -> Path | None:
        """The file in the checkpoint that the training goes on from, if there is one."""
        folder = resumed_from(args, state)
        return None if folder is None or not (folder / self._file).is_file() else folder / self._file


class RePr(_Working):
    """``regrow.RePr`` in a ``Trainer``: its steps, its state in checkpoints, and a plain model at the end.

    ``trainer.train(resume_from_checkpoint=…)`` goes on where the checkpoint was written, even in the middle
    of a sub phase; without that argument a training starts anew. The state is ``regrow_repr.pt`` in the
    checkpoint's folder. In DDP the first process decides for all.

    The model is plain again at the end of the training. A Trainer does not tell its callbacks of an
    exception: write ``with callback:`` around ``trainer.train()``, or call ``give_back()`` then.

    Args:
        example_inputs: an input of the model: pictures, or a dictionary of keyword arguments.
        per: what ``full`` and ``sub`` count: ``"epoch"``, or ``"step"`` of the optimizer. An epoch that the
            end of the training cuts short is not counted.
        settings: all other arguments of ``regrow.RePr``.

    Attributes:
        cycle: the ``regrow.RePr`` of the running training, from its first epoch on; else None.
        events: the drops, restores and restarts of the last training, since it began or went on.

    Raises:
        ValueError: ``per`` is neither. When the first epoch begins: what ``regrow.RePr`` raises.
        TypeError: ``regrow.RePr`` takes no such argument.
    """

    _file = "regrow_repr.pt"

    def __init__(self, example_inputs: Any, *, per: str = "epoch", **settings: Any) -> None:
        check_repr(example_inputs, per, settings)
        self._example_inputs, self._per, self._settings = example_inputs, per, settings
        self.cycle: own_loop.RePr | None = None
        self.events: list[Event] = []
        self._waits = False
        self._counted = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.give_back()  # of a training that an exception ended
        self.events = []
        # Bridgeout's on_train_begin may come later, and no noise can be added while filters are dropped.
        self._waits = True

    def on_epoch_begin(self, args: Any, state: Any, _: Any, **given: Any) -> None:
        if self._waits:
            self._begin(args, state, given["model"], given["optimizer"])

    def _begin(self, args: Any, state: Any, model: nn.Module, optimizer: Any) -> None:
        self._waits = False
        inputs = tree_map_only(Tensor, lambda x: x.to(args.device), self._example_inputs)
        # The Trainer hands out the model without the wrapper that replicates it over several GPUs.
        net = nn.DataParallel(model) if args.n_gpu > 1 else model
        cycle = own_loop.RePr(net, optimizer, example_inputs=inputs, **self._settings)
        self._counted = state.global_step
        try:
            if args.world_size > 1 and (group := dist.group.WORLD) is not None:
                cycle.join(group)
            if (file := self._found(args, state)) is not None:
                saved = torch.load(file, map_location="cpu", weights_only=True)
                cycle.load_state_dict(saved["cycle"])
                self._counted = saved["counted"]
        except ValueError:
            cycle.remove()
            raise
        self.cycle = cycle
        if self._per == "epoch" and _is_whole(state.epoch):
            # The checkpoint was written at the last step of an epoch, ahead of its end: the training goes on
            # with the next epoch.
            self._count(state)

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if self._per == "step":
            self._count(state)

    def on_epoch_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        cut_short = control.should_training_stop and not _is_whole(state.epoch)
        if self._per == "epoch" and not cut_short:
            self._count(state)

    def _count(self, state: Any) -> None:
        if self.cycle is None or state.global_step <= self._counted:
            return
        self._counted = state.global_step
        if (event := self.cycle.step()) is not None:
            self.events.append(event)

    def on_train_end(self, args: Any, state: Any, _: Any, **given: Any) -> None:
        if self._waits and not args.load_best_model_at_end:
            self._begin(args, state, given["model"], given["optimizer"])  # no epoch was left
        cycle, best = self.cycle, args.load_best_model_at_end and state.best_model_checkpoint
        self.give_back()
        if cycle is None:
            return
        if best:
            if _silent(given["model"], cycle.keep):
                warn_of_dropped("the best model, which was loaded, was saved while filters were dropped")
        elif cycle.phase == "sub":
            warn_of_dropped("the training ended while filters were dropped")

    def give_back(self) -> None:
        """End the cycle: a plain model and a plain optimizer. A second call does nothing."""
        self._waits = False
        if self.cycle is not None:
            self.cycle.remove()
            self.cycle = None

    def _content(self) -> bytes | None:
        if self.cycle is None:
            return None
        return as_bytes({"cycle": self.cycle.state_dict(), "counted": self._counted})


class Bridgeout(_Working):
    """``regrow.add_bridgeout`` in a ``Trainer``: its state in checkpoints, and a plain model at the end.

    The state is the number of the next draw, ``regrow_bridgeout.json`` in the checkpoint's folder: a training
    that goes on draws what the other would have drawn. After an exception the model is plain as ``RePr``
    says.

    Args:
        p, q: see ``regrow.bridgeout``.
        calibration: see ``regrow.remove_bridgeout``: unlabelled batches, on the device of the training.
        settings: all other arguments of ``regrow.add_bridgeout``.

    Raises:
        TypeError: ``regrow.add_bridgeout`` takes no such argument.
        ValueError: when the training begins: what ``regrow.add_bridgeout`` raises.
    """

    _file = "regrow_bridgeout.json"

    def __init__(
        self, p: float = 0.3, q: float = 1.5, *, calibration: Iterable[Any] | None = None, **settings: Any
    ) -> None:
        self._settings: Mapping[str, Any] = {"p": p, "q": q, **settings}
        check_bridgeout(self._settings)
        self._calibration = calibration
        self._net: nn.Module | None = None

    def on_train_begin(self, args: Any, state: Any, _: Any, *, model: nn.Module, **__: Any) -> None:
        self.give_back()  # of a training that an exception ended
        add_bridgeout(model, **self._settings)
        self._net = model
        if (file := self._found(args, state)) is not None:
            load_bridgeout_state(model, from_json(file.read_text(encoding="utf-8")))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._give_back(self._calibration)

    def give_back(self) -> None:
        """Take the noise off the model, and end a RePr on it. A second call does nothing."""
        self._give_back(None)

    def _give_back(self, calibration: Iterable[Any] | None) -> None:
        if self._net is not None:
            net, self._net = self._net, None
            own_loop.release(net)  # no noise can be removed while filters are dropped
            remove_bridgeout(net, calibration)

    def _content(self) -> bytes | None:
        return None if self._net is None else json.dumps(bridgeout_state(self._net)).encode()


def _is_whole(epoch: float | None) -> bool:
    """Whether ``state.epoch`` says that an epoch has come to its end."""
    return not (epoch or 0) % 1


def _silent(model: nn.Module, layers: Iterable[str]) -> bool:
    """Whether one of ``layers`` has a filter of zeros."""
    convolutions = (model.get_submodule(name) for name in layers)
    filters = (filters_first(layer, cast(Tensor, layer.weight)).flatten(1) for layer in convolutions)
    return any(bool((each == 0).all(1).any()) for each in filters)
