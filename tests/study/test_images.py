import pytest
import torch

from regrow.study.images import Images


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
