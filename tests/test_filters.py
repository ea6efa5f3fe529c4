import pytest
import torch
from torch import nn

from nets import FullyShardedDataParallel
from regrow.filters import (
    check_finite,
    check_keep,
    convolutions,
    eligible,
    excluded,
    left_out,
    rows,
    unit_rows,
)
from regrow.modules import unwrap


def nest():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 6, 1)),
        nn.Conv2d(6, 2, 1),
    )


def test_rows_flatten_channels_and_kernel_of_every_kind():
    assert rows(torch.zeros(5, 2, 3)).shape == (5, 6)
    assert rows(torch.zeros(5, 2, 3, 4)).shape == (5, 24)
    assert rows(torch.zeros(5, 2, 3, 4, 2)).shape == (5, 48)
    assert rows(torch.zeros(5)).shape == (5, 1)


def test_unit_rows_by_hand_and_at_the_ends_of_the_range():
    matrix = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e-30, 4e-30], [3e30, -4e30]])
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    torch.testing.assert_close(unit_rows(matrix), expected)


def test_unwrap_looks_through_compile_and_data_parallel_in_any_order():
    model = nest()
    assert unwrap(torch.compile(nn.DataParallel(model), backend="eager")) is model
    assert unwrap(nn.DataParallel(torch.compile(model, backend="eager"))) is model
    assert list(convolutions(nn.DataParallel(model))) == ["0", "1.0", "1.1", "2"]


def test_left_out_gives_each_reason():
    model = nn.ModuleDict(
        {
            "plain": nn.Conv2d(3, 4, 3),
            "depthwise": nn.Conv2d(4, 4, 3, groups=4),
            "single": nn.Conv2d(4, 1, 3),
            "frozen": nn.Conv2d(4, 4, 3).requires_grad_(False),
            "normed": nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
            "lazy": nn.LazyConv2d(4, 3),
            "a": nn.Conv2d(4, 4, 3),
            "b": nn.Conv2d(4, 4, 3),
        }
    )
    model["b"].weight = model["a"].weight
    reasons = left_out(model)
    assert set(reasons) == {"depthwise", "single", "frozen", "normed", "lazy", "a", "b"}
    assert "grouped" in reasons["depthwise"]
    assert "single filter" in reasons["single"]
    assert "frozen" in reasons["frozen"]
    assert "parametrization" in reasons["normed"]
    assert "lazy" in reasons["lazy"]
    assert "'b'" in reasons["a"]
    assert "'a'" in reasons["b"]
    assert list(eligible(model)) == ["plain"]


def test_eligible_leaves_out_names_and_containers():
    assert list(eligible(nest())) == ["0", "1.1", "2"]
    assert list(eligible(nest(), ["1"])) == ["0", "2"]
    assert list(eligible(nest(), ["1.1", "0"])) == ["2"]


def test_excluded_takes_one_name_or_several_and_matches_whole_names_only():
    names = ["conv1", "conv10", "block.conv1"]
    assert excluded("conv1", names) == {"conv1"}
    assert excluded(["block", "conv10"], names) == {"block.conv1", "conv10"}
    assert excluded((), names) == set()


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"no convolution is named 'conv_1'; did you mean 'conv1'"):
        excluded(["conv_1"], ["conv1", "conv2"])
    with pytest.raises(ValueError, match=r"names of layers.* and got an int"):
        excluded([3], ["conv1"])


def test_nothing_left_says_what_there_was():
    with pytest.raises(ValueError, match=r"the model has 1, 0 are excluded.*'0': grouped"):
        eligible(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)))
    with pytest.raises(ValueError, match="the model has 0"):
        eligible(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the model has 4, 4 are excluded"):
        eligible(nest(), ["0", "1", "2"])


def test_sharded_models_are_refused():
    class FSDPModule:
        pass

    class FSDPConv2d(FSDPModule, nn.Conv2d):  # the shape of what torch's fully_shard makes
        pass

    for model in (FullyShardedDataParallel(nest()), nn.Sequential(FSDPConv2d(3, 4, 3))):
        with pytest.raises(ValueError, match="Use DDP instead of FSDP"):
            eligible(model)


def test_check_finite_names_the_layer():
    model = nest()
    check_finite(convolutions(model))
    model[1][1].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"'1\.1' holds NaN or infinite weights"):
        check_finite(convolutions(model))


def test_check_keep_returns_masks_on_the_cpu():
    keep = check_keep(nest(), {"0": [True, False, True, True], "2": torch.tensor([True, False])})
    assert keep["0"].tolist() == [True, False, True, True]
    assert keep["2"].dtype == torch.bool


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"9": torch.ones(4, dtype=torch.bool)}, "no convolution is named '9'"),
        ({"0": torch.ones(3, dtype=torch.bool)}, r"boolean mask of 4 filters, got torch.bool of shape \[3\]"),
        ({"0": torch.ones(4)}, "boolean mask of 4 filters, got torch.float32"),
        ({"0": torch.zeros(4, dtype=torch.bool)}, "leaves no filter alive"),
    ],
)
def test_check_keep_refuses(keep, message):
    with pytest.raises(ValueError, match=message):
        check_keep(nest(), keep)
