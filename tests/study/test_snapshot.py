import random

import numpy as np
import torch

from regrow.study.checkpoints import from_bytes, to_bytes
from regrow.study.snapshot import load_random_state, random_state


def drawn():
    return [torch.rand(3).tolist(), torch.randn(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1)]  # noqa: NPY002


def test_every_generator_goes_on_where_it_was():
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    drawn()  # NumPy and Python now hold back the second of a pair of normal draws
    state = from_bytes(to_bytes(random_state()))
    expected = drawn()
    drawn()
    load_random_state(state)
    assert drawn() == expected
