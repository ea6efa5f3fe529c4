"""Knowledge Evolution: a fixed part of the weights stays, and the rest is drawn anew in every generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regrow.given import check_optimizer, check_seed, is_real
from regrow.interrupts import uninterrupted
from regrow.marks import check
from regrow.modules import CONSUMER_CLASSES, unwrap
from regrow.repr.ranks import copy_from_first, group_of
from regrow.restarts.fresh import fresh_values
from regrow.restarts.memory import Memory
from regrow.restarts.saved import VERSION, check_saved, whole_number
from regrow.restarts.seeds import seed_of

_NAME = "KnowledgeEvolution"


class KnowledgeEvolution:
    """Train a network in generations, each from the last one's fixed part (Taha et al. 2021, CVPR, arXiv
    2103.05152, weight-level split "WELS").

    Train a generation, call ``evolve``, train the next. At the construction a share ``split`` of the weights
    of every convolution and linear layer is chosen at random: the fixed part. ``evolve`` draws all other
    weights anew, and the optimizer forgets what it remembers of them. Biases and norms stay.

    Args:
        model: any module, also in wrappers. With DDP, give the wrapper, in every process.
        split: share of each layer's weights that stays, above 0 and below 1.
        seed: of the choice, and of the new weights of every generation.

    Attributes:
        generation: how often ``evolve`` was called.
        left_out: {qualified name of a parameter: why it is never drawn anew}.

    Raises:
        ValueError: an argument out of range, no weight to draw, a state in which this is refused.
    """

    def __init__(self, model: nn.Module, *, split: float = 0.8, seed: int = 0) -> None:
        check(model, _NAME)
        if not is_real(split) or not 0 < split < 1:
            raise ValueError(f"split must lie between 0 and 1, such as 0.8, got {split!r}.")
        check_seed(seed)
        self._given, self._model = model, unwrap(model)
        self._settings: dict[str, Any] = {"split": float(split), "seed": seed}
        self.generation = 0
        found = fresh_values(self._model, 0, None, self._layers())
        weights = {name: p for name, p, _ in found.parameters if name.rpartition(".")[2] == "weight"}
        if not weights:
            raise ValueError(
                "KnowledgeEvolution found no weight of a convolution or linear layer to draw anew."
            )
        self._shapes = {name: weight.shape for name, weight in weights.items()}
        self.left_out = {name: why for name, why in found.left_out.items() if name.endswith("weight")}

    def _layers(self) -> list[nn.Module]:
        return [module for module in self._model.modules() if isinstance(module, CONSUMER_CLASSES)]

    def fixed(self) -> dict[str, Tensor]:
        """{qualified name of a weight: BoolTensor of its shape, on the CPU}, True = in the fixed part."""
        masks = {}
        for number, (name, shape) in enumerate(self._shapes.items()):
            generator = torch.Generator().manual_seed(seed_of(self._settings["seed"], 2 * number))
            order = torch.randperm(shape.numel(), generator=generator)
            mask = torch.zeros(shape.numel(), dtype=torch.bool)
            mask[order[: round(self._settings["split"] * shape.numel())]] = True
            masks[name] = mask.view(shape)
        return masks

    @torch.no_grad()
    def evolve(
        self, optimizer: torch.optim.Optimizer | None = None, *, fresh: nn.Module | None = None
    ) -> dict[str, Any]:
        """Begin the next generation: all weights outside the fixed part are drawn anew.

        Args:
            optimizer: the optimizer that trains the model; None if it is built anew.
            fresh: a newly built model of the same structure, whose values are taken; None draws by each
                layer's ``reset_parameters``.

        Returns:
            A JSON-able record: version, generation, drawn {name of a weight: how many entries are new},
            notes.

        Raises:
            ValueError: ``fresh`` does not fit, the layers have other shapes than at the construction, a state
                in which this is refused. Nothing is changed.
        """
        check(self._given, _NAME, called="evolve")
        if optimizer is not None:
            check_optimizer(optimizer, "evolve")
        parameters = dict(self._model.named_parameters())
        for name, shape in self._shapes.items():
            if name not in parameters or parameters[name].shape != shape:
                raise ValueError(
                    f"{name!r} is no longer of shape {list(shape)}: build KnowledgeEvolution anew."
                )
        seed = seed_of(self._settings["seed"], 2 * self.generation + 1)
        found = fresh_values(self._model, seed, fresh, self._layers())
        values = {name: new for name, _, new in found.parameters}
        memory, group = Memory(optimizer), group_of(self._given)
        masks: dict[nn.Parameter, Tensor] = {}
        drawn = {name: ~fixed for name, fixed in self.fixed().items()}
        with uninterrupted():
            for name, entries in drawn.items():
                parameter = parameters[name]
                mask = entries.to(parameter.device)
                parameter[mask] = values[name].to(parameter)[mask]
                masks[parameter] = mask
            if group is not None:
                copy_from_first(list(masks), group)
            self.generation += 1
            notes = memory.clear(masks)
        return {
            "version": VERSION,
            "generation": self.generation,
            "drawn": {name: int(entries.sum()) for name, entries in drawn.items()},
            "notes": notes,
        }

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to continue exactly: numbers and strings only."""
        return {"version": VERSION, "settings": dict(self._settings), "generation": self.generation}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from where ``state_dict`` was taken.

        Raises:
            ValueError: the state is of another version or has other settings. Nothing is changed.
        """
        self.check_state_dict(state)
        self.generation = state["generation"]

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` unless ``load_state_dict`` would take ``state``; nothing is changed."""
        check_saved(state, _NAME, self._settings, ["generation"])
        whole_number(state["generation"], "generation", _NAME)

    def remove(self) -> None:
        """Do nothing: nothing is on the model. All classes of this room have this method."""
