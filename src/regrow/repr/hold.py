"""Hold dropped filters at 0 while an optimizer trains the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.indexing import Where, clear, on
from regrow.memory import is_dense
from regrow.repr.joined import At, Layout, take_vector
from regrow.repr.slots import readable, stepping

Entries = Sequence[tuple[nn.Parameter, Where]]


# torch.optim's own classes move no weight of 0 that has a gradient of 0 and no memory; all were tried.
_STILL = "torch.optim"
_WATCHED = 2  # steps after which that is believed


class Hold:
    """Keeps rows of parameters at exactly 0 until ``release``.

    Masking the gradient is not enough: momentum, weight decay and Adam's running averages may still move a
    row. So a hook sets the rows to 0 after an optimizer's step. The gradient is masked as well, which keeps
    dead rows out of gradient clipping and of all statistics of the gradients.

    Where the passes of the model themselves make gradients of 0 (``held``), optimizers of PyTorch leave the
    rows as they are. The first steps show whether that is so, and then nothing is done after the others: on
    a GPU one operation for each parameter would cost more than the filters left out save.

    Args:
        entries: (parameter, index of the rows) pairs; the caller has set the rows to 0. In a transposed
            convolution a filter's row of weights lies across dim 0.
        optimizer: the optimizer of the parameters, with cleared memory of the rows; its ``step`` method is
            not replaced. Where it holds other optimizers, the steps of these count too.
        held: parameters whose gradients need no hook, because their rows get gradients of 0.
    """

    def __init__(
        self,
        entries: Entries,
        optimizer: torch.optim.Optimizer,
        held: Collection[nn.Parameter] = (),
    ) -> None:
        self._entries = list(entries)
        self._stepped = self._trained = False
        self._layouts: dict[Hashable, Layout] = {}
        # Gradients accumulated before this call would reach gradient clipping and the next step.
        for parameter, rows in entries:
            if parameter.grad is not None:
                clear(parameter.grad, rows)
        parts = stepping(optimizer)
        self._handles: list[Any] = [part.register_step_post_hook(self._after_step) for part in parts]
        trained = [(parameter, rows) for parameter, rows in entries if parameter.requires_grad]
        self._unmasked = [(parameter, rows) for parameter, rows in trained if parameter in held]
        self._mask([(parameter, rows) for parameter, rows in trained if parameter not in held])
        # Not a weight, if there is a bias or a norm: of a weight with a hook Bridgeout makes w̃ by itself.
        noting = sorted((parameter for parameter, _ in trained), key=Tensor.dim)[:1]
        self._handles += [parameter.register_hook(self._note_gradient) for parameter in noting]
        still = all(type(part).__module__.startswith(_STILL) for part in parts)
        self._to_watch = _WATCHED if still and len(self._unmasked) == len(trained) else None
        self._sums = self._sum()
        for entries in (self._entries, [*self._entries, *self._unmasked]):
            any(self._values(entries))  # the indices are there when the first step is watched

    def _mask(self, entries: Entries) -> None:
        self._handles += [parameter.register_hook(_without(rows)) for parameter, rows in entries]

    def _after_step(self, *_: Any) -> None:
        self._stepped = True
        if self._to_watch and readable():
            self._to_watch -= 1
            # A loss that reads whole parameters gives rows gradients.
            if any(self._values([*self._entries, *self._gradients()])):
                self.firmly()
        elif self._to_watch != 0 or not readable():
            # A step that is captured in a CUDA graph is replayed without this method.
            self.zero()

    def firmly(self) -> None:
        """Mask all gradients, and set the rows to 0 now and after every step from now on."""
        self._mask([(parameter, rows) for parameter, rows in self._unmasked if parameter.requires_grad])
        self._unmasked, self._to_watch = [], None
        self.zero()

    def _gradients(self) -> list[tuple[Tensor, Where]]:
        return [(p.grad, rows) for p, rows in self._unmasked if p.grad is not None]

    @torch.no_grad()
    def zero(self) -> None:
        """Set the rows to 0."""
        for parameter, rows in self._entries:
            clear(parameter, rows)

    def moved(self) -> list[nn.Parameter]:
        """The parameters whose rows are not 0. The answer is waited for once per device, not per layer."""
        if not any(self._values(self._entries)):
            return []
        return [parameter for parameter, rows in self._entries if parameter[rows].any()]

    @torch.no_grad()
    def _values(self, entries: Sequence[tuple[Tensor, Where]]) -> Iterator[Tensor]:
        """What ``entries`` hold, each device and type in one operation."""
        alike: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Where]]] = {}
        for tensor, where in entries:
            alike.setdefault((tensor.device, tensor.dtype), []).append((tensor, where))
        for (device, _), those in alike.items():
            tensors = [tensor for tensor, _ in those]
            if not all(map(is_dense, tensors)):
                yield torch.stack([tensor[on(where, device)].any() for tensor, where in those]).any()
                continue
            key = device, tuple([(id(where), tensor.stride()) for tensor, where in those])
            if key not in self._layouts:
                self._layouts[key] = Layout(tensors, [At(on(where, device)) for _, where in those])
            yield take_vector(tensors, self._layouts[key]).any()

    def missed_steps(self) -> bool:
        """Whether the parameters are trained and have moved, and yet no step of the optimizer was seen.

        Without a gradient since the rows are held, training pauses, or somebody loads a state.
        """
        return self._trained and not self._stepped and self._sums != self._sum()

    def _note_gradient(self, _: Tensor) -> None:
        self._trained = True

    @torch.no_grad()
    def _sum(self) -> list[float]:
        sums = [parameter.sum(dtype=torch.float32) for parameter, _ in self._entries]
        return torch.stack([one.to(sums[0].device) for one in sums]).tolist() if sums else []

    def release(self) -> None:
        """Remove the hooks; the rows stay 0 until something writes to them."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _without(rows: Where) -> Callable[[Tensor], Tensor]:
    def masked(gradient: Tensor) -> Tensor:
        if isinstance(rows, Tensor):
            return gradient.index_fill(0, rows, 0)
        masked = gradient.clone()
        masked[rows] = 0
        return masked

    return masked
