import copy

import pytest
import torch
from torch import nn

from regrow.indexing import channels_last
from regrow.repr.batch_norm import batch_norm, norms_innermost
from regrow.repr.narrow import narrow
from regrow.surgery.plan import CutPlan


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def innermost(*shape, dtype=torch.float64):
    x = 3 * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape))) + 2
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return x.to(memory_format=layout).requires_grad_()


def settled(norm):
    generator = torch.Generator().manual_seed(1)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if tensor is not None:
            tensor.data.uniform_(0.5, 2, generator=generator)
    return norm.double()


def test_two_pictures_of_one_pixel_by_hand():
    x = torch.tensor([[[[1.0]], [[10.0]]], [[[3.0]], [[10.0]]]]).to(memory_format=torch.channels_last)
    norm = nn.BatchNorm2d(2, eps=0.0625)
    torch.nn.init.constant_(norm.weight, 2)
    # means 2 and 10; variances 1 and 0; 1 / sqrt(1.0625) = 0.970143
    torch.testing.assert_close(
        batch_norm(norm, x).flatten(),
        torch.tensor([-2 * 0.9701425, 0, 2 * 0.9701425, 0]),
    )
    # 0.9 of what was there and 0.1 of the new; the variance is 2 with n - 1
    torch.testing.assert_close(norm.running_mean, torch.tensor([0.2, 1.0]))
    torch.testing.assert_close(norm.running_var, torch.tensor([0.9 + 0.2, 0.9]))


@pytest.mark.parametrize("shape", [(4, 11, 8, 8), (3, 5, 3, 3), (2, 7, 2, 3, 4), (1, 3, 5, 5)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"momentum": 0.5}],
)
def test_it_is_what_pytorch_computes(shape, settings):
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm3d
    norm = settled(kind(shape[1], **settings))
    theirs, x = copy.deepcopy(norm), innermost(*shape)
    y = x.detach().clone().requires_grad_()
    weights = torch.randn(shape, dtype=torch.float64)
    for _ in range(3):
        assert norms_innermost(norm, x)
        mine, wanted = batch_norm(norm, x), theirs(y)
        torch.testing.assert_close(mine, wanted)
        assert channels_last(mine)
    (mine * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for one, other in zip(norm.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    for one, other in zip(norm.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("affine", [True, False])
def test_its_derivatives_are_right_the_second_one_too(affine):
    norm = settled(nn.BatchNorm2d(3, affine=affine, track_running_stats=False))
    x = innermost(2, 3, 2, 2)
    given = [x, *norm.parameters()]

    def run(x, *_):
        return batch_norm(norm, x)

    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


def test_a_mean_far_from_zero_costs_no_digits():
    x = (torch.randn(4, 5, 8, 8) + 1000).to(memory_format=torch.channels_last)
    norm = nn.BatchNorm2d(5)
    exact = copy.deepcopy(norm).double()(x.double())
    torch.testing.assert_close(batch_norm(norm, x).double(), exact, rtol=1e-3, atol=1e-3)


def test_where_pytorch_is_as_quick_or_something_else_is_computed_it_does_not_apply():
    norm, x = nn.BatchNorm2d(11), torch.randn(4, 11, 8, 8).to(memory_format=torch.channels_last)
    assert norms_innermost(norm, x)
    assert not norms_innermost(norm, x.contiguous())
    assert not norms_innermost(norm, x.bfloat16())
    assert not norms_innermost(
        nn.BatchNorm2d(32), torch.randn(4, 32, 8, 8).to(memory_format=torch.channels_last)
    )
    assert not norms_innermost(copy.deepcopy(norm).eval(), x)
    assert not norms_innermost(nn.InstanceNorm2d(11), x)
    assert not norms_innermost(norm, x[:1, :, :1, :1])
    torch.set_num_threads(1)
    assert not norms_innermost(norm, x)


def test_a_narrowed_norm_is_what_a_norm_of_that_width_computes():
    norm = settled(nn.BatchNorm2d(8))
    model, x = nn.Sequential(norm), innermost(4, 5, 8, 8)
    kept, before = [0, 2, 3, 6, 7], copy.deepcopy(norm)
    small = nn.BatchNorm2d(5).double()
    for key, tensor in norm.state_dict().items():
        small.state_dict()[key].copy_(tensor[kept] if tensor.dim() else tensor)
    with narrow(model, CutPlan(channels={"0": kept})):
        assert norms_innermost(norm, x)
        output = model(x)
        output.square().sum().backward()
    wanted = small(x.detach().contiguous())
    wanted.square().sum().backward()
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(norm.running_var[kept], small.running_var)
    torch.testing.assert_close(norm.weight.grad[kept], small.weight.grad)
    assert torch.equal(norm.running_mean[[1, 4, 5]], before.running_mean[[1, 4, 5]])
    assert not norm.weight.grad[[1, 4, 5]].any()
    assert norm.num_batches_tracked == 1
