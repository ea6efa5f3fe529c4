"""Top-1 accuracy."""

import pytest
import torch
from torch import nn

from regrow.pruning.accuracy import top1


def test_by_hand_over_batches_of_unequal_size():
    logits = torch.eye(3)
    batches = [(logits[[0, 1, 2]], torch.tensor([0, 1, 0])), (logits[[2]], torch.tensor([2]))]
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.9)).train()
    assert top1(model, batches) == (0.75, 4)
    assert model.training


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batch"),
        ([torch.zeros(2, 3)], "pair of inputs and labels"),
        ([(torch.zeros(2, 3), torch.zeros(2, 3))], r"\[2, 3\] for \[2, 3\]"),
        ([(torch.zeros(2, 3, 4), torch.zeros(2))], r"logits \[n, classes\]"),
    ],
)
def test_what_is_no_classification_is_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        top1(nn.Identity(), batches)
