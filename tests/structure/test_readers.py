import pytest
import torch
from torch import nn

from regrow.structure.readers import Readers, Reads, column_mask, silence, silent_entries


def test_reads_of_finds_every_index_of_a_filter():
    reads = Reads(filters=[0, 0, 1, 1, 2, 2], indices=[4, 5, 6, 7, 8, 9])
    assert reads.of([2, 0]) == [4, 5, 8, 9]
    assert reads.of([]) == []


@pytest.mark.parametrize(
    ("layer", "indices", "marked"),
    [
        (nn.Conv2d(4, 2, 3), [1, 3], {(0, 1), (0, 3), (1, 1), (1, 3)}),
        (nn.Linear(5, 2), [4], {(0, 4), (1, 4)}),
        # Two groups: channels 0 and 1 are read by rows 0 and 1, channels 2 and 3 by rows 2 and 3.
        (nn.Conv2d(4, 4, 3, groups=2), [1, 2], {(0, 1), (1, 1), (2, 0), (3, 0)}),
        # Depthwise, two filters per channel.
        (nn.Conv1d(3, 6, 3, groups=3), [1], {(2, 0), (3, 0)}),
        (nn.Conv2d(4, 2, 3), [], set()),
    ],
)
def test_column_mask_by_hand(layer, indices, marked):
    mask = column_mask(layer, indices)
    assert mask.shape == layer.weight.shape[:2]
    assert {tuple(entry) for entry in mask.nonzero().tolist()} == marked


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_column_mask_is_what_the_layer_multiplies_the_channels_by(groups):
    layer, x = nn.Conv2d(4, 8, 1, groups=groups), torch.randn(1, 4, 3, 3)
    without = x.clone()
    without[:, [0, 3]] = 0
    with torch.no_grad():
        expected = layer(without)
        layer.weight[column_mask(layer, [0, 3])] = 0
    torch.testing.assert_close(layer(x), expected)


def readers():
    return Readers(
        norms={"1": Reads([0, 1, 2, 3], [0, 1, 2, 3])}, consumers={"3": Reads([0, 1, 2, 3], [0, 1, 2, 3])}
    )


def small():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        for tensor in (model[1].weight, model[1].bias, model[1].running_mean):
            tensor.uniform_(0.5, 1)
    return model


def test_silent_entries_are_rows_biases_and_norm_weights():
    model = small()
    entries = silent_entries(model, {"0": readers()}, {"0": [1, 3]})
    assert [parameter is expected for (parameter, _), expected in zip(
        entries, [model[0].weight, model[0].bias, model[1].weight, model[1].bias], strict=True
    )] == [True] * 4  # fmt: skip
    assert all(rows.tolist() == [1, 3] for _, rows in entries)


def test_silent_entries_without_biases_or_norm_weights():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False))
    entries = silent_entries(model, {"0": readers()}, {"0": [2]})
    assert [parameter is model[0].weight for parameter, _ in entries] == [True]


@pytest.mark.parametrize("training", [True, False])
def test_silenced_filters_emit_exactly_zero_and_nothing_else_changes(training):
    model = small().train(training)
    x = torch.randn(4, 3, 8, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    silence(nn.DataParallel(model), {"0": readers()}, {"0": [1, 3]})
    for name, tensor in model.state_dict().items():
        if name.startswith(("0.", "1.weight", "1.bias", "1.running_mean")):
            assert not tensor[[1, 3]].any()
            assert torch.equal(tensor[[0, 2]], before[name][[0, 2]])
        else:
            assert torch.equal(tensor, before[name])
    emitted = model[1](model[0](x))
    assert not emitted[:, [1, 3]].any()
    assert emitted[:, [0, 2]].any()


@pytest.mark.parametrize(
    ("layer", "indices", "marked"),
    [
        (nn.ConvTranspose2d(3, 2, 3), [0, 2], {(0, 0), (0, 1), (2, 0), (2, 1)}),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), [1, 2], {(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)}),
    ],
)
def test_a_transposed_convolution_reads_a_channel_by_a_row(layer, indices, marked):
    mask = column_mask(layer, indices)
    assert mask.shape == layer.weight.shape[:2]
    assert {tuple(entry) for entry in mask.nonzero().tolist()} == marked


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_transposed_filters_are_silenced_and_their_channels_hidden(groups):
    layer, x = nn.ConvTranspose2d(4, 8, 2, 2, groups=groups), torch.randn(1, 4, 3, 3)
    without = x.clone()
    without[:, [0, 3]] = 0
    model = nn.Sequential(layer)
    with torch.no_grad():
        expected = layer(without)
        layer.weight[column_mask(layer, [0, 3])] = 0
        torch.testing.assert_close(layer(x), expected)
        silence(model, {"0": Readers()}, {"0": [1, 6]})
        expected[:, [1, 6]] = 0
        torch.testing.assert_close(layer(x), expected)
    (weight, at), (bias, same) = silent_entries(model, {"0": Readers()}, {"0": [1, 6]})
    assert weight is layer.weight
    assert bias is layer.bias
    assert not weight[at].any()
    assert weight[at].numel() == 2 * layer.weight.numel() // 8
    assert same.tolist() == [1, 6]
