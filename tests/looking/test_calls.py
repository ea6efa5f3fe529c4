import gc

import torch
from torch import nn

from regrow.looking.calls import garbage_waiting, random_state, seed, set_mode


def test_a_mode_is_set_for_all_parts():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Sequential(nn.BatchNorm2d(1)))
    set_mode(model, False)
    assert not any(module.training for module in model.modules())
    set_mode(model, True)
    assert all(module.training for module in model.modules())


def test_a_train_method_of_the_models_own_decides():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

    model = nn.Sequential(Frozen(), nn.BatchNorm2d(1)).eval()
    set_mode(model, True)
    assert model[0].training
    assert not model[0].norm.training
    assert model[1].training


def test_a_seed_is_pytorchs_own_and_drawing_shows():
    model = nn.Linear(1, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = torch.rand(3)
        seed(model)
        begun = random_state(model)
        assert torch.equal(random_state(model), begun)
        assert torch.equal(torch.rand(3), expected)
        assert not torch.equal(random_state(model), begun)


def test_garbage_waits_and_is_collected_again():
    assert gc.isenabled()
    with garbage_waiting():
        with garbage_waiting():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
