import random

import numpy as np
import torch

from regrow.study.checkpoints import from_bytes, to_bytes
from regrow.study.methods.method import Method
from regrow.study.snapshot import as_now, load_random_state, load_state, random_state, state_of


def adam(capturable):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], 0.5)
    weight.grad = torch.ones(2)
    optimizer.step()
    optimizer.param_groups[0]["capturable"] = capturable
    return torch.nn.ParameterList([weight]), optimizer


def test_a_run_goes_on_on_another_device():
    """On a GPU Adam is capturable, and on the CPU it cannot be."""
    for there, here in ((True, False), (False, True)):
        objects = [adam(capturable) for capturable in (there, here)]
        states = []
        for model, optimizer in objects:
            scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
            states.append((model, optimizer, scheduler, torch.amp.GradScaler("cpu", enabled=False), Method()))
        load_state(from_bytes(to_bytes(state_of(*states[0]))), *states[1])
        _, optimizer = objects[1]
        assert optimizer.param_groups[0]["capturable"] is here
        assert float(optimizer.state[objects[1][0][0]]["step"]) == 1
    optimizer.param_groups[0]["capturable"] = False
    optimizer.step()


def test_a_state_of_an_earlier_version_is_read_as_one_of_now():
    """Until version 2 of the records, a state had RePr's alone, or None."""
    for before, now in ((None, {}), ({"step": 3}, {"repr": {"step": 3}})):
        state = {"epoch": 3, "trained": {"model": {}, "repr": before, "bridgeout": None}}
        assert as_now(state) == {"epoch": 3, "trained": {"model": {}, "bridgeout": None, "method": now}}
    for state in ({"trained": {"method": {}, "repr": 1}}, {"trained": 3}, {"trained": {}}):
        assert as_now(state) is state


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
