import copy
import importlib.util
import json
import logging
import math
import os

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import regrow.shipping.onnx
from regrow.criteria.score import score
from regrow.criteria.select import select
from regrow.noise.layers import add_bridgeout
from regrow.shipping.checkpoint import load, save
from regrow.shipping.onnx import export_onnx
from regrow.surgery.cut import cut
from regrow.surgery.layers import apply_plan
from regrow.surgery.plan import CutPlan

pytestmark = pytest.mark.needs_torch("2.13", "export_onnx")  # what older ones are told: test_onnx_oldest.py
X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Several(nn.Module):
    """Two tensors and two plain arguments in; a dict with a nested tuple, None and whole numbers out."""

    def __init__(self):
        super().__init__()
        self.conv, self.drop = nn.Conv2d(3, 4, 3), nn.Dropout()

    def forward(self, x, shift=None, scale=2.0, double=False):
        maps = self.drop(self.conv(x)) * scale * (2 if double else 1)
        pooled = maps.mean((2, 3)) if shift is None else maps.mean((2, 3)) + shift
        return {"pooled": pooled, "more": (maps, None, maps.flatten(1).argmax(1))}


class OfTwoPictures(nn.Module):
    def forward(self, x):
        return x.view(2, -1)[:1] + x.flatten(1)


class Sized(nn.Module):
    def forward(self, x):
        return x if len(x) > 2 else -x


class BranchingOnValues(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Restless(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


def run(path, *inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})


@pytest.fixture
def cut_net(make_net, train):
    net = make_net((6, 8))
    train(net, torch.optim.SGD(net.parameters(), 0.1), 3, torch.randn(8, 3, 8, 8))
    plan = {"rows": {"conv1": [0, 3, 4]}, "channels": {"norm1": [0, 3, 4]}, "columns": {"conv2": [0, 3, 4]}}
    apply_plan(net, CutPlan(**plan))
    return net


def test_a_cut_model_in_batches_of_any_size(cut_net, tmp_path):
    path = tmp_path / "small.onnx"
    before = copy.deepcopy(cut_net.state_dict())
    record = export_onnx(cut_net, path, example_inputs=X)
    assert json.loads(json.dumps(record)) == record
    assert (record["version"], record["batches"]) == (1, [1, 3])
    assert record["difference"] < 1e-5
    assert os.listdir(tmp_path) == ["small.onnx"]
    # In train mode and unchanged, as it came.
    assert all(module.training for module in cut_net.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in cut_net.state_dict().items())
    shape = onnx.load(path).graph.input[0].type.tensor_type.shape
    assert shape.dim[0].dim_param
    assert [dim.dim_value for dim in shape.dim[1:]] == [3, 8, 8]
    x = torch.randn(17, 3, 8, 8)
    with torch.no_grad():
        expected = cut_net.eval()(x).numpy()
    np.testing.assert_allclose(run(path, x)[0], expected, rtol=0, atol=1e-5 * abs(expected).max())
    # The small weights are what is in the file: 3 filters over 3 channels, and 8 over 3.
    sizes = {tuple(tensor.dims) for tensor in onnx.load(path).graph.initializer}
    assert {(3, 3, 3, 3), (8, 3, 3, 3)} <= sizes


@pytest.mark.devices
def test_a_cut_model_goes_through_torch_export(cut_net):
    cut_net.eval()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(cut_net, (torch.cat([X, X]),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(program.module()(x), cut_net(x))


@pytest.mark.parametrize(
    ("inputs", "given"),
    [
        (X, [X]),
        ((X, None, 0.5, True), [X]),
        ([X, torch.ones(1, 4)], [X, torch.ones(1, 4)]),
        ({"shift": torch.ones(1, 4), "x": X, "scale": 3.0}, [torch.ones(1, 4), X]),
    ],
)
def test_arguments_of_every_kind(inputs, given, tmp_path):
    net = Several()
    record = export_onnx(net, str(tmp_path / "net.onnx"), example_inputs=inputs)
    assert (len(record["inputs"]), len(record["outputs"])) == (len(given), 3)
    net.eval()
    with torch.no_grad():
        wanted = net(**inputs) if isinstance(inputs, dict) else net(*inputs if inputs is not X else (X,))
    found = run(tmp_path / "net.onnx", *given)
    for result, expected in zip(found, [wanted["pooled"], wanted["more"][0]], strict=False):
        np.testing.assert_allclose(result, expected.numpy(), atol=1e-5)
    assert found[2] == wanted["more"][2].numpy()


def test_nothing_is_said_meanwhile(tmp_path, capfd, recwarn):
    disabled = logging.root.manager.disable
    export_onnx(Several(), tmp_path / "net.onnx", example_inputs=X)
    with pytest.raises(ValueError, match="cannot be exported"):
        export_onnx(BranchingOnValues(), tmp_path / "net.onnx", example_inputs=X)
    assert capfd.readouterr() == ("", "")
    assert [str(warning.message) for warning in recwarn] == []
    assert logging.root.manager.disable == disabled


def test_wrappers_and_bridgeout_are_looked_through(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    add_bridgeout(net)
    with torch.no_grad():
        expected = net.eval()(X).numpy()
    net.train()
    export_onnx(torch.compile(net), tmp_path / "net.onnx", example_inputs=X)
    np.testing.assert_allclose(run(tmp_path / "net.onnx", X)[0], expected, atol=1e-5)


def test_the_norms_of_a_gpu_take_no_batch_of_any_size_when_exported_there():
    """Why a copy on the CPU is exported. The tensors are PyTorch's stand-ins for those of a GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval().requires_grad_(False)
        x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        with pytest.raises(Exception, match="65535"):
            regrow.shipping.onnx._program(net, x)
        program, _ = regrow.shipping.onnx._program(net, x, 65535)
    assert [(each.lower, each.upper) for each in program.range_constraints.values()] == [(1, 65535)]


@pytest.mark.parametrize("moves", [True, False])
def test_a_model_on_a_gpu_is_exported_from_a_copy_on_the_cpu_if_it_can(cut_net, tmp_path, monkeypatch, moves):
    before = {name: id(tensor) for name, tensor in cut_net.named_parameters()}
    exported = []
    real = torch.export.export

    def export(model, *args, **kwargs):
        exported.append(model)
        if model is not cut_net and not moves:
            raise RuntimeError("Expected all tensors to be on the same device")
        return real(model, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", export)
    monkeypatch.setattr(regrow.shipping.onnx, "device_of", lambda _: torch.device("cuda"))
    record = export_onnx(cut_net, tmp_path / "net.onnx", example_inputs=X)
    assert record["difference"] < 1e-5
    assert [model is cut_net for model in exported] == ([False] if moves else [False, True])
    assert run(tmp_path / "net.onnx", torch.cat([X] * 5))[0].shape[0] == 5
    assert {name: id(tensor) for name, tensor in cut_net.named_parameters()} == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu(cut_net, tmp_path):
    record = export_onnx(cut_net.cuda(), tmp_path / "net.onnx", example_inputs=X.cuda())
    assert record["batches"] == [1, 3]
    assert next(cut_net.parameters()).is_cuda


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (nn.Conv2d(3, 4, 3), torch.tensor(1.0), "batch as first dimension"),
        (nn.Conv2d(3, 4, 3), (X[:0], torch.tensor(1.0)), "not empty"),
        (Several(), (X, torch.randn(2, 4)), r"sizes \[1, 2\]"),
        (nn.Conv2d(3, 4, 3), {"input": None}, r"sizes \[\]"),
        (nn.Conv2d(3, 4, 3), X[:, :2], "fails on a batch of 1 .* to have 3 channels"),
        (OfTwoPictures(), torch.cat([X, X]), "fails on a batch of 3"),
        (Sized(), X, "cannot be exported with a batch of any size"),
        (BranchingOnValues(), X, "cannot be exported .* must not depend on values"),
        (Restless(), X, "is off by .* of the largest value"),
        (nn.Conv2d(3, 4, 3).bfloat16(), X.bfloat16(), r"onnxruntime cannot run .* model.float\(\)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_left(model, inputs, message, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"the old file")
    with pytest.raises(ValueError, match=message):
        export_onnx(model, path, example_inputs=inputs)
    assert os.listdir(tmp_path) == ["net.onnx"]
    assert path.read_bytes() == b"the old file"
    assert model.training


def test_a_wrong_result_is_refused(tmp_path, monkeypatch):
    """1.5e-4 of the largest value is too much, 0.5e-4 is not."""
    for off, refused in [(1.5e-4, True), (0.5e-4, False)]:
        real = onnxruntime.InferenceSession.run

        def run(self, *args, real=real, off=off):
            return [result + np.float32(off) * abs(result).max() for result in real(self, *args)]

        with monkeypatch.context() as patch:
            patch.setattr(onnxruntime.InferenceSession, "run", run)
            if refused:
                with pytest.raises(ValueError, match="off by"):
                    export_onnx(nn.Conv2d(3, 4, 3), tmp_path / "net.onnx", example_inputs=X)
                assert not os.listdir(tmp_path)
            else:
                record = export_onnx(nn.Conv2d(3, 4, 3), tmp_path / "net.onnx", example_inputs=X)
                assert record["difference"] == pytest.approx(0.5e-4, rel=0.05)


def test_a_missing_extra_and_a_missing_folder(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no folder"):
        export_onnx(nn.Conv2d(3, 4, 3), tmp_path / "no" / "net.onnx", example_inputs=X)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else find(name))
    with pytest.raises(ValueError, match=r"pip install 'regrow\[onnx\]'"):
        export_onnx(nn.Conv2d(3, 4, 3), tmp_path / "net.onnx", example_inputs=X)


class DigitNet(nn.Module):
    """Ten digits from 8×8 pictures; ``two`` is added to what it reads, so its channels cannot just leave."""

    def __init__(self):
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.two, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.three, self.norm3 = nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, x):
        x = self.norm1(self.one(x)).relu()
        x = (x + self.norm2(self.two(x))).relu()
        return self.head(self.norm3(self.three(x)).relu().flatten(1))


def test_from_training_on_real_digits_to_the_files_that_are_shipped(tmp_path):
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(labels)
    net = DigitNet()
    optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9)

    def epoch():
        net.train()
        for rows in torch.randperm(1200).split(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()

    for _ in range(4):
        epoch()
    keep = select(score(net, "ortho"), fraction=0.3)
    cut(net, keep, example_inputs=images[:1], optimizer=optimizer)
    left = sum(len(conv.weight) for conv in (net.one, net.two, net.three))
    assert left == sum(int(mask.sum()) for mask in keep.values()) == 48 - 14
    epoch()
    path, test = tmp_path / "digits.safetensors", images[1200:]
    save(net, path)
    loaded = load(DigitNet(), path)
    with torch.no_grad():
        logits = net.eval()(test)
        assert torch.equal(loaded.eval()(test), logits)
    assert (logits.argmax(1) == labels[1200:]).float().mean() > 0.8
    record = export_onnx(loaded, tmp_path / "digits.onnx", example_inputs=images[:1])
    assert record["difference"] < 1e-5
    difference = torch.from_numpy(run(tmp_path / "digits.onnx", test)[0]) - logits
    assert difference.abs().max() <= 1e-5 * logits.abs().max()
    weights = [
        tensor for tensor in onnx.load(tmp_path / "digits.onnx").graph.initializer if tensor.data_type == 1
    ]
    assert sum(math.prod(tensor.dims) for tensor in weights) < sum(p.numel() for p in DigitNet().parameters())
