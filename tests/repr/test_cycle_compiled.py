"""torch.compile over the phases of a cycle: how often it compiles, and that it computes the same."""

import gc

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from cycles import X, batch, repr_on, sgd
from nets import chain

Y = torch.arange(8) % 4


@pytest.fixture(autouse=True)
def compiles_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(compact, compiler=None, steps=9):
    """Losses, gradients and statistics of a run, and how many graphs there were after each step."""
    torch.manual_seed(0)
    model = chain((6, 8, 8))
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer, full=2, sub=2, cycles=2, skip_first=False, compact=compact)
    run = model if compiler is None else torch.compile(model, backend=compiler, fullgraph=True)
    found, counts = [], []
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(run(x), y)
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        found += [buffer.clone() for buffer in model.buffers()]
        optimizer.step()
        cycle.step()
        counts.append(compiler.frame_count if compiler is not None else 0)
    return found, counts


@pytest.mark.parametrize("compact", [True, False])
def test_it_compiles_once_a_drop_and_never_at_a_restore(compact):
    expected, _ = train(compact)
    found, counts = train(compact, CompileCounterWithBackend("aot_eager"))
    # Steps 1 and 2 are full, 3 and 4 in the sub phase, 5 and 6 full, 7 and 8 in the second sub phase.
    assert counts == [1, 1, 2, 2, 2, 2, 3, 3, 3]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("compact", [True, False])
def test_a_pass_that_waits_beyond_the_end_of_its_phase_is_refused(compact):
    model = chain()
    cycle = repr_on(model, sgd(model), full=1, compact=compact)
    cycle.step()
    loss = F.cross_entropy(torch.compile(model, backend="aot_eager")(X), Y)
    cycle.remove()
    del cycle
    gc.collect()
    with pytest.raises(RuntimeError, match=r"call backward\(\) before cycle\.step\(\)"):
        loss.backward()


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.again, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.norm1(self.first(x)))
        for _ in range(2):
            x = F.relu(self.norm2(self.again(x)))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("compact", [True, False])
def test_a_layer_that_runs_twice_and_a_norm_in_eval_mode(compact):
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Twice()
        optimizer = sgd(model)
        cycle = repr_on(model, optimizer, full=1, skip_first=False, compact=compact)
        cycle.step()
        model.norm1.eval()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(run(X), Y).backward()
            optimizer.step()
        found.append({**model.state_dict(), **{f"∇{n}": p.grad for n, p in model.named_parameters()}})
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
