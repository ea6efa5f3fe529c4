"""Which numbers a pass draws with, and where in them a parameter begins."""

import math

import pytest
import torch

from regrow.noise import kernels
from regrow.noise.draws import SEGMENT, Place, base, places, start_and_key

M = 2**64 - 1


def by_definition(seed, number):
    """SplitMix64 as its authors write it, in numbers without a sign."""
    z = (seed + number * 0x9E3779B97F4A7C15) & M
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M
    z ^= z >> 31
    return z & 0xFFFFFFFF, z >> 32 | 1


NUMBERS = [0, 1, 2, 77, 2**31, 2**32, 2**62, 2**63 - 1]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789])
def test_the_pair_in_whole_numbers_and_in_tensors(seed):
    for number in NUMBERS:
        expected = by_definition(seed & M, number)
        assert start_and_key(seed, number) == expected
        found = start_and_key(seed, torch.tensor(number))
        assert all(pair.dtype == torch.int32 for pair in found)
        assert tuple(int(each) % 2**32 for each in found) == expected


def test_a_known_value():
    # The first two outputs for the seed 1234567, as in the reference implementation's tests.
    assert start_and_key(1234567, 1) == (6457827717110365317 & 0xFFFFFFFF, 6457827717110365317 >> 32 | 1)
    assert start_and_key(1234567, 2) == (3203168211198807973 & 0xFFFFFFFF, 3203168211198807973 >> 32 | 1)


def test_any_whole_number_is_a_seed():
    seeds = [0, 1, -1, 2**63, -(2**63) - 1, 10**40]
    assert len({base(seed) for seed in seeds}) == len(seeds)
    assert all(-(2**63) <= base(seed) < 2**63 for seed in seeds)


def test_places_follow_each_other_at_multiples_of_64():
    assert [place.offset for place in places([432, 64, 1, 0, 65, 3], 5)] == [0, 448, 512, 576, 576, 704]
    assert {place.base for place in places([432, 64, 1], 5)} == {base(5)}


def test_a_base_serves_so_many_weights_and_a_larger_parameter_has_its_own():
    sizes = [SEGMENT - 64, 64, 1, 2 * SEGMENT, 5, 7]
    first, second, third, fourth = (base(3, segment) for segment in range(4))
    assert places(sizes, 3) == [
        Place(first, 0), Place(first, SEGMENT - 64), Place(second, 0), Place(third, 0), Place(fourth, 0),
        Place(fourth, 64),
    ]  # fmt: skip


@pytest.mark.parametrize("distance", [2**20, 2**21, 2**22 + 64, 2**25 + 64, 3 * 2**24])
def test_parameters_that_lie_far_apart_in_a_model_are_uncorrelated(distance):
    n, sizes = 2**18, []
    for number in range(20):
        start, key = start_and_key(base(0), torch.tensor(number))
        kept = []
        for position in (0, distance):
            shift = torch.tensor((kernels.SPACING * position + 2**31) % 2**32 - 2**31, dtype=torch.int32)
            numbers = kernels.spaced(n, torch.device("cpu"))
            kept.append(kernels.scrambled(numbers, start + shift, key).double() < 0.4 * 2**31)
        z = [(each.double() - 0.7) / math.sqrt(0.21) for each in kept]
        sizes.append(float((z[0] * z[1]).mean()))
    assert max(map(abs, sizes)) < 0.01  # 5 standard deviations of independent draws
