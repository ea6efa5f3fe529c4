import json

import pytest
import torch

from regrow.analysis.agreement import agreement

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
