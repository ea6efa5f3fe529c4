"""RePr: drop the filters that overlap most, train without them, restore them with orthogonal rows; repeat."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regrow.callers import warn
from regrow.criteria.score import Criterion
from regrow.criteria.select import check_selection
from regrow.filters import check_finite
from regrow.given import check_inputs, check_module, check_optimizer, names_given
from regrow.interrupts import uninterrupted
from regrow.log import first_line, gave_up
from regrow.looking.calls import PassFailed, run
from regrow.looking.copies import NotCopied, copied, dtypes, inputs_as
from regrow.marks import Mark, check, marks_on
from regrow.modules import device_of, unwrap
from regrow.repr.averaged import Averaged
from regrow.repr.events import Event
from regrow.repr.jumps import jump, largest_outputs
from regrow.repr.layers import usable_layers
from regrow.repr.narrow import check_plan, narrow
from regrow.repr.ranks import copy_from_first, first_decides, group_of
from regrow.repr.restoring import Filters, check_restoring, restart_filters
from regrow.repr.slots import Copies, keeps_tensors, stepping
from regrow.repr.state import VERSION, check_state, phase_at
from regrow.repr.subphase import SubPhase, check_memory, phases_on
from regrow.repr.weakest import Batches, Weakest
from regrow.repr.worth import judge
from regrow.short import listed
from regrow.surgery.plan import CutPlan, NoPlan, PlanUnfit
from regrow.surgery.planning import plan_removal_and_cut
from regrow.surgery.removal import plan_removal
from regrow.torch_private import takes_step_hooks, tree_map_only

# At less than this share of the highest learning rate, a network heals too slowly after a drop or restore.
_LOW_RATE = 0.1


class RePr:
    """Drop and restore filters while you train a model in your own loop (RePr, arXiv 1811.07275, §3).

    Call ``step()`` once per epoch, or once per batch: ``full`` and ``sub`` count these calls. After ``full``
    calls the filters with the lowest scores are dropped: they emit exactly 0, and no optimizer moves them.
    After ``sub`` more calls they are restored with new directions. With ``sub=0`` they are dropped and
    restored at once, in the same call (a restart). After ``cycles`` cycles ``step()`` does nothing. Keep the
    learning rate high until the last restore: near a rate of 0 the network cannot heal.

    Args:
        model: any module, also in a DDP or ``torch.compile`` wrapper. Grouped and depthwise convolutions are
            left alone; ``left_out`` names every convolution that is left alone, and why. With DDP, give the
            wrapper and call ``step`` in every process: the first process decides for all, and after each
            drop and restore all processes have its weights and buffers, bit for bit.
        optimizer: the optimizer that trains ``model``, also as Accelerate prepares it.
        fraction: share of the ranked filters to drop, 0 ≤ fraction < 1.
        full, sub: lengths of the two phases of a cycle, in calls of ``step``. With ``sub=0`` there is no
            phase without the dropped filters, and ``compact`` has no effect.
        cycles: the number of cycles.
        criterion: a criterion of ``score``, such as ``"ortho"`` (the paper's overlap), ``"random"`` or
            ``"taylor"``; or a function of the model that returns {name: Tensor[filters]}, higher = keep. A
            state has the function's qualified name only: give the function again when you resume.
        batches, loss: what the criteria that read pictures need (see ``score``). ``batches`` are read in
            every cycle: a loader, a list, or a function that returns them. With DDP, only the first process
            reads them.
        consumers: the weights by which other layers read a restored channel. ``"zero"``: 0, so that the
            restore does not change the network's output. ``"keep"``: the weights from before the drop, by
            which a net without norms can collapse. ``"init"``: newly drawn weights.
        rows: the rows of the restored filters. ``"orthogonal"``: the paper's, in directions that no other
            filter of the layer uses, with the mean length of the kept rows. ``"init"``: drawn as PyTorch
            draws a new layer, uniform in ±1/√(inputs of a filter).
        compact: with True, leave dropped filters out of the computation in the sub phase (``narrow``); with
            False, compute them and hold them at 0, which gives the same results up to rounding. None takes
            what is quicker: it leaves them out on a CPU, and on a GPU where a pass saves enough
            multiply-accumulates to pay for the kernels that it needs more (``worth``). Where no plan can be
            confirmed, and in ``nn.DataParallel``, dropped filters are computed, and the event's notes say
            so. ``torch.compile`` compiles once after each drop, and not at a restore.
        scope: ``"global"`` ranks all filters together, ``"layer"`` drops the same share of every layer.
        floor: share of every layer that always stays alive.
        exclude: qualified names of convolutions, or of containers of convolutions, to leave alone.
        skip_first: leave out the first convolution that the input reaches, as the authors advise.
        seed: with equal weights, the same seed gives the same choices.
        example_inputs: an input of ``model`` (a tensor, a tuple of arguments, a dict of keywords); one
            picture is enough. RePr traces the model with it to find the norms and layers that read a channel.

    Raises:
        ValueError: an argument out of range, an unknown name, no convolution left, an optimizer that
            does not hold the model's parameters, NaN weights, a sharded model (FSDP). Nothing is changed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        example_inputs: Any,
        fraction: float = 0.3,
        full: int = 20,
        sub: int = 10,
        cycles: int = 3,
        criterion: Criterion = "ortho",
        batches: Batches | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        consumers: str = "zero",
        rows: str = "orthogonal",
        compact: bool | None = None,
        scope: str = "global",
        floor: float = 0.1,
        exclude: Iterable[str] = (),
        skip_first: bool = True,
        seed: int = 0,
    ) -> None:
        check(model, "RePr")
        check_optimizer(optimizer, "RePr")
        check_inputs(example_inputs, "RePr")
        for name, value, least in (("full", full, 1), ("sub", sub, 0), ("cycles", cycles, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
        check_selection(fraction, scope, floor)
        self._weakest = Weakest(criterion, batches, loss, often=cycles > 1)
        check_restoring(consumers, rows)
        if not isinstance(seed, int):
            raise ValueError(f"seed must be a whole number, got {seed!r}.")
        optimizer = _seen(optimizer)
        if compact is not None and not isinstance(compact, bool):
            raise ValueError(f"compact must be True, False or None (what is quicker), got {compact!r}.")
        exclude = names_given(exclude, "exclude")
        self._model = unwrap(model)
        self._group = group_of(model)
        self._optimizer = optimizer
        self._settings: dict[str, Any] = {
            "fraction": float(fraction), "full": full, "sub": sub, "cycles": cycles,
            "criterion": self._weakest.name,
            "consumers": consumers, "rows": rows, "scope": scope, "floor": float(floor), "exclude": exclude,
            "skip_first": bool(skip_first), "seed": seed,
        }  # fmt: skip
        layers = usable_layers(model, optimizer, example_inputs, exclude, skip_first)
        self._readers, self._layers = layers.readers, layers.usable
        self.left_out = dict(layers.left_out)
        self._replicated = isinstance(model, nn.DataParallel)
        self._compact = compact
        # Clones: a view, such as x[:1], would keep the whole batch in memory.
        self._example_inputs = tree_map_only(Tensor, lambda x: x.detach().clone(), example_inputs)
        self._dtypes = dtypes(self._model)
        self._step = 0
        self._highest_rate = self._rate()
        self._copies = Copies(optimizer)
        self._averaged: list[Averaged] = []
        self._sub: SubPhase | None = None
        self._removed = False
        self._mark = _InCycle(self)
        for name in self._layers:
            self._conv(name)._regrow_cycle = self._mark
        self._copies.watch()

    @property
    def phase(self) -> str:
        """``"full"``, ``"sub"``, or ``"done"`` after the last restore."""
        return phase_at(self._settings, self._step)

    @property
    def keep(self) -> dict[str, Tensor]:
        """{qualified name: BoolTensor[filters]} of the layers RePr works on, True = alive."""
        dropped = self._sub.dropped if self._sub else {}
        return {name: self._mask(name, dropped.get(name, [])) for name in self._layers}

    def _mask(self, name: str, dropped: list[int]) -> Tensor:
        mask = torch.ones(self._conv(name).out_channels, dtype=torch.bool)
        mask[dropped] = False
        return mask

    def step(self) -> Event | None:
        """Count one epoch (or batch), and drop or restore filters when their time has come.

        Returns:
            The drop, the restore, or with ``sub=0`` the restart, if there was one.

        Raises:
            ValueError: NaN or infinite weights at a drop or restore; nothing is changed or counted.

        Warns:
            UserWarning: filters are dropped or restored at less than a tenth of the highest rate so far; a
                restore makes the output on ``example_inputs`` more than ten times as large; something has
                moved dropped filters, which are at 0 again then; or the weights are trained, and no step of
                the optimizer was seen.
        """
        self._check_not_removed()
        with _outside_inference_mode():
            return self._counted()

    def _counted(self) -> Event | None:
        self._warn_of_others()
        self._copies.release()
        self._highest_rate = max(self._highest_rate, self._rate())
        cycle, position = divmod(self._step, self._length)
        event = None
        if cycle < self._settings["cycles"]:
            if position + 1 == self._settings["full"]:
                event = self._drop(cycle) if self._settings["sub"] else self._restart(cycle)
            elif position + 1 == self._length:
                event = self._restore(cycle)
        if event is None:  # a drop or restore counts its step itself
            self._step += 1
        return event

    @property
    def _length(self) -> int:
        return int(self._settings["full"] + self._settings["sub"])

    def _drop(self, cycle: int) -> Event:
        decided = self._first_decides(lambda: self._choose(cycle))
        for warning in decided["warnings"]:
            warn(warning)
        self._warn_if_rate_is_low("dropped")
        self._copy_from_first()
        plan = decided["plan"] and CutPlan.from_dict(decided["plan"])
        with uninterrupted():
            self._sub = self._begin(decided["dropped"], None, plan, decided["silenced"])
            self._step += 1
        notes = decided["notes"] + self._first_decides(lambda: self._sub.notes if self._sub else [])
        return Event("drop", self._step, cycle + 1, decided["dropped"], notes=notes)

    def _choose(self, cycle: int) -> dict[str, Any]:
        """The filters to drop and a plan to compute without them, as plain JSON-able data."""
        dropped, said = self._choose_weakest(cycle)
        plan, silenced, reasons = self._plan(dropped)
        return {
            "dropped": dropped,
            "silenced": silenced,
            "plan": plan and plan.to_dict(),
            "warnings": said,
            "notes": said + reasons,
        }

    def _choose_weakest(self, cycle: int) -> tuple[dict[str, list[int]], list[str]]:
        settings = self._settings
        seed = _seed(settings["seed"], cycle, 0)
        return self._weakest.of(self._model, settings, exclude=self.left_out, seed=seed)

    def _restart(self, cycle: int) -> Event:
        """Drop filters and restore them at once."""
        dropped, said = self._first_decides(lambda: self._choose_weakest(cycle))
        for warning in said:
            warn(warning)
        self._warn_if_rate_is_low("restarted")
        self._copy_from_first()
        before = largest_outputs(self._model, self._inputs())
        with uninterrupted():
            least_covered, notes = restart_filters(
                Filters(self._model, self._layers, dropped),
                self._optimizer,
                self._copies,
                consumers=self._settings["consumers"],
                new_rows=self._settings["rows"],
                generator=self._generator(cycle),
                averaged=self._averaged,
                agree=self._copy_from_first,
            )
            self._step += 1
        self._warn_of_a_jump(before)
        told = self._first_decides(lambda: {"least_covered": least_covered, "notes": said + notes})
        return Event("restart", self._step, cycle + 1, dropped, **told)

    def _restore(self, cycle: int) -> Event:
        sub = self._sub
        assert sub is not None
        self._first_decides(lambda: check_finite({name: self._conv(name) for name in sub.dropped}))
        self._warn_if_rate_is_low("restored")
        before = largest_outputs(self._model, self._inputs())
        with uninterrupted():
            # Processors may round the decomposition differently, and the processes need equal rows.
            least_covered, notes = sub.restore(self._generator(cycle), agree=self._copy_from_first)
            self._sub = None
            self._step += 1
        self._warn_of_a_jump(before)
        if sub.captured:
            notes.append("capture your CUDA graph again: it computes without the filters restored now.")
        said = self._first_decides(lambda: {"least_covered": least_covered, "notes": notes})
        return Event("restore", self._step, cycle + 1, sub.dropped, **said)

    def _generator(self, cycle: int) -> torch.Generator:
        return torch.Generator().manual_seed(_seed(self._settings["seed"], cycle, 1))

    def _first_decides(self, decide: Callable[[], Any]) -> Any:
        return first_decides(decide, self._group, device_of(self._model))

    def _copy_from_first(self) -> None:
        if self._group is not None:
            copy_from_first([*self._model.parameters(), *self._model.buffers()], self._group)

    def _plan(
        self, dropped: Mapping[str, list[int]]
    ) -> tuple[CutPlan | None, dict[str, list[int]], list[str]]:
        """A plan to compute without ``dropped``, the channels of norms behind sums that fall silent too, and
        notes on the layers that go on computing their dropped filters."""
        if not dropped:
            return None, {}, []
        keep = {name: self._mask(name, indices) for name, indices in dropped.items()}
        inputs, notes = self._inputs(), []
        if self._replicated and self._compact is not False:
            notes = [
                "all dropped filters are computed and held at 0, because nn.DataParallel copies the model in "
                "every pass: use DistributedDataParallel."
            ]
        elif self._compact is not False:
            try:
                planned = plan_removal_and_cut(
                    self._model, keep, inputs, readers=self._readers, followers=False
                )
                check_plan(self._model, planned.plan)
            except (NoPlan, PlanUnfit, NotCopied, PassFailed) as error:
                notes = [
                    "all dropped filters are computed and held at 0, because no plan could be made: "
                    f"{first_line(error)}"
                ]
            else:
                notes = [
                    f"{name}: its dropped filters are computed and held at 0, because {why}."
                    for name, why in planned.plan.masked.items()
                ]
                return planned.plan, dict(planned.removal.silenced), notes
        try:
            removal = plan_removal(self._model, keep, inputs, self._readers, followers=False)
        except (NotCopied, PassFailed) as error:
            gave_up("silencing norms behind sums", error)
            return None, {}, notes
        return None, dict(removal.silenced), notes

    def _inputs(self) -> Any:
        """``example_inputs`` where the model is now, and in its numbers if it has changed its type."""
        device, now = device_of(self._model), dtypes(self._model)
        inputs = tree_map_only(Tensor, lambda tensor: tensor.to(device), self._example_inputs)
        return inputs_as(inputs, now.pop()) if now != self._dtypes and len(now) == 1 else inputs

    def _warn_of_a_jump(self, before: list[float]) -> None:
        what = "restore" if self._settings["sub"] else "restart"
        after = largest_outputs(self._model, self._inputs())
        if warning := jump(before, after, self._settings["consumers"], what, "build RePr"):
            warn(warning)

    def _begin(self, dropped: Any, memory: Any, plan: CutPlan | None, silenced: Any) -> SubPhase:
        model, consumers = self._model, self._settings["consumers"]
        return SubPhase(
            model, self._optimizer, self._layers, dropped, consumers, memory, plan, silenced, self._copies,
            self._averaged, self._worth(plan), self._replicated, self._settings["rows"],
        )  # fmt: skip

    def _worth(self, plan: CutPlan | None) -> Callable[[Any], bool] | None:
        """See ``SubPhase``; it is asked where the choice is ours and depends on the size of the batches."""
        if plan is None or self._compact is not None or device_of(self._model).type == "cpu":
            return None
        try:
            return judge(self._model, plan, self._inputs())
        except (NotCopied, PassFailed) as error:
            gave_up("judging whether leaving out dropped filters is worth it", error)
            return None

    def join(self, group: dist.ProcessGroup) -> None:
        """Let the first process of ``group`` decide for all, from the next call of ``step`` on.

        A DDP wrapper given as ``model`` says by itself which processes train one network. Where the model is
        a part of what is wrapped, say it before the first ``step``, in every process.
        """
        self._check_not_removed()
        self._group = group

    def follow(self, averaged: nn.Module | Mapping[str, Tensor]) -> None:
        """Pass all further drops and restores on to an averaged copy of the model (EMA, SWA).

        At a drop the copy's entries of the dropped filters, and of the norms behind them, become 0; at the
        restore all that gets new values in the model gets them in the copy too. If filters are dropped now,
        they become 0 in the copy at once. A copy that does not follow goes on averaging old filters with new
        ones. Follow a copy again after a resume, because ``state_dict`` does not contain it.

        Args:
            averaged: ``AveragedModel``, timm's ``ModelEmaV3``, a deep copy of the model, or a dictionary
                {name of the model's parameter or buffer: tensor}, which is written to in place.

        Raises:
            ValueError: ``averaged`` does not fit the model, or is the model itself. Nothing is changed.
        """
        self._check_not_removed()
        copy = Averaged(averaged, self._model)
        self._averaged.append(copy)
        if self._sub is not None:
            self._sub.silence_in(copy)

    def _warn_of_others(self) -> None:
        """Warn if dropped filters have moved, or if weights train and no step of the optimizer was seen."""
        if self._sub is None:
            return
        if names := self._sub.moved_now(last=(self._step + 1) % self._length == 0):
            warn(
                f"dropped filters of {listed(names)} held other values than 0: something beside the steps "
                "of the optimizer moves them. They are at 0 again. If one optimizer wraps another, give RePr "
                "the outer one; if averaged weights are swapped in, call cycle.follow(the averaged copy); if "
                "a CUDA graph was captured before the drop, capture it again after each drop and restore."
            )
        if self._sub.missed_steps():
            warn(
                f"the weights are trained, but no step of {type(self._optimizer).__name__} was seen since "
                "filters were dropped, so nothing holds them at 0 between the calls of cycle.step(). Give "
                "RePr the optimizer whose step() is called."
            )

    def state_dict(self) -> dict[str, Any]:
        """All that RePr needs to continue exactly: tensors, numbers, strings and lists of these."""
        return {
            "version": VERSION,
            "settings": dict(self._settings),
            "step": self._step,
            "highest_rate": self._highest_rate,
            "sub_phase": None if self._sub is None else self._sub.state(),
            "copies": dict(self._copies.known),
        }

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` unless ``load_state_dict`` would take ``state``; nothing is changed."""
        check_state(state, self._settings)
        sub = state["sub_phase"]
        if sub:
            check_memory(self._model, self._layers, self._settings["consumers"], sub)
            if self._compact is not False and sub.get("plan") is not None:
                self._try_plan(CutPlan.from_dict(sub["plan"]))

    def _try_plan(self, plan: CutPlan) -> None:
        """Raise ``ValueError`` if the model cannot run by ``plan``, which may fit each layer by itself."""
        check_plan(self._model, plan)
        try:
            copy = copied(self._model)
            with narrow(copy, plan):
                run(copy, self._inputs(), training=False)
        except NotCopied as error:
            gave_up("trying the plan of a state on a copy", error)
        except PassFailed as error:
            raise ValueError(f"the model cannot run by the state's plan: {first_line(error)}") from None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from where ``state_dict`` was taken, even in the middle of a sub phase.

        Load the states of the model and the optimizer too, before or after. If ``compact`` is not the same as
        in the saved run, training continues equal up to rounding, and not bit for bit.

        Raises:
            ValueError: the state is of another version, has other settings or does not fit the model.
                Nothing is changed.
        """
        self._check_not_removed()
        with _outside_inference_mode():
            self.check_state_dict(state)
            self._load(state)

    def _load(self, state: Mapping[str, Any]) -> None:
        sub = state["sub_phase"]
        plan, silenced = None, {}
        if sub:
            silenced = sub.get("silenced", {})
            if self._compact is not False and sub.get("plan"):
                # A new plan could round differently.
                plan = CutPlan.from_dict(sub["plan"])
            elif self._compact:
                plan = self._plan(sub["dropped"])[0]
        with uninterrupted():
            if self._sub is not None:
                self._sub.release()
            self._step = int(state["step"])
            self._highest_rate = float(state["highest_rate"])
            self._copies.known = dict(state.get("copies", {}))
            self._sub = self._begin(sub["dropped"], sub, plan, silenced) if sub else None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError(
            "a RePr cannot be copied or pickled, because it works on one model and one optimizer. Save "
            "cycle.state_dict(); build RePr anew, on the copies of both, and give it the state by "
            "load_state_dict(state)."
        )

    def remove(self) -> None:
        """Take all of RePr's hooks off the model and the optimizer.

        Filters that are dropped at this moment stay at 0. Nothing holds them there any more, but no gradient
        reaches them through a ReLU: remove RePr in a full phase, or cut these filters.
        """
        if self._sub is not None:
            self._sub.release()
        self._copies.release()
        self._sub, self._removed = None, True
        for name in self._layers:
            if vars(self._conv(name)).get("_regrow_cycle") is self._mark:  # not that of a later cycle
                del self._conv(name)._regrow_cycle

    def _check_not_removed(self) -> None:
        if self._removed:
            raise ValueError("this RePr has been removed from its model; build a new one.")

    def _conv(self, name: str) -> Any:
        return self._model.get_submodule(name)

    def _rate(self) -> float:
        """The highest rate of weights; biases and norms may have rates of their own while they warm up."""
        groups = self._optimizer.param_groups
        weights = [group for group in groups if any(each.dim() > 1 for each in group["params"])]
        return max(float(group["lr"]) for group in weights or groups)

    def _warn_if_rate_is_low(self, what: str) -> None:
        rate = self._rate()
        if rate < _LOW_RATE * self._highest_rate * (1 - 1e-6):
            warn(
                f"filters are {what} at a learning rate of {rate:.3g}, far below the highest "
                f"so far ({self._highest_rate:.3g}): the network may not heal. Keep the rate high until the "
                "last restore, and lower it after that."
            )


class _InCycle(Mark):
    """The mark on the layers that a cycle works on; its state is empty if the cycle is done or deleted."""

    travels = False

    def __init__(self, cycle: RePr) -> None:
        self._cycle = weakref.ref(cycle)

    def state(self) -> str:
        cycle = self._cycle()
        return "in a cycle" if cycle is not None and cycle.phase != "done" else ""

    def undo(self, module: nn.Module) -> None:
        """End the cycle for all its layers."""
        if (cycle := self._cycle()) is not None:
            cycle.remove()
        vars(module).pop("_regrow_cycle", None)


def release(model: nn.Module) -> dict[str, Any]:
    """Take every RePr off ``model``, in place, as ``cycle.remove()`` does, without the cycle object.

    Use it after a training loop that broke off: in a sub phase, layers still compute without their dropped
    filters, and the optimizer holds these at 0. Filters that are dropped at this moment stay at 0.

    Args:
        model: any module, in its wrappers or without. Without a RePr on it, nothing is done.

    Returns:
        A JSON-able record: version; dropped {qualified name: indices of the filters that are at 0}.

    Raises:
        ValueError: ``model`` is no ``nn.Module``.
    """
    check_module(model, "release")
    model = unwrap(model)
    dropped = {name: indices for phase in phases_on(model) for name, indices in phase.dropped.items()}
    for phase in phases_on(model):
        phase.release()
    for _, module, mark in list(marks_on(model)):
        if isinstance(mark, _InCycle):
            mark.undo(module)
    return {"version": VERSION, "dropped": dropped}


def _outside_inference_mode() -> AbstractContextManager[Any]:
    # No tensor that is made in inference mode could be used in training afterwards.
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def _seen(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer whose steps can be seen: ``optimizer``, or the one in a wrapper such as Accelerate's.

    A wrapper that takes no hooks and keeps nothing of its own only hides the optimizer inside.

    Raises:
        ValueError: such a wrapper does not hold exactly one optimizer.
    """
    own = takes_step_hooks(optimizer) or "state" in vars(optimizer) or keeps_tensors(optimizer)
    if own and stepping(optimizer):
        return optimizer
    inside = [value for value in vars(optimizer).values() if isinstance(value, torch.optim.Optimizer)]
    if own or len(inside) != 1:
        raise ValueError(
            f"{type(optimizer).__name__} wraps an optimizer and takes no hooks: pass the one inside it, "
            "such as optimizer.optimizer."
        )
    return _seen(inside[0])


def _seed(seed: int, cycle: int, part: int) -> int:
    # Not drawn from a running generator, so a cycle's choices do not depend on earlier draws.
    return (seed * 1_000_003 + cycle * 2 + part) % 2**63
