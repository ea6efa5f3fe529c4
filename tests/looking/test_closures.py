import copy
import functools
import types

import pytest
import torch
from torch import nn

from regrow.looking.copies import copied

X = torch.ones(2, 3)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU())


def by_closure(model):
    forward = model.forward
    model.forward = lambda x: forward(x) + 1


def by_wraps(model):
    forward = model.forward

    @functools.wraps(forward)
    def twice(*args):
        return 2 * forward(*args)

    model.forward = twice


def by_two_decorators(model):
    by_closure(model)
    by_wraps(model)


def by_default(model):
    model.forward = lambda x, layer=model[0]: layer(x)


def by_keyword(model):
    def forward(x, *, layer=model[0]):
        return layer(x)

    model.forward = forward


def by_partial(model):
    def run(forward, x):
        return forward(x)

    model.forward = functools.partial(run, model.forward)


def by_partial_of_closure(model):
    forward = model.forward
    model.forward = functools.partial(lambda scale, x: scale * forward(x), 3)


def by_method(model):
    forward = model.forward
    model.forward = types.MethodType(lambda _self, x: forward(x), model)


def by_weight(model):
    weight = model[0].weight
    model.forward = lambda x: x @ weight


def by_object(model):
    class Wrapper:
        def __init__(self, forward):
            self.forward = forward

        def __call__(self, x):
            return self.forward(x)

    wrapper = Wrapper(torch.no_grad()(model.forward))
    model.forward = lambda x: wrapper(x)


def in_a_child(model):
    first = model[0]
    forward = first.forward
    first.forward = lambda x: forward(x) - 1


@pytest.mark.parametrize(
    "wrap",
    [by_closure, by_wraps, by_two_decorators, by_default, by_keyword, by_partial, by_partial_of_closure,
     by_method, by_weight, by_object, in_a_child],
)  # fmt: skip
def test_a_wrapped_forward_of_a_copy_runs_the_copy(wrap) -> None:
    model = net()
    wrap(model)
    before = model(X).clone()
    again = copied(model)
    assert torch.equal(again(X), before)
    with torch.no_grad():
        again[0].weight.fill_(5)
    assert torch.equal(model(X), before)
    assert not torch.equal(again(X), before)


def test_a_module_beside_the_model_is_not_copied() -> None:
    model, teacher = net(), nn.Linear(3, 3)
    model.forward = lambda x: teacher(x)
    again = copied(model)
    with torch.no_grad():
        teacher.weight.fill_(2)
    assert torch.equal(again(X), teacher(X))


def test_a_function_that_calls_itself_is_copied_once() -> None:
    model = net()
    first = model[0]

    def forward(x, times=2):
        return x if times == 0 else forward(first(x), times - 1)

    model.forward = forward
    again = copied(model)
    expected = model(X)
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(again(X), expected)


def test_a_name_that_is_not_bound_yet_stays_unbound() -> None:
    model = net()

    def make(model):
        model.forward = lambda x: later(x) + model[0](x)
        again = copied(model)
        later = torch.zeros_like
        return again, later

    again, _ = make(model)
    with pytest.raises(NameError):
        again(X)


def test_a_function_keeps_its_name_and_attributes() -> None:
    model = net()
    by_wraps(model)
    again = copied(model)
    assert again.forward.__name__ == "forward"
    assert again.forward.__wrapped__.__self__ is again
    assert copy.deepcopy(model).forward is model.forward  # what a plain copy does
