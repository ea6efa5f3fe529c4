import copy
import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from regrow.noise.layers import add_bridgeout
from regrow.shipping import checkpoint
from regrow.shipping.checkpoint import load, save
from regrow.surgery.layers import apply_plan
from regrow.surgery.plan import CutPlan

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
FIRST = CutPlan(
    rows={"conv1": [0, 2, 3, 5]}, channels={"norm1": [0, 2, 3, 5]}, columns={"conv2": [0, 2, 3, 5]}
)
# Of the four filters that the first cut left.
SECOND = CutPlan(rows={"conv1": [1, 3]}, channels={"norm1": [1, 3]}, columns={"conv2": [1, 3]})


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["regrow"])


def tamper(path, change):
    """Write the file anew with its header (a dict) and its bytes changed by ``change(header, body)``."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    described = json.loads(header["__metadata__"]["regrow"])
    body = change(header=header, described=described, body=body) or body
    if "regrow" in header["__metadata__"]:
        header["__metadata__"]["regrow"] = json.dumps(described)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def snapshot(model):
    """Everything that a load could have changed: classes, attributes, tensors by identity and by value."""
    layers = [
        (name, type(module), {k: v for k, v in vars(module).items() if not k.startswith("_")})
        for name, module in model.named_modules()
    ]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return (
        layers,
        [(name, id(t), t.dtype, t.detach().clone()) for name, t in tensors],
        checkpoint._cuts(model),
    )


def assert_untouched(model, before):
    layers, tensors, cuts = snapshot(model)
    assert (layers, cuts) == (before[0], before[2])
    for (*found, value), (*expected, old) in zip(tensors, before[1], strict=True):
        assert found == expected
        assert torch.equal(bits(value), bits(old))


def bits(tensor):
    """The bytes of ``tensor``'s entries, by which NaN equals itself and 0 is not -0."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def assert_same_state(model, other):
    states = model.state_dict(), other.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        other = states[1][name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
        assert torch.equal(bits(tensor), bits(other)), name


@pytest.fixture
def trained(make_net, train):
    net = make_net()
    train(net, torch.optim.SGD(net.parameters(), 0.1), 3, X)
    return net


@pytest.fixture
def saved(trained, tmp_path):
    """The file of a net that lost conv1's filters 1 and 4."""
    apply_plan(trained, FIRST)
    save(trained, tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


@pytest.mark.devices
def test_a_net_that_was_never_cut(trained, make_net, tmp_path):
    path = tmp_path / "net.safetensors"
    assert save(trained, path) is None
    assert metadata(path) == {"version": 1, "cuts": [], "shared": {}}
    assert os.listdir(tmp_path) == ["net.safetensors"]
    fresh = make_net().eval()
    assert load(fresh, str(path)) is fresh
    assert_same_state(fresh, trained)
    assert not fresh.training
    assert torch.equal(fresh(X), trained.eval()(X))


@pytest.mark.devices
def test_a_cut_net_on_a_freshly_built_one(trained, saved, make_net):
    assert metadata(saved) == {
        "version": 1,
        "cuts": [{"module": "", "plan": FIRST.to_dict()}],
        "shared": {},
    }
    assert load_file(saved)["conv1.weight"].shape == (4, 3, 3, 3)
    fresh = load(make_net(), saved)
    assert (fresh.conv1.out_channels, fresh.norm1.num_features, fresh.conv2.in_channels) == (4, 4, 4)
    assert_same_state(fresh, trained)
    assert torch.equal(fresh.eval()(X), trained.eval()(X))
    fresh.train()(X).sum().backward()
    assert fresh.conv1.weight.grad.shape == (4, 3, 3, 3)


@pytest.mark.devices
def test_what_was_loaded_can_be_copied_cut_again_and_saved(saved, make_net, tmp_path):
    fresh = load(make_net(), saved)
    save(copy.deepcopy(fresh), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()
    apply_plan(fresh, SECOND)
    save(fresh, tmp_path / "smaller.safetensors")
    cuts = [FIRST.to_dict(), SECOND.to_dict()]
    assert [cut["plan"] for cut in metadata(tmp_path / "smaller.safetensors")["cuts"]] == cuts
    smallest = load(make_net(), tmp_path / "smaller.safetensors")
    assert smallest.conv1.out_channels == 2
    assert torch.equal(smallest.eval()(X), fresh.eval()(X))


def test_a_net_cut_already_takes_weights_of_the_same_cuts_only(trained, saved, make_net):
    same = make_net()
    apply_plan(same, FIRST)
    assert_same_state(load(same, saved), trained)
    assert [cut["plan"] for cut in checkpoint._cuts(same)] == [FIRST.to_dict()]
    other = make_net()
    apply_plan(other, CutPlan(rows={"conv3": [0, 1]}, channels={"norm3": [0, 1]}, columns={"head": [0, 1]}))
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"has been cut before, and not as the one in .* build it afresh"):
        load(other, saved)
    assert_untouched(other, before)


def test_a_part_that_was_cut_by_itself(make_net, tmp_path):
    def build():
        return nn.ModuleDict({"backbone": make_net(), "head": nn.Linear(4, 2)})

    whole = build()
    apply_plan(whole["backbone"], FIRST)
    save(whole, tmp_path / "net.safetensors")
    assert metadata(tmp_path / "net.safetensors")["cuts"] == [{"module": "backbone", "plan": FIRST.to_dict()}]
    fresh = load(build(), tmp_path / "net.safetensors")
    assert_same_state(fresh, whole)
    assert fresh["backbone"].conv1.out_channels == 4
    apply_plan(whole, CutPlan(rows={"backbone.conv3": [0]}))
    with pytest.raises(ValueError, match="'backbone' was cut by itself, and the model around it as well"):
        save(whole, tmp_path / "net.safetensors")


class Assorted(nn.Module):
    """Tensors of every kind that a state can hold."""

    def __init__(self, fill=0):
        super().__init__()
        self.sixteen = nn.Parameter(torch.full((2, 3), 0.1 + fill, dtype=torch.float16))
        self.brain = nn.Parameter(torch.full((3,), 0.1 + fill, dtype=torch.bfloat16))
        self.scale = nn.Parameter(torch.full((), 0.1 + fill, dtype=torch.float64), requires_grad=False)
        self.register_buffer("count", torch.tensor(2**62 + fill))
        self.register_buffer("flags", torch.tensor([True, not fill]))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("missing", None)
        self.register_buffer("transposed", torch.arange(6.0).view(2, 3).t() + fill)
        self.register_buffer("images", (torch.randn(2, 3, 4, 4)).to(memory_format=torch.channels_last))
        whole = torch.arange(8.0) + fill
        self.register_buffer("left", whole[:4])
        self.register_buffer("right", whole[4:])
        self.register_buffer("reshaped", whole.view(2, 4))
        self.register_buffer("same", torch.ones(()).expand(5).clone())
        self.register_buffer("temporary", torch.tensor(7.0 + fill), persistent=False)


@pytest.mark.devices
def test_tensors_of_every_kind(tmp_path):
    net, path = Assorted(1), tmp_path / "net.safetensors"
    with torch.no_grad():
        net.images[0, 0, 0] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    before = snapshot(net)
    save(net, path)
    assert_untouched(net, before)
    assert set(load_file(path)) == set(net.state_dict())
    assert "temporary" not in load_file(path)
    fresh = Assorted()
    load(fresh, path)
    assert_same_state(fresh, net)
    assert fresh.temporary == 7
    assert not fresh.scale.requires_grad
    # As the model has them, not as they were when saved.
    assert fresh.images.is_contiguous(memory_format=torch.channels_last)
    assert not fresh.transposed.is_contiguous()
    assert fresh.missing is None


class TiedOrApart(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        if tie:
            self.two.weight = self.one.weight
            self.again = self.norm


@pytest.mark.devices
def test_tied_tensors_are_stored_once_and_tied_again(tmp_path):
    path = tmp_path / "net.safetensors"
    net = TiedOrApart()
    with torch.no_grad():
        net.norm.running_mean += 3
    save(net, path)
    shared = metadata(path)["shared"]
    assert shared["two.weight"] == "one.weight"
    assert shared["again.running_mean"] == "norm.running_mean"
    assert not set(shared) & set(load_file(path))
    assert_same_state(load(TiedOrApart(), path), net)
    apart = TiedOrApart(tie=False)
    apart.again = nn.BatchNorm2d(3)
    load(apart, path)
    assert_same_state(apart, net)
    assert apart.two.weight is apart.one.weight
    assert apart.again.running_mean is apart.norm.running_mean
    assert apart.two.bias is not apart.one.bias
    assert len(list(apart.parameters())) == len(list(net.parameters()))


def test_tensors_that_share_memory_without_being_one_parameter(tmp_path):
    net, path = TiedOrApart(tie=False), tmp_path / "net.safetensors"
    net.two.weight.data = net.one.weight.data
    save(net, path)
    assert metadata(path)["shared"] == {"two.weight": "one.weight"}
    own = net.two.weight
    load(net, path)
    assert net.two.weight is own
    assert_same_state(load(TiedOrApart(tie=False), path), net)


def test_two_stored_tensors_do_not_go_into_one(tmp_path):
    path = tmp_path / "net.safetensors"
    apart = TiedOrApart(tie=False)
    apart.again = nn.BatchNorm2d(3)
    save(apart, path)
    tied = TiedOrApart()
    before = snapshot(tied)
    with pytest.raises(ValueError, match=r"shares one tensor between 'two.weight' and 'one.weight'"):
        load(tied, path)
    assert_untouched(tied, before)


@pytest.mark.parametrize(
    "wrap", [torch.compile, nn.DataParallel, lambda net: torch.compile(nn.DataParallel(net))]
)
def test_wrappers_leave_no_prefix(wrap, trained, make_net, tmp_path):
    path = tmp_path / "net.safetensors"
    save(wrap(trained), path)
    assert set(load_file(path)) == set(trained.state_dict())
    wrapped = wrap(make_net())
    assert load(wrapped, path) is wrapped
    assert_same_state(load(make_net(), path), trained)


@pytest.mark.devices
def test_cuts_and_wrappers(saved, make_net, trained):
    compiled = torch.compile(make_net())
    assert_same_state(load(compiled, saved)._orig_mod, trained)
    for wrap in (nn.DataParallel, lambda net: torch.compile(nn.DataParallel(net))):
        wrapped = wrap(make_net())
        before = snapshot(wrapped)
        with pytest.raises(ValueError, match=r"load was refused.*Give model.module"):
            load(wrapped, saved)
        assert_untouched(wrapped, before)


@pytest.mark.devices
def test_bridgeout_may_be_on_either_side(saved, trained, make_net, tmp_path):
    add_bridgeout(trained)
    save(trained, tmp_path / "noisy.safetensors")
    assert (tmp_path / "noisy.safetensors").read_bytes() == saved.read_bytes()
    fresh = load(make_net(), saved)
    add_bridgeout(fresh)
    assert_same_state(load(fresh, saved), trained)


def set_cut(part, name, value):
    def change(described, **_):
        described["cuts"][0]["plan"][part][name] = value

    return change


def described_as(key, value):
    def change(described, **_):
        described[key] = value

    return change


def tensor_as(name, **entries):
    def change(header, **_):
        header[name].update(entries)

    return change


def renamed(old, new):
    def change(header, **_):
        header[new] = header.pop(old)

    return change


def dropped_tensor(header, body, **_):
    """The last one, so that the rest of the file stays whole."""
    last = max(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    start, _ = header.pop(last)["data_offsets"]
    return body[:start]


def without(key):
    def change(described, **_):
        del described[key]

    return change


def no_metadata(header, **_):
    del header["__metadata__"]["regrow"]


def cut_of(module):
    def change(described, **_):
        described["cuts"][0]["module"] = module

    return change


HOSTILE = {
    "version newer": (described_as("version", 2), "has version 2, and this regrow reads version 1"),
    "version true": (described_as("version", True), "has no version number"),
    "version zero": (described_as("version", 0), "has no version number"),
    "no version": (without("version"), "has no version number"),
    "no cuts": (without("cuts"), "has the keys"),
    "more keys": (described_as("run", "rm"), "has the keys"),
    "no metadata": (no_metadata, "holds no cuts"),
    "cuts a dict": (described_as("cuts", {}), "not a list of modules"),
    "a cut a string": (described_as("cuts", ["x"]), "not a list of modules"),
    "shared a list": (described_as("shared", []), "shared tensors"),
    "shared with nothing": (described_as("shared", {"conv1.weight2": "conv9.weight"}), "shared tensors"),
    "shared and stored": (described_as("shared", {"conv1.weight": "conv2.weight"}), "shared tensors"),
    "shared with a list": (described_as("shared", {"a": ["b"]}), "shared tensors"),
    "shared but unknown": (described_as("shared", {"conv8.bias": "conv1.bias"}), "has 'conv8.bias', which"),
    "cuts another module": (cut_of("features"), "cuts 'features'"),
    "cuts the wrong module": (cut_of("conv1"), "does not have"),
    "an unknown layer": (set_cut("rows", "conv7", [0]), "'conv7', which .* did you mean 'conv"),
    "a layer without filters": (set_cut("rows", "relu1", [0]), "does not fit the model"),
    "out of range": (set_cut("rows", "conv1", [0, 2, 3, 6]), "does not fit 'conv1'"),
    "far out of range": (set_cut("columns", "conv2", [0, 2, 3, 2**70]), "does not fit 'conv2'"),
    "negative": (set_cut("rows", "conv1", [-6, 2, 3, 5]), "cannot hold"),
    "twice": (set_cut("channels", "norm1", [0, 2, 2, 5]), "does not fit 'norm1'"),
    "unsorted": (set_cut("rows", "conv1", [2, 0, 3, 5]), "does not fit 'conv1'"),
    "none left": (set_cut("rows", "conv1", []), "does not fit 'conv1'"),
    "not whole": (set_cut("rows", "conv1", [0, 2.0, 3, 5]), "cannot hold"),
    "true": (set_cut("rows", "conv1", [False, True, 3, 5]), "cannot hold"),
    "a string": (set_cut("rows", "conv1", "0235"), "cannot hold"),
    "nested": (set_cut("rows", "conv1", [[0], 2, 3, 5]), "cannot hold"),
    "null": (set_cut("rows", "conv1", None), "cannot hold"),
    "fewer rows than stored": (
        set_cut("rows", "conv1", [0, 2, 3]),
        r"shape \[4, 3, 3, 3\] in the file and \[3, 3, 3, 3\] in the model",
    ),
    "more groups": (set_cut("groups", "conv1", 3), "do not go into 3 groups"),
    "no groups": (set_cut("groups", "conv1", 0), "do not go into 0 groups"),
    "placed by a wrong number": (set_cut("placed", "conv1", [6, [0, 2, 3]]), "places 3 channels"),
    "placed beyond": (set_cut("placed", "conv1", [4, [0, 2, 3, 5]]), "does not fit 'conv1'"),
    "placed in the dark": (set_cut("placed", "conv1", [10**15, [0, 2, 3, 5]]), "conv1"),
    "picked beyond": (set_cut("picked", "conv2", [0, 2, 3, 6]), "conv2"),
    "picked by a wrong number": (set_cut("picked", "conv2", [0, 2]), "picks 2 channels"),
    "of another type": (tensor_as("conv2.bias", dtype="I32"), r"is torch.int32 .*model.to\(torch.int32\)"),
    "other shape, same size": (
        tensor_as("conv1.weight", shape=[3, 4, 3, 3]),
        r"'conv1.weight' has shape \[3, 4, 3, 3\] in the file and \[4, 3, 3, 3\] in the model",
    ),
    "other size": (tensor_as("conv1.weight", shape=[6, 3, 3, 3]), "not a whole file"),
    "size beyond numbers": (tensor_as("conv1.weight", shape=[2**40, 2**40]), "not a whole file"),
    "of a type PyTorch has not": (
        tensor_as("conv1.weight", dtype="F6_E2M3", shape=[576]),
        "F6_E2M3|not a whole file",  # as safetensors does or does not know the type
    ),
    "unknown type": (tensor_as("conv1.weight", dtype="P64"), "not a whole file"),
    "offsets that overlap": (tensor_as("conv1.bias", data_offsets=[0, 16]), "not a whole file"),
    "a tensor is missing": (dropped_tensor, "has '.*', which the file lacks"),
    "a tensor renamed": (renamed("conv1.bias", "conv1.bais"), "has 'conv1.bias', .* or 'conv1.bais'"),
    "cut off": (lambda body, **_: body[:-1], "not a whole file"),
    "longer": (lambda body, **_: body + b"\0", "not a whole file"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_lies_is_refused_and_the_model_untouched(case, saved, make_net):
    change, message = HOSTILE[case]
    tamper(saved, change)
    fresh = make_net()
    before = snapshot(fresh)
    with pytest.raises(ValueError, match=message) as refusal:
        load(fresh, saved)
    assert str(saved) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert_untouched(fresh, before)


def with_metadata(text):
    header = json.dumps({"__metadata__": {"regrow": text}}).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04\x95",
        b"PK\x03\x04 a zip archive, as torch.save writes",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100_000_001) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 100_000) + b'{"a":' * 20_000,
        with_metadata("{"),
        with_metadata("null"),
        with_metadata("[" * 100_000),
        with_metadata('{"a":' * 100_000),
        with_metadata('{"version": 1' + "0" * 5000 + "}"),
        with_metadata('{"version": NaN, "cuts": [], "shared": {}}'),
        with_metadata('{"version": 1, "cuts": [' + "[" * 900 + "]" * 900 + '], "shared": {}}'),
    ],
    ids=range(16),
)
def test_what_is_no_such_file_at_all(data, make_net, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(data)
    fresh = make_net()
    before = snapshot(fresh)
    with pytest.raises(ValueError, match=r"net.safetensors is not a whole file written by regrow.save: "):
        load(fresh, path)
    assert_untouched(fresh, before)


@pytest.fixture(scope="module")
def one_file(make_net, tmp_path_factory):
    net = make_net((4, 2))
    apply_plan(net, CutPlan(rows={"conv1": [1, 2]}, channels={"norm1": [1, 2]}, columns={"conv2": [1, 2]}))
    path = tmp_path_factory.mktemp("files") / "net.safetensors"
    save(net, path)
    return path


@given(data=st.data())
def test_damage_anywhere_is_refused_or_leaves_a_whole_model(one_file, make_net, data):
    whole = bytearray(one_file.read_bytes())
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    damaged = one_file.with_name("damaged.safetensors")
    damaged.write_bytes(whole[: data.draw(st.sampled_from([len(whole), length, length // 2]))])
    fresh = make_net((4, 2))
    before = snapshot(fresh)
    try:
        load(fresh, damaged)
    except ValueError:
        assert_untouched(fresh, before)
    else:
        assert fresh.conv1.weight.shape == (2, 3, 3, 3)
        assert fresh(X).shape == (4, 4)


def test_missing_files_and_folders(make_net, trained, tmp_path):
    with pytest.raises(FileNotFoundError):
        load(make_net(), tmp_path / "no.safetensors")
    with pytest.raises(FileNotFoundError, match="no folder"):
        save(trained, tmp_path / "no" / "net.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        load(make_net(), tmp_path)


def test_plain_safetensors_are_refused(trained, make_net, tmp_path):
    save_file(trained.state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"holds no cuts \(plain safetensors are loaded with"):
        load(make_net(), tmp_path / "plain.safetensors")


def test_an_interrupted_save_leaves_the_old_file(saved, trained, tmp_path, monkeypatch):
    old = saved.read_bytes()

    def interrupted(_tensors, path, _metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(trained, saved)
    assert saved.read_bytes() == old
    assert os.listdir(tmp_path) == [saved.name]


class WithState(nn.Module):
    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        raise AssertionError(state)


def with_buffer(tensor):
    net = nn.Module()
    net.register_buffer("table", tensor)
    return net


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (WithState(), "'_extra_state' is of type dict"),
        (nn.LazyConv2d(3, 3), "save was refused.*Run one forward pass first"),
        (nn.Linear(2, 2, device="meta"), "'weight' has no values .* meta device"),
        (with_buffer(torch.eye(3).to_sparse()), "'table' is a sparse or quantized tensor"),
        (with_buffer(torch.zeros(2, dtype=torch.complex128)), "complex128"),
    ],
    ids=str,
)
def test_what_cannot_be_stored(model, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save(model, tmp_path / "net.safetensors")
    assert not os.listdir(tmp_path)


def test_models_that_cannot_be_loaded_onto(make_net, trained, tmp_path):
    path = tmp_path / "net.safetensors"
    save(nn.Sequential(nn.Linear(2, 2)), path)
    with torch.device("meta"):
        nowhere = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"'0.weight' has no values .* build the model on a real one"):
        load(nowhere, path)
    with pytest.raises(ValueError, match=r"load was refused.* \(see '0'\). Run one forward pass first"):
        load(nn.Sequential(nn.LazyLinear(2)), path)
    save(trained.bfloat16(), path)
    fresh = make_net()
    before = snapshot(fresh)
    with pytest.raises(ValueError, match=r"is torch.bfloat16 in the file .* model.to\(torch.bfloat16\)"):
        load(fresh, path)
    assert_untouched(fresh, before)
    assert_same_state(load(make_net().to(torch.bfloat16), path), trained)


def test_a_buffer_that_cannot_be_written_to_is_found_before_anything_is_changed(tmp_path):
    def build():
        net = nn.Sequential(nn.Linear(2, 2))
        net.register_buffer("expanded", torch.zeros(1).expand(3))
        return net

    save(build(), tmp_path / "net.safetensors")
    fresh = build()
    before = snapshot(fresh)
    with pytest.raises(ValueError, match="does not fit the model"):
        load(fresh, tmp_path / "net.safetensors")
    assert_untouched(fresh, before)


def test_nothing_is_ever_unpickled(tmp_path):
    code = """
import pickle, sys, torch
from torch import nn
from regrow.shipping.checkpoint import load, save
from regrow.surgery.layers import CutPlan, apply_plan

def forbidden(*args, **kwargs):
    raise AssertionError("pickle was used")

build = lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 3))
net = build()
apply_plan(net, CutPlan(rows={"0": [1, 4]}, columns={"1": [1, 4]}))
for name in ("load", "loads", "Unpickler", "dump", "dumps", "Pickler", "_Unpickler", "_Pickler"):
    setattr(pickle, name, forbidden)
torch.load = torch.save = torch.serialization.load = torch.serialization._load = forbidden
sys.addaudithook(lambda event, args: forbidden() if event == "pickle.find_class" else None)
save(net, sys.argv[1])
loaded = load(build(), sys.argv[1])
x = torch.randn(2, 3, 8, 8)
assert torch.equal(net(x), loaded(x)) and loaded[0].out_channels == 2
"""
    command = [sys.executable, "-c", code, str(tmp_path / "net.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def without_checksum(header, **_):
    del header["__metadata__"]["regrow-sha256"]


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_loads_other_values(one_file, make_net, where, bit):
    whole = bytearray(one_file.read_bytes())
    whole[int(where * len(whole))] ^= 1 << bit
    damaged = one_file.with_name("flipped.safetensors")
    damaged.write_bytes(whole)
    fresh = make_net((4, 2))
    before = snapshot(fresh)
    with pytest.raises(ValueError, match=r"flipped.safetensors") as refused:
        load(fresh, damaged)
    assert len(str(refused.value)) < 500
    assert_untouched(fresh, before)


@pytest.mark.parametrize("part", ["weights", "cuts", "checksum"])
def test_other_values_than_were_saved_are_damage(saved, make_net, part):
    def change(header, described, body):
        if part == "weights":
            return body[:-1] + bytes([body[-1] ^ 1])
        if part == "cuts":  # another plan of the same shapes
            described["cuts"][0]["plan"]["rows"]["conv1"] = [0, 1, 2, 3]
            described["cuts"][0]["plan"]["channels"]["norm1"] = [0, 1, 2, 3]
            described["cuts"][0]["plan"]["columns"]["conv2"] = [0, 1, 2, 3]
        else:
            header["__metadata__"]["regrow-sha256"] = "0" * 64
        return body

    tamper(saved, change)
    fresh = make_net()
    before = snapshot(fresh)
    with pytest.raises(ValueError, match="is damaged: its checksum is not that of what it holds"):
        load(fresh, saved)
    assert_untouched(fresh, before)


def test_a_file_from_before_there_was_a_checksum_is_loaded(saved, trained, make_net):
    tamper(saved, without_checksum)
    assert_same_state(load(make_net(), saved), trained)


def test_an_entry_of_the_metadata_that_nobody_wrote_is_refused(saved, make_net):
    tamper(saved, lambda header, **_: header["__metadata__"].update(other="x"))
    with pytest.raises(ValueError, match="has an unknown entry 'other'"):
        load(make_net(), saved)


def test_what_is_no_plain_file_is_refused_at_once(make_net, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, message in ((tmp_path / "pipe", "is not a plain file"), ("/dev/zero", "is not a plain file")):
        with pytest.raises(ValueError, match=message):
            load(make_net(), path)
    with pytest.raises(OSError, match=r"loop cannot be read: Too many levels"):
        load(make_net(), tmp_path / "loop")


def test_a_file_that_cannot_be_written_is_named_without_numbers(trained, tmp_path, monkeypatch):
    with pytest.raises(OSError, match="cannot be written: File name too long") as refused:
        save(trained, tmp_path / ("n" * 300))
    assert "Errno" not in str(refused.value)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder cannot be written: Is a directory"):
        save(trained, tmp_path / "folder")
    monkeypatch.setattr(
        os, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(30, "Read-only file system"))
    )
    with pytest.raises(OSError, match=r"net.safetensors cannot be written: Read-only file system\.$"):
        save(trained, tmp_path / "net.safetensors")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_name_of_255_bytes_is_written(trained, make_net, tmp_path):
    path = tmp_path / ("n" * 243 + ".safetensors")
    save(trained, path)
    assert_same_state(load(make_net(), path), trained)
