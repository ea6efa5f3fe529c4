import copy
import gc

import pytest
import torch
from torch import nn

from regrow.restarts.watch import Watch

pytestmark = pytest.mark.devices


class Scaled(nn.Linear):
    """A layer whose input has a name of its own, behind another argument."""

    def forward(self, x, scale=1.0):
        return scale * super().forward(x)


def test_means_of_the_last_pass_in_train_mode_however_the_layer_is_called():
    layer = Scaled(2, 1)
    watch = Watch(layer)
    assert not watch.seen
    layer(torch.tensor([[1.0, -2], [3, 2]]))
    assert watch.means.tolist() == [2, 2]
    layer(scale=2.0, x=torch.tensor([[0.0, -4]]))
    assert watch.means.tolist() == [0, 4]
    layer.eval()(torch.ones(1, 2))
    assert watch.means.tolist() == [0, 4]
    assert watch.seen
    watch.remove()
    layer.train()(torch.ones(1, 2))
    assert watch.means.tolist() == [0, 4]


def test_the_values_stay_in_one_tensor_and_no_graph_is_kept():
    layer = nn.Conv2d(2, 1, 1)
    watch = Watch(layer)
    address = watch.means.data_ptr()
    layer(torch.ones(1, 2, 2, 2, requires_grad=True))
    assert watch.means.data_ptr() == address
    assert not watch.means.requires_grad


def test_half_precision_is_summed_in_float32():
    layer = nn.Linear(1, 1).bfloat16()
    watch = Watch(layer)
    layer(torch.full((1024, 1), 0.1).bfloat16())
    assert watch.means.dtype == torch.float32
    assert float(watch.means) == pytest.approx(0.1, rel=5e-3)


def test_a_copy_watches_nothing_and_no_layer_is_kept_alive():
    layer = nn.Linear(2, 1)
    watch = Watch(layer)
    copy.deepcopy(layer)(torch.ones(1, 2))
    assert not watch.seen
    del layer
    gc.collect()
    assert watch.module is None
