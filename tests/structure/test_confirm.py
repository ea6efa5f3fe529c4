import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nets import Drawn, Residual, chain, conv, head, unsettled
from regrow.structure.confirm import confirm, reads_silence, rule_out
from regrow.structure.readers import Readers, Reads

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SILENT = torch.tensor([0, 2])


def same(filters):
    return Reads(range(filters), range(filters))


def confirmed(model, readers):
    """The claims ``readers``, changed by the passes that contradict them."""
    with torch.no_grad():
        confirm(copy.deepcopy(model).eval(), X, readers)
    return readers


def claim(consumers=(), norms=(), filters=4):
    return Readers(
        consumers={name: same(filters) for name in consumers}, norms={name: same(filters) for name in norms}
    )


def test_claims_that_are_right_stay():
    readers = {"conv1": claim(["conv2"], ["norm1"]), "conv2": claim(["head"], ["norm2"], 3)}
    expected = copy.deepcopy(readers)
    assert confirmed(chain((4, 3)), readers) == expected


def test_a_reader_that_was_forgotten_is_noticed():
    model = Drawn(
        lambda s, x: s.head(s.b(y := F.relu(s.a(x))) + s.c(y)),
        a=conv(3, 4), b=conv(4, 2), c=conv(4, 2), head=head(2),
    )  # fmt: skip
    assert not confirmed(model, {"a": claim(["b", "c"])})["a"].mixed
    found = confirmed(model, {"a": claim(["b"])})["a"]
    assert found.mixed == "forward passes did not confirm which layers read it"
    assert list(found.consumers) == ["b"]
    assert found.noisy == []


def test_a_norm_that_was_forgotten_is_noticed():
    found = confirmed(chain((4,)), {"conv1": claim(["head"])})["conv1"]
    assert found.noisy == ["head"]
    assert found.mixed == "a silenced channel does not reach 'head' as 0"


def test_a_consumer_that_reads_other_channels_is_noticed():
    readers = {
        "conv1": Readers(consumers={"conv2": Reads([0, 1, 2, 3], [1, 0, 2, 3])}, norms={"norm1": same(4)})
    }
    found = confirmed(chain((4, 3)), readers)["conv1"]
    assert found.noisy == ["conv2"]
    assert found.mixed == "a silenced channel does not reach 'conv2' as 0"
    assert list(found.norms) == ["norm1"]


def test_a_norm_that_reads_other_channels_is_taken_back():
    readers = {
        "conv1": Readers(consumers={"conv2": same(4)}, norms={"norm1": Reads([0, 1, 2, 3], [1, 0, 2, 3])})
    }
    readers["conv1"].norm_first = True
    found = confirmed(chain((4, 3)), readers)["conv1"]
    assert found.norms == {}
    assert found.unsilenced == "norm1"
    assert not found.norm_first
    assert found.noisy == ["conv2"]  # without the norm the channel arrives as its bias


def test_a_norm_behind_a_sum_is_taken_back():
    # The last norm sees the sum of both: where one of them is silent the other is not.
    model = Drawn(
        lambda s, x: s.head(s.n(s.a(x) + s.b(x))),
        a=conv(3, 4),
        b=conv(3, 4),
        n=nn.BatchNorm2d(4),
        head=head(4),
    )
    readers = confirmed(model, {"a": claim(["head.2"], ["n"]), "b": claim(["head.2"], ["n"])})
    for found in readers.values():
        assert found.unsilenced == "n"
        assert found.norms == {}
        assert found.noisy == ["head.2"]


def test_two_layers_with_the_same_filters_silenced_do_not_hide_each_others_mistakes():
    model = Drawn(lambda s, x: s.head(s.a(x) - s.b(x)), a=conv(3, 2), b=conv(3, 2), head=head(2))
    readers = confirmed(model, {"a": claim(["head.2"], filters=2), "b": claim(["head.2"], filters=2)})
    assert {name: found.noisy for name, found in readers.items()} == {"a": ["head.2"], "b": ["head.2"]}


def test_a_third_layer_does_not_hide_the_mistakes_of_the_second():
    # One filter each, so b and c lose the same one; a, which comes first, has nothing to do with them.
    model = Drawn(
        lambda s, x: s.head(s.b(x) - s.c(x)) + s.other(s.a(x)),
        a=conv(3, 1), b=conv(3, 1), c=conv(3, 1), head=head(1), other=head(1),
    )  # fmt: skip
    readers = {"a": claim(["other.2"], filters=1)} | {name: claim(["head.2"], filters=1) for name in "bc"}
    found = confirmed(model, readers)
    assert {name: each.noisy for name, each in found.items()} == {"a": [], "b": ["head.2"], "c": ["head.2"]}
    assert not found["a"].mixed


def test_a_claim_about_a_layer_with_one_filter():
    model = nn.Sequential(conv(3, 1), nn.ReLU(), conv(1, 2), head(2))
    assert not confirmed(model, {"0": claim(["2"], filters=1)})["0"].mixed
    assert confirmed(model, {"0": claim(filters=1)})["0"].mixed


def test_one_wrong_claim_does_not_take_back_the_others():
    model = Drawn(
        lambda s, x: s.head(torch.cumsum(s.b(F.relu(s.a(x))), 1)), a=conv(3, 4), b=conv(4, 4), head=head(4)
    )
    readers = confirmed(model, {"a": claim(["b"]), "b": claim(["head.2"])})
    assert not readers["a"].mixed
    assert readers["b"].mixed


def test_a_claim_that_says_mixed_is_not_looked_at_again():
    readers = {"conv1": Readers(mixed="mine", norms={"norm1": same(4)})}
    assert confirmed(chain((4, 3)), readers)["conv1"].mixed == "mine"


def test_the_block_of_a_residual_net():
    readers = {
        "stem": Readers(
            consumers={"a": same(4)}, norms={"norm": same(4)}, mixed="it is added to other channels"
        ),
        "a": claim(["b"], ["norm_a"], 3),
        "b": claim([], ["norm_b"]),
    }
    found = confirmed(unsettled(Residual(4, 3)), readers)
    assert not found["a"].mixed
    assert found["b"].mixed  # the head reads it
    assert [list(each.norms) for each in found.values()] == [["norm"], ["norm_a"], ["norm_b"]]
    assert found["stem"].noisy == []


def test_numbers_that_are_not_finite_confirm_nothing():
    model = Drawn(lambda s, x: s.head(s.a(x) / 0), a=conv(3, 4), head=head(4))
    assert confirmed(model, {"a": claim(["head.2"])})["a"].mixed
    beside = Drawn(lambda s, x: (s.head(s.a(x)), x.abs() / 0), a=conv(3, 4), head=head(4))
    found = confirmed(beside, {"a": claim(["head.2"])})["a"]
    assert found.noisy == []
    assert found.mixed == "forward passes did not confirm which layers read it"


def test_rule_out_takes_back_norms_that_serve_others_too():
    model = chain((4, 4))
    model.norm2.bias = model.norm1.bias
    readers = {"conv1": claim(["conv2"], ["norm1"]), "conv2": claim(["head"], ["norm2"])}
    for found in readers.values():
        found.norm_first = True
    rule_out(model, readers)
    for name, found in readers.items():
        assert found.norms == {}
        assert found.unsilenced == name.replace("conv", "norm")
        assert not found.norm_first
        assert not found.mixed
        assert len(found.consumers) == 1


@pytest.mark.parametrize(
    ("norm", "lost"),
    [
        (nn.GroupNorm(2, 4, affine=False), True),
        (nn.LayerNorm([4, 8, 8], elementwise_affine=False), True),
        (nn.GroupNorm(2, 4), False),
        (nn.GroupNorm(4, 4, affine=False), False),  # it makes 0 of 0 by itself
        (nn.BatchNorm2d(4, affine=False), False),
        (nn.InstanceNorm2d(4), False),
    ],
)
def test_rule_out_takes_back_norms_without_a_weight_to_silence_a_channel_by(norm, lost):
    readers = {"0": claim(["2"], ["1"])}
    rule_out(nn.Sequential(conv(3, 4), norm, conv(4, 2)), readers)
    assert readers["0"].unsilenced == ("1" if lost else "")
    assert bool(readers["0"].norms) != lost


def test_rule_out_names_consumers_that_share_their_weight():
    model = nn.ModuleDict({name: conv(4, 4) for name in "abcd"})
    model["c"].weight = model["b"].weight
    readers = {"a": claim(["b"]), "d": claim(["c", "a"]), "b": claim(["d"])}
    readers["d"].mixed = "said before"
    rule_out(model, readers)
    assert readers["a"].mixed == "'b' shares its weight with another layer"
    assert readers["d"].mixed == "said before"
    assert readers["b"].mixed == ""
    assert list(readers["a"].consumers) == ["b"]


def silent(shape, dim):
    """Random numbers, but for 0 in the channels SILENT."""
    return torch.randn(shape).index_fill_(dim, SILENT, 0)


def test_a_convolution_reads_silence_where_its_channels_are_0():
    layer = conv(4, 2)
    x = silent((2, 4, 5, 5), 1)
    assert reads_silence(layer, (x,), None, SILENT)
    assert reads_silence(layer, (x,), torch.ones(2, 2, 5, 5), SILENT)  # what it makes does not matter
    assert reads_silence(layer, (x[0],), None, SILENT)  # without a batch
    assert not reads_silence(layer, (x,), None, torch.tensor([0, 1]))
    x[1, 2, 4, 4] = 1e-30
    assert not reads_silence(layer, (x,), None, SILENT)


def test_a_linear_layer_reads_silence_in_its_last_dimension():
    assert reads_silence(nn.Linear(4, 2), (silent((2, 7, 4), 2),), None, SILENT)
    assert not reads_silence(nn.Linear(4, 2), (silent((2, 4, 4), 1),), None, SILENT)


def test_a_norm_must_make_silence_of_silence():
    norm, x, loud = nn.BatchNorm2d(4), silent((2, 4, 5, 5), 1), torch.randn(2, 4, 5, 5)
    assert reads_silence(norm, (x,), x, SILENT)
    assert reads_silence(norm, (x,), None, SILENT)  # before it has run
    assert not reads_silence(norm, (x,), loud, SILENT)
    assert not reads_silence(norm, (loud,), x, SILENT)


def test_a_layer_norm_may_have_its_channels_first_or_last():
    norm = nn.LayerNorm(4)
    for dim in (1, 3):
        x = silent((4, 4, 4, 4), dim)
        assert reads_silence(norm, (x,), x, SILENT)
    x, y = silent((4, 4, 4, 4), 1), silent((4, 4, 4, 4), 3)
    assert not reads_silence(norm, (x,), y, SILENT)  # not in one place before and another after
    x = silent((4, 4, 4, 4), 2)
    assert not reads_silence(norm, (x,), x, SILENT)


def test_what_cannot_be_seen_is_no_silence():
    zeros = torch.zeros(2, 2, 5, 5)
    assert not reads_silence(conv(4, 2), (), None, SILENT)  # called by keyword
    assert not reads_silence(conv(4, 2), (zeros,), None, SILENT)  # has no channel 2
    assert not reads_silence(nn.BatchNorm1d(4), (torch.zeros(4),), None, SILENT)
    assert not reads_silence(conv(4, 2), (torch.full((2, 4, 5, 5), torch.nan),), None, SILENT)
    assert reads_silence(conv(4, 2), (torch.zeros(0, 4, 5, 5),), None, SILENT)  # nothing is not loud
