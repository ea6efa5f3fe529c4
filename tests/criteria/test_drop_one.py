"""A filter that is dropped for a moment is silent, and comes back."""

import copy

import pytest
import torch

import nets
from regrow.criteria.batches import Batch
from regrow.criteria.drop_one import dropped, looped_scores, plain_loss
from regrow.structure.read import read_structure

pytestmark = pytest.mark.devices


@torch.no_grad()
@pytest.mark.parametrize("fails", [False, True])
def test_dropped_and_back(fails: bool) -> None:
    net = nets.away_from_zero(nets.chain()).eval()
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(2, 3, 8, 8)
    readers = read_structure(net, x)
    try:
        with dropped(net, readers, "conv2", 3):
            made = net.norm2(net.conv2(net.relu1(net.norm1(net.conv1(x)))))
            assert not made[:, 3].any()
            assert made[:, 4].any()
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert all(torch.equal(values, before[name]) for name, values in net.state_dict().items())


@torch.no_grad()
def test_scores_by_hand() -> None:
    net = nets.chain((2, 2)).eval()
    x = torch.randn(3, 3, 4, 4)
    batches = [Batch(x[:1], None, 1), Batch(x[1:], None, 2)]

    def loss(outputs: torch.Tensor, _: object) -> torch.Tensor:
        return outputs.square().mean()

    readers = read_structure(net, x)
    before = plain_loss(net, batches, loss)
    assert before == pytest.approx(float(net(x).square().mean()), rel=1e-5)
    done: list[int] = []
    found = looped_scores(net, {"conv2": readers["conv2"]}, batches, loss, before, done.append)
    assert list(found) == ["conv2"]
    assert sum(done) == 4
    maps = net[:6](x).mean((2, 3))
    maps[:, 1] = 0
    assert float(found["conv2"][1]) == pytest.approx(float(net.head(maps).square().mean()) - before, rel=1e-3)
    assert looped_scores(net, {}, batches, loss, before) == {}
