"""A model's class has another in front of it in the sub phase: what its own class asks for stays as it is."""

import copy
import inspect
import io
import pickle
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from cycles import X, repr_on, sgd
from regrow.repr.narrow import narrow
from regrow.surgery.plan import CutPlan

Y = torch.arange(8) % 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x, flip=False):
        x = x.flip(-1) if flip else x
        x = F.relu(self.norm1(self.conv1(x)))
        return self.head(F.relu(self.norm2(self.conv2(x))).mean((2, 3)))


def remake(kind, state):
    model = kind()
    model.load_state_dict(state)
    return model


class OwnReduce(Net):
    def __reduce__(self):
        return remake, (type(self), self.state_dict())


class OwnState(Net):
    def __getstate__(self):
        return (dict(vars(self)),)

    def __setstate__(self, state):
        super().__setstate__(state[0])


class OwnCopy(Net):
    def __deepcopy__(self, memo):
        made = type(self).__new__(type(self))
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made


class Slots(Net):
    __slots__ = ("other",)


class OwnCall(Net):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class BesideForward(Net):
    def __call__(self, x):
        return Net.forward(self, x)


class Kind(type):
    def __call__(cls, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class OwnKind(Net, metaclass=Kind):
    pass


class Listed(Net):
    known: ClassVar[dict] = {}

    def __init_subclass__(cls, *, called, **kwargs):
        super().__init_subclass__(**kwargs)
        Listed.known[called] = cls


class Member(Listed, called="member"):
    pass


KINDS = [Net, OwnReduce, OwnState, OwnCopy, Slots, OwnCall, BesideForward, OwnKind, Member]


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, pickled, saved, lambda model: AveragedModel(model).module]


def in_sub_phase(kind, **settings):
    torch.manual_seed(0)
    model = kind()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer, full=1, sub=9, skip_first=False, **settings)
    cycle.step()
    return model, optimizer, cycle


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_classes_of_every_kind_and_their_copies(kind, compact):
    model, optimizer, cycle = in_sub_phase(kind, compact=compact)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    cycle.load_state_dict(cycle.state_dict())
    expected = model.eval()(X)
    for copied in COPIES:
        made = copied(model).eval()
        torch.testing.assert_close(made(X), expected)
        assert vars(made).get("_regrow_passing") is None
        assert type(made) is kind or (kind is OwnCopy and isinstance(made, kind))
        with narrow(made, CutPlan()):
            torch.testing.assert_close(made(X), expected)
        assert type(made) is kind
    assert not cycle._sub.moved()
    cycle.remove()
    assert type(model) is kind
    assert "_regrow_passing" not in vars(model)
    assert Listed.known == {"member": Member}


def test_the_signature_is_the_user_s():
    model, *_ = in_sub_phase(Net)
    assert list(inspect.signature(model.forward).parameters) == ["x", "flip"]
    torch.testing.assert_close(model.eval()(X, flip=True), model(X.flip(-1)))


def test_a_forward_method_on_the_object_itself_is_taken():
    model, _, cycle = in_sub_phase(Net)
    expected = model.eval()(X)
    model.forward = lambda x: Net.forward(model, x) + 1
    torch.testing.assert_close(model(X), expected + 1)
    cycle.remove()
    torch.testing.assert_close(model(X), expected + 1)


def test_two_cycles_on_one_model():
    torch.manual_seed(0)
    model = Net()
    optimizer = sgd(model)
    plan = CutPlan(rows={"conv1": [0, 2]}, channels={"norm1": [0, 2]}, columns={"conv2": [0, 2]})
    with narrow(model, CutPlan()):
        with narrow(model, plan):
            F.cross_entropy(model(X), Y).backward()
        F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    assert type(model) is Net


def test_a_copy_made_in_the_middle_of_a_pass_is_plain():
    model, *_ = in_sub_phase(Net)
    copies = []
    model.norm2.register_forward_hook(lambda *_: copies.append(copy.deepcopy(model)))
    model.eval()(X)
    copies[0].norm2._forward_hooks.clear()
    assert type(copies[0]) is Net
    torch.testing.assert_close(copies[0](X), model(X))
