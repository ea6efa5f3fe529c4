"""RePr and Batch Bridgeout as callbacks of Ultralytics' trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from regrow.atomic import write_bytes
from regrow.integrations.arguments import warn_of_dropped
from regrow.integrations.checkpoints import as_bytes
from regrow.integrations.yolo_network import head_of, pictures_like
from regrow.modules import unwrap
from regrow.noise.layers import add_bridgeout, bridgeout_state, load_bridgeout_state, remove_bridgeout
from regrow.repr import cycle as own_loop
from regrow.repr.events import Event

_STATE = "last.regrow.pt"
_BEGIN = "on_train_start"


class InTraining:
    """What works on a network while ``yolo.train()`` lasts; its state lies beside ``last.pt``."""

    key = ""

    def __init__(self, yolo: Any, settings: dict[str, Any]) -> None:
        head_of(yolo.model)
        if any(type(getattr(call, "__self__", None)) is type(self) for call in yolo.callbacks[_BEGIN]):
            raise ValueError(
                f"this model has the callbacks of {self.key} already; yolo.reset_callbacks() takes off all "
                "callbacks, also those of others."
            )
        self._settings = settings
        self._net: nn.Module | None = None
        self._ema: nn.Module | None = None
        for event, call in (
            (_BEGIN, self.on_train_start),
            ("on_train_epoch_start", self.on_train_epoch_start),
            ("on_train_epoch_end", self.on_train_epoch_end),
            ("on_model_save", self.on_model_save),
            ("on_train_end", self.on_train_end),
            ("teardown", self.teardown),  # also after an exception
        ):
            yolo.add_callback(event, call)

    def on_train_start(self, trainer: Any) -> None:
        net = unwrap(trainer.model)
        settings = dict(self._settings)
        if settings.get("exclude") is None:
            settings["exclude"] = [head_of(net)]
        saved = self._saved(trainer)  # before anything is put on the network
        self._put_on(trainer, net, settings)
        self._net, self._ema = net, trainer.ema.ema
        if saved is not None:
            self._load(saved)

    def _saved(self, trainer: Any) -> Any:
        if not trainer.start_epoch:
            return None
        path = Path(trainer.args.resume).with_name(_STATE)
        states = torch.load(path, weights_only=True) if path.exists() else {}
        if self.key not in states or states["epoch"] != trainer.start_epoch - 1:
            raise ValueError(
                f"{path} has no state of {self.key} after epoch {trainer.start_epoch}, where this run goes "
                "on. Resume from last.pt of a run that had it, or train anew from its weights."
            )
        return states[self.key]

    def on_train_epoch_start(self, trainer: Any) -> None:
        if self._net is not None and trainer.ema.ema is not self._ema:
            # After a loss of NaN Ultralytics goes back to its last checkpoint, with a new EMA.
            self._ema = trainer.ema.ema
            self._go_back(trainer.ema.ema)

    def on_train_epoch_end(self, trainer: Any) -> None: ...

    def on_model_save(self, trainer: Any) -> None:
        if self._net is None:
            return
        path = trainer.wdir / _STATE
        states = torch.load(path, weights_only=True) if path.exists() else {}
        if states.get("epoch") != trainer.epoch:
            states = {"epoch": trainer.epoch}
        states[self.key] = self._state()
        write_bytes(path, as_bytes(states))

    def on_train_end(self, trainer: Any) -> None: ...

    def teardown(self, _: Any) -> None:
        if self._net is not None:
            self._take_off(self._net)
            self._net = self._ema = None

    def _put_on(self, trainer: Any, net: nn.Module, settings: dict[str, Any]) -> None:
        raise NotImplementedError

    def _take_off(self, net: nn.Module) -> None:
        raise NotImplementedError

    def _go_back(self, ema: Any) -> None:
        raise NotImplementedError

    def _state(self) -> Any:
        raise NotImplementedError

    def _load(self, state: Any) -> None:
        raise NotImplementedError


class RePr(InTraining):
    """See ``add_repr``.

    Attributes:
        cycle: the ``regrow.RePr`` of the running training; None outside of it.
        events: the drops, restores and restarts of the last training, since it began or went on.
    """

    key = "RePr"

    def __init__(self, yolo: Any, settings: dict[str, Any]) -> None:
        super().__init__(yolo, settings)
        self.cycle: own_loop.RePr | None = None
        self.events: list[Event] = []
        self._last_saved: Any = None

    def _put_on(self, trainer: Any, net: nn.Module, settings: dict[str, Any]) -> None:
        if settings.get("example_inputs") is None:
            settings["example_inputs"] = pictures_like(net, int(trainer.args.imgsz))
        self.cycle = own_loop.RePr(trainer.model, trainer.optimizer, **settings)
        self.events = []
        self._last_saved = self.cycle.state_dict()
        self.cycle.follow(trainer.ema.ema)

    def _go_back(self, ema: Any) -> None:
        assert self.cycle is not None
        self.cycle.load_state_dict(self._last_saved)
        self.cycle.follow(ema)

    def on_train_epoch_end(self, trainer: Any) -> None:
        if self.cycle is None or not trainer.loss.isfinite():
            return
        if (event := self.cycle.step()) is not None:
            self.events.append(event)

    def on_train_end(self, _: Any) -> None:
        if self.cycle is not None and self.cycle.phase == "sub":
            warn_of_dropped("the training ended while filters were dropped")

    def _take_off(self, _: nn.Module) -> None:
        assert self.cycle is not None
        self.cycle.remove()
        self.cycle = None

    def _state(self) -> Any:
        assert self.cycle is not None
        self._last_saved = self.cycle.state_dict()
        return self._last_saved

    def _load(self, state: Any) -> None:
        assert self.cycle is not None
        self.cycle.load_state_dict(state)
        self._last_saved = state


class Bridgeout(InTraining):
    """See ``add_bridgeout``."""

    key = "Bridgeout"

    def __init__(self, yolo: Any, settings: dict[str, Any]) -> None:
        super().__init__(yolo, settings)
        # Ahead of a RePr's: no noise can be added while filters are dropped, as they are after a resume.
        calls = yolo.callbacks[_BEGIN]
        calls.insert(0, calls.pop())

    def _put_on(self, trainer: Any, net: nn.Module, settings: dict[str, Any]) -> None:
        del trainer
        add_bridgeout(net, **settings)

    def _take_off(self, net: nn.Module) -> None:
        own_loop.release(net)  # no noise can be removed while filters are dropped
        remove_bridgeout(net)

    def _go_back(self, ema: Any) -> None:
        remove_bridgeout(ema)  # the noise has come along with the copy

    def _state(self) -> Any:
        assert self._net is not None
        return bridgeout_state(self._net)

    def _load(self, state: Any) -> None:
        assert self._net is not None
        load_bridgeout_state(self._net, state)
