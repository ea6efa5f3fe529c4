"""Forward passes over unlabelled images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from regrow.given import kind_of
from regrow.looking.calls import PassFailed, call
from regrow.modules import device_of


def check_batches(batches: Any, argument: str) -> None:
    """Raise ``ValueError`` unless ``batches``, the value of ``argument``, can be iterated over batches."""
    if isinstance(batches, Tensor | Mapping | str | nn.Module) or not isinstance(batches, Iterable):
        hint = f"For one batch x write {argument}=[x]."
        if isinstance(batches, Dataset):
            hint = "Wrap the data set in a loader: DataLoader(dataset, batch_size=64, shuffle=True)."
        raise ValueError(f"{argument} is an iterable of batches, got {kind_of(batches)}. {hint}")


def inputs_of(model: nn.Module, calibration: Iterable[Any]) -> Iterator[Any]:
    """Yield the inputs in each batch of ``calibration`` (see ``compensate``), on the device of ``model``.

    Raises:
        ValueError: there is no batch, or a batch is of an unknown kind.
    """
    device = device_of(model)
    empty = True
    for batch in calibration:
        inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if isinstance(inputs, Mapping):
            yield {key: v.to(device) if isinstance(v, Tensor) else v for key, v in inputs.items()}
        elif isinstance(inputs, Tensor):
            yield inputs.to(device)
        else:
            raise ValueError(
                "a calibration batch is a tensor, a tuple or list whose first item is the input, or a dict "
                f"of keywords, got {type(inputs).__name__}."
            )
        empty = False
    if empty:
        raise ValueError(
            "calibration yields no batch: pass a few hundred images, not an iterator that was used before."
        )


def forward(model: nn.Module, inputs: Any) -> int:
    """Run one forward pass and return the number of images; ``PassFailed``, a ``ValueError``, if it fails."""
    try:
        call(model, inputs)
    except PassFailed as error:
        raise PassFailed(
            f"the model's forward pass fails on a calibration batch: {error.__cause__}. Pass inputs that the "
            "model takes, in batches of several images."
        ) from error.__cause__
    return count_images(inputs)


def count_images(inputs: Any) -> int:
    """Return the length of the first tensor in ``inputs``; 0 if there is no tensor."""
    tensors = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    return next((len(tensor) for tensor in tensors if isinstance(tensor, Tensor) and tensor.dim()), 0)


def check_finite_results(name: str, *tensors: Tensor | None) -> None:
    """Raise ``ValueError`` if ``tensors``, which the images gave for layer ``name``, hold NaN or infinity."""
    if not all(tensor.isfinite().all() for tensor in tensors if tensor is not None):
        raise ValueError(
            f"the calibration images give NaN or infinite values in {name!r}: check the images and the model."
        )
