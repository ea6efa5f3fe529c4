"""3×3 convolutions of small pictures with a quarter of the multiplications, for many pictures at once.

The minimal filtering algorithms of Toom, Cook and Winograd (Lavin & Gray 2015, arXiv 1509.09308): m outputs of
a filter with three taps take m + 2 multiplications, and in two dimensions the savings multiply. Pictures lie in
memory as [height, width, pictures, channels], so that every step is one matrix product.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_TILES = (4, 3, 2)  # outputs of a tile; with larger ones float32 would lose digits
_MOST = 8  # pixels a side: beyond, oneDNN's own convolution is about as quick
_LEAST = 48  # channels and filters: below, the sums around the products cost more than they save
_POINTS = (0.0, 1.0, -1.0, 2.0, -2.0)  # where the polynomials are evaluated; infinity is the last one


def positions_first(pictures: Tensor) -> Tensor:
    """``pictures`` [n, channels, height, width] as [height, width, n, channels], contiguous."""
    return pictures.permute(2, 3, 0, 1).contiguous()


def pictures_first(positions: Tensor) -> Tensor:
    """The way back from ``positions_first``: a view [n, channels, height, width]."""
    return positions.permute(2, 3, 0, 1)


def lies_positions_first(pictures: Tensor) -> bool:
    """Whether ``pictures`` [n, channels, height, width] lie in memory as [height, width, n, channels]."""
    return pictures.dim() == 4 and pictures.permute(2, 3, 0, 1).is_contiguous()


def is_quicker(conv: nn.Module, size: Sequence[int], device: torch.device) -> bool:
    """Whether ``SmallMaps`` computes ``conv``, a convolution on pictures of ``size``, and does so quicker."""
    return (
        type(conv) is nn.Conv2d
        and device.type == "cpu"
        and conv.weight.dtype == torch.float32
        and conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.padding in ((1, 1), "same")
        and conv.padding_mode == "zeros"
        and conv.groups == 1
        and min(conv.weight.shape[:2]) >= _LEAST
        and len(size) == 2
        and all(side <= _MOST and _tile(side) for side in size)
    )


class SmallMaps:
    """A convolution for pictures of one size, [n, channels, height, width] → [n, filters, height, width].

    It computes what ``conv`` does, up to rounding (about 1e-6 of the largest output). The result lies in
    memory as [height, width, n, filters].
    """

    def __init__(self, conv: nn.Conv2d, size: Sequence[int]) -> None:
        self._bias = conv.bias
        (height, width), weight = size, conv.weight.detach()
        rows, row_taps, self._to_height = _matrices(height)
        columns, column_taps, self._to_width = _matrices(width)
        self._rows, self._columns = rows, columns
        self._tiles = _tiles(height), _tiles(width)
        spread = torch.einsum("ua,vb,ncab->uvcn", row_taps, column_taps, weight.double())
        self._weight = spread.to(weight).contiguous()

    def __call__(self, pictures: Tensor, scratch: Scratch) -> Tensor:
        inputs = positions_first(pictures)
        height, width, n, channels = inputs.shape
        spread_rows, spread_columns = len(self._rows), len(self._columns)
        down, across = self._tiles
        filters = self._weight.shape[-1]
        half = scratch.take(0, spread_rows, width * n * channels)
        torch.mm(self._rows, inputs.view(height, -1), out=half)
        spread = scratch.take(1, spread_rows, spread_columns, n * channels)
        torch.matmul(self._columns, half.view(spread_rows, width, -1), out=spread)
        products = scratch.take(2, spread_rows, spread_columns, n * filters)
        if down == across == 1:
            count = spread_rows * spread_columns
            torch.bmm(
                spread.view(count, n, channels),
                self._weight.view(count, channels, filters),
                out=products.view(count, n, filters),
            )
        else:
            for row in range(spread_rows):
                torch.bmm(
                    spread[row].view(-1, across * n, channels),
                    self._weight[row // down],
                    out=products[row].view(-1, across * n, filters),
                )
        half = scratch.take(0, spread_rows, width, n * filters)
        torch.matmul(self._to_width, products, out=half)
        outputs = torch.mm(self._to_height, half.view(spread_rows, -1)).view(height, width, n, filters)
        if self._bias is not None:
            outputs += self._bias
        return pictures_first(outputs)


class Scratch:
    """Memory for intermediate results that is taken again and again: new memory costs time to touch."""

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

    def take(self, place: int, *shape: int) -> Tensor:
        """A float32 tensor of ``shape`` with arbitrary values; it is valid until ``place`` is taken again."""
        count = math.prod(shape)
        if place not in self._held or self._held[place].numel() < count:
            self._held[place] = torch.empty(count)
        return self._held[place][:count].view(shape)


def max_pool(pool: Any, pictures: Tensor) -> Tensor | None:
    """2×2 maxima of pictures that lie positions first, lying so too; None where ``pool`` does another thing."""
    height, width = pictures.shape[2:]
    twos = (2, (2, 2))
    if pool.kernel_size not in twos or pool.stride not in twos or pool.padding not in (0, (0, 0)):
        return None
    if pool.dilation not in (1, (1, 1)) or pool.return_indices or height % 2 or width % 2:
        return None
    positions = pictures.permute(2, 3, 0, 1)
    low = torch.maximum(positions[0::2], positions[1::2])
    return pictures_first(torch.maximum(low[:, 0::2], low[:, 1::2]))


def _tile(side: int) -> int:
    """The outputs of a tile for pictures of ``side`` pixels; 0 if no tile divides them."""
    return side if side < 4 else next((tile for tile in _TILES if side % tile == 0), 0)


def _tiles(side: int) -> int:
    return side // _tile(side)


@functools.cache
def _matrices(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """What turns a line of ``side`` inputs, padded with one zero at each end, into factors [s, side]; the three
    taps into factors [u, 3]; and products [s] into the outputs [side, s].

    There are t tiles of u factors: s = u · t, and the factor u of tile t has number u · tiles + t.
    """
    tile, tiles = _tile(side), _tiles(side)
    if side == 2:  # of the four inputs two are zeros, and three multiplications do
        inputs = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
        taps = torch.tensor([[0.0, 1.0, 0.0], [0.0, -1.0, 1.0], [1.0, -1.0, 0.0]])
        outputs = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
        return inputs, taps.double(), outputs
    if side == 1:
        return torch.ones(1, 1), torch.tensor([[0.0, 1.0, 0.0]]).double(), torch.ones(1, 1)
    factors = tile + 2
    powers = torch.zeros(factors, factors, dtype=torch.float64)
    for row, point in enumerate(_POINTS[: factors - 1]):
        powers[row] = torch.tensor([point**power for power in range(factors)], dtype=torch.float64)
    powers[-1, -1] = 1
    taps, window, combine = (
        powers[:, :3].clone(),
        torch.linalg.inv(powers).T.contiguous(),
        powers[:, :tile].T.clone(),
    )
    for row, point in enumerate(_POINTS[: factors - 1]):  # whole numbers on the side that float32 computes
        whole = math.prod(point - other for other in _POINTS[: factors - 1] if other != point)
        window[row] *= whole
        taps[row] /= whole
    taps[-1] = torch.tensor([0.0, 0.0, 1.0])
    combine[:, -1] = 0
    combine[-1, -1] = 1
    inputs = torch.zeros(factors, tiles, side + 2, dtype=torch.float64)
    outputs = torch.zeros(tiles, tile, factors, tiles, dtype=torch.float64)
    for number in range(tiles):
        inputs[:, number, number * tile : number * tile + factors] = window
        outputs[number, :, :, number] = combine
    inputs = inputs[:, :, 1:-1].reshape(factors * tiles, side)
    return inputs.float().contiguous(), taps, outputs.reshape(side, factors * tiles).float()


class Quick:
    """The convolutions of a network for small pictures, made when first asked for, and memory for all."""

    def __init__(self) -> None:
        self._made: dict[tuple[nn.Module, tuple[int, ...]], SmallMaps] = {}
        self._scratch = Scratch()

    def convolved(self, conv: Any, pictures: Tensor) -> Tensor | None:
        """``conv`` of ``pictures``; None where PyTorch's own way is as quick or the only one."""
        size = tuple(pictures.shape[2:])
        if not is_quicker(conv, size, pictures.device):
            return None
        if (conv, size) not in self._made:
            self._made[conv, size] = SmallMaps(conv, size)
        return self._made[conv, size](pictures, self._scratch)
