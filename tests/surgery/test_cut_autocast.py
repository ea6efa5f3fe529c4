"""Cuts of networks whose own forward method opens autocast."""

import pytest
import torch

import regrow
from autocasts import FORMS, pair
from nets import keep_but

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.gives_up  # a type that the model's code fixes has no float64
@pytest.mark.parametrize("form", FORMS)
def test_a_cut_is_that_of_the_net_without_autocast(form) -> None:
    plain, model, prefix = pair(form)
    keep = {"conv1": keep_but(6, 0, 3), "conv2": keep_but(8, 1, 2), "conv3": keep_but(8, 7)}
    record = regrow.cut(model, {prefix + name: mask for name, mask in keep.items()}, example_inputs=X)
    regrow.cut(plain, keep, example_inputs=X)
    assert record["masked"] == {}
    theirs = model.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(theirs[prefix + name], value)
    assert model(X).isfinite().all()
