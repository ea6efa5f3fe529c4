import pytest
import torch

from regrow.noise.pool import Pool

LARGE = (64, 64, 8, 8)  # 1 MiB in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_leased_is_as_empty_like_makes_it(dtype, layout):
    like = torch.zeros(LARGE, dtype=dtype).repeat(2, 1, 1, 1).to(memory_format=layout)
    tensor = Pool().empty_like(like)
    wanted = torch.empty_like(like)
    assert (tensor.shape, tensor.stride(), tensor.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
    assert tensor.untyped_storage().nbytes() == wanted.untyped_storage().nbytes()
    assert not tensor._is_view()
    tensor.copy_(torch.randn(like.shape))
    assert torch.isfinite(tensor).all()


def test_memory_comes_back_when_nothing_uses_it_any_more():
    pool, like = Pool(), torch.zeros(LARGE)
    first = pool.empty_like(like)
    address = first.data_ptr()
    row, flat = first[3], first.detach().view(-1)
    del first
    other = pool.empty_like(like)
    assert other.data_ptr() != address  # two views still use the first
    del row
    assert pool.empty_like(like).data_ptr() != address
    del flat
    assert address in {pool.empty_like(like).data_ptr(), pool.empty_like(like).data_ptr()}


def test_values_stay_while_another_tensor_is_leased():
    pool, like = Pool(), torch.zeros(LARGE)
    first = pool.empty_like(like).fill_(1)
    pool.empty_like(like).fill_(2)
    third = pool.empty_like(like).fill_(3)
    assert (first == 1).all()
    assert (third == 3).all()


def test_a_graph_that_lives_on_keeps_what_it_saved():
    pool = Pool()
    weight = torch.randn(LARGE, requires_grad=True)
    factor = pool.empty_like(weight).fill_(3)
    product = weight * factor
    del factor
    pool.empty_like(weight).fill_(7)
    product.sum().backward()
    assert (weight.grad == 3).all()


def test_small_tensors_and_those_of_other_devices_are_not_pooled():
    pool = Pool()
    small = pool.empty_like(torch.zeros(3))
    meta = pool.empty_like(torch.zeros(LARGE, device="meta"))
    assert small.shape == (3,)
    assert meta.device.type == "meta"
    assert not pool._free


def test_clearing_gives_back_what_is_free_and_later_what_is_not():
    pool, like = Pool(), torch.zeros(LARGE)
    used, free = pool.empty_like(like).fill_(5), pool.empty_like(like)
    del free
    pool.clear()
    assert not pool._free
    assert (used == 5).all()
    del used
    assert not pool._free
