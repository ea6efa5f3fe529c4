"""The pictures that a criterion reads, the loss of each of them, and a model that is only read meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regrow.given import kind_of
from regrow.looking.calls import PassFailed, buffers_kept, call, evaluating, mapped, undisturbed
from regrow.looking.images import check_batches
from regrow.marks import STATES, states_of
from regrow.modules import device_of
from regrow.torch_private import tree_leaves, tree_map

Loss = Callable[[Any, Any], Tensor]
_PAIR = "a batch is a pair of inputs and labels, as a DataLoader yields them, such as (x, y)"


@contextmanager
def only_read(model: nn.Module) -> Iterator[None]:
    """``model`` runs in evaluation mode, without autocast around it, with or without a gradient; afterwards
    its modes and buffers and the random generators are as they were."""
    state = states_of(model).get("lazy")
    if state is not None:
        says, end = STATES["lazy"]
        raise ValueError(f"score was refused, because the model {says} (see {state!r}). {end}")
    with (
        torch.inference_mode(False),
        evaluating(model),
        undisturbed(model),
        torch.no_grad(),
        buffers_kept(model),
        torch.enable_grad(),
    ):
        yield


def batches_of(
    model: nn.Module, batches: Iterable[Any], criterion: str, labelled: bool
) -> Iterator[tuple[Any, Any, int]]:
    """Yield inputs, labels and the number of pictures of each batch, on the device of ``model``.

    Args:
        batches: pairs of inputs and labels, or inputs alone, which come with the labels None. Inputs are a
            tensor or a dict of keywords, and in a pair also a tuple of arguments.
        labelled: whether every batch must have labels.

    Raises:
        ValueError: there is no batch, or a batch is of an unknown kind or has no labels.
    """
    check_batches(batches, "batches")
    device = device_of(model)

    def there(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    empty = True
    for batch in batches:
        paired = isinstance(batch, tuple | list) and len(batch) > 1
        if labelled and not paired:
            raise ValueError(
                f"criterion {criterion!r} takes the cross entropy, so {_PAIR}; got {kind_of(batch)}. For a "
                "loss without labels write loss=lambda outputs, _: …"
            )
        inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
        labels = batch[1] if paired else None
        inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
        if not tensors or not isinstance(inputs, Tensor | dict | tuple | list):
            raise ValueError(
                f"{_PAIR}; the inputs are a tensor, a tuple of arguments or a dict of keywords, got "
                f"{kind_of(inputs)}."
            )
        count = len(tensors[0])
        if not count:
            raise ValueError("a batch has no picture in it: leave empty batches out.")
        # Autograd takes no tensor that was made under torch.inference_mode.
        inputs = mapped(tree_map(there, inputs), lambda x: x.clone() if x.is_inference() else x)
        yield inputs, tree_map(there, labels), count
        empty = False
    if empty:
        raise ValueError(
            "batches yields no batch: pass a few hundred pictures, not an iterator that was used before."
        )


def run(model: nn.Module, inputs: Any) -> Any:
    """What ``model`` makes of one batch; ``PassFailed``, a ``ValueError``, if it fails."""
    try:
        return call(model, inputs)
    except PassFailed as error:
        raise PassFailed(
            f"the model's forward pass fails on a batch: {error.__cause__}. Pass inputs that the model takes."
        ) from error.__cause__


def singles(value: Any, count: int) -> list[Any] | None:
    """The inputs, outputs or labels of ``count`` pictures as those of single ones, each a batch of one.

    Tensors with ``count`` entries are taken apart, in whatever containers; all else goes to every picture. A
    list may also hold something for each picture, such as the boxes in it.

    Returns:
        None where nothing could be taken apart.
    """
    if count == 1 or value is None:
        return [value] * count
    each_its_own = isinstance(value, list) and len(value) == count
    if each_its_own and not all(isinstance(each, Tensor) for each in value):
        return [[each] for each in value]
    apart = {
        id(leaf): leaf.split(1)
        for leaf in tree_leaves(value)
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == count
    }
    if not apart:
        return [[each] for each in value] if each_its_own else None

    def at(place: int) -> Any:
        return tree_map(lambda leaf: apart[id(leaf)][place] if id(leaf) in apart else leaf, value)

    return [at(place) for place in range(count)]


def one_by_one(inputs: Any, labels: Any, count: int) -> Iterator[tuple[Any, Any]]:
    """The inputs and labels of each picture of a batch. Raises ``ValueError`` where there are others."""
    return zip(_singles(inputs, count, "inputs"), _singles(labels, count, "labels"), strict=True)


def _singles(value: Any, count: int, what: str) -> list[Any]:
    parts = singles(value, count)
    if parts is None:
        raise ValueError(
            f"a criterion that takes the loss of each picture needs {what} with one entry for each of the "
            f"{count} pictures, and got {_shown(value)}."
        )
    return parts


def total_loss(outputs: Any, labels: Any, count: int, loss: Loss | None) -> Tensor:
    """The sum of the losses of single pictures, each ``loss`` of a batch of one.

    Args:
        loss: None for the cross entropy.

    Raises:
        ValueError: outputs and labels do not belong to ``count`` pictures, or the loss is no number, or has
            no gradient.
    """
    if loss is None and _are_classes(outputs, labels, count):
        return nn.functional.cross_entropy(outputs, labels, reduction="sum")
    both = zip(_singles(outputs, count, "outputs"), _singles(labels, count, "labels"), strict=True)
    losses = [(cross_entropy if loss is None else loss)(output, label) for output, label in both]
    for each in losses:
        if not isinstance(each, Tensor) or each.numel() != 1 or not each.is_floating_point():
            raise ValueError(
                f"loss(outputs, labels) returns a tensor of one number, and got {kind_of(each)}."
            )
    total: Tensor = torch.stack([each.reshape(()) for each in losses]).sum()
    if not total.requires_grad:
        raise ValueError(
            "the loss has no gradient: compute it from the outputs by operations of PyTorch, without "
            "detach(), in a model that does not run under torch.no_grad."
        )
    return total


def cross_entropy(outputs: Any, labels: Any) -> Tensor:
    """The cross entropy of logits, the loss where none is given. Raises ``ValueError`` for other outputs."""
    if not isinstance(outputs, Tensor) or not isinstance(labels, Tensor):
        raise ValueError(
            "without loss= the loss is the cross entropy of logits [n, classes, …] and labels, and got "
            f"{kind_of(outputs)} and {kind_of(labels)}. Write loss=lambda outputs, labels: …"
        )
    return nn.functional.cross_entropy(outputs, labels)


def _are_classes(outputs: Any, labels: Any, count: int) -> bool:
    return (
        isinstance(outputs, Tensor)
        and isinstance(labels, Tensor)
        and outputs.dim() == 2
        and outputs.requires_grad
        and labels.shape == outputs.shape[:1] == (count,)
        and not labels.is_floating_point()
        and bool((labels >= 0).all())  # of ignored labels the loss of a single picture is NaN
    )


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return kind_of(value)
    shapes = [list(leaf.shape) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return f"{kind_of(value)} with tensors {shapes}"
