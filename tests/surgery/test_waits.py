"""How often a cut asks for numbers that the model's device computes: a GPU is waited for at each."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import regrow
from nets import chain
from regrow.surgery import evidence

ASKS = {"item", "__bool__", "__float__", "__int__", "tolist", "equal", "allclose", "cpu", "nonzero"}


class Asked(TorchFunctionMode):
    """Counts the calls that take floating numbers out of tensors: masks and indices lie on the CPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ASKS and args and isinstance(args[0], torch.Tensor):
            self.count += args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


def asked(blocks):
    torch.manual_seed(0)
    model = chain((8,) * blocks).eval()
    keep = regrow.select(regrow.score(model, "l2"), 0.5, scope="layer")
    with Asked() as asking:
        record = regrow.cut(model, keep, example_inputs=torch.randn(1, 3, 8, 8))
    assert len(record["dropped"]) == blocks
    assert not record["masked"]
    return asking.count


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(evidence, "answers_at_once", lambda _device: False)


def test_a_deeper_net_asks_no_more_often():
    assert asked(12) == asked(3) < 40


def test_scores_are_asked_for_together():
    counts = []
    for blocks in (3, 12):
        model = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(blocks)))
        with Asked() as asking:
            regrow.score(model, "ortho")
        counts.append(asking.count)
    assert counts[0] == counts[1] <= 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_plan_of_the_cpu_and_is_waited_for_no_more_often_in_a_deeper_net():
    waits, x = {}, torch.randn(1, 3, 8, 8)
    for blocks in (3, 12):
        torch.manual_seed(0)
        model = chain((8,) * blocks).eval()
        keep = regrow.select(regrow.score(model, "l2"), 0.5, scope="layer")
        there = copy.deepcopy(model).cuda()
        expected = regrow.cut(model, keep, example_inputs=x)
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert regrow.cut(there, keep, example_inputs=x.cuda()) == expected
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        waits[blocks] = sum("synchronizing" in str(each.message) for each in caught)
    # One for each convolution in each of the two passes that are followed: two of its weights are read.
    assert waits[12] <= waits[3] + 9 * 4
