import copy
import json

import pytest
import torch
from torch import nn

import nets
import regrow
from regrow.analysis.agreement import agreement
from regrow.analysis.ranks import pearson
from regrow.criteria.score import CRITERIA

pytestmark = pytest.mark.devices


def test_correlations_by_hand():
    oracle = {"a": torch.tensor([1.0, 2, 3]), "b": torch.tensor([4.0, 5])}
    mine = {"b": torch.tensor([5.0, 4]), "a": torch.tensor([1.0, 2, 3]), "c": torch.tensor([9.0])}
    found = agreement({"mine": mine}, oracle)
    assert found["filters"] == 5
    # Ranks (1, 2, 3, 5, 4) against (1, 2, 3, 4, 5): 1 − 6 · 2 / 120 = 0.9; the values are the ranks here.
    assert found["criteria"]["mine"]["spearman"] == pytest.approx(0.9)
    assert found["criteria"]["mine"]["pearson"] == pytest.approx(0.9)
    layers = found["criteria"]["mine"]["layers"]
    assert layers["a"] == pytest.approx({"pearson": 1, "spearman": 1})
    assert layers["b"] == pytest.approx({"pearson": -1, "spearman": -1})
    assert json.loads(json.dumps(found)) == found


def test_equal_scores_have_no_correlation():
    found = agreement({"mine": {"a": torch.ones(3)}}, {"a": torch.arange(3.0)})
    assert found["criteria"]["mine"]["pearson"] is None


def test_no_layer_in_common():
    found = agreement({"mine": {"b": torch.ones(3)}}, {"a": torch.arange(3.0)})
    assert found["filters"] == 0
    assert found["criteria"]["mine"] == {"pearson": None, "spearman": None, "layers": {}}


def plain_oracle(model, batches, name):
    """The rise of the mean loss when one filter after the other is removed from a copy."""

    def loss(net):
        with torch.no_grad():
            return sum(nn.functional.cross_entropy(net(x), y, reduction="sum") for x, y in batches)

    rises = []
    for index in range(model.get_submodule(name).out_channels):
        keep = torch.ones(model.get_submodule(name).out_channels, dtype=torch.bool)
        keep[index] = False
        pruned = copy.deepcopy(model)
        regrow.read_as(pruned, {name: keep}, "removed", example_inputs=batches[0][0][:1])
        rises.append(loss(pruned) - loss(model))
    return torch.stack(rises)


def test_criteria_of_a_net_against_a_plain_loop():
    torch.manual_seed(0)
    model = nets.chain((5, 6)).eval()
    for norm in (model.norm1, model.norm2):
        nn.init.normal_(norm.bias)
    batches = [(torch.randn(12, 3, 6, 6), torch.randint(4, (12,))) for _ in range(2)]
    found = regrow.criteria_against_oracle(
        model,
        iter(batches),
        criteria={"mine": "l2", "loss": lambda m: regrow.score(m, "oracle", batches=batches)},
    )
    assert found["filters"] == 11
    expected = torch.cat([plain_oracle(model, batches, name) for name in ("conv1", "conv2")])
    lengths = torch.cat([*regrow.score(model, "l2").values()])
    assert found["criteria"]["mine"]["pearson"] == pytest.approx(pearson(lengths, expected), abs=1e-3)
    assert found["criteria"]["loss"]["spearman"] == pytest.approx(1)
    assert found["criteria"]["mine"]["layers"].keys() == {"conv1", "conv2"}


def test_all_criteria_by_default():
    torch.manual_seed(0)
    model = nets.chain((4, 4))
    batches = [(torch.randn(8, 3, 6, 6), torch.randint(4, (8,)))]
    found = regrow.criteria_against_oracle(model, batches, exclude="conv1")
    assert {*found["criteria"]} == {*CRITERIA} - {"oracle"}
    assert found["filters"] == 4


def test_what_is_refused():
    model, batches = nets.chain((4, 4)), [(torch.randn(8, 3, 6, 6), torch.randint(4, (8,)))]
    with pytest.raises(ValueError, match="unknown criterion 'orto'"):
        regrow.criteria_against_oracle(model, batches, criteria=["orto"])
    with pytest.raises(ValueError, match="batches is an iterable of batches"):
        regrow.criteria_against_oracle(model, batches[0][0])
    with pytest.raises(ValueError, match="yields no batch"):
        regrow.criteria_against_oracle(model, [])
