"""Warnings name the line that the user wrote."""

import inspect
import warnings

import pytest
import torch
from torch import nn

import regrow
from regrow.callers import warn


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))


def test_a_warning_from_here_names_this_line() -> None:
    line = inspect.currentframe().f_lineno + 2
    with pytest.warns(UserWarning, match="now") as seen:
        warn("now")
    assert (seen[0].filename, seen[0].lineno) == (__file__, line)


def test_few_images_are_told_at_the_call_of_the_public_function() -> None:
    # compensate runs under torch.no_grad(), and prune calls it from inside.
    model, x = network(), torch.randn(2, 1, 8, 8)
    keep = regrow.select(regrow.score(model, "l2"), 0.3)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        regrow.compensate(network(), keep, [x], example_inputs=x[:1])
        regrow.prune(model, fraction=0.3, example_inputs=x[:1], calibration=[x])
    found = [each for each in seen if "images are few" in str(each.message)]
    assert len(found) >= 2
    assert {each.filename for each in found} == {__file__}


def test_a_hook_that_torch_calls_names_the_loop() -> None:
    model = network()
    model.insert(1, nn.BatchNorm2d(8))
    regrow.add_bridgeout(model, p=0.5)
    model.train()[1].momentum = None  # as torch.optim.swa_utils.update_bn does
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model(torch.randn(4, 1, 8, 8))
    assert {each.filename for each in seen if "momentum None" in str(each.message)} == {__file__}
