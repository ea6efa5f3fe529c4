import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from nets import Drawn, Residual, chain, conv, head
from regrow.structure.flows import Flows, components
from regrow.structure.read import read_structure
from regrow.structure.readers import Readers, Reads

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def flows_of(model, layers=()):
    return Flows(model, read_structure(model, X), layers)


def same(filters, start=0):
    return Reads(range(filters), range(start, start + filters))


def pairs(flows):
    return sorted(zip(flows.sources.tolist(), flows.targets.tolist(), strict=True))


def numbers(mask):
    return mask.nonzero().flatten().tolist()


def test_the_numbering_of_a_chain():
    flows = flows_of(chain((2, 3)))
    assert flows.filters == {"conv1": slice(0, 2), "conv2": slice(2, 5)}
    assert flows.owner.tolist() == [0, 0, 1, 1, 1]
    assert flows.reached == {"conv1": ["norm1", "conv2"], "conv2": ["norm2", "head"]}
    assert flows.channels == {
        "norm1": slice(0, 2), "conv2": slice(2, 4), "norm2": slice(4, 7), "head": slice(7, 10),
    }  # fmt: skip
    assert pairs(flows) == [
        *[(0, 0), (0, 2), (1, 1), (1, 3)],
        *[(2, 4), (2, 7), (3, 5), (3, 8), (4, 6), (4, 9)],
    ]


def test_layers_that_no_filter_reaches_are_numbered_where_asked_for():
    model = chain((2,))
    flows = flows_of(model, ["conv1", "norm1", "relu1"])
    assert flows.channels == {"norm1": slice(0, 2), "head": slice(2, 4), "conv1": slice(4, 7)}
    assert flows.reached == {"conv1": ["norm1", "head"]}  # a ReLU takes any number of channels
    assert len(flows.arriving(torch.ones(2, dtype=torch.bool))) == 7


def test_a_layer_that_takes_any_number_of_channels_is_not_listed():
    model = nn.Sequential(conv(3, 2), nn.PReLU(), conv(2, 2), nn.PReLU(2), head(2))
    flows = flows_of(model)
    assert set(flows.channels) == {"2", "3", "4.2"}
    assert flows.reached == {"0": ["2"], "2": ["3", "4.2"]}


def test_what_arrives_of_what_is_emitted():
    flows = flows_of(chain((2, 3)))
    emitted = flows.emitted_without({"conv1": [1], "conv2": {0, 2}})
    assert emitted.tolist() == [True, False, False, True, False]
    assert numbers(flows.arriving(emitted)) == [0, 2, 5, 8]
    assert flows.emitted_without({}).all()
    assert flows.arriving(flows.emitted_without({})).all()
    assert not flows.arriving(torch.zeros(5, dtype=torch.bool)).any()


def test_a_channel_of_a_sum_arrives_as_long_as_one_filter_writes_to_it():
    # The block's b is added to the stem; the head reads the sum.
    flows = flows_of(Residual(2, 2))
    last = flows.channels["head.2"]
    for gone, there in (
        ({"stem": [0]}, [True, True]),
        ({"b": [0]}, [True, True]),
        ({"stem": [0], "b": [1]}, [True, True]),
        ({"stem": [0], "b": [0]}, [False, True]),
        ({"stem": [0, 1], "b": [0, 1]}, [False, False]),
    ):
        assert flows.arriving(flows.emitted_without(gone))[last].tolist() == there
    # The block itself reads the stem alone.
    assert flows.arriving(flows.emitted_without({"stem": [0]}))[flows.channels["a"]].tolist() == [False, True]


def test_a_filter_reaches_several_features_behind_a_flatten():
    model = nn.Sequential(conv(3, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    flows = flows_of(model)
    arriving = flows.arriving(flows.emitted_without({"0": [0]}))
    assert arriving[flows.channels["3"]].tolist() == [False] * 4 + [True] * 4


def test_who_writes_to_the_same_tensors():
    flows = flows_of(Residual(3, 2))
    assert flows.together == {"stem": {"stem", "b"}, "a": {"a"}, "b": {"stem", "b"}}
    assert flows_of(chain((2, 3))).together == {"conv1": {"conv1"}, "conv2": {"conv2"}}


def test_who_writes_beside_each_other_is_not_together_until_something_adds_them():
    def draw(s, x):
        return s.head(s.c(torch.cat([s.a(x), s.b(x)], 1)) + s.d(x))

    model = Drawn(draw, a=conv(3, 2), b=conv(3, 2), c=conv(4, 2), d=conv(3, 2), head=head(2))
    assert flows_of(model).together == {"a": {"a"}, "b": {"b"}, "c": {"c", "d"}, "d": {"c", "d"}}


def test_filters_that_meet_in_a_sum_are_coupled():
    assert flows_of(Residual(3, 2)).coupled(Residual(3, 2)) == [{"stem": [i], "b": [i]} for i in range(3)]
    assert flows_of(chain((2, 3))).coupled(chain((2, 3))) == []


def test_a_depthwise_convolution_hands_its_channels_on():
    model = nn.Sequential(conv(3, 2), conv(2, 4, groups=2), conv(4, 3), head(3))
    # Channel 0 goes on as filters 0 and 1 of the depthwise one, channel 1 as 2 and 3.
    assert flows_of(model).coupled(model) == [{"0": [0], "1": [0, 1]}, {"0": [1], "1": [2, 3]}]
    grouped = nn.Sequential(conv(3, 4), conv(4, 4, groups=2), conv(4, 3), head(3))
    assert flows_of(grouped).coupled(grouped) == []


def test_an_inverted_residual_is_coupled_through_its_depthwise_convolution_and_its_sum():
    def draw(s, x):
        x = s.stem(x)
        return s.head(x + s.back(F.relu(s.deep(F.relu(s.wide(x))))))

    model = Drawn(
        draw, stem=conv(3, 2), wide=conv(2, 3), deep=conv(3, 3, groups=3), back=conv(3, 2), head=head(2)
    )
    assert flows_of(model).coupled(model) == [
        {"stem": [0], "back": [0]},
        {"stem": [1], "back": [1]},
        {"wide": [0], "deep": [0]},
        {"wide": [1], "deep": [1]},
        {"wide": [2], "deep": [2]},
    ]


def test_channels_that_could_not_be_followed_are_not_listed():
    readers = {"conv1": Readers(reached={"conv2": same(2)}), "conv2": Readers()}
    flows = Flows(chain((2, 3)), readers)
    assert flows.filters == {"conv1": slice(0, 2), "conv2": slice(2, 5)}
    assert flows.channels == {"conv2": slice(0, 2)}
    assert flows.together == {"conv1": {"conv1"}, "conv2": {"conv2"}}
    assert flows.coupled(chain((2, 3))) == []


def test_a_model_of_which_nothing_is_known():
    flows = Flows(chain((2,)), {"conv1": Readers()})
    assert flows.channels == {}
    assert len(flows.sources) == len(flows.arriving(torch.ones(2, dtype=torch.bool))) == 0
    none = Flows(nn.Sequential(nn.Linear(2, 2)), {})
    assert none.filters == none.channels == none.together == {}
    assert none.coupled(nn.Sequential(nn.Linear(2, 2))) == []
    assert none.emitted_without({}).tolist() == []


@st.composite
def edges(draw):
    count = draw(st.integers(1, 12))
    ends = st.integers(0, count - 1)
    return count, draw(st.lists(st.tuples(ends, ends), max_size=14))


def smallest_numbers(count, drawn):
    """The smallest number that is joined to each, by a plain union-find."""
    parent = list(range(count))

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for one, other in drawn:
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return [root(i) for i in range(count)]


@given(drawn=edges())
def test_components_are_those_of_a_plain_union_find(drawn):
    count, ends = drawn
    one, other = torch.tensor(ends, dtype=torch.int64).view(-1, 2).unbind(1)
    assert components(count, one, other).tolist() == smallest_numbers(count, ends)


def test_components_by_hand():
    one, other = torch.tensor([4, 1, 3]), torch.tensor([3, 2, 5])
    assert components(7, one, other).tolist() == [0, 1, 1, 3, 3, 3, 6]
    nothing = torch.zeros(0, dtype=torch.int64)
    assert components(3, nothing, nothing).tolist() == [0, 1, 2]
    assert components(0, nothing, nothing).tolist() == []


def test_components_of_a_long_chain():
    order = torch.randperm(2000)
    labels = components(2000, order[:-1], order[1:])
    assert not labels.any()
