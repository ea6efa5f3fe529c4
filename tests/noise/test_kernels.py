import copy
import math

import pytest
import torch
from torch._inductor import config as inductor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from regrow.noise import groups, kernels
from regrow.noise.draws import base
from regrow.noise.layers import add_bridgeout, bridgeout_state, load_bridgeout_state, remove_bridgeout
from regrow.noise.perturbation import perturbed, scaled

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def int32(number):
    return torch.tensor((number + 2**31) % 2**32 - 2**31, dtype=torch.int32)


def draws(count, start, key):
    return kernels.scrambled(kernels.spaced(count, torch.device("cpu")), int32(start), int32(key))


def standardized(count, start, key, p=0.3):
    """m for each position, shifted and scaled to mean 0 and variance 1."""
    kept = draws(count, start, key).double() < (1 - p) * 2**32 - 2**31
    return (kept.double() - (1 - p)) / math.sqrt(p * (1 - p))


def test_the_hash_in_whole_numbers():
    # The definition, in Python's integers.
    def by_definition(position, start, key):
        x = (position * 0x9E3779B9 + start) % 2**32
        x = x * (2 * x + key) % 2**32
        x ^= x >> 15
        return x * 0xD35A2D97 % 2**32

    for start, key in ((0, 1), (123, 77), (2**32 - 5, 2**32 - 1)):
        expected = [by_definition(position, start, key) for position in range(1000)]
        assert [number % 2**32 for number in draws(1000, start, key).tolist()] == expected


def test_different_numbers_stay_different():
    assert len(draws(2**20, 5, 12345).unique()) == 2**20


@pytest.mark.parametrize(("start", "key"), [(0, 1), (2**31, 3), (987654321, 0xB5297A4D), (77, 2**32 - 1)])
def test_the_draws_look_random(start, key):
    n = 2**20
    z = standardized(n, start, key)
    power = torch.fft.rfft(z).abs().square() / n
    # Half a million exponential variables: one above 26 has a chance of 3e-6.
    assert power[1:].max() < 26
    # Weights at any distance from each other, up to half of all, are uncorrelated (half a million z values).
    correlation = torch.fft.irfft(power * n, n=n)[1 : n // 2] / math.sqrt(n)
    assert correlation.abs().max() < 7
    # The sums over kernels, filters and layers spread as those of independent draws do.
    for size in (9, 64, 4608, 65536):
        sums = z[: n // size * size].view(-1, size).sum(1)
        assert abs(sums.square().mean() / size - 1) < 5 * math.sqrt(2 / len(sums))
    # So do products of three and of four.
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        a, b = torch.randint(1, 6000, (2,), generator=generator).tolist()
        m = n - 12000
        three = (z[:m] * z[a : a + m] * z[a + b : a + b + m]).sum() / math.sqrt(m)
        four = (z[:m] * z[a : a + m] * z[b : b + m] * z[a + b : a + b + m]).sum() / math.sqrt(m)
        assert max(abs(three), abs(four)) < 5


def test_seeds_layers_and_passes_are_uncorrelated():
    n = 2**18
    ones = torch.ones(n)
    kept = torch.stack(
        [
            perturbed(ones, base(seed), offset, 0, torch.tensor(number), 0.3, 2.0, 1.0, False).ne(0)
            for seed in (0, 1)
            for offset in (0, n, 9 * n + 64)
            for number in range(1, 7)
        ]
    )
    z = (kept.double() - 0.7) / math.sqrt(0.21)
    assert (z @ z.T / n - torch.eye(len(z), dtype=z.dtype)).abs().max() < 5 / math.sqrt(n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("p", "q", "fraction"), [(0.3, 1.5, 1.0), (0.6, 1.0, 1.0), (0.1, 1.5, 0.75)])
def test_compiled_is_the_same_up_to_rounding(dtype, p, q, fraction):
    weight = torch.randn(24, 7, 3, 3).to(memory_format=torch.channels_last).to(dtype) * 0.05
    weight[0, 0] = 0
    gradient = torch.randn(weight.shape).to(dtype)  # not laid out like the weight
    number = torch.tensor(3)
    plain, noisy = (perturbed(weight, 1, 64, 0, number, p, q, fraction, way) for way in (False, True))
    assert noisy.dtype == dtype
    assert noisy.stride() == weight.stride()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(noisy, plain, rtol=4 * eps, atol=4 * eps)
    assert torch.equal(noisy > weight, plain > weight)  # the same weights are dropped
    slopes = [scaled(gradient, weight, plain, q, way) for way in (False, True)]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=8 * eps, atol=8 * eps)
    assert torch.equal(slopes[1][0, 0], gradient[0, 0])  # a weight of 0 has a plain gradient
    assert slopes[1].stride() == weight.stride()


def test_a_network_trains_alike_compiled_and_not(make_net):
    losses = []
    first = make_net()
    for compiled in (False, True):
        net = copy.deepcopy(first).train()
        record = add_bridgeout(net, p=0.3, linear=True, seed=5, compiled=compiled)
        assert "compiled" not in record["settings"]
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(X), torch.tensor([0, 1, 0]))
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(set(losses[0])) == 4


def test_gradients_are_scaled_in_place_compiled(monkeypatch):
    # Large weights that one layer reads. What is on the disk from other calls of the kernel would hide that
    # PyTorch cannot compile it for two views of one memory: whether arguments overlap is not part of its key.
    nets = [torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    kernels.compiled.cache_clear()
    torch.compiler.reset()
    with inductor.patch({"force_disable_caches": True}):
        for net, compiled in zip(nets, (False, True), strict=True):
            add_bridgeout(net, compiled=compiled)
            net(X).square().sum().backward()
            monkeypatch.setattr(groups, "PART", 32)
    for one, two in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_a_state_goes_from_compiled_to_not(make_net):
    first = make_net()
    nets = [copy.deepcopy(first).train() for _ in range(2)]
    add_bridgeout(nets[0], seed=5, compiled=True)
    add_bridgeout(nets[1], seed=5)
    nets[0](X)
    with torch.no_grad():
        nets[1].load_state_dict(nets[0].state_dict())
    load_bridgeout_state(nets[1], bridgeout_state(nets[0]))
    torch.testing.assert_close(nets[0](X), nets[1](X))


def test_operations_are_counted_while_it_is_compiled(make_net):
    net = make_net().train()
    counts = []
    for compiled in (False, True):
        add_bridgeout(net, compiled=compiled)
        with FlopCounterMode(display=False) as counter:
            net(X).sum().backward()
        counts.append(counter.get_total_flops())
        remove_bridgeout(net)
    assert counts[0] == counts[1] > 0


def test_without_a_compiler_nothing_is_changed(make_net):
    net = make_net()
    before = {name: type(module) for name, module in net.named_modules()}
    kernels.compiled.cache_clear()
    torch.compiler.reset()
    try:
        with (
            inductor.patch({"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}),
            pytest.raises(RuntimeError, match=r"compiled=True.*needs a C\+\+ compiler"),
        ):
            add_bridgeout(net, compiled=True)
    finally:
        kernels.compiled.cache_clear()
        torch.compiler.reset()
    assert {name: type(module) for name, module in net.named_modules()} == before
    add_bridgeout(net)  # and it has no Bridgeout
