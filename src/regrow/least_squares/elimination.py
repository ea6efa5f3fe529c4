"""In which order channels go, so that the layers that read them can best make up for each loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# As a share of the mean square of the columns.
PENALTY = 1e-3
_ROUNDING = 1e-10


@dataclass(frozen=True)
class Reading:
    """What a layer reads, or one group of a grouped layer: a system of its own.

    Attributes:
        xx: [columns, columns], float64: the mean products of the inputs, less their means where the layer has
            biases to shift.
        weights: [columns, outputs], float64, scaled so that the errors of several readings can be added up.
        channels: [columns] int64, the channel that each column reads; -1 for a column that stays.
    """

    xx: Tensor
    weights: Tensor
    channels: Tensor


def eliminate(readings: Sequence[Reading], channels: int, penalty: float = PENALTY) -> tuple[Tensor, Tensor]:
    """Remove channels one by one, always the one that costs the least, until none is left.

    Each removal is followed by new weights for the columns that are left: those with the smallest squared
    error of the outputs plus ``penalty`` · mean square of the columns · squared distance to the old weights.
    This sum is the error. It is found from the inverse of the system, which is brought up to date by the
    columns of a channel (the optimal brain surgeon: Hassibi & Stork 1992, in blocks as in Frantar &
    Alistarh, arXiv 2208.11580). Columns that do not vary cost nothing.

    Args:
        readings: of all layers that read the channels. The errors are added up.

    Returns:
        order: [channels] int64, and errors: [channels] float64, what each removal in this order adds to the
        error. Both on the CPU.
    """
    systems = [_System(reading, penalty) for reading in readings if len(reading.channels)]
    costs = torch.zeros(len(systems), channels, dtype=torch.float64)
    for row, system in zip(costs, systems, strict=True):
        system.write_costs(row)
    gone = torch.zeros(channels, dtype=torch.float64)
    order, errors = [], []
    for _ in range(channels):
        total = costs.sum(0) + gone
        channel = int(total.argmin())
        order.append(channel)
        errors.append(total[channel].item())
        for row, system in zip(costs, systems, strict=True):
            if system.remove(channel):
                system.write_costs(row)
        gone[channel] = torch.inf
    return torch.tensor(order, dtype=torch.int64), torch.tensor(errors, dtype=torch.float64)


class _System:
    """The inverse of one system and the weights, as they are after the removals so far."""

    def __init__(self, reading: Reading, penalty: float) -> None:
        power = reading.xx.diagonal()
        varies = power > _ROUNDING * power.max()  # the rest is rounding
        found = varies.nonzero().flatten()
        system = reading.xx[found[:, None], found]
        if len(found):
            system.diagonal().add_(penalty * power[found].mean())
        factor, failed = torch.linalg.cholesky_ex(system)
        # A matrix that rounding has spoilt is taken as one of columns that have nothing in common.
        inverse = torch.cholesky_inverse(factor) if not failed else system.diagonal().reciprocal().diag()
        self._set(inverse, reading.weights[found], reading.channels[found])

    def _set(self, inverse: Tensor, weights: Tensor, channels: Tensor) -> None:
        self._inverse, self._weights, self._channels = inverse, weights, channels
        order = channels.argsort(stable=True)
        numbers, counts = channels[order].unique_consecutive(return_counts=True)
        starts = counts.cumsum(0) - counts
        # Channels with equally many columns, and these: [channels] and [channels, columns of each].
        self._alike: list[tuple[Tensor, Tensor]] = []
        for count in counts.unique().tolist():
            some = ((counts == count) & (numbers >= 0)).nonzero().flatten()
            self._alike.append((numbers[some], order[starts[some][:, None] + torch.arange(count)]))

    def write_costs(self, costs: Tensor) -> None:
        """Write what the removal of each channel that is left would cost to ``costs`` [channels]."""
        costs.zero_()
        for channels, at in self._alike:
            factor = torch.linalg.cholesky_ex(self._inverse[at[:, :, None], at[:, None]])[0]
            lengths = torch.linalg.solve_triangular(factor, self._weights[at], upper=False)
            costs[channels] = lengths.square().sum((1, 2))

    def remove(self, channel: int) -> bool:
        """Take the columns of ``channel`` out, and give the others new weights; False if it has none here."""
        at = (self._channels == channel).nonzero().flatten()
        if not len(at):
            return False
        across = self._inverse[:, at]
        factor = torch.linalg.cholesky_ex(across[at])[0]
        shares = torch.cholesky_solve(torch.cat([across.T, self._weights[at]], 1), factor)
        columns = len(self._inverse)
        self._inverse.addmm_(across, shares[:, :columns], alpha=-1)
        self._weights.addmm_(across, shares[:, columns:], alpha=-1)
        self._channels[at] = -2
        left = (self._channels > -2).nonzero().flatten()
        if len(left) <= 0.7 * columns:  # work on large matrices is in proportion to their squares
            self._set(self._inverse[left[:, None], left], self._weights[left], self._channels[left])
        else:
            stays = [(names != channel) for names, _ in self._alike]
            self._alike = [
                (names[kept], places[kept]) for kept, (names, places) in zip(stays, self._alike, strict=True)
            ]
        return True
