"""What a masked copy of a model shows: which channels are zero whatever comes in, and whether a cut computes
the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from regrow.filters import named_parts
from regrow.indexing import channel_dim, index_tensor
from regrow.looking.aliveness import Aliveness
from regrow.looking.calls import floating
from regrow.looking.copies import copied, unwritten
from regrow.looking.hooks import channel_layers, hooked, idle, stock
from regrow.looking.probing import (
    NoDropout,
    buffers_kept,
    copied_as,
    disarm,
    dtypes,
    inputs_as,
    noise_like,
    run,
)
from regrow.structure.confirm import Noise, unsettle
from regrow.structure.readers import Norm
from regrow.surgery.evidence import Look, Seen, close, largest, replayed, scale_of
from regrow.surgery.layers import CutPlan, apply_plan
from regrow.surgery.removal import Removal

_NONE = torch.zeros(0, dtype=torch.int64)


class Probe:
    """A copy of a model with filters removed by masks, to hold plans against.

    Attributes:
        dead: convolution or linear layer → BoolTensor[channels]: which input channels are 0 whatever comes
            in. Layers that no pass reached are not listed.
        norms: those that ran.
        own: convolution → the norm that reads its output, and nothing else's.
        way: the way that the inputs take by which plans are compared in eval mode.
        exercised: the layers that computed something in the passes that plans are compared by.
        confirms_removal: what the readers say of the filters that are removed is so: their norms read and
            make 0 in their channels, and rows that go along read nothing else.
        partial: some layers ran in none of these passes, and may read anything in training.
    """

    def __init__(
        self,
        model: nn.Module,
        removal: Removal,
        example_inputs: Any,
        *,
        quick: bool = False,
        spare: nn.Module | None = None,
    ) -> None:
        """Copy ``model``, remove the filters and look at a few passes.

        Args:
            quick: compute in float32, and set dropped channels to 0 in what PyTorch's own convolutions make,
                with weights as they are. What this confirms is so; it may refute what is right.
            spare: a copy of the model, in evaluation mode, which is used up.

        Raises:
            ValueError: which layers run depends on the data.
        """
        self._quick = quick
        self._dropout: NoDropout | None = None
        example = self._take(model, removal, example_inputs, spare)
        self.own, self.way = self._look.own(), self._look.way
        self.norms = [name for name, _ in self.way if isinstance(self._modules[name], Norm)]
        self.dead, others = self._find_dead(example)
        self.confirms_removal = self._look.silent and all(
            self._follows(name, rows) for name, rows in removal.followers.items()
        )
        self.exercised = self._expected[False].made | self._expected.get(True, Seen()).made
        ran = set(self._expected[False].ran)
        every = {name for name, _ in self._layers}
        self.partial = True not in self._expected and ran != every
        for other in others:
            if other != ran:
                some = ", ".join(repr(name) for name in sorted(other ^ ran)[:3])
                raise ValueError(
                    f"which layers run depends on the data ({some}): regrow cannot tell what reads the "
                    "filters. Cut the parts that always run, each as a model of its own."
                )

    def _take(self, model: nn.Module, removal: Removal, example_inputs: Any, spare: nn.Module | None) -> Any:
        """Copy the model in the most precise numbers that its code bears, and look at it; the example in
        those numbers."""
        for dtype in (torch.float32, None) if self._quick else (torch.float64, torch.float32, None):
            if spare is not None and dtypes(spare) == {dtype}:
                self._model = spare.requires_grad_(False)
            else:
                self._model = copied_as(model, dtype)
            self._dtype, example = dtype, inputs_as(example_inputs, dtype)
            disarm(self._model)
            self._modules: dict[str, Any] = dict(named_parts(self._model))
            self._layers = channel_layers(self._model)
            self._stock = {name for name, module in self._layers if stock(module)}
            self._gone = {name: index_tensor(filters) for name, filters in removal.gone.items() if filters}
            self._muted = {
                name: filters for name, filters in self._gone.items() if self._quick and name in self._stock
            }
            self._noise = Noise(2)
            with torch.no_grad():
                unsettle(self._model, torch.Generator().manual_seed(0))
                removal.apply(self._model, keep_rows=self._muted)
            self._lazy = self._unwritten(self._stock)
            precise = dtypes(self._model) == {torch.float64}
            self._tolerance = 1e-6 if precise else 1e-4 if self._quick else 1e-3
            try:
                self._refer(example, removal)
                return example
            except Exception:  # a dtype written into the model's code
                if dtype is None:
                    raise
        raise AssertionError

    def _refer(self, example: Any, removal: Removal) -> None:
        """Find inputs to compare plans by, and note what masks give in each mode that can be compared."""
        one, two = noise_like(example, 1), noise_like(example, 2)
        # Two pictures are twice the work; a norm of a single value per channel needs them to train.
        for inputs in (one, two, example) if self._quick else (two, one, example):
            self._inputs, self._look = inputs, Look(self._modules, self._stock, removal.norms)
            try:
                self._expected = {False: self._see(False, note=self._look.note)}
            except Exception:  # the model takes no other batch, or no such numbers
                if inputs is example:
                    raise
                continue
            try:
                self._expected[True] = self._seen_in_training()
            except Exception:  # a model that needs targets to train, or a batch of several
                if inputs is not example:
                    continue
            return

    def _seen_in_training(self) -> Seen:
        """What masks give in train mode."""
        seen = self._trained()
        if seen.drew:  # it may have been a dropout that did: each call is looked at
            self._dropout = NoDropout()
            seen = self._trained()
        return seen

    def _trained(self) -> Seen:
        """One pass in train mode.

        Where all convolutions and linear layers are PyTorch's own, which do the same in either mode, noise
        stands for what they compute: what is between them is left to compare.
        """
        plain = all(name in self._stock for name, module in self._layers if not isinstance(module, Norm))
        if self._quick and plain:
            with suppress(Exception), buffers_kept(self._model):  # noise may be more than the model bears
                seen = self._see(True, noisy=True)
                if seen.ran == self._expected[False].ran:
                    return seen
        with buffers_kept(self._model):
            return self._see(True)

    def _follows(self, name: str, rows: Sequence[int]) -> bool:
        """Whether all that ``rows`` of a grouped convolution read is 0 whatever comes in."""
        conv = self._modules[name]
        groups = index_tensor(rows) // (conv.out_channels // conv.groups)
        return name in self.dead and bool(self.dead[name].view(conv.groups, -1)[groups].all())

    def refutes(
        self, plan: CutPlan, present: Mapping[str, Tensor], *, last: bool = False
    ) -> list[str] | None:
        """None if ``plan`` computes what the masks do, in eval and train mode; else the layers that had run,
        one after the other, when it turned out that it does not.

        Args:
            present: layer → BoolTensor[channels]: which of its input channels the plan leaves in the
                tensor that arrives. Layers not listed: all.
            last: the probe is used up.
        """
        if any(self._lacks(name, columns) for name, columns in plan.columns.items()):
            return []
        self._lazy = self._unwritten(self._lazy)
        cut = self._model if last else copied(self._model)
        ran: list[str] = []
        arriving = {
            name: (len(mask), mask.nonzero().flatten()) for name, mask in present.items() if not mask.all()
        }
        try:
            apply_plan(cut, plan)
            for training, expected in self._expected.items():
                self._compare(cut, training, expected, plan, arriving, ran)
        except Exception:  # a difference, or what the model raises at tensors of a width it does not know
            return ran
        self._confirmed = plan, cut
        return None

    def _lacks(self, name: str, columns: Sequence[int]) -> bool:
        """Whether a layer that reads ``columns`` alone does without a channel that is not always 0."""
        alive = ~self.dead.get(name, torch.ones(0, dtype=torch.bool))
        if len(alive):  # else nothing is known of it
            alive[index_tensor(columns)] = False
        return bool(alive.any())

    @property
    def folds(self) -> bool:
        """Whether a linear layer reads another number of features than the layer before it makes: which
        channel they are of may depend on the size of the picture."""
        made = [0, *(channels for _, channels in self.way)]
        layers = zip(self.way, made, strict=False)
        return any(
            isinstance(layer := self._modules[name], nn.Linear) and layer.in_features != before
            for (name, _), before in layers
        )

    def look_at(self, example_inputs: Any) -> None:
        """Take back that channels are dead where these inputs, of another size, show something in them."""
        dead, _ = self._find_dead(inputs_as(example_inputs, self._dtype))
        self.dead = {
            name: mine & dead[name] if name in dead and len(dead[name]) == len(mine) else mine & False
            for name, mine in self.dead.items()
        }

    def _unwritten(self, names: Collection[str]) -> set[str]:
        """Those of ``names`` whose weights are the model's, for all that is known."""
        weights = {name: self._modules[name]._parameters.get("weight") for name in names}
        return {name for name, weight in weights.items() if weight is not None and unwritten(weight)}

    def weights_left(self, plan: CutPlan) -> dict[str, Tensor]:
        """What ``plan``, which is the last that was confirmed, leaves of the model's weights, of those layers
        whose weights are not copies."""
        confirmed, cut = self._confirmed
        assert confirmed is plan
        layers: dict[str, Any] = dict(named_parts(cut))
        smaller = self._lazy.intersection([*plan.rows, *plan.columns, *plan.spread])
        return {name: layers[name]._parameters["weight"].detach() for name in smaller}

    def separable(self, name: str, *, rows: bool) -> bool:
        """Whether a convolution or linear layer computes each filter (``rows``), or sums over each input
        channel, by itself. A layer that standardises its weights does the first alone."""
        module = self._modules[name]
        if name in self._stock:
            return True
        if name not in self._look.samples:
            return False
        given = self._look.samples[name]
        dim = channel_dim(module, given)
        groups = getattr(module, "groups", 1)
        read, filters = given.shape[dim] // groups, len(module.weight)
        halves = {"rows": list(range(0, filters, 2))} if rows else {"columns": list(range(0, read, 2))}
        picked = None if rows else halves["columns"]
        plan = CutPlan(**{part: {"layer": indices} for part, indices in halves.items()})  # type: ignore[arg-type]
        if groups > 1:
            stay = range(0, groups, 2)
            halves = {"rows": [i for i in range(filters) if i // (filters // groups) in stay]}
            picked = [i for i in range(given.shape[dim]) if i // read in stay]
            plan = CutPlan(rows={"layer": halves["rows"]}, groups={"layer": len(stay)})
        small = nn.ModuleDict({"layer": copy.deepcopy(module)})
        try:
            apply_plan(small, plan)
            if picked is not None:
                index = index_tensor(picked, given.device)
                narrow = given.index_select(dim, index)
                given = torch.zeros_like(given).index_copy(dim, index, narrow)
            with torch.no_grad():
                whole, part = module(given), small["layer"](given if picked is None else narrow)
        except Exception:  # a layer of the user's own
            return False
        if "rows" in halves:
            at = channel_dim(module, whole)
            whole = whole.index_select(at, index_tensor(halves["rows"], whole.device))
        return close(whole, part, self._tolerance, scale_of(whole))

    def _find_dead(self, example: Any) -> tuple[dict[str, Tensor], list[set[str]]]:
        """Which channels are 0 when all that convolutions and linear layers compute is noise, and the
        layers that ran.

        Noise of one sign first and the other then: no activation stops both, and no sum cancels.
        """

        aliveness = Aliveness()

        def look(sign: int) -> set[str]:
            names: set[str] = set()

            def after(name: str, module: Any, inputs: Any, output: Any) -> Tensor | None:
                names.add(name)
                if isinstance(module, Norm):
                    return None
                aliveness.note(name, module, inputs)
                return self._noise_for(name, module, output, sign)

            with hooked(self._layers, after):
                # Noise as input too: a channel of the example may be 0 by chance.
                run(self._model, noise_like(example, 1), training=False)
            return names

        try:
            # What they compute is replaced by noise anyway.
            with idle([layer for layer in self._layers if not isinstance(layer[1], Norm)]):
                ran = [look(1), look(-1)]
        except Exception:  # noise may be more than the model's own code bears
            return {}, []
        return aliveness.dead(), ran

    def _noise_for(self, name: str, module: nn.Module, output: Tensor, sign: int) -> Tensor:
        """Noise in place of what a convolution or linear layer of the masked model makes."""
        dim = channel_dim(module, output)
        if (muted := self._muted.get(name)) is not None:
            noise = self._noise.among(output, dim, None, sign)
            return noise.index_fill_(dim, muted.to(output.device), 0)
        return self._noise.among(output, dim, self._gone.get(name), sign)

    def _see(self, training: bool, *, note: Callable[..., None] | None = None, noisy: bool = False) -> Seen:
        """What the masked model shows in one pass.

        Args:
            note: called behind each layer.
            noisy: noise stands for what convolutions and linear layers compute.
        """
        seen = Seen()

        def before(name: str, _module: nn.Module, given: Any) -> None:
            if given and isinstance(given[0], Tensor):
                seen.ran.append(name)
                mine = given[0].detach()
                # A copy: the model may go on to change its tensor in place.
                seen.given.append((name, mine.clone(), largest(mine)))

        def after(name: str, module: nn.Module, given: Any, output: Any) -> Tensor | None:
            seen.reach(name, output)
            if noisy and not isinstance(module, Norm):
                seen.noise.append((name, noise := self._noise_for(name, module, output, 0)))
                return noise.clone()
            if (muted := self._muted.get(name)) is not None:
                output.index_fill_(channel_dim(module, output), muted.to(output.device), 0)
            if note is not None:
                note(name, module, given, output)
            return None

        consumers = [layer for layer in self._layers if not isinstance(layer[1], Norm)]
        with idle(consumers if noisy else []), hooked(self._layers, after, before):
            output, seen.drew = run(self._model, self._inputs, training, self._dropout)
        seen.outputs = floating(output)
        return seen

    def _compare(
        self,
        cut: nn.Module,
        training: bool,
        expected: Seen,
        plan: CutPlan,
        arriving: Mapping[str, tuple[int, Tensor]],
        ran: list[str],
    ) -> None:
        """Run ``cut``; ``ValueError`` where what it shows is not as ``expected``.

        Every layer that reads what it should then reads exactly that, so that rounding does not add up.

        Args:
            arriving: layer → (input channels, those of them that arrive), where they are not all.
            ran: the layers that run are added.
        """
        seen, layers, read = Seen(ran), channel_layers(cut), 0

        def before(name: str, module: nn.Module, given: Any) -> Any:
            nonlocal read
            if not given or not isinstance(given[0], Tensor):
                return None
            ran.append(name)
            other_name, whole, scale = expected.given[read]
            read += 1
            if not math.isfinite(scale):
                raise ValueError(f"{name!r} reads no numbers to compare by")
            dim = channel_dim(module, whole)
            width, index = arriving.get(name, (0, _NONE))
            partly = width == whole.shape[dim]
            theirs = whole.index_select(dim, index.to(whole.device)) if partly else whole.clone()
            if name != other_name or not close(theirs, given[0].detach(), self._tolerance, scale):
                raise ValueError(f"{name!r} reads something else")
            # Where noise stands for what a layer computes, nothing behind it shows what it lacks.
            if expected.noise and name in plan.columns and largest(_without(whole, plan.columns[name], dim)):
                raise ValueError(f"{name!r} does without channels that carry something")
            return theirs, *given[1:]

        def after(name: str, _module: nn.Module, _given: Any, output: Any) -> None:
            seen.reach(name, output)

        with replayed(layers, expected.noise, plan), hooked(layers, after, before):
            output, _ = run(cut, self._inputs, training, self._dropout)
        pairs = zip(expected.outputs, floating(output), strict=True)
        if read != len(expected.given) or not all(
            close(theirs, mine, self._tolerance, scale_of(theirs)) for theirs, mine in pairs
        ):
            raise ValueError("the outputs differ")


def _without(tensor: Tensor, indices: Sequence[int], dim: int) -> Tensor:
    """What ``indices`` in ``dim`` leave over of ``tensor``."""
    left = torch.ones(tensor.shape[dim], dtype=torch.bool)
    left[index_tensor(indices)] = False
    return tensor.index_select(dim, left.nonzero().flatten().to(tensor.device))
