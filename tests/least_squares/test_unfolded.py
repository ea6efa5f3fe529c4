"""A layer's outputs are its rows of inputs times its matrix, for every kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regrow.least_squares.unfolded import inputs_at, matrix_of, outputs_at, positions, weight_of

LAYERS = {
    "plain": (nn.Conv2d(4, 6, 3, padding=1), (3, 4, 7, 5)),
    "strided, dilated": (
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1)),
        (3, 4, 9, 8),
    ),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (3, 4, 7, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (3, 4, 7, 5)),
    "same, even kernel": (nn.Conv2d(4, 6, (2, 4), padding="same"), (3, 4, 7, 5)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid", bias=False), (3, 4, 7, 5)),
    "reflected border": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (3, 4, 7, 5)),
    "circular border": (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (3, 4, 7)),
    "1d": (nn.Conv1d(4, 6, 3, stride=2), (3, 4, 9)),
    "3d": (nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 1)), (3, 4, 3, 4, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (3, 4, 5, 4)),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, (2, 3), stride=(1, 3), groups=2), (3, 4, 5, 4)),
    "transposed, dilated": (nn.ConvTranspose1d(4, 6, 3, dilation=2, padding=3), (3, 4, 9)),
    "transposed 3d": (nn.ConvTranspose3d(4, 6, 2, stride=2), (3, 4, 2, 3, 2)),
    "linear": (nn.Linear(4, 6), (3, 4)),
    "linear over positions": (nn.Linear(4, 6), (3, 5, 2, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_matrix_are_the_outputs(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = layer(x)
        count = positions(layer, output)
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(1))[: max(1, count // 2)]
        rows = inputs_at(layer, x, output, chosen)
        found = (rows @ matrix_of(layer, layer.weight)).movedim(0, 1).flatten(1)
        if layer.bias is not None:
            found = found + layer.bias
    assert count == output[0].numel() // found.shape[1]
    torch.testing.assert_close(found, outputs_at(layer, output, chosen), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_the_matrix_becomes_the_weight_again(name: str) -> None:
    layer = LAYERS[name][0]
    assert torch.equal(weight_of(layer, matrix_of(layer, layer.weight)), layer.weight)
