import copy

import pytest
import torch
from torch import nn

from regrow.compensation.norms import reestimate_norms

X = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def state_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(net.state_dict())


def hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def unsettled_tracked(net: nn.Module) -> nn.Module:
    for name, buffer in net.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return net


@pytest.mark.devices
def test_statistics_are_means_over_the_batches_by_hand() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2))
    batches = [torch.tensor([[0.0, 1.0], [2, 1], [4, 1], [6, 9]]), torch.tensor([[10.0, 0.0], [12, 4]])]
    # Means 3 and 11, 3 and 2, over 4 and 2 images; unbiased variances 20/3 and 2, 16 and 8.
    record = reestimate_norms(net, batches)
    assert record == {"version": 1, "norms": ["0"], "images": 6}
    torch.testing.assert_close(net[0].running_mean, torch.tensor([(4 * 3 + 2 * 11) / 6, (4 * 3 + 2 * 2) / 6]))
    torch.testing.assert_close(net[0].running_var, torch.tensor([(80 / 3 + 4) / 6, (64 + 16) / 6]))


@pytest.mark.devices
def test_deeper_statistics_are_those_of_the_train_mode_batch() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, momentum=None)
    )
    reference = copy.deepcopy(net).train()
    reference[1].momentum = 1.0
    reference(X)
    reestimate_norms(net, [X])
    for layer in (1, 4):
        torch.testing.assert_close(net[layer].running_mean, reference[layer].running_mean)
        torch.testing.assert_close(net[layer].running_var, reference[layer].running_var)
    assert net[1].momentum == 0.1
    assert net[4].momentum is None


@pytest.mark.devices
def test_dropout_is_off_and_modes_come_back() -> None:
    net = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3)))
    net[2].eval()
    x = torch.randn(50, 3)
    reestimate_norms(net, [x])
    torch.testing.assert_close(net[1].running_mean, x.mean(0))
    assert [net[0].training, net[1].training, net[2].training, net[2][0].training] == [
        True,
        True,
        False,
        False,
    ]
    assert hooks(net) == 0


def test_frozen_untracked_and_unreached_norms_are_left() -> None:
    class FourNorms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.frozen = nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=0.0)
            self.untracked = nn.BatchNorm1d(3, track_running_stats=False)
            self.unreached = nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.untracked(self.frozen(self.norm(x)))

    net = unsettled_tracked(FourNorms())
    before = state_of(net)
    assert reestimate_norms(net, [torch.randn(8, 3)])["norms"] == ["norm"]
    changed = {
        key.split(".")[0] for key, value in net.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == {"norm"}


def test_a_network_without_batch_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="no batch norm with running statistics"):
        reestimate_norms(nn.Sequential(nn.Conv2d(3, 2, 1), nn.GroupNorm(1, 2)), [X])


def test_one_image_with_one_value_is_refused_and_nothing_changed() -> None:
    net = unsettled_tracked(nn.Sequential(nn.BatchNorm1d(3)))
    before = state_of(net)
    with pytest.raises(ValueError, match=r"more than 1 value.*batches of several images"):
        reestimate_norms(net, [torch.randn(4, 3), torch.randn(1, 3)])
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net[0].momentum == 0.1
    assert hooks(net) == 0
