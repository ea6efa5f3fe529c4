"""Convolutions of small pictures with few multiplications equal those of PyTorch."""

import pytest
import torch
from torch import nn

from regrow.criteria.small_maps import (
    Quick,
    Scratch,
    SmallMaps,
    is_quicker,
    lies_positions_first,
    max_pool,
    pictures_first,
    positions_first,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "size", [(1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (8, 8), (16, 16), (1, 4), (3, 8), (9, 2)]
)
def test_it_equals_the_convolution(size: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 7, 3, padding=1, bias=bias)
    pictures = torch.randn(3, 5, *size)
    with torch.no_grad():
        made = SmallMaps(conv, size)(pictures, Scratch())
        expected = conv.double()(pictures.double())
    assert made.shape == expected.shape
    assert lies_positions_first(made)
    assert (made - expected).abs().max() < 2e-5 * expected.abs().max()


def test_the_middle_tap_of_a_picture_of_one_pixel_by_hand() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.arange(9.0).view(1, 1, 3, 3))
        made = SmallMaps(conv, (1, 1))(torch.full((2, 1, 1, 1), 3.0), Scratch())
    assert made.flatten().tolist() == [12.0, 12.0]


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 2, "padding": 1}, {"padding": 0}, {"padding": 1, "groups": 2},
        {"kernel_size": 5, "padding": 2}, {"padding": 2, "dilation": 2},
        {"padding": 1, "padding_mode": "circular"}, {"padding": 1, "dtype": torch.float64},
    ],
)  # fmt: skip
def test_other_convolutions_are_left_to_pytorch(settings: dict) -> None:
    assert is_quicker(nn.Conv2d(64, 64, 3, padding=1), (4, 4), CPU)
    conv = nn.Conv2d(64, 64, **{"kernel_size": 3, **settings})
    assert not is_quicker(conv, (4, 4), CPU)
    assert Quick().convolved(conv, torch.randn(1, 64, 4, 4, dtype=conv.weight.dtype)) is None


@pytest.mark.parametrize("size", [(5, 5), (4, 7), (32, 32), (4,)])
def test_other_sizes_are_left_to_pytorch(size: tuple[int, ...]) -> None:
    assert not is_quicker(nn.Conv2d(64, 64, 3, padding=1), size, CPU)


def test_narrow_layers_and_subclasses_are_left_to_pytorch() -> None:
    class Own(nn.Conv2d):
        pass

    assert not is_quicker(nn.Conv2d(3, 64, 3, padding=1), (4, 4), CPU)
    assert not is_quicker(Own(64, 64, 3, padding=1), (4, 4), CPU)
    assert not is_quicker(nn.Conv2d(64, 64, 3, padding=1), (4, 4), torch.device("cuda"))


@torch.no_grad()
def test_scratch_of_another_size_does_not_disturb() -> None:
    torch.manual_seed(0)
    conv, quick = nn.Conv2d(48, 50, 3, padding=1), Quick()
    for shape in [(2, 48, 4, 4), (5, 48, 8, 8), (1, 48, 2, 2), (2, 48, 4, 4)]:
        pictures = torch.randn(shape)
        made = quick.convolved(conv, pictures)
        assert made is not None
        assert torch.allclose(made, conv(pictures), atol=2e-5)


def test_layouts() -> None:
    pictures = torch.randn(2, 3, 4, 5)
    positions = positions_first(pictures)
    assert positions.shape == (4, 5, 2, 3)
    assert torch.equal(pictures_first(positions), pictures)
    assert not lies_positions_first(pictures)
    assert lies_positions_first(pictures_first(positions))


def test_maxima() -> None:
    pictures = pictures_first(torch.randn(4, 6, 2, 3))
    made = max_pool(nn.MaxPool2d(2), pictures)
    assert made is not None
    assert torch.equal(made, nn.MaxPool2d(2)(pictures))
    others = [nn.MaxPool2d(3), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, padding=1), nn.MaxPool2d(2, dilation=2)]
    others.append(nn.MaxPool2d(2, return_indices=True))
    assert all(max_pool(pool, pictures) is None for pool in others)
    assert max_pool(nn.MaxPool2d(2), pictures[:, :, :3]) is None
