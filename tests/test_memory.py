"""How tensors lie in memory."""

import pytest
import torch

from regrow.memory import in_memory, is_dense, lies_by


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.ones(5, 3), True),
        (torch.ones(6, 7).T, True),
        (torch.ones(2, 3, 4, 4).movedim(1, -1), True),
        (torch.ones(4, 6)[:, ::2], False),
        (torch.ones(3, 1).expand(3, 4), False),
    ],
)
def test_dense(tensor, dense):
    assert is_dense(tensor) is dense


def test_strides_of_single_elements_say_nothing():
    weight = torch.randn(8, 4, 1, 1)
    assert weight.stride() != (4, 1, 4, 4)
    assert lies_by(weight, (4, 1, 4, 4))
    assert not lies_by(torch.randn(8, 4, 2, 1), (8, 1, 4, 1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_vectors_in_the_order_of_memory(memory_format):
    tensor = torch.arange(24.0).view(2, 3, 2, 2)
    strides = torch.empty(2, 3, 2, 2).to(memory_format=memory_format).stride()
    by_hand = tensor if memory_format == torch.contiguous_format else tensor.permute(0, 2, 3, 1)
    assert in_memory(tensor, strides).tolist() == by_hand.flatten().tolist()
    last = tensor.to(memory_format=torch.channels_last)
    assert in_memory(last, strides).tolist() == by_hand.flatten().tolist()
    same = tensor.to(memory_format=memory_format)
    assert in_memory(same, strides).data_ptr() == same.data_ptr()
