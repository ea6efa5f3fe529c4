import math

import pytest
import torch
from torch import nn

from regrow.numbers import at_least_float32, largest_of, numbers, together
from regrow.torch_private import TorchDispatchMode

ASKED = {"_local_scalar_dense", "equal", "is_nonzero"}


class Asked(TorchDispatchMode):
    """Counts the operations that make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ASKED
        return func(*args, **(kwargs or {}))


def test_numbers_of_every_type_come_in_order():
    tensors = [
        torch.tensor(1.5),
        torch.tensor(2, dtype=torch.int64),
        nn.Parameter(torch.tensor(1e-300, dtype=torch.float64)),
        torch.tensor(True),
        torch.tensor(-1.0, dtype=torch.bfloat16),
        torch.tensor(math.nan),
    ]
    found = numbers(tensors)
    assert found[:5] == [1.5, 2, 1e-300, True, -1.0]
    assert math.isnan(found[5])
    assert numbers([]) == []


def test_the_largest_number():
    assert largest_of(torch.tensor([[1.0, -3.0], [2.0, 0.0]])) == 3
    assert largest_of(torch.zeros(0, 4)) == 0
    assert largest_of(torch.tensor([1.0, math.nan])).isnan()
    assert largest_of(torch.tensor([math.inf, 1.0])) == math.inf


def test_numbers_are_asked_for_once():
    with Asked() as asked:
        assert numbers([torch.tensor(float(i)) for i in range(5)]) == [0, 1, 2, 3, 4]
    assert asked.count <= 1


def test_tensors_that_are_here_are_given_back():
    one, two = torch.ones(2), torch.zeros(0)
    assert together([one, two])[0] is one
    assert together([]) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_at_least_float32_widens_what_is_narrower(dtype):
    tensor = torch.ones(2, dtype=dtype)
    found = at_least_float32(tensor)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (found is tensor) == (dtype in (torch.float32, torch.float64))
