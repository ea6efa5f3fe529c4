import math

import pytest
import torch
from torch.nn import functional as F

import regrow
from regrow.noise import vectors
from regrow.noise.draws import base
from regrow.noise.groups import smallest
from regrow.noise.perturbation import bridgeout, perturbed


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mask(shape, p, seed=0):
    """m, read off weights of 1 with q = 2, which become 1/(1-p) or 0."""
    return bridgeout(torch.ones(shape), p=p, q=2, generator=generator(seed)).ne(0)


def formula(weight, p, q, m):
    return weight + weight.abs() ** (q / 2) * (m / (1 - p) - 1)


@pytest.mark.devices
def test_by_hand():
    # With p = 0.5 the noise is ± the amplitude. |w|^(1/2), |w|^(3/4) and |w| of 16 are 4, 8 and 16.
    weight = torch.tensor([[16.0, -16.0, 0.0, 16.0], [16.0, 16.0, 16.0, -16.0]])
    sign = mask(weight.shape, p=0.5).float() * 2 - 1
    assert sign.unique().tolist() == [-1, 1]
    for q, amplitude in ((1, 4.0), (1.5, 8.0), (2, 16.0)):
        noisy = bridgeout(weight, p=0.5, q=q, generator=generator())
        torch.testing.assert_close(noisy, weight + amplitude * sign * weight.ne(0))


@pytest.mark.devices
@pytest.mark.parametrize("q", [0.5, 1, 1.5, 2, 3])
@pytest.mark.parametrize("p", [0.1, 0.3, 0.9])
def test_mean_and_variance(p, q):
    sizes = torch.tensor([-2.0, -0.05, 1e-4, 0.3, 1.0], dtype=torch.float64)
    n = 20_000
    draws = bridgeout(sizes.expand(n, 5), p=p, q=q, generator=generator())
    variance = sizes.abs() ** q * p / (1 - p)
    assert ((draws.mean(0) - sizes).abs() < 5 * (variance / n).sqrt()).all()
    # The variance of a sample variance, from the fourth moment of a Bernoulli variable.
    kurtosis = (1 - 3 * p * (1 - p)) / (p * (1 - p))
    error = variance * math.sqrt((kurtosis - 1) / n)
    assert ((draws.var(0) - variance).abs() < 5 * error).all()


@pytest.mark.devices
@pytest.mark.parametrize("target_fraction", [1.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_device_drops_the_same_weights(device, dtype, target_fraction):
    for weight in (torch.randn(24, 10, 3, 3), torch.randn(40, 7, 2, 2).to(memory_format=torch.channels_last)):
        weight = weight.to(dtype).requires_grad_()
        other = weight.detach().cpu().requires_grad_()
        settings = {"target_fraction": target_fraction}
        ours, theirs = (bridgeout(each, **settings, generator=generator(5)) for each in (weight, other))
        assert ours.device == weight.device
        assert weight.device.type == device.type
        for sign in (torch.lt, torch.gt):  # dropped weights become smaller, kept ones larger
            assert torch.equal(sign(ours, weight).cpu(), sign(theirs, other))
        torch.testing.assert_close(ours.cpu(), theirs)
        ours.sum().backward()
        theirs.sum().backward()
        torch.testing.assert_close(weight.grad.cpu(), other.grad)


def test_q_2_is_dropconnect_for_weights_that_are_not_negative():
    weight = torch.rand(16, 5, 3, 3)
    noisy = bridgeout(weight, p=0.3, q=2, generator=generator())
    kept = mask(weight.shape, p=0.3)
    torch.testing.assert_close(noisy, weight * kept / 0.7)
    assert (noisy[~kept] == 0).all()
    # For negative weights the noise has the sign of |w|: a dropped -1 becomes -2, not 0.
    negative = bridgeout(-weight, p=0.3, q=2, generator=generator())
    torch.testing.assert_close(negative[~kept], -2 * weight[~kept])


@pytest.mark.devices
@pytest.mark.parametrize("q", [0.7, 1.5, 2, 2.5])
def test_gradient_is_that_of_the_formula_away_from_zero(q):
    weight = torch.randn(8, 5, 3, 3, dtype=torch.float64)
    weight = (weight + weight.sign() * 0.01).requires_grad_()
    upstream = torch.randn_like(weight)
    m = mask(weight.shape, p=0.3).double()
    expected = formula(weight, 0.3, q, m)
    noisy = bridgeout(weight, p=0.3, q=q, generator=generator())
    torch.testing.assert_close(noisy, expected)
    (ours,) = torch.autograd.grad(noisy, weight, upstream)
    (theirs,) = torch.autograd.grad(expected, weight, upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_gradient_by_finite_differences():
    weight = torch.linspace(0.1, 1, 12, dtype=torch.float64).view(4, 3).requires_grad_()
    number = torch.tensor(3)
    assert torch.autograd.gradcheck(lambda w: perturbed(w, 1, 2, 0, number, 0.3, 1.5, 1.0, False), (weight,))


@pytest.mark.devices
@pytest.mark.parametrize("q", [0.5, 1, 1.5])
@pytest.mark.parametrize("p", [0.3, 0.8])
def test_gradient_is_bounded_at_zero_and_has_mean_1(p, q):
    small = torch.tensor([0.0, -0.0, 1e-30, -1e-12, 1e-9, 1e-6, -1e-6, 2e-6], dtype=torch.float64)
    n = 1000
    weight = small.expand(n, 8).clone().requires_grad_()
    bridgeout(weight, p=p, q=q, generator=generator()).sum().backward()
    slope = weight.grad
    assert slope.abs().max() <= 1 + q / 2 * 1000 ** (2 - q) * max(1, p / (1 - p)) * (1 + 1e-9)
    assert (slope[:, :2] == 1).all()
    # Two values each: one for m = 0, one for m = 1. Weighted with their probabilities they give 1.
    kept = mask((n, 8), p=p)
    for column, m in zip(slope.T[2:], kept.T[2:], strict=True):
        dropped_slope, kept_slope = column[~m].mean(), column[m].mean()
        assert abs(p * dropped_slope + (1 - p) * kept_slope - 1) < 1e-6 * slope.abs().max()


@pytest.mark.devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    weight = (torch.randn(8, 40) * 0.02).to(dtype)
    weight[0], weight[1] = 0, 3e-6
    weight.requires_grad_()
    noisy = bridgeout(weight, generator=generator())
    assert noisy.dtype == dtype
    full = bridgeout(weight.detach().float(), generator=generator())
    assert torch.equal(noisy, full.to(dtype))
    noisy.sum().backward()
    assert weight.grad.dtype == dtype
    assert (noisy[0] == 0).all()
    w, noise = weight.detach()[1:].double(), (noisy - weight).detach()[1:].double()
    expected = 1 + 0.75 * noise / w
    torch.testing.assert_close(weight.grad[1:].double(), expected, rtol=0.02, atol=0.02)
    assert (weight.grad[0] == 1).all()


@pytest.mark.devices
def test_the_generator_decides_the_draw():
    weight = torch.randn(4, 30)
    first = bridgeout(weight, generator=generator(1))
    assert torch.equal(first, bridgeout(weight, generator=generator(1)))
    assert not torch.equal(first, bridgeout(weight, generator=generator(2)))
    running = generator(1)
    assert torch.equal(first, bridgeout(weight, generator=running))
    assert not torch.equal(first, bridgeout(weight, generator=running))
    torch.manual_seed(3)
    free = bridgeout(weight)
    assert not torch.equal(free, bridgeout(weight))
    torch.manual_seed(3)
    assert torch.equal(free, bridgeout(weight))


@pytest.mark.devices
def test_seed_place_and_number_each_change_the_draw():
    weight = torch.ones(4, 30)
    draws = [
        perturbed(weight, base(seed), offset, 0, torch.tensor(number), 0.5, 2.0, 1.0, False)
        for seed, offset, number in [(0, 0, 0), (1, 0, 0), (0, 64, 0), (0, 0, 1), (2**32, 0, 0)]
    ]
    for i, first in enumerate(draws):
        assert all(not torch.equal(first, second) for second in draws[:i])


def test_neighbours_are_drawn_from_the_whole_range():
    kept = mask((1, 400_000), p=0.5).float().view(-1, 4)
    assert ((kept.mean(0) - 0.5).abs() < 5 * 0.5 / math.sqrt(100_000)).all()
    # And none of four neighbours follows another.
    assert (torch.corrcoef(kept.T) - torch.eye(4)).abs().max() < 5 / math.sqrt(100_000)


@pytest.mark.devices
def test_a_large_weight_is_drawn_in_parts_that_differ(monkeypatch):
    monkeypatch.setattr(vectors, "PART", 1000)
    weight = torch.ones(70, 10, 3, 3, requires_grad=True)  # parts of 1000 weights, the last of 300
    noisy = bridgeout(weight, p=0.5, q=1, generator=generator())
    assert set(noisy.unique().tolist()) == {0, 2}
    parts = noisy.detach().flatten().split(1000)
    assert all(not torch.equal(parts[0], part) for part in parts[1:-1])
    assert abs(noisy.mean() - 1) < 5 / math.sqrt(weight.numel())
    noisy.sum().backward()
    # 1 + (q/2) · noise/w, with a noise of ±1
    torch.testing.assert_close(weight.grad, 1 + 0.5 * (noisy.detach() - 1))


@pytest.mark.parametrize("p", [1e-7, 1 - 1e-7])
def test_a_p_below_the_resolution_of_the_random_numbers(p):
    noisy = bridgeout(torch.ones(8, 1000), p=p, q=2, generator=generator())
    assert noisy.isfinite().all()
    assert (noisy > 0).float().mean() == pytest.approx(1 - p, abs=0.01)


def test_p_is_exact_between_two_levels_of_the_random_numbers():
    # Halfway between 1 and 2 of 65536 weights: a threshold of 16 bits would miss it.
    n, draws, ones = 2**18, 64, torch.ones(64, 2**12)
    running = generator()
    total = sum(int(bridgeout(ones, 1 - 1.5 / 2**16, 2, generator=running).ne(0).sum()) for _ in range(draws))
    expected = draws * n * 1.5 / 2**16
    assert abs(total - expected) < 4 * math.sqrt(expected + draws * 4)  # within a draw, and between draws


@pytest.mark.devices
def test_p_0_changes_nothing():
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    noisy = bridgeout(weight, p=0, q=1.5)
    assert torch.equal(noisy, weight)
    assert noisy is not weight
    noisy.backward(torch.full_like(weight, 2.0))
    assert (weight.grad == 2).all()


@pytest.mark.devices
def test_memory_layout_is_kept_and_does_not_matter():
    images = torch.randn(16, 8, 3, 3).to(memory_format=torch.channels_last)
    transposed = torch.randn(50, 70).T
    strided = torch.randn(20, 30)[:, ::3]
    for weight in (images, transposed, strided, torch.randn(70), torch.ones(30, 1, 1)):
        noisy = bridgeout(weight, p=0.5, q=2, generator=generator())
        ratio = noisy[weight > 0] / weight[weight > 0]
        assert ratio.unique().tolist() == [0, 2]
    assert bridgeout(images).is_contiguous(memory_format=torch.channels_last)
    assert bridgeout(torch.empty(0, 3, 3, 3)).shape == (0, 3, 3, 3)


@pytest.mark.devices
def test_target_fraction_perturbs_exactly_the_smallest_weights_of_each_filter():
    weight = torch.randn(20, 4, 5)
    noisy = bridgeout(weight, p=0.5, target_fraction=0.3, generator=generator())
    order = weight.view(20, 20).abs().argsort(1)
    changed = noisy.ne(weight).view(20, 20)
    assert changed.gather(1, order[:, :6]).all()  # p = 0.5: the noise is never 0
    assert not changed.gather(1, order[:, 6:]).any()


def test_smallest_by_hand():
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.5], [1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 5.0]])
    yes, no = True, False
    # Equal magnitudes: the first ones.
    assert smallest(weight, 0.5).tolist() == [[no, yes, no, yes], [yes, yes, no, no], [yes, yes, no, no]]
    assert smallest(weight, 0.6).sum(1).tolist() == [2, 2, 2]  # 2.4 of 4
    assert smallest(weight, 0.625).sum(1).tolist() == [3, 3, 3]  # 2.5 of 4
    assert not smallest(weight, 0.1).any()  # 0.4 of 4
    assert smallest(weight, 1.0).all()
    assert smallest(torch.ones(1, 50), 0.29).sum() == 15  # 14.5, which is a little less in binary


def test_weights_that_are_not_targeted_have_a_plain_gradient():
    weight = torch.tensor([[0.1, -4.0, 3.0, 0.2]], requires_grad=True)
    bridgeout(weight, target_fraction=0.5).sum().backward()
    assert weight.grad[0, 1:3].tolist() == [1, 1]
    assert (weight.grad[0, [0, 3]] != 1).all()


def test_the_operator_meets_pytorchs_own_checks():
    weight = torch.rand(4, 3, 2, 2, requires_grad=True)
    torch.library.opcheck(perturbed, (weight, 1, 2, 0, torch.tensor(3), 0.3, 1.5, 0.5, False))


@pytest.mark.devices
def test_it_trains_as_a_pure_function():
    weight = torch.randn(6, 3, 3, 3, requires_grad=True)
    F.conv2d(torch.randn(2, 3, 8, 8), regrow.bridgeout(weight, p=0.3, q=1.5)).square().mean().backward()
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 1}, "0 <= p < 1"),
        ({"p": -0.1}, "0 <= p < 1"),
        ({"p": math.nan}, "0 <= p < 1"),
        ({"p": "0.3"}, "p must be a number"),
        ({"q": 0}, "above 0"),
        ({"q": -1.5}, "above 0"),
        ({"q": math.inf}, "finite"),
        ({"q": None}, "q must be a number"),
        ({"target_fraction": 0}, "target_fraction=1.0"),
        ({"target_fraction": 1.1}, "target_fraction=1.0"),
        ({"target_fraction": True}, "must be a number"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        bridgeout(torch.ones(2, 2), **arguments)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "weight", [torch.ones(2, 2, dtype=torch.int64), torch.ones(2) * 1j, torch.tensor(1.0)]
)
def test_bad_weights_are_refused(weight):
    with pytest.raises(ValueError, match="real floating-point"):
        bridgeout(weight)
