"""Bridgeout on a GPU: nothing waits for it, a captured graph draws anew, and the draws are those of a CPU."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from nets import chain
from regrow.noise import vectors
from regrow.noise.layers import add_bridgeout, bridgeout_state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a GPU")
X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def both(**settings):
    on_cpu = chain((8, 12, 16)).train()
    add_bridgeout(on_cpu, linear=True, seed=3, **settings)
    return on_cpu, copy.deepcopy(on_cpu).cuda()


@pytest.mark.parametrize("settings", [{}, {"q": 2.0, "p": 0.6}, {"target_fraction": 0.5, "q": 0.7}])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("quick", [False, True])
def test_draws_and_gradients_are_those_of_a_cpu(settings, layout, quick, monkeypatch):
    nets = [net.to(memory_format=layout) for net in both(**settings)]
    if quick:
        assert vectors.quick_kernels(torch.ones(3, device="cuda")) is not None
    else:
        monkeypatch.setattr(vectors, "quick_kernels", lambda _: None)
    for _ in range(2):
        outs = [net(X.to(next(net.parameters()).device)) for net in nets]
        torch.testing.assert_close(outs[1].cpu(), outs[0], rtol=1e-3, atol=1e-3)
        for out in outs:
            out.square().sum().backward()
    for one, two in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(two.grad.cpu(), one.grad, rtol=1e-2, atol=1e-2)
        assert two.grad.stride() == two.stride()
    assert nets[1]._bridgeout_passes.number.is_cuda
    assert bridgeout_state(nets[1]) == bridgeout_state(nets[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    net = both()[1].to(dtype)
    net(X.cuda().to(dtype)).float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def test_nothing_waits_for_the_gpu():
    net, x = both()[1], X.cuda()
    optimizer = torch.optim.SGD(net.parameters(), 0.01, foreach=True)

    def step():
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_launched():
    def kernels(net, x):
        for _ in range(2):
            net(x).square().sum().backward()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            net(x).square().sum().backward()
            torch.cuda.synchronize()
        return [event.name for event in found.events() if event.device_type.name == "CUDA"]

    plain, noisy = chain((8, 12, 16)).train().cuda(), both()[1]
    more = len(kernels(noisy, X.cuda())) - len(kernels(plain, X.cuda()))
    # The count goes up and is copied; two kernels forward and three backward.
    assert more <= 8


def test_a_captured_graph_draws_anew_at_each_replay():
    net, x = both()[1], X.cuda()
    twin = copy.deepcopy(net)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            net.zero_grad()
            net(x).square().sum().backward()
            twin(x)
    torch.cuda.current_stream().wait_stream(side)
    net.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = net(x)
        out.square().sum().backward()
    seen = []
    for _ in range(3):
        graph.replay()
        twin.zero_grad()
        expected = twin(x)
        expected.square().sum().backward()
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(net.conv1.weight.grad, twin.conv1.weight.grad, rtol=1e-2, atol=1e-2)
        seen.append(out.clone())
    assert not torch.equal(seen[0], seen[1])
    assert bridgeout_state(net) == bridgeout_state(twin)


def test_compiled_with_graphs():
    net, x = both()[1], X.cuda()
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(x)
        torch.testing.assert_close(out, twin(x), rtol=1e-2, atol=1e-2)
        out.square().sum().backward()
    assert bridgeout_state(net) == bridgeout_state(twin)


def test_a_model_that_moves_takes_its_count_along():
    on_cpu, moved = both()
    moved.cpu()
    torch.testing.assert_close(moved(X), on_cpu(X))
    moved.cuda()
    torch.testing.assert_close(moved(X.cuda()).cpu(), on_cpu(X), rtol=1e-3, atol=1e-3)
    assert moved._bridgeout_passes.number.is_cuda
    assert bridgeout_state(moved)["passes"] == 2


def test_it_trains():
    net, x = both(p=0.1)[1], X.cuda()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(net(x), torch.tensor([0, 1, 2], device="cuda"))
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
