"""A masked copy of a model: which channels are always zero, and whether a cut computes the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.indexing import index_tensor, index_tensors
from regrow.log import gave_up, log
from regrow.looking.aliveness import Aliveness
from regrow.looking.calls import PassFailed, buffers_kept, call, run
from regrow.looking.copies import NotCopied, copied, copied_as, dtypes, inputs_as
from regrow.looking.dropout import NoDropout, stop_dropout
from regrow.looking.hooks import hooked, idle
from regrow.looking.noise import Noise, noise_like, unsettle
from regrow.marks import strip
from regrow.modules import Norm, channel_dim, channel_layers, device_of, filter_count, is_stock
from regrow.surgery.evidence import Look, Refuted, Seen, close, compare, scale_of, see
from regrow.surgery.layers import apply_plan
from regrow.surgery.plan import CutPlan, NoPlan, PlanUnfit
from regrow.surgery.removal import Removal


class Probe:
    """A copy of a model with filters removed by masks, to hold plans against.

    Attributes:
        dead: convolution or linear layer → BoolTensor[channels]: which input channels are 0 whatever comes
            in. Layers that no pass reached are not listed.
        norms: the norms that ran.
        own: convolution → the norm that alone of all norms reads its output, and reads nothing else.
        way: the way that the inputs take by which plans are compared in eval mode.
        exercised: the layers that computed something in the passes that plans are compared by.
        confirms_removal: the readers are right about the removed filters: the norms read and return 0 in
            their channels, and the rows removed with them read no other channel.
        partial: some layers ran in none of these passes, and may read anything in training.
    """

    def __init__(
        self, model: nn.Module, removal: Removal, example_inputs: Any, *, quick: bool = False
    ) -> None:
        """Copy ``model``, remove the filters and run a few passes.

        Args:
            quick: compute in float32, and set dropped channels to 0 behind PyTorch's own convolutions, whose
                weights are then not copied. A confirmed plan is right; a refuted one may be right too.

        Raises:
            NoPlan: which layers run depends on the data.
            PassFailed: the model fails on ``example_inputs``.
            NotCopied: the model cannot be copied.
        """
        self._quick = quick
        self._dropout: NoDropout | None = None
        example = self._take(model, removal, example_inputs)
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
                raise NoPlan(
                    f"which layers run depends on the data ({some}): nothing tells which layers read the "
                    "filters. Cut the parts that always run, each as a model of its own."
                )

    def _take(self, model: nn.Module, removal: Removal, example_inputs: Any) -> Any:
        """Copy the model in the most precise numbers that its code takes, and run it; the example in those
        numbers."""
        for dtype in (torch.float32, None) if self._quick else (torch.float64, torch.float32, None):
            self._model = copied_as(model, dtype)
            self._dtype, example = dtype, inputs_as(example_inputs, dtype)
            strip(self._model)
            stop_dropout(self._model)
            self._modules: dict[str, Any] = dict(self._model.named_modules())
            self._layers = channel_layers(self._model)
            self._stock = {name for name, module in self._layers if is_stock(module)}
            gone = {name: filters for name, filters in removal.gone.items() if filters}
            self._gone = dict(zip(gone, index_tensors(list(gone.values())), strict=True))
            muted = [name for name in self._gone if self._quick and name in self._stock]
            there = index_tensors([self._gone[name] for name in muted], device_of(self._model))
            self._muted = dict(zip(muted, there, strict=True))
            self._noise = Noise(2)
            with torch.no_grad():
                unsettle(self._model, torch.Generator().manual_seed(0))
                removal.apply(self._model, keep_rows=self._muted)
            precise = dtypes(self._model) == {torch.float64}
            self._tolerance = 1e-6 if precise else 1e-4 if self._quick else 1e-3
            try:
                self._refer(example, removal)
                return example
            except PassFailed as error:  # a type written into the model's code
                if dtype is None:
                    raise
                gave_up(f"computing in {dtype}", error)
        raise AssertionError

    def _refer(self, example: Any, removal: Removal) -> None:
        """Find inputs to compare plans by, and note what masks give in each mode that can be compared."""
        one, two = noise_like(example, 1), noise_like(example, 2)
        # Two pictures are twice the work; a norm of a single value per channel needs them to train.
        for inputs in (one, two, example) if self._quick else (two, one, example):
            last = inputs is example
            self._inputs, self._look = (
                inputs,
                Look(self._modules, self._stock, removal.norms, device_of(self._model)),
            )
            try:
                self._expected = {False: self._see(False, look=self._look)}
            except PassFailed as error:  # the model takes no other batch, or no such numbers
                if last:
                    raise
                gave_up("inputs of noise", error)
                continue
            try:
                self._expected[True] = self._seen_in_training()
            except PassFailed as error:  # a model that needs targets to train, or a batch of several
                gave_up("comparing in train mode", error)
                if not last:
                    continue
            return

    def _seen_in_training(self) -> Seen:
        """What masks give in train mode."""
        seen = self._trained()
        if seen.drew:  # perhaps in a dropout: from here on NoDropout intercepts each call
            self._dropout = NoDropout()
            seen = self._trained()
        return seen

    def _trained(self) -> Seen:
        """One pass in train mode.

        Where all convolutions and linear layers are PyTorch's own, which do the same in either mode, noise
        stands for their outputs: the code between them is left to compare.
        """
        plain = all(name in self._stock for name, module in self._layers if not isinstance(module, Norm))
        if self._quick and plain:
            try:
                with buffers_kept(self._model):
                    seen = self._see(True, noisy=True)
                if seen.ran == self._expected[False].ran:
                    return seen
            except PassFailed as error:  # noise may be more than the model's own code bears
                gave_up("training with noise in place of the layers' outputs", error)
        with buffers_kept(self._model):
            return self._see(True)

    def _see(self, training: bool, *, look: Look | None = None, noisy: bool = False) -> Seen:
        """What the masked model shows in one pass.

        Args:
            look: notes each layer.
            noisy: noise stands for the outputs of convolutions and linear layers.
        """

        def then(seen: Seen, name: str, module: nn.Module, given: Any, output: Tensor) -> Tensor | None:
            if noisy and not isinstance(module, Norm):
                seen.noise.append((name, noise := self._noise_for(name, module, output, 0)))
                return noise.clone()
            if (muted := self._muted.get(name)) is not None:
                output.index_fill_(channel_dim(module, output), muted.to(output.device), 0)
            if look is not None:
                look.note(name, module, given, output)
            return None

        consumers = [layer for layer in self._layers if not isinstance(layer[1], Norm)]
        with idle(consumers if noisy else []):
            return see(self._model, self._inputs, training, then=then, dropout=self._dropout)

    def _follows(self, name: str, rows: Sequence[int]) -> bool:
        """Whether all that ``rows`` of a grouped convolution read is 0 whatever comes in."""
        conv = self._modules[name]
        groups = index_tensor(rows) // (conv.out_channels // conv.groups)
        return name in self.dead and bool(self.dead[name].view(conv.groups, -1)[groups].all())

    def refutes(self, plan: CutPlan, present: Mapping[str, Tensor]) -> list[str] | None:
        """None if ``plan`` computes what the masks do, in eval and train mode; else the layers that had run,
        one after the other, when a difference showed.

        Args:
            present: layer → BoolTensor[channels]: which of its input channels the plan leaves in the
                tensor that arrives. Layers not listed: all.
        """
        if any(self._lacks(name, columns) for name, columns in plan.columns.items()):
            return []
        cut = copied(self._model)
        ran: list[str] = []
        try:
            apply_plan(cut, plan)
            for training, expected in self._expected.items():
                compare(
                    cut, self._inputs, expected, self._tolerance, training,
                    plan=plan, present=present, ran=ran, dropout=self._dropout,
                )  # fmt: skip
        except (PlanUnfit, Refuted, PassFailed) as reason:
            log.debug("a plan was refuted: %s", reason)
            return ran
        return None

    def _lacks(self, name: str, columns: Sequence[int]) -> bool:
        """Whether a layer that reads ``columns`` alone leaves out a channel that is not always 0."""
        alive = ~self.dead.get(name, torch.ones(0, dtype=torch.bool))
        if len(alive):  # else nothing is known of the layer
            alive[index_tensor(columns)] = False
        return bool(alive.any())

    @property
    def folds(self) -> bool:
        """Whether a linear layer reads another number of features than the layer before it makes: which
        channel a feature belongs to may depend on the size of the picture."""
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
        groups, filters = getattr(module, "groups", 1), filter_count(module, module.weight)
        read = given.shape[dim] // groups
        kept, picked = list(range(0, filters, 2)), list(range(0, read, 2))
        if groups > 1:
            stay = range(0, groups, 2)
            kept = [i for i in range(filters) if i // (filters // groups) in stay]
            picked = [i for i in range(given.shape[dim]) if i // read in stay]
            plan = CutPlan(rows={"layer": kept}, groups={"layer": len(stay)})
        else:
            plan = CutPlan(rows={"layer": kept}) if rows else CutPlan(columns={"layer": picked})
        narrow = given
        if groups > 1 or not rows:
            index = index_tensor(picked, given.device)
            narrow = given.index_select(dim, index)
            given = torch.zeros_like(given).index_copy(dim, index, narrow)
        try:
            small = copied(nn.ModuleDict({"layer": module}))
            apply_plan(small, plan)
            with torch.no_grad():
                whole, part = call(module, given), call(small.get_submodule("layer"), narrow)
        except (NotCopied, PlanUnfit, PassFailed) as error:  # a layer of the user's own
            gave_up(f"computing half of the filters of {name!r}", error)
            return False
        if not isinstance(whole, Tensor) or not isinstance(part, Tensor):
            return False
        if groups > 1 or rows:
            at = channel_dim(module, whole)
            if not 0 <= at < whole.dim() or whole.shape[at] != filters:
                return False
            whole = whole.index_select(at, index_tensor(kept, whole.device))
        return close(whole, part, self._tolerance, scale_of(whole))

    def _find_dead(self, example: Any) -> tuple[dict[str, Tensor], list[set[str]]]:
        """Which channels are 0 when all that convolutions and linear layers compute is noise, and the
        layers that ran.

        Noise of one sign first and the other then: no activation stops both, and no sum cancels.
        """
        aliveness = Aliveness()

        def look(sign: int) -> set[str]:
            names: set[str] = set()

            def after(name: str, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
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
            # Noise takes the place of their outputs.
            with idle([layer for layer in self._layers if not isinstance(layer[1], Norm)]):
                ran = [look(1), look(-1)]
        except PassFailed as error:  # noise may be more than the model's own code bears
            gave_up("finding channels that are always 0", error)
            return {}, []
        return aliveness.dead(), ran

    def _noise_for(self, name: str, module: nn.Module, output: Tensor, sign: int) -> Tensor:
        """Noise in place of the output of a convolution or linear layer of the masked model."""
        dim = channel_dim(module, output)
        if (muted := self._muted.get(name)) is not None:
            noise = self._noise.among(output, dim, None, sign)
            return noise.index_fill_(dim, muted.to(output.device), 0)
        return self._noise.among(output, dim, self._gone.get(name), sign)
