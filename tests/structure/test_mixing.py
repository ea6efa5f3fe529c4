"""Fixed rules that mix channels are seen, whatever the size of the numbers in example_inputs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nets import Drawn, conv, head
from regrow.structure.mixing import rule_out_mixing
from regrow.structure.read import propose_structure
from regrow.surgery.cut import cut
from regrow.surgery.removal import remove_filters

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net(between, **layers):
    """a, then ``between``, then b; 6 channels."""
    return Drawn(
        lambda s, x: s.head(F.relu(s.b(between(s, F.relu(s.a(x)))))),
        a=conv(3, 6), b=conv(6, 6), head=head(6), **layers,
    )  # fmt: skip


def rms(x):
    return x * (x.pow(2).mean(1, keepdim=True) + 1e-6).rsqrt()


def response(x):
    """The norm of ConvNeXt V2, without its weights."""
    size = x.norm(dim=(2, 3), keepdim=True)
    return x * size / (size.mean(1, keepdim=True) + 1e-6)


def attended(x):
    flat = x.flatten(2)
    return ((flat @ flat.transpose(1, 2)).softmax(-1) @ flat).view_as(x)


MIXING = {
    "local response norm": lambda _, x: F.local_response_norm(x, 5),
    "a weak one": lambda _, x: F.local_response_norm(x, 3, alpha=1e-9),
    "one behind a sigmoid": lambda _, x: F.local_response_norm(x.sigmoid(), 3),
    "softmax": lambda _, x: x.softmax(1),
    "log-softmax": lambda _, x: x.log_softmax(1),
    "softmin": lambda _, x: F.softmin(x, 1),
    "unit length": lambda _, x: F.normalize(x, dim=1),
    "its mean": lambda _, x: x - x.mean(1, keepdim=True),
    "its maximum": lambda _, x: x * x.amax(1, keepdim=True).sigmoid(),
    "its deviation": lambda _, x: x / (1e6 + x.std(1, keepdim=True)),
    "its length": lambda _, x: x + 1e-6 * x.norm(dim=1, keepdim=True),
    "running sum": lambda _, x: x.cumsum(1),
    "running maximum": lambda _, x: x.cummax(1).values,
    "differences": lambda _, x: F.pad(x.diff(dim=1), (0, 0, 0, 0, 1, 0)),
    "the other way round": lambda _, x: x.flip(1),
    "shifted": lambda _, x: x.roll(1, 1),
    "sorted": lambda _, x: x.sort(1).values,
    "layer norm": lambda _, x: F.layer_norm(x, x.shape[1:]),
    "group norm": lambda _, x: F.group_norm(x, 2),
    "root mean square": lambda _, x: rms(x),
    "global response norm": lambda _, x: response(x),
    "spectrum": lambda _, x: torch.fft.fft(x, dim=1).real,
    "blurred": lambda _, x: F.avg_pool3d(x.unsqueeze(1), (3, 1, 1), 1, (1, 0, 0)).squeeze(1),
    "cosine": lambda _, x: x * F.cosine_similarity(x, 1 + x, dim=1).unsqueeze(1),
    "attention": lambda _, x: attended(x),
    "fixed matrix": lambda _, x: torch.einsum("bchw,cd->bdhw", x, 1 + torch.eye(6).to(x)),
}  # fmt: skip


@pytest.mark.parametrize("between", MIXING.values(), ids=MIXING)
def test_channels_that_change_others_keep_their_places(between):
    found = propose_structure(net(between), 1e-3 * X).readers
    assert found["a"].blocked == "its channels change others that 'b' reads"
    assert found["a"].mixed, "zeroed columns would not hide it"
    assert (found["b"].blocked, found["b"].mixed) == ("", "")


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("kind", ["local response norm", "a weak one", "softmax", "shifted", "its mean"])
def test_a_cut_equals_masks_for_numbers_of_any_size(kind, scale):
    masked = net(MIXING[kind]).double().eval()
    small = net(MIXING[kind]).double().eval()
    small.load_state_dict(masked.state_dict())
    keep = {"a": torch.tensor([True, False, True, False, True, True])}
    x = X.double()
    remove_filters(masked, keep, example_inputs=x)
    cut(small, keep, example_inputs=scale * x)
    assert len(small.a.weight) == 4
    for size in (1e-3, 1.0, 1e3):
        expected = masked(size * x)
        torch.testing.assert_close(
            small(size * x), expected, rtol=0, atol=1e-13 * float(expected.detach().abs().max())
        )


@pytest.mark.parametrize(
    "layer",
    [nn.LocalResponseNorm(3), nn.LocalResponseNorm(3, alpha=0.0), nn.CrossMapLRN2d(3), nn.Softmax2d()],
)
def test_layers_that_mix_are_known_by_their_type(layer):
    found = propose_structure(net(lambda s, x: s.mixer(x), mixer=layer), 1e-4 * X).readers["a"]
    assert found.blocked == f"'mixer', a {type(layer).__name__}, computes each channel from several"


KEPT_APART = {
    "nothing": lambda _, x: x,
    "activations": lambda _, x: F.silu(F.gelu(F.hardswish(x))),
    "pooling": lambda _, x: F.interpolate(F.avg_pool2d(F.max_pool2d(x, 2), 2), scale_factor=2),
    "norms of one channel": lambda s, x: s.n(F.instance_norm(x)),
    "softmax over positions": lambda _, x: x * x.flatten(2).softmax(2).view_as(x),
    "a sum with itself": lambda _, x: x + x.relu(),
    "channels last": lambda _, x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2),
    "division by itself": lambda _, x: x / x,  # 0 / 0 is no number
    "gate": lambda s, x: x * s.g(x.mean((2, 3), keepdim=True)).sigmoid(),
    "same noise each time": lambda _, x: x + torch.rand_like(x),
    "float32": lambda _, x: x.float().exp().double().to(x),
}  # fmt: skip


@pytest.mark.parametrize("between", KEPT_APART.values(), ids=KEPT_APART)
def test_what_keeps_channels_apart_blocks_nothing(between):
    model = net(between, n=nn.BatchNorm2d(6), g=conv(6, 6, 1))
    assert propose_structure(model, X).readers["a"].blocked == ""


def test_only_the_branch_that_mixes_is_blocked():
    model = Drawn(
        lambda s, x: s.head(torch.cat([s.c(s.a(x).softmax(1)), s.d(s.b(x).relu())], 1)),
        a=conv(3, 6), b=conv(3, 6), c=conv(6, 4), d=conv(6, 4), head=head(8),
    )  # fmt: skip
    found = propose_structure(model, X).readers
    assert {name: bool(each.blocked) for name, each in found.items()} == {
        "a": True, "c": False, "b": False, "d": False,
    }  # fmt: skip


def test_both_writers_of_a_sum_that_is_mixed_are_blocked():
    model = Drawn(
        lambda s, x: s.head(s.c(F.local_response_norm(s.a(x) + s.b(x), 3))),
        a=conv(3, 6), b=conv(3, 6), c=conv(6, 4), head=head(4),
    )  # fmt: skip
    found = propose_structure(model, X).readers
    assert found["a"].blocked == found["b"].blocked == "its channels change others that 'c' reads"
    assert not found["c"].blocked


def test_a_layer_behind_a_block_that_begins_at_zero_is_seen():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(6)
            nn.init.zeros_(self.norm.weight)

        def forward(self, x):
            return x + self.norm(x.softmax(1))

    assert propose_structure(net(lambda s, x: s.block(x), block=Scaled()), X).readers["a"].blocked


@pytest.mark.gives_up
def test_a_layer_that_makes_fewer_channels_than_it_has_filters_stands_in_nobodys_way():
    class Halved(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)[:, ::2]

    model = Drawn(
        lambda s, x: s.head(s.c(s.b(s.a(x).relu()).softmax(1))),
        a=conv(3, 6), b=Halved(6, 12, 1), c=conv(6, 4), head=head(4),
    )  # fmt: skip
    readers = propose_structure(model, X).readers
    rule_out_mixing(model, X, readers)
    assert readers["b"].blocked
    assert not readers["c"].blocked


@pytest.mark.gives_up
def test_a_model_that_bears_no_noise_keeps_the_graphs_proposal(given_up):
    def picky(_, x):
        assert float(x.detach().abs().max()) < 0.5
        return x

    model = net(picky)
    nn.init.constant_(model.a.weight, 1e-4)
    readers = propose_structure(model, X).readers
    assert any(line.startswith("gave up looking for channels that change others") for line in given_up)
    before = {name: each.blocked for name, each in readers.items()}
    rule_out_mixing(model, X, readers)
    assert {name: each.blocked for name, each in readers.items()} == before
