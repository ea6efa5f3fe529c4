import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from nets import Drawn, Standardised, conv, head, keep_but
from regrow.structure.read import propose_structure, read_structure
from regrow.structure.readers import Reads
from regrow.surgery.cut import cut
from regrow.surgery.layers import apply_plan
from regrow.surgery.planning import CutPlan, plan_cut
from regrow.surgery.removal import remove_filters
from regrow.surgery.verify import Probe

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def planned(model, **dropped):
    """The plan without the filters ``dropped``, after a look at whether it computes what masks do."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 0.2, 0.5)
    modules = dict(model.named_modules())
    keep = {name: keep_but(modules[name].out_channels, *gone) for name, gone in dropped.items()}
    plan = plan_cut(model, keep, X[:1])
    masked, small = copy.deepcopy(model), copy.deepcopy(model)
    remove_filters(masked, keep, example_inputs=X[:1])
    apply_plan(small, plan)
    for training in (False, True):
        expected = masked.train(training)(X)
        torch.testing.assert_close(small.train(training)(X), expected, rtol=1e-4, atol=1e-5)
    return plan


def test_a_chain_loses_rows_norm_channels_and_columns(make_net):
    plan = planned(make_net((3, 4)), conv1=[1])
    assert plan == CutPlan(rows={"conv1": [0, 2]}, channels={"norm1": [0, 2]}, columns={"conv2": [0, 2]})


def test_a_flattened_channel_takes_its_columns_along():
    model = nn.Sequential(conv(3, 3), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(3 * 4, 3))
    plan = planned(model, **{"0": [1]})
    assert plan == CutPlan(rows={"0": [0, 2]}, columns={"4": [0, 1, 2, 3, 8, 9, 10, 11]})


def test_columns_behind_a_concatenation_are_shifted_and_its_norm_shrinks():
    model = Drawn(
        lambda s, x: s.head(s.c(F.relu(s.n(torch.cat([s.a(x), s.b(x)], 1))))),
        a=conv(3, 2), b=conv(3, 3), n=nn.BatchNorm2d(5), c=conv(5, 4), head=head(4),
    )  # fmt: skip
    assert planned(model, a=[0], b=[2]) == CutPlan(
        rows={"a": [1], "b": [0, 1]}, channels={"n": [1, 2, 3]}, columns={"c": [1, 2, 3]}
    )


def test_a_depthwise_row_goes_with_the_channel_it_reads():
    model = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4, groups=4), nn.BatchNorm2d(4), conv(4, 4), head(4))
    assert planned(model, **{"0": [1, 2]}) == CutPlan(
        rows={"0": [0, 3], "2": [0, 3]}, groups={"2": 2}, channels={"3": [0, 3]}, columns={"4": [0, 3]}
    )


def test_without_followers_a_depthwise_row_goes_on():
    model = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4, groups=4), nn.BatchNorm2d(4), conv(4, 4), head(4))
    plan = plan_cut(model, {"0": keep_but(4, 1, 2)}, X[:1], followers=False)
    assert plan == CutPlan(rows={"0": [0, 3]}, placed={"0": (4, [0, 3])})


def test_a_whole_group_goes_and_half_a_group_does_not():
    model = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 4, groups=2), nn.ReLU(), conv(4, 4), head(4))
    assert planned(model, **{"0": [0, 1, 2]}) == CutPlan(
        rows={"0": [3, 4, 5], "2": [2, 3]}, groups={"2": 1}, columns={"4": [2, 3]}
    )
    assert planned(model, **{"0": [0, 1, 3]}) == CutPlan(rows={"0": [2, 4, 5]}, placed={"0": (6, [2, 4, 5])})


def test_filters_of_a_grouped_convolution_go_where_its_groups_stay_even():
    model = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 6, groups=2), nn.ReLU(), conv(6, 4), head(4))
    even = planned(model, **{"2": [0, 4]})
    assert even == CutPlan(rows={"2": [1, 2, 3, 5]}, columns={"4": [1, 2, 3, 5]})
    uneven = planned(model, **{"2": [0]})
    assert uneven.spread == {"2": [1, 2, 3, 4, 5]}
    assert uneven.masked == {"2": "its groups lose different numbers of filters"}
    whole_group = planned(model, **{"2": [0, 1, 2]})  # what only they read is computed no more
    assert whole_group == CutPlan(
        rows={"0": [2, 3], "2": [3, 4, 5]}, groups={"2": 1}, columns={"4": [3, 4, 5]}
    )


class TwoBlocks(nn.Module):
    """stem → + block → + block → head, with a norm before each sum."""

    def __init__(self, filters=4):
        super().__init__()
        self.stem, self.norm = conv(3, filters, bias=False), nn.BatchNorm2d(filters)
        self.a1, self.b1, self.n1 = conv(filters, 3), conv(3, filters), nn.BatchNorm2d(filters)
        self.a2, self.b2, self.n2 = conv(filters, 3), conv(3, filters), nn.BatchNorm2d(filters)
        self.head = head(filters)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.n1(self.b1(F.relu(self.a1(x)))))
        x = F.relu(x + self.n2(self.b2(F.relu(self.a2(x)))))
        return self.head(x)


def test_a_filter_that_others_are_added_to_is_placed_behind_its_norm():
    assert planned(TwoBlocks(), b1=[1]) == CutPlan(
        rows={"b1": [0, 2, 3]}, channels={"n1": [0, 2, 3]}, placed={"n1": (4, [0, 2, 3])}
    )


def test_a_channel_that_all_writers_dropped_leaves_the_stream():
    assert planned(TwoBlocks(), stem=[1, 2], b1=[1], b2=[1, 3]) == CutPlan(
        rows={"stem": [0, 3], "b1": [0, 2, 3], "b2": [0, 2]},
        channels={"norm": [0, 3], "n1": [0, 2, 3], "n2": [0, 2]},
        # Three channels are left of the stream, and each writer puts its own at their places there.
        placed={"norm": (3, [0, 2]), "n2": (3, [0, 1])},
        # The first block reads the stream before the other writers have filled channel 2.
        columns={"a1": [0, 3], "a2": [0, 2, 3], "head.2": [0, 2, 3]},
        picked={"a1": [0, 2]},
    )


def test_a_stream_cut_jointly_needs_no_placing():
    gone = [0, 3]
    plan = planned(TwoBlocks(), stem=gone, b1=gone, b2=gone)
    assert plan.placed == plan.picked == {}
    assert plan.rows == {"stem": [1, 2], "b1": [1, 2], "b2": [1, 2]}
    assert plan.columns == {"a1": [1, 2], "a2": [1, 2], "head.2": [1, 2]}


class Gated(nn.Module):
    """expand → depthwise → squeeze and excitation → project."""

    def __init__(self):
        super().__init__()
        self.expand, self.n1 = conv(3, 6, 1), nn.BatchNorm2d(6)
        self.depth, self.n2 = conv(6, 6, groups=6), nn.BatchNorm2d(6)
        self.squeeze, self.excite = conv(6, 3, 1), conv(3, 6, 1)
        self.project, self.head = conv(6, 4, 1), head(4)

    def forward(self, x):
        x = F.silu(self.n2(self.depth(F.silu(self.n1(self.expand(x))))))
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return self.head(self.project(x * torch.sigmoid(gate)))


def test_squeeze_and_excitation_shrinks_with_what_it_gates():
    plan = planned(Gated(), expand=[1, 4])
    stay = [0, 2, 3, 5]
    assert plan == CutPlan(
        rows={"expand": stay, "depth": stay, "excite": stay},
        columns={"squeeze": stay, "project": stay},
        channels={"n1": stay, "n2": stay},
        groups={"depth": 4},
    )


def test_a_gate_without_a_filter_goes_on_gating_by_a_half():
    plan = planned(Gated(), expand=[1], excite=[0, 1])
    assert plan.rows["excite"] == [2, 3, 4, 5]
    assert plan.placed == {"excite": (5, [1, 2, 3, 4])}  # among the five channels left


def test_norms_that_mix_channels_go_on_at_full_width_among_zeros():
    model = nn.Sequential(conv(3, 4), nn.GroupNorm(2, 4), nn.ReLU(), conv(4, 4), head(4))
    assert planned(model, **{"0": [1]}) == CutPlan(
        rows={"0": [0, 2, 3]},
        placed={"0": (4, [0, 2, 3])},
        spread={"1": [0, 2, 3]},
        columns={"3": [0, 2, 3]},
        picked={"3": [0, 2, 3]},
    )


def test_a_norm_of_one_group_per_channel_shrinks():
    model = nn.Sequential(conv(3, 4), nn.GroupNorm(4, 4), nn.ReLU(), conv(4, 4), head(4))
    assert planned(model, **{"0": [1]}) == CutPlan(
        rows={"0": [0, 2, 3]}, channels={"1": [0, 2, 3]}, columns={"3": [0, 2, 3]}
    )


def shuffled(x):
    return x.view(len(x), 2, 3, *x.shape[2:]).transpose(1, 2).flatten(1, 2)


def softmaxed(x):
    return x.softmax(1)


@pytest.mark.parametrize("between", [shuffled, lambda x: x.cumsum(1), lambda x: x.roll(1, 1), softmaxed])
def test_unknown_arithmetic_across_channels_gets_its_full_width(between):
    model = Drawn(
        lambda s, x: s.head(s.b(between(F.relu(s.n(s.a(x)))))),
        a=conv(3, 6), n=nn.BatchNorm2d(6), b=conv(6, 4), head=head(4),
    )  # fmt: skip
    plan = planned(model, a=[1, 2])
    assert plan.rows == {"a": [0, 3, 4, 5]}
    assert plan.placed == {"n": (6, [0, 3, 4, 5])}


class Split(nn.Module):
    """Blocks that split their channels into parts of a fixed size: expand → split → cat → project."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"expand": conv(3, 6), "a": conv(2, 2), "b": conv(4, 4), "project": conv(6, 3)})
            for _ in range(blocks)
        )
        self.head = head(3)

    def forward(self, x):
        for block in self.blocks:
            a, b = torch.split(F.relu(block["expand"](x)), [2, 4], 1)
            x = block["project"](F.relu(torch.cat([block["a"](a), block["b"](b)], 1)))
        return self.head(x)


@pytest.mark.gives_up
def test_splits_of_a_fixed_size_get_it_and_all_else_shrinks():
    blocks = 4
    gone = {}
    for i in range(blocks):
        gone |= {f"blocks.{i}.expand": [1, 3], f"blocks.{i}.b": [0], f"blocks.{i}.project": [2]}
    plan = planned(Split(blocks), **gone)
    assert plan.placed == {f"blocks.{i}.expand": (6, [0, 2, 4, 5]) for i in range(blocks)}
    assert len(plan.rows) == 3 * blocks
    for i in range(blocks):
        assert plan.rows[f"blocks.{i}.expand"] == [0, 2, 4, 5]
        assert plan.rows[f"blocks.{i}.b"] == [1, 2, 3]
        assert plan.rows[f"blocks.{i}.project"] == [0, 1]
        assert plan.columns[f"blocks.{i}.project"] == [0, 1, 3, 4, 5]
    assert plan.columns["blocks.1.expand"] == plan.columns["head.2"] == [0, 1]


def test_an_activation_that_turns_zero_into_something_else_gets_its_full_width():
    model = nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), nn.Sigmoid(), conv(3, 4), head(4))
    assert planned(model, **{"0": [2]}) == CutPlan(
        rows={"0": [0, 1]}, channels={"1": [0, 1]}, placed={"1": (3, [0, 1])}
    )


def test_a_norm_behind_a_sum_loses_a_channel_that_nothing_writes_to():
    model = Drawn(
        lambda s, x: s.head(F.relu(s.n(s.a(x) + s.b(x)))),
        a=conv(3, 4), b=conv(3, 4), n=nn.BatchNorm2d(4), head=head(4),
    )  # fmt: skip
    three = [0, 2, 3]
    assert planned(model, a=[1], b=[1]) == CutPlan(
        rows={"a": three, "b": three}, channels={"n": three}, columns={"head.2": three}
    )
    one = planned(model, a=[1], b=[2])  # each channel has a writer still
    assert one == CutPlan(rows={"a": three, "b": [0, 1, 3]}, placed={"a": (4, three), "b": (4, [0, 1, 3])})


def test_a_parametric_activation_shrinks():
    model = nn.Sequential(conv(3, 3), nn.PReLU(3), conv(3, 3), nn.PReLU(), head(3))
    assert planned(model, **{"0": [1], "2": [0]}) == CutPlan(
        rows={"0": [0, 2], "2": [1, 2]}, channels={"1": [0, 2]}, columns={"2": [0, 2], "4.2": [1, 2]}
    )


def test_a_convolution_used_twice_stays_right():
    model = Drawn(
        lambda s, x: s.head(F.relu(s.b(F.relu(s.b(F.relu(s.a(x))))))),
        a=conv(3, 4),
        b=conv(4, 4),
        head=head(4),
    )
    plan = planned(model, a=[1], b=[1, 2])
    assert plan.rows == {"a": [0, 2, 3], "b": [0, 3]}
    plan = planned(model, a=[1], b=[1])
    assert plan == CutPlan(
        rows={"a": [0, 2, 3], "b": [0, 2, 3]}, columns={"b": [0, 2, 3], "head.2": [0, 2, 3]}
    )


@pytest.mark.parametrize("normed", [parametrizations.weight_norm, nn.utils.spectral_norm])
def test_a_reader_whose_weight_is_computed_keeps_its_columns(normed):
    model = nn.Sequential(conv(3, 4), nn.ReLU(), normed(conv(4, 4)), nn.ReLU(), head(4))
    assert planned(model, **{"0": [1]}) == CutPlan(rows={"0": [0, 2, 3]}, placed={"0": (4, [0, 2, 3])})


def test_readers_that_share_a_weight_keep_their_columns():
    model = Drawn(
        lambda s, x: s.one(F.relu(s.a(x)).mean((2, 3))) + s.two(x.mean((2, 3))[:, [0, 1, 2, 0]]),
        a=conv(3, 4), one=nn.Linear(4, 2), two=nn.Linear(4, 2),
    )  # fmt: skip
    model.two.weight = model.one.weight
    assert planned(model, a=[1]) == CutPlan(rows={"a": [0, 2, 3]}, placed={"a": (4, [0, 2, 3])})


def test_a_convolution_of_another_kind_is_tried_row_by_row_and_column_by_column():
    other = Standardised(4, 3, 3, padding=1)
    model = nn.Sequential(conv(3, 4), nn.ReLU(), other, nn.ReLU(), conv(3, 2), head(2))
    assert planned(model, **{"0": [1], "2": [0]}) == CutPlan(
        rows={"0": [0, 2, 3], "2": [1, 2]}, placed={"0": (4, [0, 2, 3])}, columns={"4": [1, 2]}
    )


class AcrossFilters(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight / (1 + self.weight.std()), self.bias, padding=1)


def test_a_convolution_whose_filters_depend_on_each_other_is_masked_and_named():
    model = nn.Sequential(conv(3, 4), nn.ReLU(), AcrossFilters(4, 3, 3), nn.ReLU(), conv(3, 2), head(2))
    plan = planned(model, **{"2": [0]})
    assert plan.spread == {"2": [1, 2]}
    assert plan.masked == {"2": "computing its kept filters alone was not confirmed"}


def test_a_branch_that_only_training_takes_is_confirmed_too():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.aux, self.head = conv(3, 4), conv(4, 4), conv(4, 4), head(4)

        def forward(self, x):
            x = F.relu(self.a(x))
            out = self.head(self.b(x))
            return out + self.aux(x).mean((2, 3)) if self.training else out

    assert planned(Auxiliary(), a=[1]) == CutPlan(
        rows={"a": [0, 2, 3]}, placed={"a": (4, [0, 2, 3])},
        columns={"b": [0, 2, 3]}, picked={"b": [0, 2, 3]},
    )  # fmt: skip


@pytest.mark.gives_up
def test_a_graph_that_breaks_leaves_a_plan_that_is_right():
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=4)
    x = torch.randn(1, 3, 32, 32)
    assert "could not trace" in next(iter(read_structure(model, x).values())).mixed
    gone = {"stage2.0.branch2.0": [0, 5], "conv1.0": [3], "stage2.1.branch2.5": [1]}
    modules = dict(model.named_modules())
    keep = {name: keep_but(modules[name].out_channels, *rows) for name, rows in gone.items()}
    plan = plan_cut(model, keep, x)
    assert {name: modules[name].out_channels - len(rows) for name, rows in plan.rows.items()} == {
        name: len(rows) for name, rows in gone.items()
    }
    assert not plan.masked
    # Only conv1 writes what the pooling hands on to both branches.
    assert len(plan.columns["stage2.0.branch2.0"]) == 23


@pytest.mark.gives_up
def test_half_of_resnet18_is_not_private_and_all_of_it_is_cut():
    model = torchvision.models.resnet18(num_classes=4)
    modules = dict(model.named_modules())
    keep = {
        name: torch.arange(module.out_channels) % 3 > 0
        for name, module in modules.items()
        if isinstance(module, nn.Conv2d)
    }
    plan = plan_cut(model, keep, torch.randn(1, 3, 32, 32))
    assert len(plan.rows) == 20
    assert not plan.masked
    assert plan.placed == {}  # all writers of a stream drop the same


def test_nothing_to_drop_is_an_empty_plan(make_net):
    assert plan_cut(make_net(), {"conv1": keep_but(6)}, X) == CutPlan()
    assert plan_cut(make_net(), {}, None) == CutPlan()


def test_planning_touches_nothing(make_net):
    model = make_net().train()
    before = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    plan_cut(model, {"conv1": keep_but(6, 1)}, X[:1])
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("zeros", [(), (1,), (0, 1, 2)])
def test_the_plan_does_not_depend_on_what_the_parameters_and_the_pictures_are(make_net, zeros):
    model = make_net((3, 4))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    x = X[:1].clone()
    x[:, list(zeros)] = 0
    plan = plan_cut(model, {"conv1": keep_but(3, 1)}, x)
    assert plan == CutPlan(rows={"conv1": [0, 2]}, channels={"norm1": [0, 2]}, columns={"conv2": [0, 2]})


def test_a_structure_that_is_known_is_not_read_again(make_net):
    model = make_net((3, 4))
    readers = read_structure(model, X[:1])
    keep = {"conv1": keep_but(3, 1)}
    assert plan_cut(model, keep, X[:1], readers=readers) == plan_cut(model, keep, X[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(make_net, dtype):
    plan = plan_cut(make_net((3, 4)).to(dtype), {"conv1": keep_but(3, 1)}, X[:1].to(dtype))
    assert plan.columns == {"conv2": [0, 2]}


def test_a_dtype_written_into_the_code_is_respected(make_net):
    model = Drawn(lambda s, x: s.net(x.float()), net=make_net((3, 4)))
    assert plan_cut(model, {"net.conv1": keep_but(3, 1)}, X[:1].double()).columns == {"net.conv2": [0, 2]}


def test_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = conv(3, 4), conv(3, 4), head(8)

        def forward(self, left, right, *, scale):
            both = torch.cat([self.a(left), self.b(right)], 1)
            return {"logits": self.head(both) * scale, "rest": [left]}

    model = Two()
    plan = plan_cut(model, {"a": keep_but(4, 1)}, {"left": X[:1], "right": X[:1], "scale": 2.0})
    assert plan == CutPlan(rows={"a": [0, 2, 3]}, columns={"head.2": [0, 2, 3, 4, 5, 6, 7]})


class Fickle(nn.Module):
    """Which convolution runs depends on the picture."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 4), conv(4, 4), conv(4, 4), head(4)
        self.judge = conv(3, 2)

    def forward(self, x):
        y = self.a(x)
        return self.head(self.b(y) if self.judge(x).mean() > 0 else self.c(y))


def test_a_forward_pass_that_depends_on_data_is_refused():
    with pytest.raises(ValueError, match=r"which layers run depends on the data .*'b', 'c'"):
        plan_cut(Fickle(), {"a": keep_but(4, 1)}, X[:1])


def test_a_model_that_remembers_its_calls_is_refused():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head, self.calls = conv(3, 4), head(4), 0

        def forward(self, x):
            self.calls += 1
            return self.head(F.relu(self.a(x))) * self.calls

    model = Counting()
    with pytest.raises(ValueError, match="does not compute the same twice"):
        plan_cut(model, {"a": keep_but(4, 1)}, X[:1])
    assert model.calls == 0


def test_a_layer_of_which_nothing_would_be_left_is_refused():
    model = nn.Sequential(conv(3, 2), nn.ReLU(), conv(2, 2, groups=2), nn.ReLU(), conv(2, 4), head(4))
    with pytest.raises(ValueError, match="no filter of '2' would be left"):
        plan_cut(model, {"0": keep_but(2, 0), "2": keep_but(2, 1)}, X[:1])


# --- what the graph proposes is not taken for granted ------------------------------------------------------


def test_a_proposal_about_a_norm_that_is_wrong_is_found_out(monkeypatch):
    model = Drawn(
        lambda s, x: s.head(F.relu(s.n(torch.cat([s.a(x), s.b(x)], 1)))),
        a=conv(3, 2), b=conv(3, 3), n=nn.BatchNorm2d(5), head=head(5),
    )  # fmt: skip

    def lying(*args):
        proposal = propose_structure(*args)
        proposal.readers["a"].norms["n"] = Reads([0, 1], [2, 3])  # b's channels
        return proposal

    keep = {"a": keep_but(2, 0)}
    assert plan_cut(model, keep, X[:1]).channels == {"n": [1, 2, 3, 4]}
    monkeypatch.setattr("regrow.surgery.planning.propose_structure", lying)
    with pytest.raises(ValueError, match="'n' behind it cannot be silenced"):
        plan_cut(model, keep, X[:1])


def test_a_row_behind_an_activation_that_makes_something_of_zero_stays():
    layers = conv(3, 4), nn.Sigmoid(), conv(4, 4, groups=4), nn.ReLU(), head(4)
    plan = planned(nn.Sequential(*layers), **{"0": [1]})
    assert "2" not in plan.rows
    layers = conv(3, 4), nn.ReLU(), conv(4, 4, groups=4), nn.ReLU(), head(4)
    assert planned(nn.Sequential(*layers), **{"0": [1]}).rows == {"0": [0, 2, 3], "2": [0, 2, 3]}


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(4), nn.BatchNorm2d(4, affine=False)])
def test_a_norm_without_weights_on_the_way(norm):
    planned(nn.Sequential(conv(3, 4), norm, nn.ReLU(), conv(4, 5), nn.ReLU(), head(5)), **{"0": [1]})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_filters_that_hold_no_numbers_can_be_dropped(value):
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), head(4))
    with torch.no_grad():
        model[0].weight[1] = value
    keep = {"0": keep_but(4, 1)}
    small = copy.deepcopy(model)
    apply_plan(small, plan_cut(model, keep, X[:1]))
    remove_filters(model, keep, example_inputs=X[:1])
    assert torch.isfinite(model.eval()(X)).all()
    torch.testing.assert_close(small.eval()(X), model(X), rtol=1e-4, atol=1e-5)


def test_weights_that_are_read_without_calling_their_layer():
    def both(net, x):
        return net.head(net.a(x).relu() + F.conv2d(x, net.a.weight, padding=1).relu())

    assert planned(Drawn(both, a=conv(3, 4), head=head(4)), a=[1])

    def penalty(net, x):
        return net.head(net.b(net.a(x).relu()).relu()), net.a.weight.square().sum()

    model = Drawn(penalty, a=conv(3, 4), b=conv(4, 5), head=head(5))
    assert plan_cut(model, {"a": keep_but(4, 1)}, X[:1]).rows == {"a": [0, 2, 3]}


def test_what_float32_refutes_is_looked_at_in_float64(monkeypatch, make_net):
    model, keep = make_net((3, 4)), {"conv1": keep_but(3, 1)}
    expected, refutes, asked = plan_cut(model, keep, X[:1]), Probe.refutes, []

    def strict(probe, *args, **named):
        asked.append(next(probe._model.parameters()).dtype)
        return [] if asked[-1] == torch.float32 else refutes(probe, *args, **named)

    monkeypatch.setattr(Probe, "refutes", strict)
    assert plan_cut(model, keep, X[:1]) == expected
    assert asked == [torch.float32, torch.float64]
    small = copy.deepcopy(model)
    cut(small, keep, example_inputs=X[:1])
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float32}
    apply_plan(model, expected)
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small"])
def test_float32_is_enough_for_common_nets(name, monkeypatch):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=4)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    keep = {
        name: torch.arange(layer.out_channels) % 3 > 0 for name, layer in layers.items() if layer.groups == 1
    }
    monkeypatch.setattr("regrow.surgery.planning._Search.plan", None)  # what comes after a refutation
    assert plan_cut(model, keep, torch.randn(1, 3, 64, 64)).rows


def test_nothing_known_of_any_reader_leaves_a_plan_that_is_right(monkeypatch):
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), head(4))

    def blind(*args):
        proposal = propose_structure(*args)
        for found in proposal.readers.values():
            found.consumers, found.reached, found.blocked = {}, {}, "torch-pruning could not trace the model"
        return proposal

    monkeypatch.setattr("regrow.surgery.planning.propose_structure", blind)
    monkeypatch.setattr(Probe, "_find_dead", lambda *_: ({}, []))
    plan = plan_cut(model, {"0": keep_but(4, 1)}, X[:1])
    alive = [0, 2, 3]
    assert plan == CutPlan(rows={"0": alive}, channels={"1": alive}, placed={"1": (4, alive)})
