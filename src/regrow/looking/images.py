"""Forward passes over unlabelled images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from regrow.given import kind_of
from regrow.looking.calls import PassFailed, call
from regrow.modules import device_of
from regrow.torch_private import tree_map_only


def check_batches(batches: Any, argument: str) -> None:
    """Raise ``ValueError`` unless ``batches``, the value of ``argument``, can be iterated over batches."""
    if isinstance(batches, Tensor | Mapping | str | nn.Module) or not isinstance(batches, Iterable):
        hint = f"For one batch x write {argument}=[x]."
        if isinstance(batches, Dataset):
            hint = "Wrap the data set in a loader: DataLoader(dataset, batch_size=64, shuffle=True)."
        raise ValueError(f"{argument} is an iterable of batches, got {kind_of(batches)}. {hint}")


def picked(calibration: Iterable[Any], example_inputs: Any = None) -> Iterator[Any]:
    """Yield the inputs in each batch of ``calibration`` (see ``compensate``): a tensor, a dict of keywords,
    or a tuple of arguments.

    Args:
        example_inputs: of the model, where they are known (see ``parted``).

    Raises:
        ValueError: there is no batch, or a batch is of an unknown kind.
    """
    several = inputs_needed(example_inputs)
    empty = True
    for batch in calibration:
        inputs = parted(batch, example_inputs)[0]
        if isinstance(inputs, tuple | list):
            inputs = tuple(inputs)
        if not isinstance(inputs, Tensor | Mapping) and not (
            isinstance(inputs, tuple)
            and any(isinstance(each, Tensor) or _are_tensors(each) for each in inputs)
        ):
            raise ValueError(
                "a calibration batch is a tensor, a tuple or list whose first item is the input, or a dict "
                f"of keywords, got {type(inputs).__name__}."
            )
        if several > 1 and isinstance(inputs, Tensor):
            raise ValueError(
                f"the model takes {several} inputs, as example_inputs say, and a calibration batch has one: "
                "give tuples of the inputs, or pairs of such a tuple and labels, or dicts of keywords."
            )
        if count_images(inputs) == 0 and _first(inputs) is not None:
            raise ValueError("a calibration batch has no images in it: leave out empty batches.")
        yield inputs
        empty = False
    if empty:
        raise ValueError(
            "calibration yields no batch: pass a few hundred images, not an iterator that was used before."
        )


def inputs_needed(example_inputs: Any) -> int:
    """How many arguments ``example_inputs`` say that a model takes; 0 where they are not a tuple of them."""
    return len(example_inputs) if isinstance(example_inputs, tuple | list) else 0


def parted(batch: Any, example_inputs: Any) -> tuple[Any, Any]:
    """The inputs and the labels in a batch; None without labels.

    Args:
        example_inputs: of the model, where they are known. A tuple of several says that the model takes that
            many, and that a batch of so many tensors is a tuple of arguments. If the first of them is a list
            of pictures, as detectors take them, such a list in a batch is one argument.
    """
    if not isinstance(batch, tuple | list) or not batch:
        return batch, None
    several = inputs_needed(example_inputs)
    dims = _dims_of_pictures(example_inputs)
    if dims and _are_tensors(batch) and all(each.dim() == dims for each in batch):
        return (batch,), None
    pictures = dims and _are_tensors(batch[0])
    if several > 1 and len(batch) >= several and (pictures or isinstance(batch[0], Tensor)):
        return tuple(batch[:several]), batch[several] if len(batch) > several else None
    return (batch[0],) if pictures else batch[0], batch[1] if len(batch) == 2 else None


def _dims_of_pictures(example_inputs: Any) -> int:
    """How many dimensions the pictures have that a model takes in a list; 0 where it takes no list."""
    given = example_inputs.values() if isinstance(example_inputs, Mapping) else example_inputs
    first = None if isinstance(given, Tensor | None) else next(iter(given), None)
    return first[0].dim() if first is not None and _are_tensors(first) else 0


def _are_tensors(given: Any) -> bool:
    return isinstance(given, tuple | list) and bool(given) and all(isinstance(each, Tensor) for each in given)


def of_one_class(calibration: Iterable[Any], example_inputs: Any) -> str:
    """A warning if all of two labels or more, one for each image, are the same; else empty.

    Args:
        example_inputs: see ``parted``.
    """
    found = []
    for batch in calibration:
        labels = parted(batch, example_inputs)[1]
        if not isinstance(labels, Tensor) or labels.dim() != 1:
            return ""
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            return ""
        found.append(labels.cpu())
    if sum(map(len, found)) < 2 or len(classes := torch.cat(found).unique()) > 1:
        return ""
    return (
        f"all calibration images have the label {classes.item()}: what other classes need is not seen, and "
        "is lost. Shuffle the images before you take some of them."
    )


def of_another_size(batches: Iterable[Any], example_inputs: Any) -> str:
    """A warning if images are of another size than the example inputs; else empty.

    Args:
        batches: as ``picked`` yields them.
    """
    example = _first(example_inputs)
    if example is None or example.dim() < 4:
        return ""
    for images in map(_first, batches):
        if images is not None and images.dim() == example.dim() and images.shape[2:] != example.shape[2:]:
            given, wanted = ("×".join(map(str, each.shape[1:])) for each in (images, example))
            return (
                f"calibration images are {given}, and example_inputs {wanted}: what is measured at one size "
                "need not fit another. Give both the size at which the network is used."
            )
    return ""


def there(model: nn.Module, inputs: Any) -> Any:
    """``inputs``, as ``picked`` yields them, on the device of ``model``."""
    device = device_of(model)

    def moved(value: Any) -> Any:
        return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)

    return (
        {key: moved(value) for key, value in inputs.items()} if isinstance(inputs, Mapping) else moved(inputs)
    )


def inputs_of(model: nn.Module, calibration: Iterable[Any]) -> Iterator[Any]:
    """Yield the inputs in each batch of ``calibration``, on the device of ``model``. Raises as ``picked``."""
    return (there(model, inputs) for inputs in picked(calibration))


def forward(model: nn.Module, inputs: Any) -> int:
    """Run one forward pass and return the number of images; ``PassFailed``, a ``ValueError``, if it fails."""
    output_of(model, inputs)
    return count_images(inputs)


def output_of(model: nn.Module, inputs: Any) -> Any:
    """Run one forward pass and return its output; ``PassFailed``, a ``ValueError``, if it fails."""
    try:
        return call(model, inputs)
    except PassFailed as error:
        raise PassFailed(
            f"the model's forward pass fails on a calibration batch: {error.__cause__}. Pass inputs that the "
            "model takes, in batches of several images; a model of several inputs takes tuples of them, with "
            "such a tuple as example_inputs too."
        ) from error.__cause__


def count_images(inputs: Any) -> int:
    """Return the length of the first tensor in ``inputs``, or else of the first list of tensors, as detectors
    take pictures; 0 if there is neither."""
    first = _first(inputs)
    if first is not None or isinstance(inputs, Tensor):
        return 0 if first is None else len(first)
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs
    return next((len(each) for each in parts if _are_tensors(each)), 0)


def _first(inputs: Any) -> Tensor | None:
    """The first tensor in ``inputs`` that is no single number."""
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs
    tensors = [parts] if isinstance(parts, Tensor) else parts
    return next((tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.dim()), None)


def check_finite_results(name: str, *tensors: Tensor | None) -> None:
    """Raise ``ValueError`` if ``tensors``, which the images gave for layer ``name``, hold NaN or infinity."""
    if not all(tensor.isfinite().all() for tensor in tensors if tensor is not None):
        raise ValueError(
            f"the calibration images give NaN or infinite values in {name!r}: check the images and the model."
        )
