"""Dense-Sparse-Dense training: the smallest weights held at 0 for a while, then free to train again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regrow.given import check_optimizer, is_real
from regrow.interrupts import uninterrupted
from regrow.marks import Mark, borrowed_weight, check
from regrow.modules import CONSUMER_CLASSES, unwrap
from regrow.repr.ranks import copy_from_first, group_of
from regrow.repr.slots import stepping
from regrow.restarts.memory import Memory
from regrow.restarts.saved import VERSION, answers, check_saved
from regrow.short import short
from regrow.torch_private import own_parameters

_NAME = "DenseSparseDense"


class DenseSparseDense:
    """Hold the smallest weights at 0 for a while (Han et al. 2017, arXiv 1607.04381).

    Train, call ``sparsify``, train on, call ``densify``, train to the end at a lower rate (a tenth in the
    paper). ``sparsify`` sets the ``fraction`` of weights that are smallest in each convolution and linear
    layer to 0 and holds them there after every step of the optimizer; ``densify`` lets them go. Both can be
    called again. Biases and norms are left alone.

    Args:
        model: any module, also in wrappers. With DDP, give the wrapper, in every process.
        optimizer: the optimizer that trains ``model``.
        fraction: share of each layer's weights, at least 0 and below 1.

    Attributes:
        left_out: {qualified name of a weight: why it is left alone}.

    Raises:
        ValueError: an argument out of range, no weight to work on, a state in which this is refused.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, fraction: float = 0.3) -> None:
        check(model, _NAME)
        check_optimizer(optimizer, _NAME)
        if not is_real(fraction) or not 0 <= fraction < 1:
            raise ValueError(f"fraction must be at least 0 and below 1, such as 0.3, got {fraction!r}.")
        self._given, self._model, self._optimizer = model, unwrap(model), optimizer
        self._settings = {"fraction": float(fraction)}
        self._masks: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._marked: list[nn.Module] = []
        self._removed = False
        self._weights: dict[str, nn.Parameter] = {}
        self.left_out: dict[str, str] = {}
        seen: set[int] = set()
        for name, module in self._model.named_modules():
            if not isinstance(module, CONSUMER_CLASSES):
                continue
            weight: Any = own_parameters(module).get("weight")
            if why := borrowed_weight(module) or ("" if weight.requires_grad else "it is frozen"):
                self.left_out[f"{name}.weight" if name else "weight"] = why
            elif id(weight) not in seen:
                seen.add(id(weight))
                self._weights[f"{name}.weight" if name else "weight"] = weight
        if not self._weights:
            raise ValueError(
                "DenseSparseDense found no weight of a convolution or linear layer that is trained."
            )
        if not stepping(optimizer):
            raise ValueError(
                f"{type(optimizer).__name__} takes no hooks, and nothing would hold the weights at 0: pass "
                "the optimizer inside it."
            )
        self._memory = Memory(optimizer)
        self._memory.watch()

    @property
    def sparse(self) -> bool:
        """Whether weights are held at 0 now."""
        return bool(self._masks)

    def _check_here(self, called: str) -> None:
        if self._removed:
            raise ValueError("this DenseSparseDense has been removed from its model; build a new one.")
        check(self._given, _NAME, called=called)

    @torch.no_grad()
    def sparsify(self) -> dict[str, Any]:
        """Set the smallest weights of each layer to 0, and hold them there until ``densify``.

        Returns:
            A JSON-able record: version, kind "sparsify", held {name of a weight: how many entries}, notes.

        Raises:
            ValueError: weights are held already, NaN weights, a state in which this is refused. Nothing is
                changed.
        """
        if self.sparse:
            raise ValueError("sparsify was called twice: call densify() in between.")
        self._check_here("sparsify")
        masks = {}
        for name, weight in self._weights.items():
            sizes = weight.detach().abs().flatten()
            if not sizes.isfinite().all():
                raise ValueError(f"{name!r} holds NaN or infinite weights: go back to the last good state.")
            count = math.floor(self._settings["fraction"] * len(sizes) + 1e-9)
            mask = torch.zeros_like(sizes, dtype=torch.bool)
            mask[sizes.argsort(stable=True)[:count]] = True
            masks[name] = mask.view(weight.shape)
        if (group := group_of(self._given)) is not None:
            numbers = [mask.to(torch.uint8) for mask in masks.values()]
            copy_from_first(numbers, group)
            masks = {name: number.bool() for name, number in zip(masks, numbers, strict=True)}
        self._memory.release()
        self._memory.look()
        with uninterrupted():
            self._hold(masks)
            notes = self._forget()
        return self._record("sparsify", notes)

    @torch.no_grad()
    def densify(self) -> dict[str, Any]:
        """Let the held weights train again, from 0.

        Returns:
            A JSON-able record: version, kind "densify", held {name of a weight: how many entries}, notes.

        Raises:
            ValueError: no weights are held.
        """
        if not self.sparse:
            raise ValueError("densify was called, and no weights are held at 0: call sparsify() first.")
        with uninterrupted():
            record = self._record("densify", self._forget())
            self._release()
        return record

    def _record(self, kind: str, notes: list[str]) -> dict[str, Any]:
        held = {name: int(mask.sum()) for name, mask in self._masks.items()}
        return {"version": VERSION, "kind": kind, "held": held, "notes": notes}

    def _forget(self) -> list[str]:
        return self._memory.clear({self._weights[name]: mask for name, mask in self._masks.items()})

    def _hold(self, masks: Mapping[str, Tensor]) -> None:
        self._release()
        self._masks = dict(masks)
        self._handles = [part.register_step_post_hook(self._after_step) for part in stepping(self._optimizer)]
        for name, mask in masks.items():
            # A gradient there would count in gradient clipping.
            self._handles.append(self._weights[name].register_hook(_without(mask)))
        held = {id(self._weights[name]) for name in masks}
        for module in self._model.modules():
            if id(own_parameters(module).get("weight")) in held:
                module._regrow_sparse = _Sparse(self)  # type: ignore[assignment]
                self._marked.append(module)
        self._after_step()

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        for name, mask in self._masks.items():
            self._weights[name].masked_fill_(mask, 0)

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._marked:
            vars(module).pop("_regrow_sparse", None)
        self._handles, self._marked, self._masks = [], [], {}

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to continue exactly: tensors, numbers and strings only."""
        return {
            "version": VERSION,
            "settings": dict(self._settings),
            "held": {name: mask.cpu() for name, mask in self._masks.items()},
            "copies": self._memory.known(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from where ``state_dict`` was taken, also while weights are held.

        Load the states of the model and the optimizer too, before or after.

        Raises:
            ValueError: the state is of another version, has other settings or does not fit the model.
                Nothing is changed.
        """
        self.check_state_dict(state)
        held = state["held"]
        with uninterrupted():
            self._memory = Memory(self._optimizer, dict(state["copies"]))
            self._release()
            if held:
                self._hold({name: mask.to(self._weights[name].device) for name, mask in held.items()})

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` unless ``load_state_dict`` would take ``state``; nothing is changed."""
        check_saved(state, _NAME, self._settings, ["held", "copies"])
        if self._removed:
            raise ValueError("this DenseSparseDense has been removed from its model; build a new one.")
        answers(state["copies"], _NAME)
        held = state["held"]
        if not isinstance(held, Mapping) or (held and set(held) != set(self._weights)):
            raise ValueError(f"the state holds weights of other layers: {short(held)}.")
        for name, mask in held.items():
            fits = isinstance(mask, Tensor) and mask.dtype == torch.bool
            if not fits or mask.shape != self._weights[name].shape:
                raise ValueError(
                    f"the state does not fit {name!r} of shape {list(self._weights[name].shape)}."
                )

    def remove(self) -> None:
        """Take the hooks off the optimizer. Weights that are held now are 0 until something trains them."""
        self._release()
        self._removed = True


def _without(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.masked_fill(mask, 0)


class _Sparse(Mark):
    """The mark on the layers whose weights are held."""

    travels = False

    def __init__(self, owner: DenseSparseDense) -> None:
        self._owner = owner

    def state(self) -> str:
        return "sparse"

    def undo(self, module: nn.Module) -> None:  # noqa: ARG002
        """Let the weights of all layers go."""
        self._owner._release()
