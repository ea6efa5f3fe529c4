"""One computation for groups of layers in a pass: who is in a group, and when a layer computes by itself."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from regrow import together
from regrow.together import Together


class Net(nn.Module):
    """Layers by number; a call runs those in ``order`` and notes what each was given."""

    def __init__(self, count=4, order=()):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(count))
        self.made, self.given = [], []
        self.together = Together(
            self.make, lambda layer: layer.training or None, lambda layer: layer.weight.nbytes,
            lambda layer: layer.weight._version, [self.layers[i] for i in order],
        )  # fmt: skip

    def number(self, layer):
        return [each is layer for each in self.layers].index(True)

    def make(self, layers):
        self.made.append([self.number(layer) for layer in layers])
        return [f"value {self.number(layer)}" for layer in layers]

    def ask(self, number):
        self.given.append(self.together.get(self.layers[number]))
        return self.given[-1]

    def run(self, order, whole=True):
        self.together.begin()
        self.made, self.given = [], []
        for number in order:
            self.ask(number)
        self.together.end(whole)
        return self.made, self.given


def test_the_first_pass_shows_the_order_and_the_next_makes_all_at_once():
    net = Net()
    assert net.run([2, 0, 3]) == ([], [None] * 3)
    assert net.run([2, 0, 3]) == ([[2, 0, 3]], ["value 2", "value 0", "value 3"])


def test_a_known_order_serves_the_first_pass():
    assert Net(order=[1, 0]).run([1, 0]) == ([[1, 0]], ["value 1", "value 0"])


def test_a_layer_that_runs_twice_gets_the_same_value():
    assert Net(order=[0, 1]).run([0, 1, 0]) == ([[0, 1]], ["value 0", "value 1", "value 0"])


def test_groups_hold_no_more_than_their_bytes(monkeypatch):
    monkeypatch.setattr(together, "GROUP_BYTES", 32)  # two layers of 2 × 2 numbers of 4 bytes
    made, given = Net(order=[0, 1, 2, 3]).run([0, 1, 2, 3])
    assert made == [[0, 1], [2, 3]]
    assert given == [f"value {i}" for i in range(4)]


def test_a_layer_larger_than_a_group_is_a_group(monkeypatch):
    monkeypatch.setattr(together, "GROUP_BYTES", 8)
    assert Net(order=[0, 1]).run([0, 1])[0] == [[0], [1]]


def test_a_layer_that_was_left_out_once_computes_by_itself_from_then_on():
    net = Net(order=[0, 1, 2])
    net.run([0, 2])
    assert net.run([0, 1, 2]) == ([[0, 2]], ["value 0", None, "value 2"])


def test_a_pass_that_an_error_broke_off_teaches_nothing():
    net = Net(order=[0, 1])
    net.run([0], whole=False)
    assert net.run([0, 1])[0] == [[0, 1]]


def test_groups_keep_to_one_kind_and_leave_out_whoever_has_none_now():
    net = Net(order=[0, 1, 2])
    net.layers[1].eval()  # has no kind
    assert net.run([0, 1, 2]) == ([[0, 2]], ["value 0", None, "value 2"])
    net.together._kind = lambda layer: net.number(layer) % 2
    net.layers[1].train()
    net.together.end(whole=True)
    net.together._groups = net.together._grouped(net.together._steady)
    assert net.run([0, 1, 2])[0] == [[0, 2], [1]]


def test_a_layer_whose_weight_has_changed_since_computes_by_itself():
    net = Net(order=[0, 1])
    net.together.begin()
    assert net.ask(0) == "value 0"
    with torch.no_grad():
        net.layers[1].weight.mul_(2)
    assert net.ask(1) is None


def test_outside_of_a_pass_a_layer_computes_by_itself():
    net = Net(order=[0])
    assert net.ask(0) is None
    net.run([0])
    assert net.ask(0) is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_may_be_computed_again_computes_by_itself(reentrant):
    net = Net(order=[0, 1])
    x = torch.ones(1, 2, requires_grad=True)
    seen = []

    def part(x):
        seen.append(net.together.get(net.layers[0]))
        return net.layers[0](x)

    net.together.begin()
    y = checkpoint(part, x, use_reentrant=reentrant)
    assert net.ask(1) == "value 1"
    y.sum().backward()
    assert seen == [None, None]


def test_in_a_pass_without_gradients_all_are_made_at_once_too():
    net = Net(order=[0, 1])
    with torch.no_grad():
        assert net.run([0, 1])[0] == [[0, 1]]


def test_compiled_code_computes_by_itself():
    net = Net(order=[0])
    net.together.begin()

    @torch.compile(backend="eager", fullgraph=False)
    def compiled(x):
        return x + (1 if net.together.get(net.layers[0]) is None else 2)

    assert compiled(torch.zeros(1)).item() == 1


def test_a_copy_has_nothing_of_the_running_pass_and_its_own_layers():
    net = Net(order=[0, 1])
    net.together.begin()
    net.ask(0)
    twin = copy.deepcopy(net)
    assert twin.ask(0) is None
    assert twin.run([0, 1]) == ([[0, 1]], ["value 0", "value 1"])
