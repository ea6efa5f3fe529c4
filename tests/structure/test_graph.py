import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nets import Drawn, Residual, chain, conv, head
from regrow.looking.calls import PassFailed, call, floating
from regrow.structure.graph import Graph, LostCount

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def forward(model, inputs):
    return [tensor for tensor in floating(call(model, inputs)) if tensor.requires_grad]


def graph_of(model, x=X):
    return Graph(model.eval(), x, forward)


def readers_of(model, name):
    return graph_of(model).readers(model.get_submodule(name))


def pairs(found):
    return {name: sorted(zip(reads.filters, reads.indices, strict=True)) for name, reads in found.items()}


def same(filters, start=0):
    return [(i, start + i) for i in range(filters)]


def test_the_readers_in_a_chain():
    model = chain((2, 3))
    graph = graph_of(model)
    one, two = graph.readers(model.conv1), graph.readers(model.conv2)
    assert pairs(one.norms) == {"norm1": same(2)}
    assert pairs(one.consumers) == {"conv2": same(2)}
    assert pairs(one.reached) == {"norm1": same(2), "conv2": same(2)}
    assert pairs(two.norms) == {"norm2": same(3)}
    assert pairs(two.consumers) == {"head": same(3)}
    for found in (one, two):
        assert (found.mixed, found.blocked, found.unsilenced) == ("", "", "")
        assert (found.norm_first, found.noisy) == (True, [])


def test_it_proposes_what_passes_have_not_confirmed():
    # The norm serves both convolutions, and both read its bias: that is for passes to find out.
    model = Drawn(
        lambda s, x: s.head(s.n(s.a(x)) * s.n(s.b(x))),
        a=conv(3, 2), b=conv(3, 2), n=nn.BatchNorm2d(2), head=head(2),
    )  # fmt: skip
    graph = graph_of(model)
    assert pairs(graph.readers(model.a).norms) == pairs(graph.readers(model.b).norms) == {"n": same(2)}
    turned = Drawn(lambda s, x: s.head(s.a(x).flip(1)), a=conv(3, 2), head=head(2))
    assert pairs(readers_of(turned, "a").consumers) == {"head.2": same(2)}  # a flip is taken for element-wise


def test_channels_go_on_behind_a_sum_as_what_is_reached():
    model = Residual(2, 3)
    graph = graph_of(model)
    stem, b = graph.readers(model.stem), graph.readers(model.b)
    assert stem.mixed == b.mixed == "it is added to other channels"
    assert pairs(stem.norms) == {"norm": same(2)}
    assert pairs(stem.consumers) == {"a": same(2)}
    assert pairs(stem.reached) == {"norm": same(2), "a": same(2), "head.2": same(2)}
    assert pairs(b.consumers) == {}
    assert pairs(b.reached) == {"norm_b": same(2), "head.2": same(2)}
    assert stem.blocked == b.blocked == ""


@pytest.mark.parametrize("add", [torch.add, torch.sub, lambda a, b: torch.addcmul(a, b, b)])
def test_sums_of_each_kind(add):
    model = Drawn(lambda s, x: s.head(add(s.a(x), s.b(x))), a=conv(3, 2), b=conv(3, 2), head=head(2))
    assert readers_of(model, "a").mixed == "it is added to other channels"


def test_tensors_side_by_side():
    model = Drawn(
        lambda s, x: s.head(torch.cat([s.b(y := s.a(x)), s.c(x), y], 1)),
        a=conv(3, 2), b=conv(2, 3), c=conv(3, 1), head=head(6),
    )  # fmt: skip
    graph = graph_of(model)
    assert pairs(graph.readers(model.a).consumers) == {"b": same(2), "head.2": same(2, start=4)}
    assert pairs(graph.readers(model.b).consumers) == {"head.2": same(3)}
    assert pairs(graph.readers(model.c).consumers) == {"head.2": same(1, start=3)}


def test_a_channel_that_comes_on_two_ways_is_read_once():
    model = Drawn(lambda s, x: s.head(F.relu(y := s.a(x)) * y.sigmoid()), a=conv(3, 4), head=head(4))
    found = readers_of(model, "a")
    assert pairs(found.consumers) == pairs(found.reached) == {"head.2": same(4)}
    summed = Drawn(lambda s, x: s.head(F.relu(y := s.a(x)) + y + y.sigmoid()), a=conv(3, 4), head=head(4))
    assert pairs(readers_of(summed, "a").reached) == {"head.2": same(4)}


def test_a_sum_that_leaves_the_network():
    model = Drawn(lambda s, x: (s.a(x) + s.b(x)).mean((2, 3)), a=conv(3, 4), b=conv(3, 4))
    found = readers_of(model, "a")
    assert found.mixed == "it is added to other channels"
    assert found.blocked == "it is part of the network's output"


@pytest.mark.parametrize(
    ("norm", "first"),
    [
        (nn.BatchNorm2d(4), True),
        (nn.GroupNorm(4, 4), True),
        (nn.GroupNorm(2, 4), False),
        (nn.BatchNorm2d(4, affine=False), False),
        (nn.ReLU(), False),
    ],
)
def test_which_norms_hide_a_channel_from_all_behind_them(norm, first):
    assert readers_of(nn.Sequential(conv(3, 4), norm, head(4)), "0").norm_first == first
    beside = Drawn(lambda s, x: s.head(s.n(y := s.a(x)) * y), a=conv(3, 4), n=norm, head=head(4))
    assert not readers_of(beside, "a").norm_first


def test_a_filter_is_several_features_behind_a_flatten():
    model = nn.Sequential(conv(3, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    reads = readers_of(model, "0").consumers["3"]
    assert [reads.of([i]) for i in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_filter_is_thousands_of_features_where_nothing_pools():
    model = nn.Sequential(conv(3, 2), nn.Flatten(), nn.Linear(2 * 64 * 64, 2))
    found = graph_of(model, torch.zeros(1, 3, 64, 64)).readers(model[0])
    assert sorted(found.consumers["2"].of([1])) == list(range(64 * 64, 2 * 64 * 64))


@pytest.mark.parametrize(
    ("end", "mixed"),
    [
        (nn.AdaptiveAvgPool2d(1), "it is part of the network's output"),
        (nn.Sequential(nn.GroupNorm(2, 4), head(4)), "'1.0' normalises several channels together"),
    ],
)
def test_why_a_channel_is_not_hidden(end, mixed):
    found = readers_of(nn.Sequential(conv(3, 4), end), "0")
    assert found.mixed == mixed
    assert found.blocked


def test_a_prelu_on_the_way_is_reached_and_passed():
    model = nn.Sequential(conv(3, 4), nn.PReLU(4), conv(4, 2), head(2))
    found = readers_of(model, "0")
    assert pairs(found.reached) == {"1": same(4), "2": same(4)}
    assert pairs(found.consumers) == {"2": same(4)}
    assert not found.mixed


def test_a_layer_with_weights_that_is_neither_norm_nor_consumer_is_named():
    model = Drawn(
        lambda s, x: s.head(s.mid(s.a(x)[0])[0][None]), a=conv(3, 4), mid=nn.LSTM(8, 8), head=head(4)
    )
    found = readers_of(model, "a")
    assert found.mixed == "it is read by a LSTM"
    assert found.blocked == "they are read by a LSTM"
    assert found.consumers == found.reached == {}


def test_a_convolution_that_leads_nowhere():
    model = Drawn(lambda s, x: (s.a(x), s.head(s.b(x)))[1], a=conv(3, 4), b=conv(3, 4), head=head(4))
    found = readers_of(model, "a")
    assert found.mixed == found.blocked == "its output does not reach the network's"
    assert found.reached == {}


@pytest.mark.gives_up
def test_a_count_that_is_lost_on_the_way_is_none_and_logged(caplog):
    def draw(s, x):
        one, three = s.a(x).split([1, 3], 1)
        return s.head(s.b(one) + s.c(three) + s.d(x))

    model = Drawn(draw, a=conv(3, 4), b=conv(1, 2), c=conv(3, 2), d=conv(3, 2), head=head(2))
    graph = graph_of(model)
    with caplog.at_level("INFO", logger="regrow"):
        assert graph.readers(model.a) is None
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "gave up following the channels of 'a'"
    ]
    assert pairs(graph.readers(model.d).reached) == {"head.2": same(2)}  # the others are followed


class Shuffled(nn.Module):
    """Half of the channels go through a convolution, and take turns with the others then."""

    def __init__(self):
        super().__init__()
        self.conv = conv(2, 2)

    def forward(self, x):
        one, other = x.chunk(2, 1)
        both = torch.cat([one, self.conv(other)], 1).view(len(x), 2, 2, *x.shape[2:])
        return both.transpose(1, 2).contiguous().view(x.shape)


def test_a_model_that_cannot_be_traced():
    model = nn.Sequential(conv(3, 4), Shuffled(), Shuffled(), Shuffled(), head(4))
    with pytest.raises(LostCount, match=r"torch-pruning could not trace the model \(\w+\)") as caught:
        graph_of(model)
    assert type(caught.value.__cause__).__name__ in str(caught.value)


def test_an_error_of_the_model_is_not_one_of_the_graph():
    with pytest.raises(PassFailed, match="forward pass fails"):
        graph_of(chain(), X[:, :2])

    def failing(_model, _inputs):
        raise PassFailed("mine")

    with pytest.raises(PassFailed, match="mine"):
        Graph(chain().eval(), X, failing)


def test_a_closed_graph_is_taken_apart():
    model = chain((2,))
    graph = graph_of(model)
    node = weakref.ref(graph._graph.module2node[model.conv1])
    gc.disable()
    try:
        graph.close()
        del graph
        assert node() is None
    finally:
        gc.enable()
