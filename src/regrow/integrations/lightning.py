"""RePr and Batch Bridgeout as callbacks of Lightning's ``Trainer``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from regrow.given import names_given
from regrow.integrations.arguments import check_bridgeout, check_repr, warn_of_dropped
from regrow.integrations.fitting import (
    averaged_copies,
    callback_bases,
    check_part,
    network_name,
    optimizer_of,
)
from regrow.integrations.measuring import WithoutGradients, measures, with_momentum
from regrow.noise.layers import add_bridgeout, bridgeout_state, load_bridgeout_state, remove_bridgeout
from regrow.repr import cycle as own_loop
from regrow.repr.events import Event
from regrow.repr.ranks import group_of
from regrow.repr.slots import stepping

_Base: Any = type("_Base", callback_bases(), {})


class _OnAPart(_Base):
    """A callback that works on one part of the LightningModule while a fit lasts, and has a state."""

    def __init__(self, module: str | None) -> None:
        if module is not None:
            names_given([module], "module")
        self._module = module
        self._state: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        return f"regrow.{type(self).__name__}({self._module!r})"

    def setup(self, *_: Any, stage: str) -> None:
        """Start anew in each fit; Lightning loads the state of ``ckpt_path`` after this."""
        if stage == "fit":
            self._state = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until there is a model on its device and an optimizer."""
        self._state = dict(state_dict)

    def _part(self, pl_module: nn.Module) -> str:
        name = network_name(pl_module) if self._module is None else self._module
        check_part(pl_module, name)
        return name


class RePr(_OnAPart):
    """``regrow.RePr`` in a fit: its steps, its state in checkpoints, and a plain model at the end.

    The model is plain again when the fit ends, also by an exception. A fit goes on from ``ckpt_path`` where
    the checkpoint was written, even in the middle of a sub phase, and starts anew without. The averaged
    copies of Lightning's weight averaging follow. With DDP the first process decides for all.

    Args:
        example_inputs: an input of the part (see ``module``); None takes the LightningModule's
            ``example_input_array``.
        module: qualified name of the part to work on, ``""`` for the LightningModule itself. None takes the
            only child that has trained convolutions, or the LightningModule if several have.
        per: what ``full`` and ``sub`` count: ``"epoch"``, or ``"step"`` of the part's optimizer. An epoch
            without such a step is not counted, nor one in which weight averaging measures norms.
        settings: all other arguments of ``regrow.RePr``.

    Attributes:
        cycle: the ``regrow.RePr`` of the running fit; None outside of a fit.
        events: the drops, restores and restarts of the last fit, since it began or went on.

    Raises:
        ValueError: ``per`` is neither. When the fit begins: what ``regrow.RePr`` raises; no inputs are known;
            ``module`` is no part; not exactly one optimizer trains it.
        TypeError: ``regrow.RePr`` takes no such argument.
    """

    def __init__(
        self, example_inputs: Any = None, *, module: str | None = None, per: str = "epoch", **settings: Any
    ) -> None:
        super().__init__(module)
        check_repr(example_inputs, per, settings)
        self._example_inputs, self._per, self._settings = example_inputs, per, settings
        self.cycle: own_loop.RePr | None = None
        self.events: list[Event] = []
        self._norms: list[nn.Module] = []
        self._steps = self._counted = self._epoch = 0
        self._handle: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # By now the model is on its device, and its states and the optimizer's are loaded.
        name = self._part(pl_module)
        net = pl_module.get_submodule(name)
        self.cycle, self.events = None, []
        optimizer = optimizer_of(net, trainer.optimizers)
        inputs = self._inputs(trainer, pl_module)
        cycle = own_loop.RePr(net, optimizer, example_inputs=inputs, **self._settings)
        try:
            if (group := group_of(trainer.model)) is not None:
                cycle.join(group)
            if self._state:
                cycle.load_state_dict(self._state["cycle"])
            for copy in averaged_copies(trainer.callbacks, name):
                cycle.follow(copy)
        except ValueError:
            cycle.remove()
            raise
        self.cycle, self._norms = cycle, with_momentum(net)
        # Lightning's global_step counts the steps of all optimizers, and none that goes past Lightning.
        self._steps = self._state.get("steps", trainer.global_step)
        self._counted = self._state.get("counted", self._steps)
        self._handle = stepping(optimizer)[0].register_step_post_hook(self._note_step)
        self._epoch = self._state.get("epoch", trainer.current_epoch)
        if self._per == "epoch" and self._epoch < trainer.current_epoch:
            # The checkpoint is from the last step of an epoch: Lightning goes on with the next epoch, and
            # leaves out the hook at the end of that one.
            self._count()

    def _note_step(self, *_: Any) -> None:
        self._steps += 1

    def _inputs(self, trainer: Any, pl_module: Any) -> Any:
        inputs = self._example_inputs
        if inputs is None and (inputs := pl_module.example_input_array) is None:
            raise ValueError(
                "RePr needs an input to see which layer reads what: give RePr(example_inputs=x[:1]), or set "
                "self.example_input_array in the LightningModule."
            )
        return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(inputs))

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._epoch = trainer.current_epoch
        if self._per == "step":
            self._count()

    def on_train_epoch_end(self, *_: Any) -> None:
        if self._per == "epoch":
            self._count()

    def _count(self) -> None:
        # The hooks also run after accumulated batches, and again after a resume.
        if self.cycle is None or self._steps <= self._counted or measures(self._norms):
            return
        times = self._steps - self._counted if self._per == "step" else 1
        self._counted = self._steps
        for _ in range(times):
            if (event := self.cycle.step()) is not None:
                self.events.append(event)

    def on_train_end(self, *_: Any) -> None:
        dropped = self.cycle is not None and self.cycle.phase == "sub"
        self.give_back()
        if dropped:
            warn_of_dropped("the fit ended while filters were dropped")

    def on_exception(self, *_: Any) -> None:
        self.give_back()

    def give_back(self) -> None:
        """End the cycle: a plain model and a plain optimizer. A second call does nothing."""
        if self.cycle is not None:
            self._state = self.state_dict()  # for checkpoints that are written later
            self._handle.remove()
            self.cycle.remove()
            self.cycle = None

    def state_dict(self) -> dict[str, Any]:
        if self.cycle is None:
            return dict(self._state)
        counts = {"steps": self._steps, "counted": self._counted, "epoch": self._epoch}
        return {"cycle": self.cycle.state_dict(), **counts}


class Bridgeout(_OnAPart):
    """``regrow.add_bridgeout`` in a fit: its state in checkpoints, and a plain model at the end.

    The model is plain again when the fit ends, also by an exception.
    The state in checkpoints is the number of the next draw: a fit from ``ckpt_path`` draws what the other
    would have drawn.

    Args:
        p, q: see ``regrow.bridgeout``.
        module: as in ``RePr``. The training step must call the part, because its calls mark the passes.
        calibration: see ``regrow.remove_bridgeout``: unlabelled batches, on the device that the fit uses.
        settings: all other arguments of ``regrow.add_bridgeout``.

    Raises:
        TypeError: ``regrow.add_bridgeout`` takes no such argument.
        ValueError: when the fit begins: what ``regrow.add_bridgeout`` raises; ``module`` is no part.
    """

    def __init__(
        self,
        p: float = 0.3,
        q: float = 1.5,
        *,
        module: str | None = None,
        calibration: Iterable[Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(module)
        self._settings: Mapping[str, Any] = {"p": p, "q": q, **settings}
        check_bridgeout(self._settings)
        self._calibration = calibration
        self._net: nn.Module | None = None
        self._measuring: WithoutGradients | None = None

    def on_fit_start(self, _: Any, pl_module: Any) -> None:
        # Ahead of RePr's on_train_start: no noise can be added while filters are dropped.
        net = pl_module.get_submodule(self._part(pl_module))
        add_bridgeout(net, **self._settings)
        self._net, self._measuring = net, WithoutGradients(net)
        if self._state:
            load_bridgeout_state(net, self._state["noise"])

    def on_fit_end(self, trainer: Any, *_: Any) -> None:
        # Behind RePr's on_train_end: no noise can be removed while filters are dropped.
        self._give_back(trainer, self._calibration)

    def on_exception(self, trainer: Any, *_: Any) -> None:
        self._give_back(trainer, None)

    def _give_back(self, trainer: Any, calibration: Iterable[Any] | None) -> None:
        if self._net is None or self._measuring is None:
            return
        for callback in trainer.callbacks:
            if isinstance(callback, RePr):
                callback.give_back()
        self._state = self.state_dict()
        self._measuring.undo()
        net, self._net, self._measuring = self._net, None, None
        remove_bridgeout(net, calibration)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state) if self._net is None else {"noise": bridgeout_state(self._net)}
