import pytest
import torch
from torch import nn

from regrow.indexing import channels_last, pad_and_select, place, place_plainly, sources, take, take_block
from regrow.modules import channel_dim

FORMATS = [torch.contiguous_format, torch.channels_last]
INDEX = torch.tensor([0, 2])


def test_take_and_place_by_hand():
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert take(x, INDEX, 1).tolist() == [[1, 3], [4, 6]]
    assert take(x, torch.tensor([1]), 0).tolist() == [[4, 5, 6]]
    assert place(x, torch.tensor([1, 2, 4]), 1, 5).tolist() == [[0, 1, 2, 0, 3], [0, 4, 5, 0, 6]]
    assert place(x, INDEX, 0, 3).tolist() == [[1, 2, 3], [0, 0, 0], [4, 5, 6]]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_they_give_the_same(fmt, mode):
    x = torch.randn(2, 3, 4, 5).to(memory_format=fmt)
    expected = take(x, INDEX, 1), place(x, torch.tensor([0, 2, 4]), 1, 5)
    with mode():
        found = take(x, INDEX, 1), place(x, torch.tensor([0, 2, 4]), 1, 5)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


@pytest.mark.parametrize("fmt", FORMATS)
def test_each_is_the_derivative_of_the_other(fmt):
    x = torch.randn(2, 3, 4, 5).to(memory_format=fmt).requires_grad_()
    taken = take(x, INDEX, 1)
    (gradient,) = torch.autograd.grad(taken, x, weights := torch.randn_like(taken))
    assert torch.equal(gradient, place(weights, INDEX, 1, 3))
    placed = place(x, torch.tensor([1, 2, 4]), 1, 5)
    (gradient,) = torch.autograd.grad(placed, x, weights := torch.randn_like(placed))
    assert torch.equal(gradient, weights[:, [1, 2, 4]])


@pytest.mark.parametrize("dim", [0, 1, 3, -1])
def test_first_and_second_derivatives_are_right(dim):
    x = torch.randn(3, 3, 2, 3, dtype=torch.double, requires_grad=True)
    for function in (
        lambda x: take(x, INDEX, dim) ** 3,
        lambda x: place(x, INDEX.new_tensor([0, 1, 3]), dim, 4) ** 3,
    ):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


def test_the_memory_format_stays():
    for fmt in FORMATS:
        x = torch.randn(2, 3, 4, 5).to(memory_format=fmt)
        for narrow in (take(x, INDEX, 1), place(x, torch.tensor([0, 1, 4]), 1, 6)):
            assert narrow.is_contiguous(memory_format=fmt)
        weight = torch.randn(6, 5, 3, 3).to(memory_format=fmt).requires_grad_()
        block = take_block(weight, torch.tensor([0, 1, 5]), torch.tensor([1, 2]))
        assert block.is_contiguous(memory_format=fmt)
        block.square().sum().backward()
        assert weight.grad.stride() == weight.stride()


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_they_return_may_be_changed_in_place(fmt):
    x = (
        torch.tensor([-1.0, 2, -3])
        .expand(2, 4, 5, 3)
        .movedim(-1, 1)
        .contiguous(memory_format=fmt)
        .requires_grad_()
    )
    weight = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    for tensor, result in (
        (x, take(x, INDEX, 1)),
        (x, place(x, INDEX.new_tensor([0, 2, 3]), 1, 5)),
        (weight, take_block(weight, INDEX[:1], INDEX)),
    ):
        (gradient,) = torch.autograd.grad(result.relu_().sum(), tensor)
        assert not gradient[:, [0, 2]].any()  # -1 and -3
    assert gradient[0, 1].eq(0).all()  # 2 is not in the block


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rows", [None, [1, 3]])
@pytest.mark.parametrize("columns", [None, [0, 2, 4]])
def test_a_block_of_a_weight(fmt, rows, columns):
    weight = torch.randn(4, 5, 3, 2).to(memory_format=fmt).requires_grad_()
    as_tensor = lambda index: None if index is None else torch.tensor(index)  # noqa: E731
    block = take_block(weight, as_tensor(rows), as_tensor(columns))
    kept, read = rows or list(range(4)), columns or list(range(5))
    assert torch.equal(block, weight[kept][:, read])
    (block**2).sum().backward()
    expected = torch.zeros_like(weight)
    for i in kept:
        for j in read:
            expected[i, j] = 2 * weight[i, j].detach()
    assert torch.equal(weight.grad, expected)


def test_a_block_of_a_vector_and_of_a_matrix():
    vector, matrix = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert take_block(vector, INDEX, None).tolist() == [1, 3]
    assert take_block(vector, None, None) is vector
    assert take_block(matrix, None, INDEX).tolist() == [[1, 3], [4, 6]]
    assert take_block(matrix, torch.tensor([1]), INDEX).tolist() == [[4, 6]]


def test_where_channels_are():
    assert channel_dim(nn.Conv2d(3, 4, 1), torch.zeros(2, 3, 5, 5)) == 1
    assert channel_dim(nn.Conv2d(3, 4, 1), torch.zeros(3, 5, 5)) == 0
    assert channel_dim(nn.Conv1d(3, 4, 1), torch.zeros(2, 3, 5)) == 1
    assert channel_dim(nn.Linear(3, 4), torch.zeros(2, 7, 3)) == 2
    assert channel_dim(nn.BatchNorm1d(3), torch.zeros(2, 3)) == 1


def test_what_counts_as_channels_last():
    x = torch.zeros(2, 3, 4, 5)
    assert not channels_last(x)
    assert channels_last(x.to(memory_format=torch.channels_last))
    assert channels_last(torch.zeros(2, 4, 3).movedim(-1, 1))
    assert not channels_last(x.transpose(2, 3))
    assert not channels_last(torch.zeros(2, 3))


def test_where_each_place_gets_its_channel_from():
    assert sources([0, 2], 4) == [0, 2, 1, 2]
    assert sources([1], 2) == [1, 0]
    assert sources([0, 1], 2) == [0, 1]


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_plain_operations_place_the_same(shape, dim):
    x = torch.randn(shape)
    positions = list(range(0, 2 * shape[dim], 2))
    index, width = torch.tensor(positions), 2 * shape[dim] + 1
    expected = place(x, index, dim, width)
    assert torch.equal(place_plainly(x, index, dim, width), expected)
    assert torch.equal(pad_and_select(x, torch.tensor(sources(positions, width)), dim), expected)


def test_quantized_numbers_are_taken_and_placed():
    bits = torch.quantize_per_tensor(torch.tensor([[1.0, 2.0, 3.0]]), 0.5, 4, torch.quint8)
    assert take(bits, INDEX, 1).dequantize().tolist() == [[1, 3]]
    assert place(bits, torch.tensor([0, 2, 4]), 1, 5).dequantize().tolist() == [[1, 0, 2, 0, 3]]
