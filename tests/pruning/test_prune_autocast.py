"""Pruning networks whose own forward method opens autocast."""

import pytest
import torch

import regrow
from autocasts import FORMS, pair

X = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.gives_up
@pytest.mark.parametrize("form", FORMS)
def test_a_pruned_net_is_compensated_up_to_the_precision_of_its_passes(form) -> None:
    plain, model, prefix = pair(form)
    settings = {"fraction": 0.3, "example_inputs": X[:1], "calibration": [X]}
    record, expected = regrow.prune(model, **settings), regrow.prune(plain, **settings)
    assert list(record["compensation"]["layers"]) == [
        prefix + name for name in expected["compensation"]["layers"]
    ]
    theirs = model.state_dict()
    # Weights that the few pictures hardly tell apart differ more than what they make.
    for name, value in plain.state_dict().items():
        assert theirs[prefix + name].shape == value.shape
    torch.testing.assert_close(model(X).float(), plain(X), rtol=0.05, atol=0.05)
