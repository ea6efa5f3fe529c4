"""What needs several processes is in test_cycle.py and study/test_ranks.py."""

import pytest
import torch
from torch import nn

from regrow.repr.ranks import first_decides, group_of


def test_only_a_ddp_wrapper_says_that_processes_train_one_network():
    model = nn.Linear(2, 2)
    assert group_of(model) is None
    assert group_of(nn.DataParallel(model)) is None
    assert group_of(torch.compile(model, backend="eager")) is None


def test_without_a_group_each_decides_for_itself():
    decided = object()
    assert first_decides(lambda: decided, None, torch.device("cpu")) is decided
    with pytest.raises(KeyError):
        first_decides(lambda: {}["a"], None, torch.device("cpu"))
