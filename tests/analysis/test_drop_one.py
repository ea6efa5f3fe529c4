import copy

import pytest
import torch
from torch import nn

import nets
import regrow
from regrow.analysis.drop_one import drop_one_accuracy

pytestmark = pytest.mark.devices


def by_hand():
    """Two 1×1 filters read channels 0 and 1, and their means are the logits of two classes."""
    model = nn.Sequential(
        nn.Conv2d(2, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2).view(2, 2, 1, 1))
        model[0].bias.zero_()
        model[4].weight.copy_(torch.eye(2))
        model[4].bias.copy_(torch.tensor([0.5, 0.0]))
    return model


def test_two_filters_by_hand():
    # Channel 0 says class 0, channel 1 says class 1, and a bias of 0.5 favours class 0. Without filter 0 the
    # bias still says class 0 where channel 1 is silent; without filter 1 nothing says class 1.
    images = torch.zeros(4, 2, 3, 3)
    labels = torch.tensor([0, 1, 1, 1])
    images[torch.arange(4), labels] = 1.0
    found = regrow.drop_one_accuracy(by_hand(), [(images[:3], labels[:3]), (images[3:], labels[3:])])
    assert found["0"].tolist() == [1.0, 0.25]


def slow(model, batches, name, index):
    """The accuracy of a copy that ``read_as`` removed one filter from."""
    keep = torch.ones(model.get_submodule(name).out_channels, dtype=torch.bool)
    keep[index] = False
    pruned = copy.deepcopy(model).eval()
    regrow.read_as(pruned, {name: keep}, "removed", example_inputs=batches[0][0][:1])
    right = sum(int((pruned(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


def test_against_copies_with_one_filter_removed():
    torch.manual_seed(0)
    model = nets.chain((4, 5))
    for norm in (model.norm1, model.norm2):
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
    batches = [(torch.randn(24, 3, 6, 6), torch.randint(4, (24,))) for _ in range(2)]
    found = drop_one_accuracy(model, batches)
    assert set(found) == {"conv1", "conv2"}
    for name, accuracies in found.items():
        expected = [slow(model, batches, name, index) for index in range(len(accuracies))]
        assert accuracies.tolist() == pytest.approx(expected)
    assert len({*found["conv1"].tolist(), *found["conv2"].tolist()}) > 1


def test_nothing_changes():
    model = nets.chain((3, 3)).train()
    before = copy.deepcopy(model.state_dict())
    found = drop_one_accuracy(
        model, [(torch.randn(4, 3, 6, 6), torch.zeros(4).long())], exclude=["conv1"], progress=False
    )
    assert [*found] == ["conv2"]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_classifier_of_a_net_without_a_linear_layer():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    batch = torch.randn(10, 3, 5, 5), torch.arange(10) % 5
    found = drop_one_accuracy(model, [batch])
    with torch.no_grad():
        logits = model(batch[0])
    logits[:, 2] = 0
    assert found["2"][2] == pytest.approx(float((logits.argmax(1) == batch[1]).double().mean()))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "yields no batch"),
        ([torch.zeros(4, 2, 3, 3)], r"batches of \(inputs, labels \[batch\]\)"),
        ([(torch.zeros(4, 2, 3, 3), torch.zeros(3))], r"for labels a tensor \[3\]"),
        (torch.zeros(4, 2, 3, 3), r"batches is an iterable of batches"),
    ],
)
def test_what_is_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        drop_one_accuracy(by_hand(), batches)
