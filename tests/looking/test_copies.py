import copy

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from regrow.looking.copies import NotCopied, copied
from regrow.torch_private import is_unwritten, lazy_copy

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class SelfContaining(nn.Module):
    """A module with what plain layers do not hold: a list of modules, itself, a bound method, a tensor."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.again = [self.conv]
        self.me = [self]
        self.act = self.shift
        self.by = torch.ones(1)
        self.sizes = {"kernel": 3}

    def shift(self, x):
        return x + self.by

    def forward(self, x):
        return self.act(self.again[0](x))


def test_parameters_take_memory_when_they_are_written_to():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    versions = [parameter._version for parameter in model.parameters()]
    twin = copied(model)
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert mine is not theirs
        assert torch.equal(mine, theirs)
        assert mine.requires_grad == theirs.requires_grad
    assert all(map(is_unwritten, twin.parameters()))
    assert torch.equal(twin(X), model(X))
    assert is_unwritten(twin[0].weight)
    twin[0].weight.data.mul_(2)
    assert not is_unwritten(twin[0].weight)
    assert is_unwritten(twin[0].bias)
    twin[0].weight.requires_grad_(True)
    assert not model[0].weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model[0].state_dict(prefix="0.").items())
    assert [parameter._version for parameter in model.parameters()] == versions
    # The other way round: what becomes of the model is nothing to the copy.
    with torch.no_grad():
        model[0].bias.add_(1)
    assert torch.equal(twin[0].bias, before["0.bias"])


def test_what_cannot_wait_is_copied_at_once(monkeypatch):
    numbers = torch.from_numpy(np.ones(3))
    twin = lazy_copy(numbers)
    twin.mul_(2)
    assert numbers.tolist() == [1, 1, 1]
    monkeypatch.delattr(torch, "_lazy_clone")
    twin = lazy_copy(torch.ones(3))
    assert twin.tolist() == [1, 1, 1]
    assert not is_unwritten(twin)


def test_a_part_that_is_compiled_in_place_is_the_copy_s_own():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[0].compile(backend="eager")
    twin = copied(model)
    twin(X)
    assert twin[0][1].num_batches_tracked == 1
    assert model[0][1].num_batches_tracked == 0


@pytest.mark.devices
def test_renewed_parameters_and_all_buffers_are_the_copy_s_own():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = copy.deepcopy(model.state_dict())
    twin = copied(model, torch.clone).train()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin(X)
    assert twin[1].num_batches_tracked == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_renewing_may_change_the_numbers():
    twin = copied(nn.Conv2d(3, 4, 3), torch.Tensor.double)
    assert twin.weight.dtype == torch.float64
    assert type(twin.weight) is nn.Parameter


def test_what_is_shared_is_shared_in_the_copy():
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
    )
    model[2].weight = model[0].weight
    model[3].running_mean = model[1].running_mean
    model.append(model[0])
    twin = copied(model, torch.clone)
    assert twin[2].weight is twin[0].weight
    assert twin[2].weight is not model[0].weight
    assert twin[3].running_mean is twin[1].running_mean
    assert twin[4] is twin[0]


def test_hooks_of_the_copy_do_not_reach_the_model():
    model, seen = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), []
    twin = copied(model)
    for module in twin.modules():
        module.register_forward_hook(lambda *_: seen.append(1))
    model(X)
    assert not seen
    twin(X)
    assert len(seen) == 3


def test_a_model_s_own_hooks_come_along():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model[0].register_forward_hook(lambda _module, _inputs, output: output * 2)
    torch.testing.assert_close(copied(model)(X), model(X))


def test_what_plain_layers_do_not_hold_is_copied_as_deepcopy_does():
    model = SelfContaining()
    twin = copied(model, torch.clone)
    assert twin.again[0] is twin.conv
    assert twin.me[0] is twin
    assert twin.act.__self__ is twin
    twin.by.zero_()
    twin.sizes["kernel"] = 5
    assert model.by == 1
    assert model.sizes == {"kernel": 3}
    torch.testing.assert_close(twin(X), twin.conv(X))


def test_a_module_with_a_way_of_its_own_to_be_copied_is_asked():
    class Counted(nn.Conv2d):
        def __deepcopy__(self, memo):
            made = Counted(3, 4, 3)
            made.copies = 1
            return made

    class Restored(nn.ReLU):
        def __setstate__(self, state):
            super().__setstate__(state)
            self.restored = True

    twin = copied(nn.Sequential(Counted(3, 4, 3), Restored()))
    assert twin[0].copies == 1
    assert twin[1].restored


@pytest.mark.devices
@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "swin_t"])
def test_the_same_as_deepcopy(name):
    model = torchvision.models.get_model(name, num_classes=4).eval()
    twin = copied(model, torch.clone)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    for mine, theirs in zip(twin.modules(), model.modules(), strict=True):
        assert vars(mine).keys() == vars(theirs).keys()
        assert mine is not theirs
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(twin(x), model(x))


def test_a_model_that_cannot_be_copied_says_so():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.kept = model(X)  # a tensor with a gradient function
    with pytest.raises(NotCopied, match=r"the model cannot be copied: .*deepcopy"):
        copied(model)


def test_tensors_in_one_memory_share_the_copy_s_memory():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.register_buffer("table", torch.arange(4.0))
    model.first = model.table[:2]  # an attribute that is no buffer
    model[0].register_buffer("same", model.table.view(2, 2))
    twin = copied(model)
    twin.table.add_(1)
    assert twin.first.tolist() == [1, 2]
    assert twin[0].same.tolist() == [[1, 2], [3, 4]]
    assert model.table.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "odd",
    [
        torch.ones(1).expand(3),
        torch.ones(2, 3).t(),
        torch.ones(4)[1:],
        torch.ones(3).to_sparse(),
        torch.ones(3, requires_grad=True).detach().requires_grad_(),
        torch.ones(3, dtype=torch.complex64).conj(),
    ],
)
def test_odd_buffers_are_copied_as_deepcopy_does(odd):
    model = nn.Sequential(nn.BatchNorm2d(3))
    model.register_buffer("odd", odd)
    twin, expected = copied(model).odd, copy.deepcopy(model).odd
    assert type(twin) is type(odd)
    assert twin is not odd
    assert twin.requires_grad == odd.requires_grad
    if type(odd) is torch.Tensor and odd.layout is torch.strided:
        assert twin.stride() == expected.stride()
        assert twin.is_conj() == expected.is_conj()
        assert torch.equal(twin, expected)


def test_containers_that_modules_share_are_shared_in_the_copy():
    model = nn.Sequential(nn.ReLU(), nn.ReLU())
    model[0].seen = model[1].seen = {}
    model[0].parts = {"other": model[1], "sizes": [1, 2]}
    twin = copied(model)
    twin[0].seen["x"] = 1
    assert twin[1].seen == {"x": 1}
    assert model[0].seen == {}
    assert twin[0].parts["other"] is twin[1]
    twin[0].parts["sizes"].append(3)
    assert model[0].parts["sizes"] == [1, 2]


def test_a_copy_of_recurrent_layers_reads_its_own_weights():
    model = nn.Sequential(nn.LSTM(3, 2), nn.BatchNorm1d(2))
    twin = copied(model, torch.clone)
    with torch.no_grad():
        for parameter in twin[0].parameters():
            parameter.zero_()
    assert not twin[0](torch.ones(1, 1, 3))[0].any()
    assert model[0](torch.ones(1, 1, 3))[0].any()


def test_an_object_that_copies_a_module_finds_it_whole():
    class Keeper:
        def __init__(self, conv):
            self.conv = conv

        def __deepcopy__(self, memo):
            conv = copy.deepcopy(self.conv, memo)
            assert conv.weight.shape == (4, 3, 3, 3)
            return Keeper(conv)

    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.keeper = Keeper(model[0])
    twin = copied(model)
    assert twin.keeper.conv is twin[0]
