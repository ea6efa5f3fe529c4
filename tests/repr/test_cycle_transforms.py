"""The transforms of torch.func, and other derivatives, while RePr leaves dropped filters out."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.nn import functional as F

from cycles import X, repr_on, sgd
from nets import Residual, chain
from regrow.noise.layers import add_bridgeout

Y = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
EVALUATED = {
    "norms": lambda: chain().eval(),
    "no norms": lambda: chain(norm=nn.Identity),
    "group norms": lambda: chain(norm=lambda width: nn.GroupNorm(1, width)),
    "batch statistics": lambda: chain(norm=lambda width: nn.BatchNorm2d(width, track_running_stats=False)),
    "a sum": lambda: Residual(8, 6, normed=False),
    "a sum behind norms": lambda: Residual(8, 6).eval(),
}


def in_sub_phase(kind, compact):
    torch.manual_seed(0)
    model = EVALUATED[kind]()
    cycle = repr_on(model, sgd(model), full=1, compact=compact)
    cycle.step()
    assert cycle.phase == "sub"
    return model


def values_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def loss(model, values, x, y):
    return F.cross_entropy(functional_call(model, values, (x,)), y)


def per_example(model):
    gradient = grad(lambda v, x, y: loss(model, v, x[None], y[None]))
    return vmap(gradient, in_dims=(None, 0, 0))(values_of(model), X, Y)


def ensemble(model):
    values = {name: torch.stack([v, 2 * v, -v]) for name, v in values_of(model).items()}
    return vmap(lambda v: functional_call(model, v, (X,)))(values)


def forward_mode(model):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(X, torch.ones_like(X)))).tangent


def along_weights(model):
    values = values_of(model)  # 0 in dropped filters, which no optimizer moves
    return jvp(lambda v: functional_call(model, v, (X,)), (values,), (values,))[1]


def gradients(model, x, y):
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def gradients_per_example(model):
    each = [gradients(model, x[None], y[None]) for x, y in zip(X, Y, strict=True)]
    return {name: torch.stack([g[name] for g in each]) for name in each[0]}


def penalty(model):
    gradients = torch.autograd.grad(F.cross_entropy(model(X), Y), list(model.parameters()), create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in gradients), list(model.parameters()))


WAYS = {
    "functional_call": lambda model: functional_call(model, values_of(model), (X,)),
    "vmap": lambda model: vmap(lambda x: model(x[None])[0])(X),
    "ensemble": ensemble,
    "vjp": lambda model: vjp(model, X)[1](torch.ones(8, 4))[0],
    "jvp": along_weights,
    "jacrev": lambda model: jacrev(model)(X),
    "forward mode": forward_mode,
    "penalty": penalty,
}


@pytest.mark.parametrize("kind", EVALUATED)
@pytest.mark.parametrize("way", WAYS)
def test_a_narrowed_net_gives_what_the_masked_one_gives(way, kind) -> None:
    if kind == "batch statistics" and way == "vmap":
        return  # one picture alone has no statistics
    found, expected = (WAYS[way](in_sub_phase(kind, compact)) for compact in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", EVALUATED)
def test_gradients_are_those_of_an_ordinary_backward_pass(kind) -> None:
    model = in_sub_phase(kind, True)
    found = grad(lambda v: loss(model, v, X, Y))(values_of(model))
    torch.testing.assert_close(found, gradients(in_sub_phase(kind, False), X, Y), rtol=1e-4, atol=1e-5)
    masked = in_sub_phase(kind, False)
    found = grad(lambda v: loss(masked, v, X, Y))(values_of(masked))
    torch.testing.assert_close(found, gradients(masked, X, Y), rtol=1e-4, atol=1e-5)
    found, expected = per_example(model), gradients_per_example(in_sub_phase(kind, False))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_running_statistics_that_a_call_brings_along() -> None:
    found = []
    for compact in (True, False):
        torch.manual_seed(0)
        model = chain()
        cycle = repr_on(model, sgd(model), full=1, compact=compact)
        cycle.step()
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        functional_call(model, {**values_of(model), **buffers}, (X,))
        assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
        for name, mask in cycle.keep.items():
            for statistic in ("running_mean", "running_var"):
                found.append(buffers[f"{name.replace('conv', 'norm')}.{statistic}"][mask])
    torch.testing.assert_close(found[: len(found) // 2], found[len(found) // 2 :])


def test_with_bridgeout() -> None:
    found = []
    for compact in (True, False):
        torch.manual_seed(0)
        model = chain(norm=nn.Identity)
        add_bridgeout(model)
        repr_on(model, sgd(model), full=1, compact=compact).step()
        found.append(grad(lambda v, model=model: loss(model, v, X, Y))(values_of(model)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_graph_from_before_a_drop_is_refused_by_pytorch_and_not_computed_wrongly() -> None:
    torch.manual_seed(0)
    model = chain()
    cycle = repr_on(model, sgd(model), full=1)
    value = F.cross_entropy(model(X), Y)
    cycle.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
