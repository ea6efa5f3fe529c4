"""Passes are timed in turns, plain networks operation by operation and deployed ones as they are."""

import pytest
import torch
from torch import nn

from regrow.pruning.latency import as_used, launching, measure_latency
from regrow.shipping.deploy import Form
from regrow.shipping.deployed import Deployed

X = torch.zeros(1, 1, 8, 8)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten())


def test_latency_has_a_spread_and_the_models_take_turns():
    order = []
    models = [net(), net()]
    for name, model in zip("ab", models, strict=True):
        model.register_forward_hook(lambda *_, name=name: order.append(name))
    found = measure_latency(models, X)
    for each in found:
        assert 0 < each["lowest"] <= each["median"] <= each["highest"]
        assert each["passes"] >= 5
    assert "".join(order) == "ab" * (len(order) // 2)
    assert all(model.training for model in models)


def test_a_deployed_network_runs_as_deployed_and_a_compiled_one_as_plain(monkeypatch):
    seen = []
    original = torch.compiler.set_stance

    def stance(name):
        seen.append(name)
        return original(name)

    monkeypatch.setattr(torch.compiler, "set_stance", stance)
    model = net().eval()
    used = as_used(model, X, Form(dtype=torch.bfloat16))
    assert isinstance(used, Deployed)
    assert as_used(model, X, None) is model
    kinds = []
    used.network[0].register_forward_pre_hook(
        lambda *_: kinds.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
    )
    _ = torch._dynamo  # loaded: from here on, plain networks must not run compiled code
    seen.clear()  # folding ran passes too
    measure_latency([used], X)
    assert set(kinds) == {(False, False)}
    assert seen == []
    measure_latency([torch.compile(model, backend="eager")], X)
    assert set(seen) == {"force_eager"}


def test_a_cpu_launches_nothing():
    assert launching(net(), X) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    model, x = (
        nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(50)]).cuda(),
        torch.zeros(1, 8, 8, 8),
    )
    plain, graphed = measure_latency([model, as_used(model, x.cuda(), Form())], x.cuda())
    assert graphed["median"] < plain["median"]  # 50 launches, and 1
    assert launching(model, x.cuda()) > 0.8
