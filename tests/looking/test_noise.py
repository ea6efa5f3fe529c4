import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nets import chain, conv
from regrow.looking.calls import PassFailed
from regrow.looking.noise import Noise, noise_like, unsettle

SILENT = torch.tensor([0, 2])


@pytest.mark.parametrize("sign", [1, -1])
def test_noise_of_one_sign(sign):
    noise = Noise(0).among(torch.zeros(4, 5, 6), 1, None, sign)
    assert noise.shape == (4, 5, 6)
    assert (sign * noise >= 0.5).all()
    assert (sign * noise <= 1.5).all()
    assert len(noise.unique()) > 100


def test_noise_of_both_signs_is_near_0_and_far():
    noise = Noise(0).among(torch.zeros(4, 5, 60), 1, None, 0)
    assert 0.4 < (noise > 0).float().mean() < 0.6
    assert noise.abs().min() < 0.01
    assert noise.abs().max() > 2
    assert noise.abs().min() > 0


@pytest.mark.parametrize("sign", [1, -1, 0])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_silent_channels_stay(sign, dim):
    output = torch.full((3, 4, 5), 7.0)
    before = output.clone()
    noise = Noise(0).among(output, dim, SILENT, sign)
    assert (noise.index_select(dim, SILENT) == 7).all()
    others = torch.tensor([i for i in range(output.shape[dim]) if i not in SILENT.tolist()])
    assert (noise.index_select(dim, others) != 7).all()
    assert torch.equal(output, before)


def test_noise_comes_again_from_the_same_seed_alone():
    output = torch.zeros(3, 4)
    one, other = Noise(5), Noise(5)
    first = one.among(output, 1, None, 0)
    assert torch.equal(first, other.among(output, 1, None, 0))
    assert not torch.equal(first, one.among(output, 1, None, 0))
    assert not torch.equal(first, Noise(6).among(output, 1, None, 0))
    before = torch.get_rng_state()
    one.among(output, 1, SILENT, 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_noise_is_of_the_outputs_kind(dtype):
    noise = Noise(0).among(torch.zeros(3, 4, dtype=dtype), 1, SILENT, 1)
    assert noise.dtype == dtype
    assert not noise[:, SILENT].any()


@pytest.mark.parametrize(("shape", "dim"), [((3, 2), 1), ((3,), 1), ((2, 3, 4), 0), ((), 0)])
def test_a_tensor_without_such_channels(shape, dim):
    with pytest.raises(PassFailed, match="without a channel for each filter"):
        Noise(0).among(torch.zeros(shape), dim, SILENT, 1)
    assert Noise(0).among(torch.zeros(shape), dim, None, 1).shape == shape


def settled():
    """A net with constant tensors of every kind."""
    model = chain((4, 4))
    model.conv2 = conv(4, 4, bias=False)
    model.norm2 = nn.BatchNorm2d(4, affine=False)
    model.scale = nn.PReLU(4)
    model.ln = nn.LayerNorm(4)
    model.gn = nn.GroupNorm(2, 4, affine=False)
    model.register_parameter("gain", nn.Parameter(torch.zeros(())))
    model.register_parameter("none", None)
    model.register_buffer("mask", torch.ones(3, 3))
    model.register_buffer("empty", torch.zeros(0))
    model.register_buffer("count", torch.zeros(3, dtype=torch.int64))
    nn.init.zeros_(model.conv2.weight)
    nn.init.constant_(model.head.weight, 0.25)
    return model


def unsettled(model, seed=0):
    with torch.no_grad():
        unsettle(model, torch.Generator().manual_seed(seed))
    return model


def test_no_floating_tensor_is_0_or_constant_afterwards():
    model = unsettled(settled())
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.numel():
            assert tensor.all(), name
            assert tensor.numel() == 1 or len(tensor.unique()) == tensor.numel(), name
    assert model.norm1.num_batches_tracked == 0
    assert not model.count.any()


def test_in_which_range_each_tensor_is():
    model = unsettled(settled())
    for tensor, low, high in (
        (model.norm1.weight, 0.5, 1.5),
        (model.norm1.bias, 0.2, 0.5),
        (model.norm1.running_mean, -0.1, -0.02),
        (model.norm1.running_var, 0.5, 1.5),
        (model.norm2.running_mean, -0.1, -0.02),
        (model.ln.weight, 0.5, 1.5),
        (model.ln.bias, 0.2, 0.5),
        (model.conv1.bias, -0.1, 0.1),
        (model.head.bias, -0.1, 0.1),
        (model.conv2.weight, 0.5, 1.5),
        (model.head.weight, 0.5, 1.5),
        (model.scale.weight, 0.5, 1.5),
        (model.gain, 0.5, 1.5),
        (model.mask, 0.5, 1.5),
    ):
        assert low <= tensor.min() <= tensor.max() <= high


def test_weights_that_differ_from_each_other_stay():
    model = settled()
    nearly = nn.Parameter(torch.zeros(3))
    nearly.data[1] = 1e-3
    model.register_parameter("nearly", nearly)
    before = model.conv1.weight.clone()
    unsettled(model)
    assert torch.equal(model.conv1.weight, before)
    assert model.nearly.tolist() == pytest.approx([0, 1e-3, 0])


def test_the_same_seed_gives_the_same_and_parameters_stay_themselves():
    one, other = settled(), settled()
    other.load_state_dict(one.state_dict())
    parameters = list(one.parameters())
    unsettled(one), unsettled(other)
    assert all(a is b for a, b in zip(parameters, one.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    third = unsettled(settled(), seed=1)
    assert not torch.equal(one.norm1.weight, third.norm1.weight)


def test_what_shares_memory_with_a_probe_is_not_written_to():
    model = settled()
    probe = copy.deepcopy(model)
    for name, parameter in probe.named_parameters():
        parameter.data = model.get_parameter(name).data
    for name, buffer in probe.named_buffers():
        buffer.data = model.get_buffer(name).data
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unsettled(probe)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():  # nor later, in what has values of its own now
        probe.norm1.weight.zero_()
        probe.norm1.bias[0] = 3
    assert (model.norm1.weight == 1).all()
    assert (model.norm1.bias == 0).all()
    assert probe.norm2.running_var.all()


def test_a_tensor_that_two_modules_hold_gets_one_value():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[1].bias = model[0].weight  # its first holder is asked
    unsettled(model)
    assert model[1].bias is model[0].weight
    assert model[0].weight.min() >= 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_numbers_stay_of_their_kind(dtype):
    model = unsettled(chain((4,)).to(dtype))
    assert {tensor.dtype for tensor in model.parameters()} == {dtype}
    assert model.norm1.running_var.dtype == dtype


def test_a_model_without_tensors():
    assert list(unsettled(nn.ReLU()).state_dict()) == []


tensors = st.tuples(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.floats(-5, 5, width=32),
    st.floats(0.25, 5, width=32),
)


@given(drawn=tensors, repeats=st.integers(1, 3))
def test_random_numbers_in_the_range_of_the_example(drawn, repeats):
    shape, low, size = drawn
    example = torch.rand(shape) * size + low
    before = example.clone()
    noise = noise_like(example, repeats)
    assert noise.shape == (repeats * shape[0], *shape[1:])
    if example.numel() > 1:
        assert noise.min() >= example.min() - 1e-5
        assert noise.max() <= example.max() + 1e-5
    assert torch.equal(example, before)
    assert torch.equal(noise, noise_like(example, repeats))


def test_the_repeats_differ_from_each_other():
    noise = noise_like(torch.rand(2, 3, 4), 2)
    assert noise.shape == (4, 3, 4)
    assert not torch.equal(noise[:2], noise[2:])


def test_a_constant_example_gives_normal_numbers():
    noise = noise_like(torch.full((40, 25), 3.0), 1)
    assert noise.mean().abs() < 0.2
    assert 0.8 < noise.std() < 1.2


def test_what_is_no_floating_tensor_is_repeated_and_nothing_else():
    tokens, x = torch.tensor([[1, 2], [3, 4]]), torch.rand(2, 3)
    found = noise_like({"x": x, "tokens": tokens, "flag": True, "none": None, "scale": torch.tensor(2.0)}, 2)
    assert list(found) == ["x", "tokens", "flag", "none", "scale"]
    assert found["x"].shape == (4, 3)
    assert found["tokens"].tolist() == [[1, 2], [3, 4], [1, 2], [3, 4]]
    assert found["flag"] is True
    assert found["none"] is None
    assert found["scale"].shape == ()


def test_arguments_in_containers():
    x, y = torch.rand(2, 3), torch.rand(2, 1)
    for example in ((x, y), [x, y]):
        found = noise_like(example, 2)
        assert [tensor.shape for tensor in found] == [(4, 3), (4, 1)]
    # Lists of pictures in an argument: how many there are is for the model to say.
    (found,) = noise_like(([x, y],), 2)
    assert [tensor.shape for tensor in found] == [(2, 3), (2, 1)]
    assert not torch.equal(found[0], x)
    (inner,) = noise_like([{"x": x}], 2)
    assert inner["x"].shape == (2, 3)


def test_an_empty_tensor_and_other_numbers():
    assert noise_like(torch.zeros(0, 3), 2).shape == (0, 3)
    assert noise_like(torch.rand(2, 3).to(torch.bfloat16), 1).dtype == torch.bfloat16
    assert noise_like(torch.rand(2, 3).double(), 1).dtype == torch.float64


def test_infinite_numbers_of_a_mask_stay_and_the_others_are_noise():
    mask = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf])
    noise = noise_like(mask, 1)
    assert noise.isinf().tolist() == [False, True, False, True]
    assert noise[[0, 2]].all()
