import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from nets import Drawn, conv
from outputs import KINDS, STATES, RandomNet
from regrow.looking.copies import copied
from regrow.structure import escapes
from regrow.structure.stock import single_operation
from regrow.torch_private import TorchDispatchMode, modes_running, outside_modes

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


LAYERS = [
    (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 8)),
    (nn.Conv2d(4, 4, 3, groups=2, dilation=2, bias=False), (2, 4, 8, 8)),
    (nn.Conv3d(3, 4, (1, 2, 3)), (2, 3, 4, 4, 4)),
    (nn.BatchNorm1d(3), (4, 3)),
    (nn.BatchNorm2d(3).eval(), (2, 3, 4, 4)),
    (nn.BatchNorm3d(3, affine=False, track_running_stats=False), (2, 3, 2, 2, 2)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_a_layer_computes_the_operation_of_the_table(layer, shape):
    x = torch.randn(shape)
    with torch.no_grad(), Recorded() as recorded:
        layer(x)
    func, args = single_operation(layer)(layer, x)
    # Counting the batches, and room for numbers that only a backward pass needs.
    calls = [call for call in recorded.calls if call[0].overloadpacket.__name__ not in ("add_", "empty")]
    assert [call[0] for call in calls] == [func]
    for mine, theirs in zip(args, calls[0][1], strict=True):
        assert mine is theirs or (mine if isinstance(mine, bool | int | float) else list(mine)) == theirs


@pytest.mark.parametrize("kind", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Hardswish, nn.GELU])
def test_an_activation_is_one_operation_element_by_element(kind):
    for layer in (kind(), *([kind(inplace=True)] if kind is not nn.GELU else [])):
        with torch.no_grad(), Recorded() as recorded:
            layer(X.clone())
        func, _ = single_operation(layer)(layer, X)
        assert len(recorded.calls[1:]) == 1
        assert recorded.calls[1][0].overloadpacket.__name__.endswith("_") == (
            func.overloadpacket.__name__ == "relu_"
        )


def test_layers_that_compute_something_else_are_not_in_the_table():
    class Scaled(nn.Conv2d):
        pass

    replaced = nn.ReLU()
    replaced.forward = torch.sigmoid
    parametrized = nn.Conv2d(3, 4, 3)
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    others = [
        Scaled(3, 4, 3),
        replaced,
        parametrized,
        nn.Conv2d(3, 4, 3, padding_mode="circular"),
        nn.Softmax(1),
    ]
    assert [single_operation(module) for module in others] == [None] * 5
    same, plain = nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(3, 4, 3)
    assert single_operation(same)(same, X)[0] is None
    assert single_operation(plain)(plain, X[0])[0] is None  # no batch
    plain.weight = nn.Parameter(plain.weight.to_sparse())
    assert single_operation(plain)(plain, X)[0] is None


def followed_both_ways(model, x, training, monkeypatch):
    model = copied(model, requires_grad=False).eval()
    torch.manual_seed(0)
    quick = escapes.follow(model, x, training=training)
    with monkeypatch.context() as patched:
        patched.setattr(escapes, "single_operation", lambda _module: None)
        torch.manual_seed(0)
        return quick, escapes.follow(model, x, training=training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "efficientnet_b0"])
def test_the_table_changes_nothing_in_what_is_found(name, training, monkeypatch):
    model = torchvision.models.get_model(name, num_classes=4)
    quick, slow = followed_both_ways(model, torch.randn(2, 3, 64, 64), training, monkeypatch)
    assert quick == slow
    assert quick.escapes


@pytest.mark.parametrize("seed", range(60))
def test_nor_for_a_random_net(seed, monkeypatch):
    torch.manual_seed(seed)
    kinds, states = list(KINDS), list(STATES)
    net = RandomNet(seed, kinds[seed % len(kinds)], states[seed // len(kinds) % len(states)])
    quick, slow = followed_both_ways(net, X, False, monkeypatch)
    assert quick == slow


def test_a_mode_of_the_model_s_own_sees_every_operation():
    seen = []

    def draw(net, x):
        with Recorded() as recorded:
            y = net.relu(net.conv(x))
        seen.append([call[0].overloadpacket.__name__ for call in recorded.calls])
        return net.head(y.mean((2, 3)))

    net = Drawn(draw, conv=conv(3, 4), relu=nn.ReLU(), head=nn.Linear(4, 2))
    escapes.follow(copied(net, requires_grad=False).eval(), X)
    assert seen[-1] == ["convolution", "relu"]


def test_a_transform_sees_every_operation():
    def draw(net, x):
        return net.head(torch.func.vmap(lambda each: net.relu(net.conv(each[None]))[0])(x).mean((2, 3)))

    net = Drawn(draw, conv=conv(3, 4), relu=nn.ReLU(), head=nn.Linear(4, 2))
    found = escapes.follow(copied(net, requires_grad=False).eval(), X).escapes
    assert "head" in found


def test_modes_do_not_see_what_happens_outside_of_them():
    with Recorded() as recorded:
        assert modes_running() == (1, 0)
        with outside_modes():
            F.relu(X)
        assert recorded.calls == []
        F.relu(X)
    assert len(recorded.calls) == 1
    assert modes_running() == (0, 0)
    assert not torch.func.vmap(lambda x: x * (modes_running() is not None))(X).any()


def test_without_private_names_of_pytorch_each_operation_is_looked_at(monkeypatch):
    model = copied(torchvision.models.resnet18(num_classes=4), requires_grad=False).eval()
    expected = escapes.follow(model, torch.ones(1, 3, 64, 64))
    monkeypatch.delattr(torch._C, "DisableTorchFunction")
    assert escapes.follow(model, torch.ones(1, 3, 64, 64)) == expected
