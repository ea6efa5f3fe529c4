import copy

import pytest
import torch
import torchvision
from torch import nn

from regrow.looking.small_inputs import idle_way, smaller_picture, way
from regrow.structure import read as structure
from regrow.structure.read import read_structure
from regrow.surgery.layers import apply_plan
from regrow.surgery.planning import plan_cut
from regrow.surgery.removal import remove_filters


def net(*tail):
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), *tail).eval()


def pooled():
    return net(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


class BranchingOnSize(nn.Module):
    """A net with one convolution more for pictures that are large."""

    def __init__(self):
        super().__init__()
        self.first, self.more, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(self.more(x).relu() if x.shape[-1] > 100 else x)


def test_large_pictures_become_small_and_keep_their_proportions():
    pictures = torch.full((5, 3, 224, 448), 0.25)
    small = smaller_picture(pooled(), pictures)
    assert small.shape == (2, 3, 64, 128)
    assert (small == 0.25).all()


def test_what_is_small_or_no_picture_stays():
    model = pooled()
    for given in (
        torch.zeros(4, 3, 127, 300),
        torch.zeros(3, 224, 224),
        torch.zeros(1, 3, 224, 224, dtype=torch.uint8),
        (torch.zeros(1, 3, 224, 224),),
        {"x": torch.zeros(1, 3, 224, 224)},
    ):
        assert smaller_picture(model, given) is given


@pytest.mark.gives_up
def test_a_model_of_one_size_keeps_it():
    pictures = torch.zeros(1, 3, 128, 128)
    assert smaller_picture(net(nn.Flatten(), nn.Linear(4 * 128 * 128, 2)), pictures) is pictures


def test_a_model_that_takes_another_way_for_small_pictures_keeps_them():
    pictures = torch.zeros(1, 3, 224, 224)
    assert smaller_picture(BranchingOnSize().eval(), pictures) is pictures


@pytest.mark.gives_up
def test_a_failing_model_is_left_to_fail_where_it_is_run():
    pictures = torch.zeros(1, 5, 224, 224)
    assert smaller_picture(pooled(), pictures) is pictures


def test_random_numbers_and_statistics_are_as_before():
    model = nn.Sequential(nn.Dropout(), *pooled()).train().eval()
    pictures = torch.rand(1, 3, 224, 224)
    before = torch.random.get_rng_state()
    smaller_picture(model, pictures)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model[2].num_batches_tracked == 0


def test_the_same_structure_and_the_same_plan():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4, width_per_group=64)
    small, large = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 128, 128)
    readers = read_structure(model, small)
    assert read_structure(model, large) == readers
    keep = {"layer1.0.conv1": torch.arange(64) % 3 > 0, "layer2.0.conv2": torch.arange(128) % 3 > 0}
    assert plan_cut(model, keep, large) == plan_cut(model, keep, small)


def test_a_model_that_takes_another_way_for_small_pictures_is_planned_on_large_ones():
    keep = {"first": torch.tensor([True, False, True, True]), "more": torch.tensor([True, True, False, True])}
    plan = plan_cut(BranchingOnSize(), keep, torch.randn(1, 3, 128, 128))
    assert plan.rows == {"first": [0, 2, 3], "more": [0, 1, 3]}
    assert plan.columns == {"more": [0, 2, 3], "last": [0, 1, 3]}


@pytest.mark.gives_up
def test_a_model_of_one_size_is_planned_at_that_size():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=32), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 2))
    plan = plan_cut(model, {"0": torch.tensor([True, True, False, True])}, torch.randn(1, 3, 128, 128))
    assert plan.rows == {"0": [0, 1, 3]}
    assert plan.columns == {"3": [*range(32), *range(48, 64)]}
    keep = {"0": torch.tensor([True, True, False, True])}
    readers = read_structure(model, torch.randn(1, 3, 128, 128))
    assert plan_cut(model, keep, torch.randn(1, 3, 128, 128), readers=readers) == plan


def traced_on(monkeypatch, model, x):
    """The sides of the pictures that the graph was traced on."""
    sides, graph = [], structure.Graph

    def tracing(probe, inputs, forward):
        sides.append(inputs.shape[-1])
        return graph(probe, inputs, forward)

    monkeypatch.setattr(structure, "Graph", tracing)
    structure.propose_structure(model, x)
    return sides


@pytest.mark.gives_up
def test_the_graph_is_traced_on_small_pictures_where_they_go_the_same_way(monkeypatch):
    x = torch.randn(1, 3, 128, 128)
    assert traced_on(monkeypatch, pooled(), x) == [64]
    fixed = nn.Sequential(nn.Conv2d(3, 4, 3, stride=32), nn.Flatten(), nn.Linear(4 * 16, 2))
    assert traced_on(monkeypatch, fixed, x) == [128]
    assert traced_on(monkeypatch, pooled(), torch.randn(1, 3, 32, 32)) == [32]


def test_the_way_is_that_of_a_pass_that_computes():
    torch.manual_seed(0)
    model, x = torchvision.models.mobilenet_v3_small().eval(), torch.randn(1, 3, 128, 128)
    assert idle_way(model, x) == way(model, x)
    assert model(x).abs().sum() > 0


class Cropped(nn.Module):
    """Reads a fixed number of features of maps whose size is the picture's."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3, stride=8, padding=1), nn.Linear(128, 4)

    def forward(self, x):
        return self.head(self.conv(x).relu().flatten(1)[:, :128])


@pytest.mark.parametrize("given", [True, False])
def test_features_that_are_of_other_channels_in_large_pictures_stay(given):
    torch.manual_seed(0)
    model, x = Cropped(), torch.randn(3, 3, 128, 128)
    keep = {"conv": torch.arange(16) != 1}  # at 64 pixels half of the features are of that channel, here none
    small, masked = copy.deepcopy(model), copy.deepcopy(model)
    plan = plan_cut(model, keep, x, readers=read_structure(model, x) if given else None)
    apply_plan(small, plan)
    remove_filters(masked, keep, example_inputs=x)
    torch.testing.assert_close(small(x), masked(x), rtol=1e-4, atol=1e-5)
