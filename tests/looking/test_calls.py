import contextlib
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import nn

from regrow.looking.calls import PassFailed, buffers_kept, call, evaluating, mapped, run, switch


def test_a_train_method_of_the_models_own_decides():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, x):
            assert self.training
            assert not self.norm.training
            return self.norm(x)

    model = Frozen().eval()
    run(model, torch.ones(1, 1, 2, 2), training=True)
    assert model.norm.num_batches_tracked == 0


def test_a_run_is_the_same_each_time_and_drawing_shows():
    class Drawing(nn.Module):
        def forward(self, x):
            return x + torch.rand(3)

    torch.manual_seed(5)
    begun = torch.get_rng_state()
    first, drew = run(Drawing(), torch.zeros(3), training=False)
    assert drew
    torch.manual_seed(7)
    torch.testing.assert_close(run(Drawing(), torch.zeros(3), training=False)[0], first, rtol=0, atol=0)
    torch.manual_seed(5)
    run(Drawing(), torch.zeros(3), training=False)
    assert torch.equal(torch.get_rng_state(), begun)
    assert not run(nn.Linear(3, 1), torch.zeros(3), training=False)[1]


def test_a_model_on_the_cpu_leaves_the_generators_of_other_devices_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch, "manual_seed", seeded.append)  # it seeds every device
    run(nn.Dropout(), torch.ones(3), training=True)
    assert seeded == []


@pytest.mark.devices
def test_inputs_that_a_pass_writes_to_are_copies():
    class Writing(nn.Module):
        def forward(self, x):
            return x.add_(1)

    x = torch.zeros(3)
    run(Writing(), x, training=False)
    assert not x.any()


@pytest.mark.parametrize("error", [KeyError("there"), AssertionError("no"), RuntimeError("one\ntwo")])
def test_an_error_of_the_model_is_told_from_all_others(error):
    class Failing(nn.Module):
        def forward(self, _):
            raise error

    with pytest.raises(PassFailed, match="the model's forward pass fails: ") as caught:
        call(Failing(), torch.zeros(1))
    assert caught.value.__cause__ is error
    assert "two" not in str(caught.value)


def test_arguments_in_every_container():
    class Sum(nn.Module):
        def forward(self, a, b):
            return a + 2 * b

    one, two = torch.ones(1), torch.full((1,), 2.0)
    assert call(Sum(), (one, two)) == call(Sum(), {"b": two, "a": one}) == 5
    assert call(nn.Identity(), two) == 2


def test_every_module_is_back_in_its_mode():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm2d(1)))
    model[0].eval()
    with contextlib.suppress(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == [True, False, True, True]


@pytest.mark.devices
def test_buffers_are_as_before_after_an_error_too():
    norm = nn.BatchNorm2d(1)
    with contextlib.suppress(KeyError), buffers_kept(norm):
        norm(torch.ones(2, 1, 2, 2))
        assert norm.num_batches_tracked == 1
        raise KeyError
    assert norm.num_batches_tracked == 0
    assert norm.running_mean == 0


def test_inputs_in_named_tuples_are_changed_in_place_of_the_old_ones():
    class Pair(NamedTuple):
        pictures: torch.Tensor
        index: torch.Tensor

    given = Pair(torch.ones(2), torch.ones(2, dtype=torch.int64))
    doubled = mapped({"pair": given, "flag": None}, lambda x: 2 * x)
    assert isinstance(doubled["pair"], Pair)
    assert doubled["pair"].pictures.tolist() == [2, 2]
    assert doubled["pair"].index is given.index
    assert doubled["flag"] is None


def test_switching_the_mode_of_every_module():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.Dropout()))
    model[1][1].eval()
    assert switch(model, False) is model
    assert not any(module.training for module in model.modules())
    switch(model, True)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("training", [False, True])
def test_a_module_with_a_way_of_its_own_to_switch_is_asked(training):
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[0].eval()
            return self

    model = nn.Sequential(Frozen(nn.BatchNorm2d(3), nn.Dropout()))
    switch(model, training)
    assert not model[0][0].training
    assert model[0][1].training == model.training == training
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        scripted = nn.Sequential(torch.jit.script(nn.Dropout()))
    assert switch(scripted, training)[0].training == training
