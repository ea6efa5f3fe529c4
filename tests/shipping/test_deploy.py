"""The form in which a network is used: what was done, that it computes the same, and what is refused."""

import contextlib
import copy
import json
import pickle
from dataclasses import dataclass
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import regrow
from nets import Residual
from regrow.looking.noise import unsettle
from regrow.shipping.deploy import deploy, form_of
from regrow.shipping.deployed import Deployed, Graphed
from regrow.surgery.cut import cut

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def settled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        unsettle(model, torch.Generator().manual_seed(0))
    return model.eval()


class Loud(nn.Module):
    """Its weights and outputs fit into float16, and a number in between does not."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.one.weight, 1e4)
        nn.init.constant_(self.two.weight, 1e-4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(10 * self.one(x))


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.float())


class Restless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, shift: Tensor | None = None, scale: float = 1.0) -> dict:
        maps = self.conv(x) * scale
        return {"maps": maps if shift is None else maps + shift, "best": (maps.flatten(1).argmax(1), None)}


def test_a_cut_network_by_default_is_folded_and_computes_the_same():
    net = settled(Residual(8, 8)).train()
    keep = {"a": torch.arange(8) % 4 > 0}
    cut(net, keep, example_inputs=X)
    before = copy.deepcopy(net.state_dict())
    deployed, record = regrow.deploy(net, example_inputs=X)
    assert record == json.loads(json.dumps(record))
    assert (record["version"], record["dtype"], record["mode"], record["not_captured"]) == (
        1, "float32", "eager", "",
    )  # fmt: skip
    assert record["difference"] <= record["tolerance"] == 1e-4
    assert record["folded"]
    assert record["onnx"] is None
    assert not deployed.training
    assert not any(parameter.requires_grad for parameter in deployed.parameters())
    assert deployed.network.a.weight.is_contiguous(memory_format=torch.channels_last)
    # The user's model is as it was, and in train mode.
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert net.a.weight.is_contiguous()
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(deployed(x), net.eval()(x).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="fold"):
        regrow.prune(deployed, fraction=0.3, example_inputs=X, compensate=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_float32_and_gives_float32(make_net, dtype):
    net = settled(make_net())
    deployed, record = deploy(net, example_inputs=X, dtype=dtype, channels_last=False)
    assert record["dtype"] == str(dtype).removeprefix("torch.")
    assert {parameter.dtype for parameter in deployed.parameters()} == {dtype}
    seen = []
    deployed.network.conv1.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    found, expected = deployed(X), net(X).detach()
    assert seen == [dtype]
    assert found.dtype == torch.float32
    off = float((found - expected).abs().max() / expected.abs().max())
    assert off == pytest.approx(record["difference"], rel=1e-3)
    assert 0 < off < record["tolerance"]
    assert next(net.parameters()).dtype == torch.float32


def test_pictures_come_in_channels_last_and_nothing_else_changes():
    net = Several()
    deployed, _ = deploy(net, example_inputs={"scale": 2.0, "x": X})
    seen = []
    deployed.network.conv.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    found, expected = deployed(x=X, scale=2.0), net(X, scale=2.0)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found["maps"], expected["maps"].detach())
    assert torch.equal(found["best"][0], expected["best"][0])
    assert found["best"][1] is None


def test_compiled(make_net, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    net = settled(make_net())
    deployed, record = deploy(net, example_inputs=X, mode="compile")
    assert compiled == [deployed]
    assert record["mode"] == "compile"


@pytest.mark.needs_torch("2.13", "export_onnx")
def test_a_file_for_onnxruntime_too(make_net, tmp_path):
    net = settled(make_net())
    _, record = deploy(net, example_inputs=X, dtype=torch.bfloat16, onnx=tmp_path / "net.onnx")
    assert record["onnx"]["difference"] < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.tensor(found), net(X).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Conv2d(3, 4, 3), {"dtype": "float16"}, "dtype is torch.float32, .* and got 'float16'"),
        (nn.Conv2d(3, 4, 3), {"dtype": torch.int8}, "dtype is .* got torch.int8"),
        (nn.Conv2d(3, 4, 3), {"channels_last": 1}, "channels_last is True or False"),
        (nn.Conv2d(3, 4, 3), {"mode": "grap"}, "unknown mode 'grap'; did you mean 'graph'"),
        (nn.Conv2d(3, 4, 3), {"mode": "graph"}, "the model is on cpu"),
        (nn.Conv2d(3, 4, 3), {"tolerance": 0}, "tolerance is a share"),
        (nn.Conv2d(4, 4, 3), {}, "cannot be copied and run"),
        (Loud(), {"dtype": torch.float16}, r"off by inf .* write dtype=torch\.bfloat16"),
        pytest.param(
            Fixed(), {"dtype": torch.bfloat16}, "does not run deployed in bfloat16.*Leave dtype out",
            marks=pytest.mark.gives_up,
        ),
        (Restless(), {}, "an output is off by .* 0.0001 is allowed"),
        (nn.Conv2d(3, 4, 3), {"dtype": torch.bfloat16, "tolerance": 1e-6}, "1e-06 is allowed"),
    ],
)  # fmt: skip
def test_what_is_refused(model, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        deploy(model, example_inputs=X, onnx=tmp_path / "net.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_options_as_a_budget_takes_them():
    assert form_of(False) is None
    assert form_of(True) == form_of({})
    assert form_of({"dtype": torch.float16, "mode": "eager"}).mode == "eager"
    with pytest.raises(ValueError, match="deploy has no option 'dtyp'; did you mean 'dtype'"):
        form_of({"dtyp": torch.float16})
    with pytest.raises(ValueError, match=r"deployed is True, or options .* got a tensor"):
        form_of(X)


# ── CUDA graphs ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs without a GPU: a graph that is replayed runs the network on the tensors that it captured,
    and writes to those that it returned. Gives the list of captured graphs, to count replays."""
    captured = []

    class Graph:
        def __init__(self):
            self.replays = 0
            captured.append(self)

        def replay(self):
            self.replays += 1
            args, kwargs = torch.utils._pytree.tree_unflatten(self.owner._inputs, self.owner._shape[0])
            again = self.owner.network(*args, **kwargs)
            for mine, theirs in zip(leaves(self.owner._output), leaves(again), strict=True):
                mine.copy_(theirs)

    def leaves(output):
        return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]

    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name, value in {
        "CUDAGraph": Graph,
        "graph": lambda _: contextlib.nullcontext(),
        "device": lambda _: contextlib.nullcontext(),
        "stream": lambda _: contextlib.nullcontext(),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return captured


def graphed(graphs, net, example):
    module = Graphed(net.eval(), example)
    graphs[-1].owner = module
    return module


def test_a_graph_takes_the_inputs_of_each_call_and_its_outputs_stay(graphs, make_net):
    net = settled(make_net())
    module = graphed(graphs, net, X)
    with torch.no_grad():
        first, second = module(X), module(2 * X)
        torch.testing.assert_close(first, net(X))
        torch.testing.assert_close(second, net(2 * X))
        assert graphs[0].replays == 2
        # Other shapes and kinds of numbers go operation by operation.
        torch.testing.assert_close(module(X[:1]), net(X[:1]))
        with pytest.raises(RuntimeError, match="same"):
            module(X.double())
        assert graphs[0].replays == 2


def test_a_graph_knows_arguments_by_name_and_plain_ones_by_value(graphs):
    net = Several().eval()
    shift = torch.ones(2, 4, 6, 6)
    module = graphed(graphs, net, {"x": X, "shift": shift, "scale": 2.0})
    with torch.no_grad():
        for given in (
            {"x": X, "shift": shift, "scale": 2.0},
            {"scale": 3.0, "shift": X[:, :1, :6, :6], "x": X},
        ):
            found = module(**given)
            torch.testing.assert_close(found["maps"], net(**given)["maps"])
        module(x=X, shift=2 * shift, scale=2.0)
    assert graphs[0].replays == 2


def test_a_graph_is_left_when_its_network_moves_and_by_copies(graphs, make_net):
    net = settled(make_net())
    module = graphed(graphs, net, X)
    twins = [pickle.loads(pickle.dumps(module)), copy.deepcopy(module)]
    assert module._graph is not None
    with torch.no_grad():
        for twin in twins:
            torch.testing.assert_close(twin(X), net(X))
        module.double()
        assert module(X.double()).dtype == torch.float64
    assert graphs[0].replays == 0


@dataclass
class Pair:
    maps: Tensor


class Boxed(nn.Conv2d):
    def forward(self, x):
        return Pair(super().forward(x))


def test_tensors_that_could_not_be_copied_are_no_graph(graphs):
    with pytest.raises(ValueError, match="of the class Pair, holds tensors unseen"):
        Graphed(Boxed(3, 4, 3), X)
    assert not graphs


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@pytest.mark.parametrize("mode", ["auto", "graph", "compile", "eager"])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_on_a_gpu(make_net, mode, dtype):
    net, x = settled(make_net()).cuda(), X.cuda()
    deployed, record = deploy(net, example_inputs=x, dtype=dtype, mode=mode)
    assert record["mode"] == ("graph" if mode == "auto" else mode)
    first, second = deployed(x), deployed(-x)
    for found, given in ((first, x), (second, -x), (deployed(x[:1]), x[:1])):
        expected = net(given)
        assert float((found - expected).abs().max() / expected.abs().max()) < 0.02
    assert isinstance(deployed, Deployed if mode == "eager" else Graphed)
