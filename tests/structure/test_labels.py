import pytest
import torch

from regrow.structure.labels import (
    NOWHERE,
    both,
    compact,
    contracted,
    keeps_apart,
    lies_along,
    moved,
    written_out,
)

aten = torch.ops.aten
X = torch.zeros(2, 4, 3, 3)


def test_labels_written_out_and_back():
    assert written_out(1, X.shape).tolist() == [[[[1]], [[2]], [[3]], [[4]]]]
    assert written_out(NOWHERE, X.shape).tolist() == [[[[1]]]]
    assert written_out(None, X.shape) is None
    assert compact(written_out(1, X.shape).expand(X.shape)) == 1
    assert compact(torch.full((2, 4), 7)) == NOWHERE
    # Pictures and channels in one dimension: the labels repeat, and may come apart again.
    flat = written_out(1, X.shape).expand(X.shape).reshape(8, 9)
    repeated = compact(flat)
    assert repeated.tolist() == [[1], [2], [3], [4]] * 2
    assert compact(repeated.expand(8, 9).reshape(2, 4, 9)) == 1
    assert compact(torch.zeros(0, 4, dtype=torch.int32)) is None
    # Channels that lie beside others are told apart all the same.
    assert compact(torch.tensor([[0, 0, 1, 2]])) == 1
    assert both(torch.tensor([1, 2]), torch.tensor([1, 2])).tolist() == [1, 2]
    assert len(both(torch.tensor([[1], [2]]), torch.tensor([[1, 2]])).unique()) == 4


def test_along_which_dimension():
    assert lies_along(1, 1, 4)
    assert lies_along(3, -1, 4)
    assert not lies_along(1, 2, 4)
    assert lies_along(NOWHERE, 2, 4)
    assert not lies_along(None, 1, 4)
    assert not lies_along(torch.arange(8).view(2, 4, 1), 1, 3)


@pytest.mark.parametrize(
    ("operation", "args", "shape", "where"),
    [
        (aten.relu.default, (X,), (2, 4, 3, 3), 1),
        (aten.mul.Tensor, (X, torch.zeros(5, 2, 4, 3, 3)), (5, 2, 4, 3, 3), 2),
        (aten.mean.dim, (X, [2, 3]), (2, 4), 1),
        (aten.mean.dim, (X, [-1, -2], True), (2, 4, 1, 1), 1),
        (aten.mean.dim, (X, [0]), (4, 3, 3), 0),
        (aten.amax.default, (X, [1]), (2, 3, 3), NOWHERE),
        (aten.amax.default, (X, [1], True), (2, 1, 3, 3), NOWHERE),
        (aten.avg_pool2d.default, (X, [3, 3]), (2, 4, 1, 1), 1),
        (aten.glu.default, (X, 1), (2, 2, 3, 3), 1),
        (aten.cat.default, ([X, X], 1), (2, 8, 3, 3), 1),
        (aten.pixel_shuffle.default, (X, 2), (2, 1, 6, 6), None),
        (aten.flip.default, (X, [1]), (2, 4, 3, 3), 1),
        (aten.index.Tensor, (X, [None, torch.tensor([3, 0])]), (2, 2, 3, 3), 1),
        (aten.unfold.default, (X, 2, 2, 1), (2, 4, 2, 3, 2), None),
    ],
)
def test_where_an_operation_takes_the_channels(operation, args, shape, where):
    found = moved(operation, args, {}, X, 1, shape)
    if where is None and isinstance(found, torch.Tensor):
        assert min(found.shape) >= 1  # labels: the channels lie along several dimensions
    else:
        assert found == where
    assert moved(operation, args, {}, X, None, shape) is None
    assert moved(operation, args, {}, X, NOWHERE, shape) == NOWHERE


@pytest.mark.parametrize(
    ("operation", "args", "apart"),
    [
        (aten.relu.default, (X,), True),
        (aten.add.Tensor, (X, 1), True),
        (aten.mean.dim, (X, [2, 3]), True),
        (aten.mean.dim, (X, [-1]), True),
        (aten.mean.dim, (X, [1]), False),
        (aten.mean.dim, (X, [-3]), False),
        (aten.mean.default, (X,), False),
        (aten.max_pool2d_with_indices.default, (X, [2, 2]), True),
        (aten.avg_pool3d.default, (X, [3, 1, 1]), False),
        (aten.upsample_nearest2d.default, (X, [6, 6]), True),
        (aten._softmax.default, (X, 1, False), False),
        (aten.slice.Tensor, (X, 2, 0, 2), True),
        (aten.slice.Tensor, (X, 1, 0, 2), False),
        (aten.cumsum.default, (X, 2), False),
        (aten.native_layer_norm.default, (X, [3], None, None, 1e-5), False),
    ],
)
def test_operations_that_keep_channels_apart(operation, args, apart):
    assert keeps_apart(operation, args, {}, [(X, 1)]) is apart


def test_a_tensor_and_its_transpose_do_not_keep_apart():
    x = torch.zeros(2, 4, 4)
    assert keeps_apart(aten.add.Tensor, (x, x), {}, [(x, 1), (x, 1)])
    assert not keeps_apart(aten.add.Tensor, (x, x), {}, [(x, 1), (x, 2)])
    assert keeps_apart(aten.mul.Tensor, (x, x[0]), {}, [(x, 1), (x[0], 0)])


def test_which_operand_is_summed_over():
    assert contracted("mm", (X, X)) == ((0, -1), (1, 0))
    assert contracted("add", (X, X)) == ()
    convolution = (None, [1, 1], [0, 0], [1, 1], False, [0, 0])
    assert contracted("convolution", (X, torch.ones(2, 4, 1, 1), *convolution, 1)) == ((0, 1),)
    assert contracted("convolution", (X, torch.ones(4, 1, 1, 1), *convolution, 4)) == ()
    assert contracted("convolution", (X, torch.eye(4).view(4, 4, 1, 1), *convolution, 1)) == ()
    assert contracted("convolution", (X, torch.ones(4, 2, 1, 1), *convolution, 2)) == ((0, 1),)
    transposed = (None, [1, 1], [0, 0], [1, 1], True, [0, 0])
    assert contracted("convolution", (X, torch.ones(4, 2, 1, 1), *transposed, 1)) == ((0, 1),)
    assert contracted("convolution", (X, torch.ones(4, 1, 1, 1), *transposed, 4)) == ()
