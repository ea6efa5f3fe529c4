import gc
import random
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import regrow
from nets import Drawn, conv, head
from outputs import KINDS, STATES, RandomNet
from regrow.looking.copies import copied
from regrow.structure.escapes import OUTPUT, follow
from regrow.structure.read import propose_structure, read_structure

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def found(model, x=X, **settings):
    return follow(copied(model, requires_grad=False).eval(), x, **settings).escapes


def drawn(draw, **layers):
    """The layers that ``follow`` names, for a network that computes ``draw(self, x)``."""
    return set(found(Drawn(draw, **layers)))


@pytest.mark.parametrize("seed", range(320))
def test_no_output_of_a_random_net_can_be_removed(seed):
    torch.manual_seed(seed)
    kinds, states = list(KINDS), list(STATES)
    net = RandomNet(seed, kinds[seed % len(kinds)], states[seed // len(kinds) % len(states)])
    readers = propose_structure(net, X).readers
    assert net.heads <= {name for name in readers if readers[name].output}
    # The other layers are not kept for nothing.
    assert not readers["stem"].output


def random_net(kind):
    torch.manual_seed(0)
    net = RandomNet(len(kind), kind, random.Random(kind).choice(list(STATES)))
    return net, {name: net.get_submodule(name).weight.detach().clone() for name in net.heads}


@pytest.mark.parametrize("kind", KINDS)
def test_repr_leaves_every_kind_of_output_whole(kind):
    net, heads = random_net(kind)
    cycle = regrow.RePr(
        net, torch.optim.SGD(net.parameters(), 0.1), example_inputs=X,
        full=1, sub=1, cycles=1, fraction=0.4, skip_first=False,
    )  # fmt: skip
    assert cycle.step().filters
    for name, weight in heads.items():
        assert name in cycle.left_out
        assert torch.equal(net.get_submodule(name).weight, weight)


@pytest.mark.parametrize(
    "kind",
    [
        "tensor",
        "tuple",
        "dict",
        "dataclass",
        "object",
        "generator",
        "detached",
        "argmax",
        "numpy",
        "attribute",
    ],
)
def test_prune_leaves_every_kind_of_output_whole(kind):
    net, heads = random_net(kind)
    report = regrow.prune(net, fraction=0.4, example_inputs=X, compensate=False)
    assert report["dropped"]["stem"]
    for name, weight in heads.items():
        assert name in report["left_out"]
        left = net.get_submodule(name).weight
        assert len(left) == len(weight)
        assert left.flatten(1).any(1).all()


@dataclass
class Out:
    logits: torch.Tensor


def test_the_network_of_the_report():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 1)

        def forward(self, x):
            return Out(self.head(F.relu(self.a(x))).mean((2, 3)))

    net = Net()
    report = regrow.prune(net, fraction=0.4, example_inputs=X, compensate=False)
    assert (net.a.out_channels, net.head.out_channels, net.head.in_channels) == (5, 10, 5)
    assert report["left_out"] == {"head": OUTPUT}
    assert net(X).logits.shape == (2, 10)


def test_layers_that_weights_read_are_no_outputs():
    assert drawn(lambda s, x: s.head(F.relu(s.a(x))), a=conv(3, 4), head=head(4)) == {"head.2"}
    assert drawn(lambda s, x: s.b(s.a(x)), a=conv(3, 4), b=conv(4, 2)) == {"b"}
    w = nn.Bilinear(1, 2, 4)
    w.weight = nn.Parameter(torch.randn(4, 2))
    assert drawn(lambda s, x: s.a(x).mean((2, 3)) @ s.w.weight, a=conv(3, 4), w=w) == set()


@pytest.mark.parametrize(
    "between",
    [
        lambda y: F.relu(y, inplace=True) + y,
        lambda y: y.clone(memory_format=torch.channels_last),
        lambda y: torch.cat([y, y], 1)[:, 2:6],
        lambda y: F.pixel_unshuffle(F.pixel_shuffle(y, 2), 2),
        lambda y: F.avg_pool2d(y, 3, 1, 1),
        lambda y: F.interpolate(F.max_pool2d(y, 2), scale_factor=2),
        lambda y: y.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, (8, 8)),
        lambda y: F.glu(torch.cat([y, y], 1), 1),
        lambda y: y * y.mean((2, 3), keepdim=True).sigmoid(),
        lambda y: y * y.amax(1, keepdim=True).sigmoid(),
        lambda y: y * torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1).mean(1, keepdim=True),
        lambda y: F.layer_norm(y, y.shape[1:]),
        lambda y: y.reshape(2, 2, 2, 8, 8).transpose(1, 2).reshape(2, 4, 8, 8),
        lambda y: torch.stack([y, y]).sum(0),
        lambda y: y[:, [2, 0, 1, 3]],
        lambda y: torch.where(y > 0, y, 0.1 * y),
        lambda y: torch.zeros(2, 8, 8, 8).index_copy_(1, torch.arange(4), y)[:, :4],
        lambda y: y.detach(),
        lambda y: y.double().float(),
        lambda y: y.roll(1, 3).flip(2),
        lambda y: F.softmax(y, 1),
        lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect")[..., 1:-1, 1:-1],
        lambda y: y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    ],
)
def test_code_between_two_layers(between):
    assert drawn(lambda s, x: s.b(between(s.a(x))).sum((2, 3)), a=conv(3, 4), b=conv(4, 2)) == {"b"}
    assert drawn(lambda s, x: between(s.a(x)).sum((2, 3)), a=conv(3, 4)) == {"a"}


def test_a_linear_layer_over_positions_passes_channels_on():
    """Learned pooling: the channels of ``a`` are the classes."""
    over_space = nn.Linear(64, 1)
    assert "a" in drawn(lambda s, x: s.p(s.a(x).flatten(2)).squeeze(2), a=conv(3, 4), p=over_space)
    assert drawn(
        lambda s, x: s.out(s.p(s.a(x).flatten(2)).squeeze(2)), a=conv(3, 4), p=over_space, out=nn.Linear(4, 2)
    ) == {"out"}
    mixer = nn.Linear(64, 64)  # whose own features, positions, are averaged into the output
    assert drawn(
        lambda s, x: s.out(s.mix(s.a(x).flatten(2)).transpose(1, 2)).mean(1),
        a=conv(3, 4), mix=mixer, out=nn.Linear(4, 2),
    ) == {"mix", "out"}  # fmt: skip


def test_a_convolution_with_one_channel_a_group_passes_channels_on():
    depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    assert drawn(lambda s, x: s.d(s.a(x)), a=conv(3, 4), d=depthwise) == {"a", "d"}
    assert drawn(lambda s, x: s.b(s.d(s.a(x))), a=conv(3, 4), d=depthwise, b=conv(4, 2)) == {"b"}
    grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
    assert drawn(lambda s, x: s.d(s.a(x)), a=conv(3, 4), d=grouped) == {"d"}
    up = nn.ConvTranspose2d(4, 4, 2, groups=4)
    assert "a" in drawn(lambda s, x: s.d(s.a(x)), a=conv(3, 4), d=up)
    assert "a" not in drawn(lambda s, x: s.d(s.a(x)), a=conv(3, 4), d=nn.ConvTranspose2d(4, 2, 2))


def test_a_constant_matrix_is_no_weight():
    """A palette or a fixed rotation of the classes leaves them outputs."""
    w = nn.Bilinear(1, 2, 4)
    w.weight = nn.Parameter(torch.randn(4, 2))
    assert drawn(lambda s, x: s.a(x).mean((2, 3)) @ torch.eye(4), a=conv(3, 4)) == {"a"}
    assert drawn(lambda s, x: torch.eye(4)[s.a(x).mean((2, 3)).argmax(1)], a=conv(3, 4)) == {"a"}


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (lambda y: y.tolist(), "Python or NumPy"),
        (lambda y: y.numpy(), "Python or NumPy"),
        (lambda y: y[0, 0, 0, 0].item(), "Python or NumPy"),
        (lambda y: bool(y.mean() > 0), "Python or NumPy"),
        (lambda y: int(y.argmax()), "Python or NumPy"),
        (lambda y: repr(y), "Python or NumPy"),
        (lambda y: memoryview(y.numpy()), "Python or NumPy"),
        (lambda y: torch.utils.dlpack.to_dlpack(y) and y.__dlpack__(), "Python or NumPy"),
        (lambda y: y.exp(), "no operation reads"),
    ],
)
def test_what_is_read_besides_is_named_with_the_reason(read, says):
    def draw(s, x):
        y = s.a(x)
        read(y.detach())
        return s.head(y)

    reasons = found(Drawn(draw, a=conv(3, 4), head=head(4)))
    assert says in reasons["a"]
    assert "may be the network's output" in reasons["a"]


def test_what_is_kept_in_attributes_lists_and_closures_is_named():
    kept: list[Any] = []

    def in_closure(s, x):
        kept.append(s.a(x))
        return s.head(kept[-1])

    def in_circle(s, x):
        s.circle = [s.a(x)]
        s.circle.append(s.circle)
        return s.head(s.circle[0])

    def in_buffer(s, x):
        s.room = s.a(x)
        return s.head(s.room)

    for draw in (in_closure, in_circle, in_buffer):
        reasons = found(Drawn(draw, a=conv(3, 4), head=head(4)))
        assert "keeps what it computes" in reasons["a"], draw


def test_a_hook_of_the_users_that_keeps_features_keeps_the_filters():
    features = {}
    model = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4), nn.ReLU(), head(4))
    model[0].register_forward_hook(lambda _m, _x, y: features.update(a=y.detach()))
    model[1].register_forward_hook(lambda _m, _x, y: features.update(shape=y.shape))
    assert set(found(model)) == {"0", "4.2"}


def test_a_circle_of_references_that_nobody_holds_is_no_output():
    class Cell:
        pass

    def draw(s, x):
        cell = Cell()
        cell.me, cell.y = cell, s.a(x)
        return s.head(cell.y)

    gc.disable()
    try:
        assert drawn(draw, a=conv(3, 4), head=head(4)) == {"head.2"}
    finally:
        gc.enable()


def test_train_mode_may_return_more():
    def draw(s, x):
        y = s.a(x)
        return (s.head(y), y) if s.training else s.head(y)

    model = Drawn(draw, a=conv(3, 4), head=head(4))
    assert set(found(model)) == {"head.2"}
    assert set(found(model, training=True)) == {"a", "head.2"}
    assert read_structure(model, X)["a"].output == OUTPUT


def test_statistics_are_no_outputs():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("largest", torch.zeros(()))

        def forward(self, x):
            self.largest.copy_(x.amax())
            if self.training:
                self.mean.lerp_(x.mean((0, 2, 3)), 0.1)
            return x - self.mean.view(-1, 1, 1)

    model = nn.Sequential(conv(3, 4), Running(), head(4))
    assert set(found(model)) == set(found(model, training=True)) == {"2.2"}
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), head(4))
    assert set(found(model, training=True)) == {"2.2"}


def test_a_sum_of_two_heads_is_the_output_of_both():
    assert drawn(lambda s, x: s.a(x) + s.b(x), a=conv(3, 4), b=conv(3, 4)) == {"a", "b"}


def test_a_model_that_is_one_layer():
    assert found(nn.Conv2d(3, 4, 1)) == {"": OUTPUT}


def test_weights_that_are_computed_are_weights():
    standardised = conv(3, 4)
    standardised.forward = lambda x: F.conv2d(
        x, standardised.weight / standardised.weight.std((1, 2, 3), keepdim=True)
    )
    normed = torch.nn.utils.parametrizations.weight_norm(conv(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = torch.nn.utils.weight_norm(conv(4, 4))
    spectral = torch.nn.utils.parametrizations.spectral_norm(conv(4, 2))
    model = nn.Sequential(standardised, normed, nn.ReLU(), old, nn.ReLU(), spectral)
    assert set(follow(model.requires_grad_(False).eval(), X).escapes) == {"5"}


class Weighted(nn.Module):
    """A linear layer of the user's own, by several ways to multiply."""

    def __init__(self, how):
        super().__init__()
        self.weight, self.how = nn.Parameter(torch.randn(2, 4)), how

    def forward(self, x):
        return self.how(x, self.weight)


@pytest.mark.parametrize(
    "how",
    [
        lambda x, w: torch.einsum("nchw,oc->nohw", x, w),
        lambda x, w: torch.einsum("nchw,oc->no", x, w),
        lambda x, w: F.linear(x.permute(0, 2, 3, 1), w),
        lambda x, w: F.conv2d(x, w[:, :, None, None]),
        lambda x, w: w @ x.flatten(2),
        lambda x, w: torch.tensordot(x, w, ([1], [1])),
        lambda x, w: torch.bmm(w.expand(2, 2, 4), x.flatten(2)),
    ],
)
def test_weights_of_the_users_own_read_channels_too(how):
    assert drawn(lambda s, x: s.w(s.a(x)), a=conv(3, 4), w=Weighted(how)) == set()


def test_recurrent_layers_and_attention_read_channels():
    model = Drawn(
        lambda s, x: s.out(s.rnn(s.a(x).mean(2).transpose(1, 2))[0]),
        a=conv(3, 4), rnn=nn.LSTM(4, 6, batch_first=True), out=nn.Linear(6, 2),
    )  # fmt: skip
    assert set(found(model)) == {"out"}
    model = Drawn(
        lambda s, x: s.out(s.att(y := s.a(x).flatten(2).transpose(1, 2), y, y)[0].mean(1)),
        a=conv(3, 4), att=nn.MultiheadAttention(4, 2, batch_first=True), out=nn.Linear(4, 2),
    )  # fmt: skip
    assert "a" not in found(model)


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("fcn_resnet50", {"classifier.4"}),
        ("lraspp_mobilenet_v3_large", {"classifier.low_classifier", "classifier.high_classifier"}),
    ],
)
def test_segmentation_nets(name, outputs):
    model = getattr(torchvision.models.segmentation, name)(weights=None, weights_backbone=None)
    assert set(found(model, torch.randn(2, 3, 64, 64))) == outputs


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "densenet121", "swin_t"]
)
def test_the_classifier_alone_is_the_output_of_a_classifier(name):
    model = getattr(torchvision.models, name)(weights=None)
    x = torch.randn(2, 3, 64, 64)
    assert len(found(model, x)) == len(found(model, x, training=True)) == 1


def test_tensors_without_elements_are_followed():
    """A detector whose boxes are all below the threshold calls its head with nothing."""

    def draw(s, x):
        y = s.a(x).flatten(2).transpose(1, 2).reshape(-1, 4)
        none = y[torch.zeros(len(y), dtype=torch.bool)]
        return s.out(none[none[:, 0].sort()[1]]), s.b(x)

    assert {"out", "b"} <= drawn(draw, a=conv(3, 4), out=nn.Linear(4, 2), b=conv(3, 2))


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("retinanet_resnet50_fpn", {"head.classification_head.cls_logits", "head.regression_head.bbox_reg"}),
        (
            "fasterrcnn_mobilenet_v3_large_320_fpn",
            {"rpn.head.cls_logits", "rpn.head.bbox_pred"}
            | {"roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"},
        ),
    ],
)
def test_detectors(name, outputs):
    detection = torchvision.models.detection
    small = {"min_size": 96, "max_size": 96} if name.startswith("retina") else {"min_size": 96}
    model = getattr(detection, name)(weights=None, weights_backbone=None, **small)
    assert set(found(model, ([torch.rand(3, 96, 96)],))) == outputs


def test_scripted_code_is_followed():
    between = torch.jit.script(_squared)
    assert drawn(lambda s, x: s.b(between(s.a(x))), a=conv(3, 4), b=conv(4, 2)) == {"b"}
    assert drawn(lambda s, x: [between(s.a(x)).argmax(1)], a=conv(3, 4)) == {"a"}


def _squared(x):
    return torch.relu(x) * x
