"""Costs, against sums on paper."""

import torch
from torch import nn

from regrow.pruning.cost import activation_bytes, count_macs, count_parameters, weight_bytes


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1, groups=2), nn.Flatten(),
        nn.Linear(128, 3),
    )  # fmt: skip


X = torch.zeros(1, 1, 8, 8)


def test_parameters_and_bytes_by_hand():
    model = net()
    assert count_parameters(model) == (4 * 9 + 4) + (2 * 2 * 9 + 2) + (128 * 3 + 3) == 465
    assert weight_bytes(model) == 4 * 465
    model.double()
    model.register_buffer("mean", torch.zeros(10, dtype=torch.float32))
    assert weight_bytes(model) == 8 * 465 + 40


def test_what_is_shared_counts_once():
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False))
    model[1].weight = model[0].weight
    assert count_parameters(model) == 4
    assert weight_bytes(model) == 16


def test_macs_by_hand_grow_with_the_batch_and_leave_the_mode():
    model = net().train()
    by_hand = 64 * 4 * 9 + 64 * 2 * 2 * 9 + 128 * 3
    assert count_macs(model, X) == by_hand
    assert count_macs(model, X.expand(3, -1, -1, -1)) == 3 * by_hand
    assert model.training


def test_peak_activations_by_hand():
    # The ReLU makes a second map of 4 × 64 floats beside the first; all else is smaller.
    assert activation_bytes(net(), X) == 2 * 4 * 64 * 4
    in_place = net()
    in_place[1] = nn.ReLU(inplace=True)
    # Now the second convolution's 2 × 64 beside the first's 4 × 64.
    assert activation_bytes(in_place, X) == (4 + 2) * 64 * 4
