"""What every test shares: one thread, reproducible draws, and small nets to work on."""

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from hypothesis import settings
from torch import nn

import devices
from nets import chain

torch.set_num_threads(1)
# For the processes that tests start, too: threads that wait for a core spin, and a busy machine stalls.
os.environ["OMP_NUM_THREADS"] = "1"
# The compiler is taken to know the vector instructions of this CPU. PyTorch would compile a program for each
# of them first, and that takes longer than the first kernel.
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"
settings.register_profile("regrow", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("regrow")


@pytest.fixture(scope="session", autouse=True)
def _server() -> None:
    # The process that tests fork from takes seconds for its imports: they overlap with the first tests.
    if "forking" in sys.modules:
        sys.modules["forking"].start_server()


def pytest_configure() -> None:
    devices.device_wanted()  # a name that makes no sense ends the run before it begins


def pytest_collection_finish() -> None:
    # A collection of garbage walks all objects but the frozen ones: the imported modules have a million.
    gc.collect()
    gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cuda = metafunc.definition.get_closest_marker("cuda") is not None
    if cuda or metafunc.definition.get_closest_marker("devices") is not None:
        metafunc.parametrize("device", devices.places(metafunc.definition.name, cuda=cuda), indirect=True)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a test marked ``devices`` or ``cuda`` runs; the CPU for all others.

    What a test marked ``devices`` makes is there; one marked ``cuda`` moves it itself.
    """
    place = getattr(request, "param", None)
    moved = place is not None and request.node.get_closest_marker("cuda") is None
    with devices.on(place) if moved else nullcontext():
        yield torch.device("cpu") if place is None else place


@pytest.fixture(autouse=True)
def _new_enough(request: pytest.FixtureRequest) -> None:
    for marker in request.node.iter_markers("needs_torch"):
        version, what = marker.args
        if torch.__version__ < version:
            pytest.skip(f"{what} needs PyTorch {version}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    # What one test compiled counts towards the limit of recompilations of the next.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


class _GivenUp(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.fixture(autouse=True)
def given_up(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """What regrow tried and gave up during the test: an error, unless the test is marked ``gives_up``.

    A bug in the planning of cuts would otherwise show only as a worse plan.
    """
    log, handler = logging.getLogger("regrow"), _GivenUp()
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    yield handler.said
    log.removeHandler(handler)
    log.setLevel(level)
    if request.node.get_closest_marker("gives_up") is None:
        assert handler.said == []


@pytest.fixture(scope="session")
def make_net() -> Callable[..., nn.Sequential]:
    """``make_net(filters)`` → conv1, norm1, relu1, conv2, … pool, flatten, head (4 classes)."""
    return chain


@pytest.fixture(scope="session")
def train() -> Callable[..., None]:
    """``train(model, optimizer, steps, x)``: steps of cross entropy on one fixed batch."""

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, x: torch.Tensor) -> None:
        labels = torch.arange(len(x)) % 4
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()

    return run
