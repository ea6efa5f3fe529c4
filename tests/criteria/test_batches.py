"""Batches of pictures with labels, and their loss."""

import math
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from regrow.criteria.batches import Batch, check_loss, loss_of, mean_loss, read_batches

CPU = torch.device("cpu")


def test_kinds_of_batches() -> None:
    x, y = torch.ones(3, 2), torch.arange(3)
    for batch in [(x, y), [x, y], ({"x": x}, y), ((x, x), y)]:
        (read,) = read_batches([batch], CPU, needs_labels=True)
        assert read.pictures == 3
        assert torch.equal(read.labels, y)
    (read,) = read_batches(iter([x]), CPU, needs_labels=False)
    assert read.labels is None


@pytest.mark.parametrize("given", [torch.ones(2), {"x": 1}, "abc", 3, TensorDataset(torch.ones(2))])
def test_no_batches(given: Any) -> None:
    with pytest.raises(ValueError, match="batches is an iterable"):
        list(read_batches(given, CPU, needs_labels=False))


def test_the_first_pictures() -> None:
    batch = Batch({"x": torch.arange(5), "y": torch.arange(5)}, torch.arange(5), 5)
    few = batch.first(2)
    assert few.pictures == 2
    assert few.inputs["y"].tolist() == [0, 1]
    odd = Batch((torch.arange(5), torch.arange(3)), None, 5)
    assert odd.first(2) is odd


def test_means_are_over_pictures() -> None:
    batches = [Batch(None, None, 1), Batch(None, None, 3)]
    assert mean_loss([torch.tensor(1.0), torch.tensor(5.0)], batches) == 4.0


def test_losses() -> None:
    batch = Batch(torch.ones(2), torch.zeros(2), 2)
    assert loss_of(lambda outputs, y: (outputs - y).mean().view(1), torch.ones(2), batch).shape == ()
    for wrong in (lambda *_: 1.0, lambda outputs, _: outputs):
        with pytest.raises(ValueError, match="a tensor of one number"):
            loss_of(wrong, torch.ones(2), batch)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="loss of the model"):
            check_loss(value)
    check_loss(3.0)


def test_every_tensor_goes_to_the_device() -> None:
    x = {"ids": torch.arange(3), "masks": [torch.ones(3, dtype=torch.bool)], "scale": 2}
    (read,) = read_batches([(x, {"boxes": torch.arange(3)})], torch.device("meta"), needs_labels=True)
    found = [read.inputs["ids"], read.inputs["masks"][0], read.labels["boxes"]]
    assert [each.device.type for each in found] == ["meta"] * 3
    assert read.inputs["scale"] == 2


def test_tensors_of_inference_mode_can_be_used_with_a_gradient() -> None:
    with torch.inference_mode():
        x, y = torch.arange(3), torch.arange(3)
    (read,) = read_batches([(x, y)], CPU, needs_labels=True)
    table = torch.eye(3, requires_grad=True)
    torch.nn.functional.cross_entropy(table[read.inputs], read.labels).backward()
    assert table.grad is not None


def test_single_pictures() -> None:
    batch = Batch((torch.arange(3), 7), torch.arange(3), 3)
    found = [(each.inputs[0].tolist(), each.inputs[1], each.labels.tolist()) for each in batch.singles()]
    assert found == [([n], 7, [n]) for n in range(3)]
    assert [each.labels for each in Batch(torch.arange(2), None, 2).singles()] == [None, None]
    with pytest.raises(ValueError, match="labels with one entry for each of the 3 pictures"):
        list(Batch(torch.arange(3), torch.arange(2), 3).singles())
