import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from nets import Drawn, Residual, Scores, conv, head
from regrow.structure.read import read_structure

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def pairs(reads):
    return list(zip(reads.filters, reads.indices, strict=True))


def same(filters, start=0):
    return [(i, start + i) for i in range(filters)]


def test_a_chain(make_net):
    found = read_structure(make_net((3, 4)), X)
    assert list(found) == ["conv1", "conv2"]
    one, two = found["conv1"], found["conv2"]
    assert {name: pairs(reads) for name, reads in one.norms.items()} == {"norm1": same(3)}
    assert {name: pairs(reads) for name, reads in one.consumers.items()} == {"conv2": same(3)}
    assert {name: pairs(reads) for name, reads in two.consumers.items()} == {"head": same(4)}
    assert (one.mixed, one.norm_first, one.output, one.unsilenced) == ("", True, "", "")


def test_flatten_gives_a_filter_one_column_per_pixel():
    model = nn.Sequential(conv(3, 2), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(2 * 4, 3))
    reads = read_structure(model, X)["0"].consumers["4"]
    assert reads.of([0]) == [0, 1, 2, 3]
    assert reads.of([1]) == [4, 5, 6, 7]


def test_concatenation_shifts_the_indices_and_a_norm_behind_it_sees_both():
    model = Drawn(
        lambda s, x: s.head(s.c(F.relu(s.n(torch.cat([s.a(x), s.b(x)], 1))))),
        a=conv(3, 2), b=conv(3, 3), n=nn.BatchNorm2d(5), c=conv(5, 4), head=head(4),
    )  # fmt: skip
    found = read_structure(model, X)
    assert pairs(found["a"].norms["n"]) == pairs(found["a"].consumers["c"]) == same(2)
    assert pairs(found["b"].norms["n"]) == pairs(found["b"].consumers["c"]) == same(3, start=2)
    assert found["a"].mixed == found["b"].mixed == ""


def test_a_dense_block_has_every_later_layer_among_its_readers():
    model = Drawn(
        lambda s, x: s.head(torch.cat([(y := torch.cat([(z := s.a(x)), s.b(s.n1(z))], 1)), s.c(s.n2(y))], 1)),
        a=conv(3, 2), n1=nn.BatchNorm2d(2), b=conv(2, 3), n2=nn.BatchNorm2d(5), c=conv(5, 2), head=head(7),
    )  # fmt: skip
    found = read_structure(model, X)["a"]
    assert {name: pairs(reads) for name, reads in found.norms.items()} == {"n1": same(2), "n2": same(2)}
    assert set(found.consumers) == {"b", "c", "head.2"}
    assert not found.mixed
    assert not found.norm_first


def test_sums_are_mixed_and_a_norm_before_them_can_hide_a_channel():
    model = Drawn(
        lambda s, x: s.head((y := F.relu(s.n(s.a(x)))) + s.n2(s.b(y)) + s.c(y)),
        a=conv(3, 4), n=nn.BatchNorm2d(4), b=conv(4, 4), n2=nn.BatchNorm2d(4), c=conv(4, 4), head=head(4),
    )  # fmt: skip
    found = read_structure(model, X)
    for name, norms, norm_first in (("a", ["n"], True), ("b", ["n2"], True), ("c", [], False)):
        assert found[name].mixed == "it is added to other channels"
        assert list(found[name].norms) == norms
        assert found[name].norm_first == norm_first


def test_a_norm_without_weights_cannot_hide_a_channel():
    model = Drawn(
        lambda s, x: s.head(x.sum(1, keepdim=True) + s.n(s.a(x))),
        a=conv(3, 4), n=nn.BatchNorm2d(4, affine=False), head=head(4),
    )  # fmt: skip
    found = read_structure(model, X)["a"]
    assert list(found.norms) == ["n"]
    assert not found.norm_first
    assert not found.unsilenced


def test_what_makes_the_output_is_marked():
    found = read_structure(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 5), nn.AdaptiveAvgPool2d(1)), X)
    assert not found["0"].output
    assert found["2"].output
    assert found["2"].mixed == "it is part of the network's output"


def test_a_convolution_that_leads_nowhere():
    model = Drawn(lambda s, x: (s.a(x), s.head(s.b(x)))[1], a=conv(3, 4), b=conv(3, 4), head=head(4))
    found = read_structure(model, X)
    assert "no operation reads" in found["a"].output
    assert not found["b"].mixed


def test_order_is_that_of_execution_and_what_is_not_reached_is_not_listed():
    model = Drawn(
        lambda s, x: s.head(s.late(s.early(x))),
        late=conv(4, 4),
        unused=conv(4, 4),
        early=conv(3, 4),
        head=head(4),
    )
    assert list(read_structure(model, X)) == ["early", "late"]


def test_depthwise_and_grouped_consumers():
    model = nn.Sequential(
        conv(3, 4), conv(4, 4, groups=4), conv(4, 6, 1), conv(6, 4, groups=2), conv(4, 4), head(4)
    )
    found = read_structure(model, X)
    assert pairs(found["0"].consumers["1"]) == same(4)
    assert pairs(found["2"].consumers["3"]) == same(6)
    assert not found["0"].mixed
    assert not found["2"].mixed


def test_group_norm_ties_channels_together_unless_each_has_a_group():
    for norm, mixed, norm_first in (
        (nn.GroupNorm(2, 4), "'1' normalises several channels together", False),
        (nn.GroupNorm(4, 4), "", True),
    ):
        found = read_structure(nn.Sequential(conv(3, 4), norm, nn.ReLU(), conv(4, 4), head(4)), X)["0"]
        assert list(found.norms) == ["1"]
        assert (found.mixed, found.norm_first) == (mixed, norm_first)


def test_layer_norm_over_channels_first_and_last():
    class ChannelsFirst(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    first = nn.Sequential(conv(3, 4), ChannelsFirst(4), nn.ReLU(), conv(4, 4), head(4))
    last = Drawn(
        lambda s, x: s.head(s.n(s.a(x).flatten(2).transpose(1, 2))).mean(1),
        a=conv(3, 4), n=nn.LayerNorm(4), head=nn.Linear(4, 2),
    )  # fmt: skip
    for model, name, norm in ((first, "0", "1"), (last, "a", "n")):
        found = read_structure(model, X)[name]
        assert pairs(found.norms[norm]) == same(4)
        assert not found.unsilenced
        assert "normalises several channels together" in found.mixed


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(2, 4, affine=False), nn.LayerNorm([4, 8, 8], elementwise_affine=False)]
)
def test_norms_that_turn_zero_into_something_else_are_named(norm):
    found = read_structure(nn.Sequential(conv(3, 4), norm, nn.ReLU(), conv(4, 4), head(4)), X)["0"]
    assert not found.norms
    assert found.unsilenced == "1"


def test_a_norm_that_serves_two_convolutions_cannot_be_silenced_for_one():
    model = Drawn(
        lambda s, x: s.head(s.c(s.n(s.a(x))) * s.d(s.n(s.b(x)))),
        a=conv(3, 2), b=conv(3, 2), n=nn.BatchNorm2d(2), c=conv(2, 4), d=conv(2, 4), head=head(4),
    )  # fmt: skip
    found = read_structure(model, X)
    for name in ("a", "b"):
        assert found[name].unsilenced == "n"
        assert not found[name].norms
        assert found[name].mixed  # its bias reaches the consumers


def test_a_consumer_that_reads_two_convolutions_at_one_index_is_no_ones_own():
    model = Drawn(
        lambda s, x: s.head(s.a(x)) - s.head(s.b(x)), a=conv(3, 2), b=conv(3, 2), head=head(2)
    )  # two filters: silenced together, the same one may fall in both
    found = read_structure(model, X)
    assert found["a"].mixed == found["b"].mixed == "a silenced channel does not reach 'head.2' as 0"


def test_a_product_of_channels_is_hidden_by_either_factor():
    model = Drawn(lambda s, x: s.head(s.a(x) * s.b(x)), a=conv(3, 4), b=conv(3, 4), head=head(4))
    found = read_structure(model, X)
    assert found["a"].mixed == found["b"].mixed == ""


def test_tied_weights_are_no_ones_own():
    model = Drawn(
        lambda s, x: s.one(F.relu(s.b(s.a(x))).mean((2, 3))) + s.two(x.mean((2, 3))[:, [0, 1, 2, 0]]),
        a=conv(3, 4), b=conv(4, 4), one=nn.Linear(4, 2), two=nn.Linear(4, 2),
    )  # fmt: skip
    model.two.weight = model.one.weight
    found = read_structure(model, X)
    assert found["b"].mixed == "'one' shares its weight with another layer"
    assert not found["a"].mixed


def test_activations_that_turn_zero_into_something_else():
    found = read_structure(nn.Sequential(conv(3, 4), nn.Sigmoid(), conv(4, 4), nn.ReLU(), head(4)), X)
    assert found["0"].mixed == "a silenced channel does not reach '2' as 0"
    assert not found["2"].mixed


def test_unknown_arithmetic_across_channels_is_found_out():
    model = Drawn(
        lambda s, x: s.head(torch.cumsum(s.b(F.relu(s.a(x))), 1)), a=conv(3, 4), b=conv(4, 4), head=head(4)
    )
    found = read_structure(model, X)
    assert found["b"].mixed
    assert not found["a"].mixed


@pytest.mark.gives_up
def test_a_graph_that_loses_count_of_the_channels_says_nothing():
    def shuffled(x):
        return x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)

    model = Drawn(
        lambda s, x: s.head(F.adaptive_avg_pool2d(F.relu(shuffled(s.n(s.a(x)))), 2).flatten(1)),
        a=conv(3, 4), n=nn.BatchNorm2d(4), head=nn.Linear(16, 3),
    )  # fmt: skip
    found = read_structure(model, X)["a"]
    assert {name: pairs(reads) for name, reads in found.norms.items()} == {"n": same(4)}
    assert found.consumers == found.reached == {}
    assert found.mixed == found.blocked == "torch-pruning could not follow its channels"


def test_what_channels_reach_beyond_a_sum():
    model = Drawn(
        lambda s, x: s.head((y := F.relu(s.n(s.a(x)))) + s.n2(s.b(y))),
        a=conv(3, 4), n=nn.BatchNorm2d(4), b=conv(4, 4), n2=nn.BatchNorm2d(4), head=head(4),
    )  # fmt: skip
    found = read_structure(model, X)
    assert {name: pairs(reads) for name, reads in found["a"].reached.items()} == {
        "n": same(4), "b": same(4), "head.2": same(4),
    }  # fmt: skip
    assert {name: pairs(reads) for name, reads in found["b"].reached.items()} == {
        "n2": same(4), "head.2": same(4),
    }  # fmt: skip
    assert not found["a"].blocked


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda s, x: s.g(x).mean((2, 3)), "'g' normalises several channels together"),
        (lambda s, x: s.t(x.flatten(2).transpose(1, 2))[0].mean(1), "they are read by a LSTM"),
        (lambda _, x: x.mean((2, 3)), "it is part of the network's output"),
    ],
)
def test_what_keeps_channels_in_the_tensors_beyond_a_sum(end, reason):
    model = Drawn(
        lambda s, x: end(s, s.a(x) + s.b(x)),
        a=conv(3, 4), b=conv(3, 4), g=nn.GroupNorm(2, 4), t=nn.LSTM(4, 2, batch_first=True),
    )  # fmt: skip
    found = read_structure(model, X)
    assert found["a"].mixed == found["b"].mixed == "it is added to other channels"
    assert found["a"].blocked == found["b"].blocked == reason


@pytest.mark.parametrize(
    ("across", "reason"),
    [
        (nn.LocalResponseNorm(3), "'1', a LocalResponseNorm, computes each channel from several"),
        (Drawn(lambda _, x: F.normalize(x, dim=1)), "its channels change others that '2' reads"),
        (Drawn(lambda _, x: x / x.std()), "its channels change others that '2' reads"),
    ],
)
def test_a_channel_that_scales_its_neighbours_is_not_hidden_by_its_columns(across, reason):
    # Silenced it reaches its consumer as 0, and still it moves the others.
    found = read_structure(nn.Sequential(conv(3, 4), across, conv(4, 4), nn.ReLU(), head(4)), X)
    assert found["0"].mixed == found["0"].blocked == reason
    assert not found["2"].mixed


@pytest.mark.parametrize("normed", [nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
def test_columns_that_are_computed_cannot_hide_a_channel(normed):
    found = read_structure(nn.Sequential(conv(3, 4), nn.ReLU(), normed(conv(4, 4)), nn.ReLU(), head(4)), X)
    assert found["0"].mixed == "forward passes did not confirm which layers read it"


def test_a_scale_of_zero_hides_no_mistake():
    # As in ReZero, or a residual branch whose last layer starts at zero.
    model = Drawn(
        lambda s, x: s.head(s.last(torch.flip(s.a(x), [1])) * s.scale.weight[:, :, None, None]),
        a=conv(3, 4), last=conv(4, 4), scale=nn.Linear(4, 1, bias=False), head=head(4),
    )  # fmt: skip
    nn.init.zeros_(model.scale.weight)
    nn.init.zeros_(model.last.weight)
    assert read_structure(model, X)["a"].mixed


def test_a_frozen_norm_of_buffers_is_seen_before_its_statistics_are_loaded():
    model = nn.Sequential(conv(3, 8), torchvision.ops.FrozenBatchNorm2d(8), nn.ReLU(), conv(8, 4), head(4))
    assert read_structure(model, X)["0"].mixed == "a silenced channel does not reach '3' as 0"


def test_a_transposed_convolution_reads_and_is_read_like_any_other():
    model = nn.Sequential(
        conv(3, 4), nn.ReLU(), nn.ConvTranspose2d(4, 5, 2), nn.BatchNorm2d(5), conv(5, 4), head(4)
    )
    found = read_structure(model, X)
    assert list(found) == ["0", "2", "4"]
    assert {name: pairs(reads) for name, reads in found["0"].consumers.items()} == {"2": same(4)}
    assert {name: pairs(reads) for name, reads in found["2"].norms.items()} == {"3": same(5)}
    assert {name: pairs(reads) for name, reads in found["2"].consumers.items()} == {"4": same(5)}
    assert [readers.mixed or readers.blocked for readers in found.values()] == ["", "", ""]


def test_a_convolution_used_twice_reads_itself():
    model = Drawn(
        lambda s, x: s.head(F.relu(s.b(F.relu(s.b(F.relu(s.a(x))))))),
        a=conv(3, 4),
        b=conv(4, 4),
        head=head(4),
    )
    found = read_structure(model, X)
    assert set(found["b"].consumers) == {"b", "head.2"}
    assert found["a"].mixed  # a column of b reads a filter of a and one of b
    assert found["b"].mixed


def test_a_consumer_called_by_keyword_is_read_like_any_other():
    model = Drawn(lambda s, x: s.head(s.b(input=s.a(x))), a=conv(3, 4), b=conv(4, 4), head=head(4))
    found = read_structure(model, X)["a"]
    assert list(found.consumers) == ["b"]
    assert not found.mixed


def test_dictionaries_tuples_and_none_in_and_out():
    class ManyOutputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = conv(3, 4), conv(4, 4), head(4)

        def forward(self, x, flag=None, *, scale=1.0):
            y = self.head(self.b(self.a(x))) * scale
            return {"logits": y, "classes": y.argmax(1), "rest": (flag, [x])}

    for inputs in ((X, None), [X], {"x": X, "flag": None, "scale": 2.0}):
        found = read_structure(ManyOutputs(), inputs)
        assert list(found["a"].consumers) == ["b"]
        assert found["a"].mixed == found["b"].mixed == ""


@pytest.mark.parametrize("dim", [1, 3])
def test_other_dimensions(make_net, dim):
    found = read_structure(make_net((3, 4), dim=dim), torch.randn(1, 3, *[6] * dim))
    assert pairs(found["conv1"].norms["norm1"]) == pairs(found["conv1"].consumers["conv2"]) == same(3)
    assert found["conv1"].mixed == found["conv2"].mixed == ""


def test_nothing_of_the_model_is_touched(make_net):
    model = make_net().train()
    model.add_module("noise", Drawn(lambda _, x: F.dropout(x, 0.5, training=True)))
    model.norm2.eval()
    model.conv2.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    grads = [(p.requires_grad, p.grad) for p in model.parameters()]
    rng = torch.get_rng_state()
    x = X.clone()
    read_structure(model, x)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(x, X)
    assert [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == flags
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == grads
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_reading_twice_and_under_no_grad_says_the_same(make_net):
    model = make_net()
    first = read_structure(model, X)
    with torch.no_grad():
        assert read_structure(model, X) == first
    assert read_structure(torch.compile(model, backend="eager"), X) == first


def test_bad_inputs_say_what_to_pass(make_net):
    with pytest.raises(ValueError, match=r"fails on example_inputs.*x\[:1\]; a tuple for several arguments"):
        read_structure(make_net(), torch.randn(1, 4, 8, 8))
    with pytest.raises(ValueError, match="fails on example_inputs"):
        read_structure(make_net().bfloat16(), X)


def test_a_model_that_cannot_be_copied_says_why(make_net):
    model = make_net()
    model.kept = model(X)
    with pytest.raises(ValueError, match=r"cannot be copied.*before a forward pass"):
        read_structure(model, X)


# torchvision's nets, small pictures. How many convolutions have which reason to be mixed.
@pytest.mark.parametrize(
    ("name", "convolutions", "free", "summed"),
    [
        ("squeezenet1_1", 26, 25, 0),
        ("mobilenet_v2", 52, 37, 15),
        ("densenet121", 120, 120, 0),
        ("resnet18", 20, 8, 12),
    ],
)
def test_torchvision_nets(name, convolutions, free, summed):
    model = getattr(torchvision.models, name)(num_classes=10)
    found = read_structure(model, torch.randn(1, 3, 64, 64))
    assert len(found) == convolutions
    assert sum(not reads.mixed for reads in found.values()) == free
    assert sum(reads.mixed == "it is added to other channels" for reads in found.values()) == summed
    assert all(reads.norms for reads in found.values()) == (name != "squeezenet1_1")
    assert not any(reads.unsilenced for reads in found.values())


def test_the_squeezenet_classifier_is_the_output():
    found = read_structure(torchvision.models.squeezenet1_1(num_classes=10), torch.randn(1, 3, 64, 64))
    assert [name for name, reads in found.items() if reads.output] == ["classifier.1"]


@pytest.mark.gives_up
def test_where_the_tracer_fails_norms_are_still_found_and_nothing_is_claimed():
    # torch-pruning 1.6 raises on ShuffleNet's channel shuffle.
    found = read_structure(torchvision.models.shufflenet_v2_x0_5(), torch.randn(1, 3, 64, 64))
    assert len(found) == 56
    for reads in found.values():
        assert reads.mixed.startswith("torch-pruning could not trace the model")
        assert len(reads.norms) == 1
        assert not reads.consumers


def test_reading_inside_autocast_finds_the_same(make_net):
    net = make_net()
    x = X
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = read_structure(net, x)
    assert inside == read_structure(net, x)


@pytest.mark.gives_up
def test_a_norm_of_another_width_than_the_filters_cannot_be_silenced():
    class Shuffled(nn.Conv2d):
        def forward(self, x):
            return F.pixel_shuffle(super().forward(x), 2)

    net = nn.Sequential(nn.Conv2d(3, 8, 1), Shuffled(8, 16, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    found = read_structure(net, torch.randn(2, 3, 4, 4))
    assert found["1"].norms == {}
    assert found["1"].unsilenced == "2"


def test_what_a_depthwise_layer_hands_on_to_the_output_is_output():
    found = read_structure(Scores(), X)
    assert {name for name, readers in found.items() if readers.output} == {
        "score_a", "score_b", "up_b", "up",
    }  # fmt: skip
    # Several of them, a norm between them, and a depthwise layer whose channels are mixed again.
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 8, 2, groups=4),
    )  # fmt: skip
    found = read_structure(model, X)
    assert {name for name, readers in found.items() if readers.output} == {"3", "4", "6"}
    grouped = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 2, groups=2))
    assert {name for name, readers in read_structure(grouped, X).items() if readers.output} == {"1"}


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("kind", [nn.ConvTranspose2d, nn.Conv2d])
def test_what_bilinear_weights_hand_on_to_the_output_is_output(kind, fixed):
    # As in the first FCN: every class has weights for all others, and they are 0.
    model = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 3), kind(3, 3, 4, 2, 1, bias=False))
    with torch.no_grad():
        model[3].weight.zero_()
        model[3].weight[range(3), [2, 0, 1]] = 0.25
    model[3].requires_grad_(not fixed)
    found = read_structure(model, X)
    assert {name for name, readers in found.items() if readers.output} == {"2", "3"}
    with torch.no_grad():
        model[3].weight[0, 0] = 1e-3  # a filter that mixes two of them
    assert not read_structure(model, X)["2"].output
    with torch.no_grad():
        model[3].weight.zero_()  # as many heads begin
    assert not read_structure(model, X)["2"].output


def block(net, x):
    return net.norm_b(net.b(F.relu(net.norm_a(net.a(x)))))


class Hidden(torch.autograd.Function):
    """Runs a block as one operation of autograd's."""

    @staticmethod
    def forward(_, x, net):
        return block(net, x)

    @staticmethod
    def backward(_, gradient):
        return gradient, None


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_part_is_read_as_any_other(reentrant):
    class Checkpointed(Residual):
        def forward(self, x):
            x = F.relu(self.norm(self.stem(x)))
            part = checkpoint(lambda x: block(self, x), x, use_reentrant=reentrant)
            return self.head(F.relu(x + part))

    before = dict(vars(CheckpointFunction))
    found = read_structure(Checkpointed(4, 6), X)
    assert found == read_structure(Residual(4, 6), X)
    assert dict(vars(CheckpointFunction)) == before


def test_norms_within_an_operation_of_the_users_are_found():
    class Hides(Residual):
        def forward(self, x):
            x = F.relu(self.norm(self.stem(x)))
            return self.head(F.relu(x + Hidden.apply(x, self)))

    found = read_structure(Hides(4, 6), X)
    for name, filters in (("a", 6), ("b", 4)):
        norms = {norm: pairs(reads) for norm, reads in found[name].norms.items()}
        assert norms == {f"norm_{name}": same(filters)}
        assert found[name].consumers == {}
        assert found[name].mixed == found[name].blocked == "its output does not reach the network's"
