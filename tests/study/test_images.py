import pytest
import torch

from regrow.study.images import Images, shrunk


def test_take_keeps_pictures_and_labels_together() -> None:
    pixels = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1)
    taken = Images(pixels, torch.tensor([10, 11, 12])).take(torch.tensor([2, 0]))
    assert taken.pixels.flatten().tolist() == [2, 0]
    assert taken.labels.tolist() == [12, 10]
    assert len(taken) == 2


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), "pixels must be uint8"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "channels"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), r"int64 \[2\]"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2), "labels must be int64"),
    ],
)
def test_wrong_tensors_are_refused(pixels: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Images(pixels, labels)


def test_shrunk_pictures_are_means_over_areas() -> None:
    pixels = torch.tensor([[[[0, 2, 9, 9], [4, 6, 9, 9], [1, 1, 0, 0], [1, 2, 0, 255]]]], dtype=torch.uint8)
    small = shrunk(Images(pixels, torch.tensor([7])), 2)
    # Means 3, 9, 1.25 and 63.75, rounded.
    assert small.pixels.flatten().tolist() == [3, 9, 1, 64]
    assert small.labels.tolist() == [7]
