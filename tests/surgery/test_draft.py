import copy
from itertools import product

import pytest
import torch
from torch import nn

from nets import Drawn, Residual, Standardised, chain, conv, head, keep_but, unsettled
from regrow.surgery.draft import MASKED, OUT, PLACED, PLACED_BEHIND_NORM, Drafting
from regrow.surgery.layers import apply_plan
from regrow.surgery.plan import CutPlan
from regrow.surgery.removal import plan_removal
from regrow.surgery.verify import Probe

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LEVELS = (MASKED, PLACED, PLACED_BEHIND_NORM, OUT)
NOT_CONFIRMED = "computing its kept filters alone was not confirmed"


def drafting_of(model, keep, **removal):
    removal = plan_removal(model, keep, X, **removal)
    return Drafting(model, removal, Probe(model, removal, X, quick=True))


def plan_of(model, keep, levels):
    """The plan where every convolution is at one level, or each at its own."""
    drafting = drafting_of(model, keep)
    if isinstance(levels, int):
        levels = dict.fromkeys(drafting.convolutions, levels)
    return drafting.draft(levels).plan


def net():
    torch.manual_seed(0)
    return unsettled(chain((3, 4)))


KEEP = {"conv1": keep_but(3, 1)}
# What conv2 reads is the same at each level: channel 1 is 0, and it picks the others of a wide tensor.
READS = {"columns": {"conv2": [0, 2]}, "picked": {"conv2": [0, 2]}}


@pytest.mark.parametrize(
    ("level", "plan"),
    [
        # The convolution computes all; of its rows, and of the norm's weights, two are left.
        (
            MASKED,
            CutPlan(**READS, spread={"conv1": [0, 2], "norm1": [0, 2]}, masked={"conv1": NOT_CONFIRMED}),
        ),
        # The convolution computes two, and puts them where they were.
        (
            PLACED,
            CutPlan(**READS, rows={"conv1": [0, 2]}, placed={"conv1": (3, [0, 2])}, spread={"norm1": [0, 2]}),
        ),
        # The norm does so: it computes two as well.
        (
            PLACED_BEHIND_NORM,
            CutPlan(
                **READS, rows={"conv1": [0, 2]}, channels={"norm1": [0, 2]}, placed={"norm1": (3, [0, 2])}
            ),
        ),
        # The tensors are narrow, and nobody picks or places.
        (
            OUT,
            CutPlan(rows={"conv1": [0, 2]}, channels={"norm1": [0, 2]}, columns={"conv2": [0, 2]}),
        ),
    ],
)
def test_the_plan_at_each_level(level, plan):
    assert plan_of(net(), KEEP, level) == plan


def test_which_channels_each_level_leaves_in_the_tensors():
    drafting = drafting_of(net(), KEEP)
    for level in LEVELS:
        present = drafting.draft(dict.fromkeys(drafting.convolutions, level)).present
        expected = [True, level != OUT, True]
        assert present["norm1"].tolist() == present["conv2"].tolist() == expected
        assert present["norm2"].all()
        assert present["head"].all()
        assert present["conv1"].tolist() == [True] * 3  # nobody writes to the picture


def test_two_convolutions_at_levels_of_their_own():
    keep = {"conv1": keep_but(3, 1), "conv2": keep_but(4, 0)}
    assert plan_of(net(), keep, {"conv1": OUT, "conv2": PLACED}) == CutPlan(
        rows={"conv1": [0, 2], "conv2": [1, 2, 3]},
        columns={"conv2": [0, 2], "head": [1, 2, 3]},
        channels={"norm1": [0, 2]},
        placed={"conv2": (4, [1, 2, 3])},
        picked={"head": [1, 2, 3]},
        spread={"norm2": [1, 2, 3]},
    )


def test_without_a_norm_the_convolution_places_its_output_itself():
    model = nn.Sequential(conv(3, 3), nn.ReLU(), conv(3, 2), head(2))
    keep = {"0": keep_but(3, 0)}
    reads = {"columns": {"2": [1, 2]}, "picked": {"2": [1, 2]}}
    placed = CutPlan(**reads, rows={"0": [1, 2]}, placed={"0": (3, [1, 2])})
    assert plan_of(model, keep, PLACED) == plan_of(model, keep, PLACED_BEHIND_NORM) == placed
    assert plan_of(model, keep, OUT) == CutPlan(rows={"0": [1, 2]}, columns={"2": [1, 2]})
    assert plan_of(model, keep, MASKED) == CutPlan(**reads, spread={"0": [1, 2]}, masked={"0": NOT_CONFIRMED})


def test_a_prelu_on_the_way_loses_its_channels_with_the_tensors():
    model = nn.Sequential(conv(3, 3), nn.PReLU(3), conv(3, 2), head(2))
    keep = {"0": keep_but(3, 0)}
    assert plan_of(model, keep, OUT) == CutPlan(
        rows={"0": [1, 2]}, channels={"1": [1, 2]}, columns={"2": [1, 2]}
    )
    assert plan_of(model, keep, PLACED).channels == {}


def test_wanting_everything_nobody_picks():
    drafting = drafting_of(net(), KEEP)
    drafting.want_everything()
    at = {level: drafting.draft(dict.fromkeys(drafting.convolutions, level)).plan for level in LEVELS}
    spread = {"norm1": [0, 2]}
    assert at[MASKED] == CutPlan(spread={"conv1": [0, 2], **spread}, masked={"conv1": NOT_CONFIRMED})
    assert at[PLACED] == CutPlan(rows={"conv1": [0, 2]}, placed={"conv1": (3, [0, 2])}, spread=spread)
    # Somebody wants each channel, so none leaves: at best the norm places it.
    assert at[OUT] == at[PLACED_BEHIND_NORM]
    assert at[OUT] == CutPlan(
        rows={"conv1": [0, 2]}, channels={"norm1": [0, 2]}, placed={"norm1": (3, [0, 2])}
    )


def residual():
    torch.manual_seed(0)
    return unsettled(Residual(3, 2))


def test_a_channel_of_a_residual_stream_leaves_if_all_who_write_to_it_let_it_go():
    # Both lose filter 1, so the head needs two channels; and a, which reads the stem alone, too.
    keep = {"stem": keep_but(3, 1), "b": keep_but(3, 1)}
    two = [0, 2]
    assert plan_of(residual(), keep, OUT) == CutPlan(
        rows={"stem": two, "b": two}, channels={"norm": two, "norm_b": two}, columns={"a": two, "head.2": two}
    )


@pytest.mark.parametrize("held", [MASKED, PLACED, PLACED_BEHIND_NORM])
@pytest.mark.parametrize("name", ["stem", "b"])
def test_a_channel_stays_in_the_stream_while_one_writer_holds_it(name, held):
    keep = {"stem": keep_but(3, 1), "b": keep_but(3, 1)}
    drafting = drafting_of(residual(), keep)
    draft = drafting.draft({"stem": OUT, "a": OUT, "b": OUT, name: held})
    other, norm = ("b", "norm_b") if name == "stem" else ("stem", "norm")
    # The other one computes two filters, and puts them where the stream has them.
    assert draft.plan.rows[other] == [0, 2]
    assert draft.plan.placed[norm] == (3, [0, 2])
    assert draft.plan.channels[norm] == [0, 2]
    assert draft.plan.picked["head.2"] == draft.plan.columns["head.2"] == [0, 2]
    assert draft.present["head.2"].all()
    assert (name in draft.plan.masked) == (held == MASKED)


def test_a_channel_that_one_writer_keeps_stays_for_the_other():
    # The stem alone loses filter 1: b still writes to it, and the head reads it.
    plan = plan_of(residual(), {"stem": keep_but(3, 1)}, OUT)
    assert plan == CutPlan(
        rows={"stem": [0, 2]}, channels={"norm": [0, 2]}, placed={"norm": (3, [0, 2])},
        columns={"a": [0, 2]}, picked={"a": [0, 2]},
    )  # fmt: skip


def test_the_inner_convolution_of_a_block_leaves_by_itself():
    plan = plan_of(residual(), {"a": keep_but(2, 0)}, OUT)
    assert plan == CutPlan(rows={"a": [1]}, channels={"norm_a": [1]}, columns={"b": [1]})


def depthwise():
    torch.manual_seed(0)
    layers = (
        conv(3, 3),
        nn.BatchNorm2d(3),
        conv(3, 3, groups=3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        conv(3, 2),
        head(2),
    )
    return unsettled(nn.Sequential(*layers))


def test_a_depthwise_convolution_loses_the_groups_whose_channel_is_gone():
    keep = {"0": keep_but(3, 1)}
    two = [0, 2]
    assert plan_of(depthwise(), keep, OUT) == CutPlan(
        rows={"0": two, "2": two}, channels={"1": two, "3": two}, groups={"2": 2}, columns={"5": two}
    )
    assert plan_of(depthwise(), keep, PLACED) == CutPlan(
        rows={"0": two, "2": two}, groups={"2": 2}, placed={"0": (3, two), "2": (3, two)},
        picked={"2": two, "5": two}, columns={"5": two}, spread={"1": two, "3": two},
    )  # fmt: skip
    held = plan_of(depthwise(), keep, MASKED)
    assert held.groups == held.rows == {}
    assert held.spread == {"0": two, "1": two, "2": two, "3": two}
    assert list(held.masked) == ["0", "2"]


def test_rows_of_a_depthwise_convolution_that_do_not_go_along_are_computed():
    drafting = drafting_of(depthwise(), {"0": keep_but(3, 1)}, followers=False)
    plan = drafting.draft(dict.fromkeys(drafting.convolutions, OUT)).plan
    assert "2" not in plan.rows
    assert plan.placed == {"1": (3, [0, 2])}  # its second filter reads the channel that is 0
    assert plan.rows == {"0": [0, 2]}


def grouped():
    """Two groups of two filters, each group with two channels."""
    torch.manual_seed(0)
    return nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4, groups=2), nn.ReLU(), conv(4, 2), head(2))


def test_groups_that_lose_the_same_number_of_filters_stay_groups():
    assert plan_of(grouped(), {"2": keep_but(4, 1, 2)}, OUT) == CutPlan(
        rows={"2": [0, 3]}, columns={"4": [0, 3]}
    )


@pytest.mark.parametrize("level", LEVELS)
def test_groups_that_lose_different_numbers_of_filters_are_held_at_0(level):
    plan = plan_of(grouped(), {"2": keep_but(4, 1)}, level)
    reason = "its groups lose different numbers of filters"
    assert plan == CutPlan(
        columns={"4": [0, 2, 3]}, picked={"4": [0, 2, 3]}, spread={"2": [0, 2, 3]}, masked={"2": reason}
    )


def test_filters_that_nobody_reads_any_more_leave_with_the_group_that_read_them():
    # The second group goes, and it alone read the filters 2 and 3 of the first convolution.
    keep = {"2": keep_but(4, 2, 3)}
    assert plan_of(grouped(), keep, OUT) == CutPlan(
        rows={"0": [0, 1], "2": [0, 1]}, groups={"2": 1}, columns={"4": [0, 1]}
    )
    # As long as they are emitted the group that is left picks its own.
    assert plan_of(grouped(), keep, {"0": PLACED, "2": OUT, "4": OUT}) == CutPlan(
        rows={"2": [0, 1]}, groups={"2": 1}, picked={"2": [0, 1]}, columns={"4": [0, 1]}
    )


def test_a_group_keeps_its_channels_in_the_tensor_while_it_computes():
    # Channel 0 is gone, and the first group, which reads channels 0 and 1, is not.
    plan = plan_of(grouped(), {"0": keep_but(4, 0)}, OUT)
    assert plan == CutPlan(rows={"0": [1, 2, 3]}, placed={"0": (4, [1, 2, 3])})
    # Both of its channels are gone, and so are its filters: the second group is left.
    both = plan_of(grouped(), {"0": keep_but(4, 0, 1)}, OUT)
    assert both == CutPlan(rows={"0": [2, 3], "2": [2, 3]}, groups={"2": 1}, columns={"4": [2, 3]})


def test_a_convolution_whose_kept_filters_nobody_reads_computes_one_of_them():
    # What is left of the second convolution reads channels 0 and 1, which are gone.
    keep = {"0": keep_but(4, 0, 1), "2": keep_but(4, 2, 3)}
    drafting = drafting_of(grouped(), keep, followers=False)
    plan = drafting.draft(dict.fromkeys(drafting.convolutions, OUT)).plan
    assert plan == CutPlan(
        rows={"0": [2], "2": [0, 1]}, groups={"2": 1}, placed={"0": (3, [2])}, picked={"2": [0, 1]},
        columns={"4": [0, 1]},
    )  # fmt: skip


@pytest.mark.parametrize("level", [PLACED, PLACED_BEHIND_NORM, OUT])
def test_a_norm_over_groups_of_channels_keeps_the_tensor_wide(level):
    model = nn.Sequential(conv(3, 4), nn.GroupNorm(2, 4), nn.ReLU(), conv(4, 2), head(2))
    some = [0, 2, 3]
    assert plan_of(model, {"0": keep_but(4, 1)}, level) == CutPlan(
        rows={"0": some}, placed={"0": (4, some)}, spread={"1": some}, columns={"3": some}, picked={"3": some}
    )


def test_what_is_known_of_the_layers():
    drafting = drafting_of(residual(), {"a": keep_but(2, 0)})
    assert list(drafting.convolutions) == ["stem", "a", "b"]
    assert drafting.fixed == set()
    assert drafting.flows.reached["a"] == ["norm_a", "b"]
    assert set(drafting.flows.reached["stem"]) == {"norm", "a", "head.2"}
    assert drafting.flows.together == {"stem": {"stem", "b"}, "a": {"a"}, "b": {"stem", "b"}}


class Neighbours(nn.Conv2d):
    """Each filter's output has that of the next one in it."""

    def forward(self, x):
        made = super().forward(x)
        return made + made.roll(1, 1)


def test_a_layer_that_cannot_compute_some_filters_alone_is_fixed():
    model = nn.Sequential(Neighbours(3, 4, 1), Standardised(4, 4, 1), conv(4, 2), head(2))
    assert drafting_of(model, {"1": keep_but(4, 0)}).fixed == {"0"}
    shared = Drawn(
        lambda s, x: s.head(s.c(s.a(x)) + s.b(x)), a=conv(3, 4), b=conv(3, 4), c=conv(4, 4), head=head(4)
    )
    shared.b.weight = shared.a.weight
    assert drafting_of(shared, {"c": keep_but(4, 0)}).fixed == {"a", "b"}


def test_no_filter_left_is_refused():
    # All that the second group's filters read is gone, and no other filter of it is kept.
    keep = {"0": keep_but(4, 2, 3), "2": keep_but(4, 0, 1)}
    with pytest.raises(
        ValueError, match="no filter of '2' would be left: the filters in keep read removed channels"
    ):
        drafting_of(grouped(), keep)


NETS = {
    "chain": (net, {"conv1": keep_but(3, 1), "conv2": keep_but(4, 0, 3)}),
    "residual": (residual, {"stem": keep_but(3, 1), "a": keep_but(2, 0), "b": keep_but(3, 1, 2)}),
    "depthwise": (depthwise, {"0": keep_but(3, 1)}),
    "grouped": (grouped, {"0": keep_but(4, 0, 1), "2": keep_but(4, 1, 2)}),
}


@pytest.mark.parametrize("name", NETS)
def test_every_mixture_of_levels_computes_what_the_masks_do(name):
    make, keep = NETS[name]
    model = make()
    removal = plan_removal(model, keep, X)
    drafting = Drafting(model, removal, Probe(model, removal, X, quick=True))
    masked = copy.deepcopy(model)
    removal.apply(masked)
    with torch.no_grad():
        expected = masked(X)
        for levels in product(LEVELS, repeat=len(drafting.convolutions)):
            small = copy.deepcopy(model)
            apply_plan(small, drafting.draft(dict(zip(drafting.convolutions, levels, strict=True))).plan)
            torch.testing.assert_close(small(X), expected, rtol=1e-4, atol=1e-5)
