"""Continual backprop: the units of lowest utility are drawn anew, a few at a time, while training goes on."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.criteria.utility import outgoing
from regrow.given import check_inputs, check_optimizer, check_seed, is_real
from regrow.indexing import index_tensor
from regrow.interrupts import uninterrupted
from regrow.marks import Mark, check
from regrow.modules import device_of, unwrap
from regrow.repr.ranks import copy_from_first, first_decides, group_of
from regrow.restarts.fresh import check_fresh
from regrow.restarts.memory import Memory
from regrow.restarts.saved import VERSION, answers, check_saved, whole_number
from regrow.restarts.seeds import seed_of
from regrow.restarts.units import find_units, renew, width_of
from regrow.restarts.watch import Watch
from regrow.short import short

_NAME = "ContinualBackprop"


class ContinualBackprop:
    """Draw the least useful units anew while you train (Dohare et al. 2024, Nature 632, algorithm 1).

    Call ``step()`` after each step of the optimizer. A unit is a filter of a convolution or an output of a
    linear layer between two others. Its contribution in a step is the mean absolute value that arrives at the
    layers which read it, times the sum of the absolute weights by which they read it; its utility is the
    running mean of that, corrected for its age. In each layer ``rate`` × the mature units are counted up in
    each step; whenever the count reaches 1, the mature unit of lowest utility is drawn anew: new incoming
    weights, bias 0, norms reset, outgoing weights 0, age 0. The optimizer forgets what it remembers of these
    weights.

    Args:
        model: any module, also in wrappers. With DDP, give the wrapper and call ``step`` in every process:
            the first process decides. Build this before the model is compiled.
        optimizer: the optimizer that trains ``model``.
        example_inputs: an input of ``model``, such as x[:1], by which the readers of each unit are found.
        rate: share of the mature units that is drawn anew in each step, 0 to 1.
        maturity: steps that a unit is left in peace for.
        decay: of the running mean, at least 0 and below 1.
        seed: of the new weights.
        fresh: a newly built model of the same structure, whose filters are taken as new ones; None draws by
            each layer's ``reset_parameters``.

    Attributes:
        left_out: {qualified name of a convolution or linear layer: why its units are left alone}.

    Raises:
        ValueError: an argument out of range, no layer to work on, a state in which this is refused.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        example_inputs: Any,
        rate: float = 1e-4,
        maturity: int = 100,
        decay: float = 0.99,
        seed: int = 0,
        fresh: nn.Module | None = None,
    ) -> None:
        check(model, _NAME)
        check_optimizer(optimizer, _NAME)
        check_inputs(example_inputs, _NAME)
        check_seed(seed)
        if not is_real(rate) or not 0 <= rate <= 1:
            raise ValueError(f"rate must lie between 0 and 1, such as 1e-4, got {rate!r}.")
        if not is_real(decay) or not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, such as 0.99, got {decay!r}.")
        if isinstance(maturity, bool) or not isinstance(maturity, int) or maturity < 0:
            raise ValueError(f"maturity must be a whole number of steps, at least 0, got {maturity!r}.")
        self._given, self._model, self._optimizer = model, unwrap(model), optimizer
        self._fresh = None if fresh is None else check_fresh(self._model, fresh)
        self._settings: dict[str, Any] = {
            "rate": float(rate), "maturity": maturity, "decay": float(decay), "seed": seed,
        }  # fmt: skip
        units = find_units(self._model, example_inputs)
        self._layers, self.left_out = units.layers, units.left_out
        self._steps = 0
        self._memory = Memory(optimizer)
        self._memory.watch()
        self._utility: dict[str, Tensor] = {}
        self._age: dict[str, Tensor] = {}
        self._places: dict[str, list[tuple[str, Tensor, Tensor]]] = {}
        self._count = dict.fromkeys(self._layers, 0.0)
        for name, readers in self._layers.items():
            layer: Any = self._model.get_submodule(name)
            device = layer.weight.device
            wide = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
            self._utility[name] = torch.zeros(width_of(layer), dtype=wide, device=device)
            self._age[name] = torch.zeros(width_of(layer), dtype=torch.int64)
            self._places[name] = [
                (consumer, index_tensor(reads.filters, device), index_tensor(reads.indices, device))
                for consumer, reads in readers.consumers.items()
            ]
        self._watches: dict[str, Watch] = {}
        mark = _Replacing(self)
        self._marked: list[nn.Module] = []
        for name in dict.fromkeys(
            consumer for readers in self._layers.values() for consumer in readers.consumers
        ):
            module: Any = self._model.get_submodule(name)
            self._watches[name] = Watch(module)
        for name in {*self._layers, *self._watches}:
            module = self._model.get_submodule(name)
            module._regrow_replacing = mark
            self._marked.append(module)
        self._removed = False
        for watch in self._watches.values():
            weakref.finalize(self, watch.remove)

    @torch.no_grad()
    def step(self) -> dict[str, list[int]]:
        """Count a step of the optimizer, and draw units anew whose time has come.

        Returns:
            {qualified name of a layer: indices of its units that are new now}; empty in most steps.

        Raises:
            ValueError: no pass in train mode was seen, NaN activations or weights when a unit is chosen,
                a state in which this is refused. Nothing is changed.
        """
        if self._removed:
            raise ValueError("this ContinualBackprop has been removed from its model; build a new one.")
        self._memory.release()
        live = [
            name for name, places in self._places.items() if any(self._watches[c].seen for c, *_ in places)
        ]
        if not live:
            raise ValueError(
                "step() has seen no pass of the model in train mode: call it after a training step of this "
                "model, build ContinualBackprop before torch.compile, and take DDP in place of "
                "nn.DataParallel."
            )
        rate, maturity = self._settings["rate"], self._settings["maturity"]
        counts = {}
        for name in live:
            mature = int((self._age[name] + 1 > maturity).sum())
            counts[name] = self._count[name] + rate * mature
        due = {name: int(count + 1e-9) for name, count in counts.items()}
        due = {name: number for name, number in due.items() if number}
        if due:
            # What forbids redo forbids a renewal; this method's own row would forbid itself, by its mark.
            check(self._given, "redo", called="ContinualBackprop.step")
        utility, aged = self._updated(live), {name: self._age[name] + 1 for name in live}
        chosen: dict[str, list[int]] = {}
        group = group_of(self._given)
        if due:
            chosen = first_decides(lambda: self._choose(due, utility, aged), group, device_of(self._model))
        with uninterrupted():
            self._steps += 1
            self._utility |= utility
            self._age |= aged
            self._count |= {name: max(0.0, count - due.get(name, 0)) for name, count in counts.items()}
            if chosen:
                self._renew(chosen, group)
        return chosen

    def _updated(self, live: Sequence[str]) -> dict[str, Tensor]:
        """The running means of the layers ``live``, with the contributions of this step."""
        decay = self._settings["decay"]
        used = {name: watch.means * outgoing(watch.module) for name, watch in self._watches.items()}
        found = {}
        for name in live:
            before = self._utility[name]
            now = torch.zeros_like(before)
            for consumer, filters, places in self._places[name]:
                now.index_add_(0, filters, used[consumer].to(before)[places])
            found[name] = before * decay + now * (1 - decay)
        return found

    def _choose(
        self, due: Mapping[str, int], utility: Mapping[str, Tensor], age: Mapping[str, Tensor]
    ) -> dict[str, list[int]]:
        chosen = {}
        for name, number in due.items():
            known = utility[name].double().cpu() / (1 - self._settings["decay"] ** age[name].double())
            if not known.isfinite().all():
                raise ValueError(
                    f"the units of {name!r} have NaN or infinite values: go back to a good state."
                )
            mature = (age[name] > self._settings["maturity"]).nonzero().flatten()
            order = known[mature].argsort(stable=True)
            chosen[name] = sorted(mature[order[:number]].tolist())
        return chosen

    def _renew(self, chosen: Mapping[str, list[int]], group: Any) -> None:
        self._memory.look()
        seed = seed_of(self._settings["seed"], self._steps)
        masks = renew(self._model, self._layers, chosen, seed, self._fresh)
        if group is not None:
            copy_from_first([*self._model.parameters(), *self._model.buffers()], group)
        self._memory.clear(masks)
        for name, indices in chosen.items():
            self._utility[name][indices] = 0
            self._age[name][indices] = 0

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to continue exactly: tensors, numbers and strings only."""
        return {
            "version": VERSION,
            "settings": dict(self._settings),
            "steps": self._steps,
            "layers": {
                name: {
                    "utility": self._utility[name].cpu().clone(),
                    "age": self._age[name].clone(),
                    "count": self._count[name],
                }
                for name in self._layers
            },
            "copies": self._memory.known(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from where ``state_dict`` was taken. Load the states of the model and the optimizer too.

        Raises:
            ValueError: the state is of another version, has other settings or does not fit the model.
                Nothing is changed.
        """
        self.check_state_dict(state)
        with uninterrupted():
            self._steps = state["steps"]
            self._memory = Memory(self._optimizer, dict(state["copies"]))
            for name, saved in state["layers"].items():
                self._utility[name] = saved["utility"].to(self._utility[name], copy=True)
                self._age[name] = saved["age"].cpu().clone()
                self._count[name] = float(saved["count"])

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` unless ``load_state_dict`` would take ``state``; nothing is changed."""
        if self._removed:
            raise ValueError("this ContinualBackprop has been removed from its model; build a new one.")
        check_saved(state, _NAME, self._settings, ["steps", "layers", "copies"])
        whole_number(state["steps"], "steps", _NAME)
        answers(state["copies"], _NAME)
        layers = state["layers"]
        if not isinstance(layers, Mapping) or set(layers) != set(self._layers):
            raise ValueError(f"the state is of other layers than {', '.join(self._layers)}: {short(layers)}.")
        for name, saved in layers.items():
            self._check_layer(name, saved)

    def _check_layer(self, name: str, saved: Any) -> None:
        width = len(self._age[name])
        if not isinstance(saved, Mapping) or {"utility", "age", "count"} - set(saved):
            raise ValueError(f"the state of {name!r} has utility, age and count, got {short(saved)}.")
        utility, age, count = saved["utility"], saved["age"], saved["count"]
        good = isinstance(utility, Tensor) and utility.is_floating_point() and utility.shape == (width,)
        good = good and isinstance(age, Tensor) and age.dtype == torch.int64 and age.shape == (width,)
        good = good and not isinstance(count, bool) and isinstance(count, int | float)
        if not good or not 0 <= count < width + 1 or bool((age < 0).any()) or not utility.isfinite().all():
            raise ValueError(f"the state does not fit the {width} units of {name!r}.")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError(
            "a ContinualBackprop cannot be copied or pickled, because it works on one model and one "
            "optimizer. Save its state_dict(); build it anew, on the copies of both, and give it the state "
            "by load_state_dict(state)."
        )

    def remove(self) -> None:
        """Take everything off the model; its weights stay as they are."""
        for watch in self._watches.values():
            watch.remove()
        for module in self._marked:
            vars(module).pop("_regrow_replacing", None)
        self._removed = True


class _Replacing(Mark):
    """The mark on the layers that continual backprop works on; empty if the object is deleted."""

    travels = False

    def __init__(self, owner: ContinualBackprop) -> None:
        self._owner = weakref.ref(owner)

    def state(self) -> str:
        return "replacing units" if self._owner() is not None else ""

    def undo(self, module: nn.Module) -> None:  # noqa: ARG002
        """End continual backprop for all its layers."""
        if (owner := self._owner()) is not None:
            owner.remove()
