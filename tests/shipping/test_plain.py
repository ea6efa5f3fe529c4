"""Cut networks, as they are and made of plain layers, in the tools that people deploy networks with."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx

import regrow
from nets import Ahead, Residual, conv, head, keep_but, unsettled
from regrow.marks import is_placed, is_spread
from regrow.shipping.plain import Picked, Placed, plain_layers
from regrow.surgery.layers import apply_plan, is_cut
from regrow.surgery.plan import CutPlan
from regrow.surgery.small import Small

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
# The tools of quantisation and torch.jit say that they are old.
pytestmark = pytest.mark.filterwarnings("ignore")


class Lines(nn.Module):
    """A stream of lines, with norms that take tensors of several shapes and two branches side by side."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv1d(3, 6, 3, padding=1), nn.BatchNorm1d(6)
        self.a, self.norm_a = nn.Conv1d(6, 6, 3, padding=1), nn.GroupNorm(6, 6)
        self.b, self.norm_b = nn.Conv1d(6, 6, 3, padding=1, groups=2), nn.InstanceNorm1d(6, affine=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x.flatten(2))))
        x = F.relu(x + self.norm_a(self.a(x)) + self.norm_b(self.b(x)))
        return self.head(x.mean(2))


class Bare(nn.Module):
    """A stream without norms, a block that reads a part of it, and channels that are joined."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = conv(3, 6), conv(6, 6, bias=False), conv(12, 6, 1)
        self.head = head(6)

    def forward(self, x):
        x = self.stem(x)
        y = torch.cat([x, F.relu(self.a(x))], 1)
        return self.head(x + self.b(y))


def cut(net, **dropped):
    net = unsettled(net)
    keep = {name: keep_but(net.get_submodule(name).out_channels, *those) for name, those in dropped.items()}
    regrow.cut(net, keep, example_inputs=X[:1])
    assert any(map(is_placed, net.modules()))
    return net


NETS = {
    "residual": lambda: cut(Residual(6, 5), stem=[1], a=[0, 2], b=[0, 3]),
    "without norms": lambda: cut(Residual(6, 5, normed=False), stem=[1], a=[0, 2], b=[0, 3]),
    "norms ahead": lambda: cut(Ahead(), stem=[0, 1], conv1=[0, 2], conv2=[2]),
    "lines": lambda: cut(Lines(), stem=[0, 5], a=[1, 2], b=[0, 4]),
    "bare": lambda: cut(Bare(), stem=[0, 5], a=[1, 2], b=[3]),
}


def exported_as_before(net):
    file = io.BytesIO()
    torch.onnx.export(net, (X,), file, dynamo=False)
    session = pytest.importorskip("onnxruntime").InferenceSession(file.getvalue())
    return torch.as_tensor(session.run(None, {session.get_inputs()[0].name: X.numpy()})[0])


def scripted(net):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(net), file)
    return torch.jit.load(io.BytesIO(file.getvalue()))(X)


def traced_by_fx(net):
    graph = torch.fx.symbolic_trace(net)
    for node in graph.graph.nodes:
        node.type = None  # PyTorch 2.6 does not pickle types that are written as text
    graph.recompile()
    return pickle.loads(pickle.dumps(graph))(X)


TOOLS = {
    "torch.jit.script": scripted,
    "torch.jit.trace": lambda net: torch.jit.trace(net, X[:2])(X),
    "torch.fx": traced_by_fx,
    "old ONNX exporter": exported_as_before,
    "torch.export": lambda net: torch.export.export(net, (X,)).module()(X),
    "torch.compile": lambda net: torch.compile(net, backend="eager", fullgraph=True)(X),
    "copy": lambda net: copy.deepcopy(net)(X),
    "pickle": lambda net: pickle.loads(pickle.dumps(net))(X),
}


@pytest.mark.parametrize("plain", [False, True], ids=["as it is", "plain"])
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("kind", NETS)
def test_a_cut_net_is_taken_by(tool, kind, plain):
    net = NETS[kind]()
    expected, work = net(X), plain_layers(net) if plain else net
    if tool == "torch.jit.script" and any(map(is_spread, work.modules())):
        with pytest.raises(RuntimeError, match=r"give it regrow.plain_layers\(model\)"):
            scripted(work)
        return
    with torch.no_grad():
        torch.testing.assert_close(TOOLS[tool](work), expected.detach())


def static(net):
    """``net`` in 8 bits by FX quantisation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = quantize_fx.prepare_fx(
            copy.deepcopy(net), quantization.get_default_qconfig_mapping("x86"), (X,)
        )
        prepared(X)
        return quantize_fx.convert_fx(prepared)


def quantised(net):
    return [name for name, module in net.named_modules() if "quantized" in type(module).__module__]


def assert_near(found, expected):
    """The error of 8 bits: a few steps of the 256 between the smallest and the largest number."""
    assert float((found - expected).abs().max()) < 0.05 * float(expected.max() - expected.min())


@pytest.mark.parametrize("kind", NETS)
def test_fx_quantisation(kind):
    net = NETS[kind]()
    for work in (net, plain_layers(net)):
        small = static(work)
        assert_near(small(X), net(X))
    layers = [module for module in net.modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear)]
    assert len(quantised(small)) >= len(layers)


class Quantisable(nn.Module):
    """A residual net for eager quantisation."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.stem, self.norm, self.relu = conv(3, 6), nn.BatchNorm2d(6), nn.ReLU()
        self.a, self.norm_a, self.relu_a = conv(6, 5), nn.BatchNorm2d(5), nn.ReLU()
        self.b, self.norm_b = conv(5, 6), nn.BatchNorm2d(6)
        self.sum, self.head = nn.quantized.FloatFunctional(), head(6)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(self.quant(x))))
        y = self.norm_b(self.b(self.relu_a(self.norm_a(self.a(x)))))
        return self.dequant(self.head(self.sum.add_relu(x, y)))


def test_eager_quantisation_of_plain_layers():
    net = cut(Quantisable(), stem=[1], a=[0, 2], b=[0, 3])
    plain = plain_layers(net)
    assert type(plain.norm.layer) is nn.BatchNorm2d
    assert isinstance(plain.norm.place, Placed)
    # The ReLU of 0 is 0, so it may as well stand in front of the placing.
    groups = [["stem", "norm.layer", "relu"], ["b", "norm_b.layer"]]
    a = "a.layer" if isinstance(plain.a, nn.Sequential) else "a"
    fused = quantization.fuse_modules(plain, [*groups, [a, "norm_a", "relu_a"]])
    torch.testing.assert_close(fused(X), net(X))
    fused.qconfig = quantization.get_default_qconfig("x86")
    quantization.prepare(fused, inplace=True)
    fused(X)
    quantization.convert(fused, inplace=True)
    assert {"stem", "b", a} <= set(quantised(fused))
    assert_near(fused(X), net(X))
    torch.testing.assert_close(scripted(fused), fused(X))


def test_dynamic_quantisation_and_training_aware_quantisation():
    net = cut(Residual(6, 5), stem=[1], a=[0, 2], b=[0, 3])
    plain = plain_layers(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_near(quantization.quantize_dynamic(net, {nn.Linear})(X), net(X))
        mapping = quantization.get_default_qat_qconfig_mapping("x86")
        trained = quantize_fx.prepare_qat_fx(plain.train(), mapping, (X,))
        trained(X).sum().backward()
        assert quantised(quantize_fx.convert_fx(trained.eval()))


@pytest.mark.devices
@pytest.mark.parametrize("kind", NETS)
def test_the_copy_has_ordinary_layers_and_the_model_stays(kind):
    net = NETS[kind]().train()
    before = {name: (tensor, tensor.clone()) for name, tensor in net.state_dict().items()}
    kinds = [type(module) for module in net.modules()]
    plain = plain_layers(net)
    assert [type(module) for module in net.modules()] == kinds
    assert all(torch.equal(t, before[name][1]) for name, t in net.state_dict().items())
    assert not any(isinstance(module, Small) or is_placed(module) for module in plain.modules())
    assert not is_cut(plain)
    assert plain.training
    assert {name.replace(".layer.", ".") for name in plain.state_dict()} == set(before)
    for module in plain.modules():
        if isinstance(module, nn.Sequential) and hasattr(module, "layer"):
            assert set(dict(module.named_children())) <= {"pick", "layer", "place"}
    # In train mode too, and with gradients.
    torch.testing.assert_close(plain(X), net(X))
    for one in (plain, net):
        one(X).square().sum().backward()
    grads = {name.replace(".layer.", "."): p.grad for name, p in plain.named_parameters()}
    for name, parameter in net.named_parameters():
        if grads[name].shape == parameter.shape:  # else the layer computed with its weight among zeros
            torch.testing.assert_close(grads[name], parameter.grad)


@pytest.mark.devices
def test_a_layer_with_its_weights_among_zeros_gets_them_as_its_own():
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    norm.bias.requires_grad_(False)
    net = nn.Sequential(norm)
    apply_plan(net, CutPlan(spread={"0": [0, 2]}))
    plain = plain_layers(net)
    assert type(plain[0]) is nn.BatchNorm2d
    assert plain[0].weight.tolist() == [1, 0, 3]
    assert plain[0].weight.requires_grad
    assert not plain[0].bias.requires_grad
    assert [p.shape for p in net.parameters()] == [(2,), (2,)]


@pytest.mark.devices
def test_a_model_that_is_one_layer_and_a_layer_with_two_names():
    layer = nn.Conv2d(3, 3, 1)
    apply_plan(
        layer, CutPlan(rows={"": [1]}, placed={"": (3, [1])}, columns={"": [0, 2]}, picked={"": [0, 2]})
    )
    plain = plain_layers(layer)
    assert [type(step) for step in plain] == [Picked, nn.Conv2d, Placed]
    assert torch.equal(plain(X), layer(X))
    twice = nn.ModuleDict({"one": layer, "two": layer})
    both = plain_layers(twice)
    assert both["one"] is both["two"]
    assert torch.equal(both["two"](X), layer(X))


def test_a_model_that_was_not_cut_is_copied_and_hooks_are_refused():
    net = unsettled(Residual(6, 5))
    plain = plain_layers(net)
    assert plain.state_dict().keys() == net.state_dict().keys()
    assert torch.equal(plain(X), net(X))
    net = NETS["residual"]()
    small = next(name for name, module in net.named_modules() if isinstance(module, Small))
    handle = net.get_submodule(small).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=f"'{small}' has forward hooks"):
        plain_layers(net)
    handle.remove()
    plain_layers(net)


def test_a_folded_net_of_plain_layers():
    net = NETS["residual"]()
    deployed, _ = regrow.fold_norms(net, example_inputs=X[:1])
    plain = plain_layers(deployed)
    torch.testing.assert_close(plain(X), net(X))
    torch.testing.assert_close(scripted(plain), net(X))
    assert_near(static(plain)(X), net(X))


@pytest.mark.parametrize("dim", [1, -3])
def test_picking_and_placing_by_hand(dim):
    x = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    placed, picked = Placed(torch.tensor([0, 3]), 4, dim), Picked(torch.tensor([1]), dim)
    for work in (lambda module: module, torch.jit.script, torch.fx.symbolic_trace):
        assert work(placed)(x).flatten().tolist() == [1, 0, 0, 2]
        assert work(picked)(x).flatten().tolist() == [2]
    bits = torch.quantize_per_tensor(x, 0.5, 3, torch.quint8)
    assert placed(bits).dequantize().flatten().tolist() == [1, 0, 0, 2]
    assert picked(bits).dequantize().flatten().tolist() == [2]
    assert not placed.state_dict()
    assert not picked.state_dict()
