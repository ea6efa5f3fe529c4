"""Batch Bridgeout inside of the transforms of torch.func, and derivatives of its derivatives."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap
from torch.nn import functional as F

from nets import chain
from regrow.noise.draws import Place
from regrow.noise.groups import Part
from regrow.noise.kernels import SMALLEST
from regrow.noise.layers import add_bridgeout, bridgeout_state
from regrow.noise.perturbation import bridgeout, drawn
from regrow.noise.vectors import Strength

SETTINGS = [{}, {"q": 2.0}, {"q": 1.0}, {"p": 0.5, "q": 3.0}, {"p": 0.0}, {"target_fraction": 0.5}]
X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 3])


def weights(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    # Away from 0, where derivatives of |w| are not what differences show.
    return (drawn + 0.3 * drawn.sign()).to(dtype)


def draw(weight, settings):
    """``bridgeout`` with a number that is drawn already, as transforms want it."""
    given = {"p": 0.3, "q": 1.5, "target_fraction": 1.0, **settings}
    return drawn(weight, Part(Place(0, 0), 0, False), torch.tensor(7), Strength(**given, compiled=False))


def noisy_net(**settings) -> nn.Module:
    torch.manual_seed(0)
    model = chain((3, 4), norm=nn.Identity).double()
    add_bridgeout(model, linear=True, **settings)
    return model


@pytest.mark.parametrize("settings", SETTINGS)
def test_second_derivatives_are_what_differences_show(settings) -> None:
    weight = weights(3, 4).requires_grad_()
    assert gradcheck(lambda w: draw(w, settings), weight)
    assert gradgradcheck(lambda w: draw(w, settings), weight)
    assert gradcheck(lambda w: draw(w, settings), weight, check_forward_ad=True, check_backward_ad=False)


def test_the_second_derivative_by_hand() -> None:
    # w̃ = w + c·w^(3/4) for w > 0, so w̃′ = 1 + (3/4)·c·w^(−1/4), w̃″ = −(3/16)·c·w^(−5/4).
    weight = torch.tensor([[16.0, 16.0, 16.0, 16.0]], dtype=torch.float64, requires_grad=True)
    noisy = draw(weight, {"p": 0.5})
    first = torch.autograd.grad(noisy.sum(), weight, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), weight)[0]
    c = (noisy > weight).double() * 2 - 1  # 1/(1 − p) − 1 or −1
    torch.testing.assert_close(noisy.detach(), 16 + 8 * c)
    torch.testing.assert_close(first.detach(), 1 + 0.375 * c)
    torch.testing.assert_close(second, -0.1875 * c / 32)


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0])
def test_derivatives_near_zero_are_finite_and_bounded(q) -> None:
    weight = torch.tensor([[0.0, -0.0, 1e-9, -1e-9, 1e-7, 1.0]], dtype=torch.float64, requires_grad=True)
    noisy = draw(weight, {"p": 0.5, "q": q})
    plain = torch.autograd.grad(noisy.sum(), weight, retain_graph=True)[0]
    first = torch.autograd.grad(noisy.sum(), weight, create_graph=True)[0]
    torch.testing.assert_close(first.detach(), plain)
    assert first[0, :2].tolist() == [1, 1]
    assert torch.autograd.grad(first.square().sum(), weight)[0].isfinite().all()
    again = grad(lambda w: draw(w, {"p": 0.5, "q": q}).sum())(weight.detach())
    torch.testing.assert_close(again, plain)
    assert (first - 1).abs().max() <= q / 2 * (1 / SMALLEST) ** (1 - q / 2) * 1.0001


@pytest.mark.parametrize("settings", SETTINGS)
def test_transforms_draw_the_same_noise(settings) -> None:
    weight = weights(3, 4)
    expected = draw(weight, settings)
    slopes = torch.autograd.grad(draw(leaf := weight.clone().requires_grad_(), settings).sum(), leaf)[0]
    several = vmap(lambda w: draw(w, settings))(torch.stack([weight, weight]))
    torch.testing.assert_close(several, torch.stack([expected, expected]))
    value, pull = vjp(lambda w: draw(w, settings), weight)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(pull(torch.ones_like(weight))[0], slopes)
    value, tangent = jvp(lambda w: draw(w, settings), (weight,), (torch.ones_like(weight),))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(tangent, slopes)
    curvature = hessian(lambda w: draw(w, settings).sum())(weight)
    diagonal = torch.einsum("abab->ab", curvature)
    assert torch.equal(curvature.flatten(0, 1).flatten(1), torch.diag(diagonal.flatten()))


def test_a_tangent_without_gradients() -> None:
    weight = weights(2, 3)
    with torch.no_grad(), forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(draw(forward_ad.make_dual(weight, weight), {}))
    torch.testing.assert_close(value, draw(weight, {}))
    assert not torch.equal(tangent, weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_precisions(dtype) -> None:
    weight = weights(3, 4, dtype=dtype).requires_grad_()
    first = torch.autograd.grad(draw(weight, {}).sum(), weight, create_graph=True)[0]
    assert first.dtype == dtype
    plain = torch.autograd.grad(draw(weight, {}).sum(), weight)[0]
    torch.testing.assert_close(first.detach(), plain)
    torch.testing.assert_close(grad(lambda w: draw(w, {}).sum())(weight.detach()), plain)
    assert torch.autograd.grad(first.sum(), weight)[0].isfinite().all()


def penalty_of(model) -> torch.Tensor:
    gradients = torch.autograd.grad(F.cross_entropy(model(X), Y), list(model.parameters()), create_graph=True)
    return sum(g.square().sum() for g in gradients)


@pytest.mark.parametrize("settings", [{}, {"target_fraction": 0.5}])
def test_a_gradient_penalty_trains_a_net(settings) -> None:
    penalties = []
    for _ in range(2):
        model = noisy_net(p=0.1, seed=1, **settings)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        before = penalty_of(model.eval()).item()
        model.train()
        for _ in range(8):
            penalty = penalty_of(model)
            optimizer.zero_grad()
            penalty.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
            penalties.append(penalty.item())
        assert penalty_of(model.eval()) < before / 1.5
    assert penalties[:8] == penalties[8:]  # the same seed, the same noise


def test_a_penalty_of_input_gradients_reaches_the_weights() -> None:
    model, x = noisy_net(), X.clone().requires_grad_()
    slopes = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
    ((slopes.flatten(1).norm(dim=1) - 1) ** 2).mean().backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if name.endswith("weight"))


def test_gradients_of_a_net_by_transforms() -> None:
    model = noisy_net()
    F.cross_entropy(model(X), Y).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}

    def loss(values, x, y):
        return F.cross_entropy(functional_call(model, values, (x,)), y)

    values = {name: p.detach() for name, p in model.named_parameters()}
    model = noisy_net()  # the pass has the same number
    found = grad(loss)(values, X, Y)
    assert bridgeout_state(model)["passes"] == 1
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    model = noisy_net()
    each = vmap(grad(lambda v, x, y: loss(v, x[None], y[None])), in_dims=(None, 0, 0))(values, X, Y)
    for name in expected:
        torch.testing.assert_close(each[name].mean(0), expected[name])


def test_passes_count_on_behind_a_transform() -> None:
    model = noisy_net()
    values = {name: p.detach() for name, p in model.named_parameters()}
    grad(lambda v: functional_call(model, v, (X,)).sum())(values)
    model(X).sum().backward()
    assert bridgeout_state(model)["passes"] == 2


def test_the_public_function_inside_of_a_transform() -> None:
    weight = weights(3, 4)

    def drawn_from(w):
        return bridgeout(w, generator=torch.Generator().manual_seed(3))

    slopes = torch.autograd.grad(drawn_from(leaf := weight.clone().requires_grad_()).sum(), leaf)[0]
    torch.testing.assert_close(grad(lambda w: drawn_from(w).sum())(weight), slopes)
