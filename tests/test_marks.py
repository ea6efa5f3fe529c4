"""Every cell of the table: each public operation on a model in each state."""

import contextlib
import copy
import gc
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import regrow
from regrow.marks import OPERATIONS, REFUSED, STATES, check, states_of, strip
from regrow.modules import unwrap
from regrow.surgery.removal import remove_filters

DOCS = Path(__file__).parents[1] / "docs"
X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
KEEP = {"conv2": torch.tensor([True, False, True, True, False, True])}


def net():
    """conv1, norm1, conv2, norm2, conv3, norm3, head; its norms have seen pictures."""
    torch.manual_seed(0)
    model = nn.Sequential()
    channels = 3
    for i, width in enumerate((4, 6, 5), 1):
        model.add_module(f"conv{i}", nn.Conv2d(channels, width, 3, padding=1))
        model.add_module(f"norm{i}", nn.BatchNorm2d(width))
        model.add_module(f"relu{i}", nn.ReLU())
        channels = width
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("head", nn.Linear(channels, 4))
    for _ in range(3):
        model(X)
    return model


class Residual(nn.Module):
    """A stream that two convolutions are added to: cut in one of them alone, that one places its channels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv3, self.norm3 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        x = (x + self.norm2(self.conv2(x))).relu()
        return self.head(self.norm3(self.conv3(x)).relu().mean((2, 3)))


@dataclass
class Situation:
    """A model in a state.

    Attributes:
        model: as the user has it, in its wrappers.
        plain: an ordinary model that computes the same in evaluation mode.
        fresh: makes the model that the user builds before loading a file.
        kept: objects that the state needs.
    """

    model: nn.Module
    plain: nn.Module
    fresh: Any = net
    kept: Any = None


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def in_sub_phase(model, compact):
    optimizer = sgd(model)
    cycle = regrow.RePr(
        model, optimizer, example_inputs=X[:1], full=1, sub=5, cycles=1, fraction=0.4, compact=compact
    )
    cycle.step()
    return Situation(model, copy.deepcopy(model), kept=(cycle, optimizer))


def in_a_cycle(model):
    optimizer = sgd(model)
    cycle = regrow.RePr(model, optimizer, example_inputs=X[:1], full=5)
    return Situation(model, copy.deepcopy(model), kept=(cycle, optimizer))


def replacing_units(model):
    method = regrow.ContinualBackprop(model, sgd(model), example_inputs=X[:1])
    return Situation(model, copy.deepcopy(model), kept=method)


def sparse(model):
    optimizer = sgd(model)
    method = regrow.DenseSparseDense(model, optimizer)
    method.sparsify()
    return Situation(model, copy.deepcopy(model), kept=(method, optimizer))


def with_bridgeout(model):
    plain = copy.deepcopy(model)
    regrow.add_bridgeout(model, p=0.3, seed=1)
    return Situation(model, plain)


def placed(_):
    model = Residual()
    for _ in range(3):
        model(X)
    plain = copy.deepcopy(model)
    remove_filters(plain, KEEP, example_inputs=X[:1])
    regrow.cut(model, KEEP, example_inputs=X[:1])
    assert hasattr(model.norm2, "_regrow_placed") or hasattr(model.conv2, "_regrow_placed")
    return Situation(model, plain, fresh=Residual)


def folded(model):
    deployed, _ = regrow.fold_norms(model, example_inputs=X[:1])
    return Situation(deployed, model)


def observed(model):
    from torch.ao import quantization

    model.qconfig = quantization.get_default_qat_qconfig("x86")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = quantization.prepare_qat(model.train())
    prepared(X)
    prepared.apply(quantization.disable_observer)
    return Situation(prepared, copy.deepcopy(prepared), fresh=lambda: copy.deepcopy(prepared))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(model):
    def double(some):
        parametrize.register_parametrization(some.conv3, "weight", Doubled())
        return some

    plain = copy.deepcopy(model)
    plain.conv3.weight.data.mul_(2)
    return Situation(double(model), plain, fresh=lambda: double(net()))


def pruned(model):
    prune.l1_unstructured(model.conv3, "weight", 0.3)
    plain = net()
    plain.conv3.weight.data.copy_(model.conv3.weight)
    return Situation(model, plain)


def weight_normed(model):
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(model.conv3)
    return Situation(model, plain)


def made_in_inference_mode(model):
    with torch.inference_mode():
        made = nn.Sequential(*[nn.Conv2d(3, 4, 3)])
    with torch.inference_mode():
        return Situation(copy.deepcopy(model), model, kept=made)


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain = copy.deepcopy(model)
    fully_shard(model.conv2, mesh=init_device_mesh("cpu", (1,)))
    return Situation(model, plain)


def lazy(model):
    plain = copy.deepcopy(model)
    model.conv2 = nn.LazyConv2d(6, 3, padding=1)
    return Situation(model, plain)


def compiled_in_place(model):
    model.compile(backend="eager")
    return Situation(model, net())


# (state, how a model comes into it)
CASES = {
    "narrowed": ("narrowed", lambda model: in_sub_phase(model, True)),
    "masked": ("masked", lambda model: in_sub_phase(model, False)),
    "in a cycle": ("in a cycle", in_a_cycle),
    "replacing units": ("replacing units", replacing_units),
    "sparse": ("sparse", sparse),
    "bridgeout": ("bridgeout", with_bridgeout),
    "placed": ("placed", placed),
    "folded": ("folded", folded),
    "observed": ("observed", observed),
    "DataParallel": ("data parallel", lambda model: Situation(nn.DataParallel(model), copy.deepcopy(model))),
    "DDP": (
        "data parallel",
        lambda model: Situation(nn.parallel.DistributedDataParallel(model), copy.deepcopy(model)),
    ),
    "sharded": ("sharded", sharded),
    "compiled": (
        "compiled",
        lambda model: Situation(torch.compile(model, backend="eager"), copy.deepcopy(model)),
    ),
    "compiled in place": ("compiled", compiled_in_place),
    "parametrized": ("parametrized", parametrized),
    "pruning masks": ("pruning masks", pruned),
    "weight hooks": ("weight hooks", weight_normed),
    "inference mode": ("inference mode", lambda model: Situation(model, copy.deepcopy(model))),
    "inference tensors": ("inference tensors", made_in_inference_mode),
    "lazy": ("lazy", lazy),
}


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def values(model):
    """What the user's own model computes in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        found = unwrap(model).eval()(X)
    for module, mode in modes.items():
        module.training = mode
    return found


def snapshot(model):
    """Everything that an operation could change."""
    tensors = {name: t if nn.parameter.is_lazy(t) else t.clone() for name, t in model.state_dict().items()}
    return tensors, [(name, type(module), module.training) for name, module in model.named_modules()]


def assert_same(before, after):
    assert before[1] == after[1]
    assert before[0].keys() == after[0].keys()
    for name, tensor in before[0].items():
        same = tensor is after[0][name] if nn.parameter.is_lazy(tensor) else None
        assert same or bool((tensor == after[0][name]).all()), name


def context(state):
    return torch.inference_mode() if state == "inference mode" else contextlib.nullcontext()


def train_a_cycle(model, settings):
    """A whole cycle on ``model``; that its dropped filters are at 0 in between, and new ones afterwards."""
    inner, optimizer = unwrap(model), sgd(model)
    cycle = regrow.RePr(model, optimizer, example_inputs=X[:1], full=1, sub=2, cycles=1, **settings)
    dropped = cycle.step().filters
    assert dropped
    for _ in range(2):
        optimizer.zero_grad()
        inner.train()(X).square().mean().backward()
        optimizer.step()
        for name, filters in dropped.items():
            assert not inner.get_submodule(name).weight[filters].any()
        cycle.step()
    for name, filters in dropped.items():
        assert inner.get_submodule(name).weight[filters].flatten(1).any(1).all()
    cycle.remove()
    assert values(model).isfinite().all()


# operation → what it does to a model in a situation, and how its result is held against that of the plain one
def repr_(s, _):
    train_a_cycle(s.model, {"fraction": 0.4})


def restart(s, _):
    inner = unwrap(s.model)
    borrowed = [name for name, layer in inner.named_modules() if name == "conv3" and is_borrowed(layer)]
    before, _ = snapshot(inner)
    record = regrow.restart(s.model, sgd(inner), example_inputs=X[:1], fraction=0.4)
    assert record["filters"]
    assert {"conv1", *borrowed} <= record["left_out"].keys()
    for name, filters in record["filters"].items():
        new, old = inner.get_submodule(name).weight[filters], before[f"{name}.weight"][filters]
        assert (new != old).flatten(1).any(1).all()
        assert new.flatten(1).any(1).all()
    assert values(s.model).isfinite().all()


def cut(s, _):
    keep = {name: mask for name, mask in KEEP.items() if len(mask) == unwrap(s.model).conv2.out_channels}
    keep = keep or {"conv1": torch.arange(6) % 3 > 0}
    regrow.cut(s.model, keep, example_inputs=X[:1])
    remove_filters(s.plain, keep, example_inputs=X[:1])
    torch.testing.assert_close(values(s.model), values(s.plain))


def prune_(s, _):
    placed_before = states_of(s.model).get("placed") is not None
    report = regrow.prune(s.model, fraction=0.4, example_inputs=X[:1], compensate=False)
    assert report["filters"]["after"] < report["filters"]["before"]
    if not placed_before:  # else the indices are of the filters that the cut had left
        keep = {name: torch.ones(len(s.plain.get_submodule(name).weight)) > 0 for name in report["dropped"]}
        for name, filters in report["dropped"].items():
            keep[name][filters] = False
        remove_filters(s.plain, keep, example_inputs=X[:1])
        torch.testing.assert_close(values(s.model), values(s.plain))


def compensate(s, _):
    # Least squares leaves a weight that is computed from others as it is.
    method = "means" if "parametrized" in states_of(s.model) else "least-squares"
    for model in (s.model, s.plain):
        regrow.compensate(model, KEEP, [X], example_inputs=X[:1], method=method)
    torch.testing.assert_close(values(s.model), values(s.plain))


def read_as(s, _):
    for reading in ("zeroed", "removed"):
        for model in (s.model, s.plain):
            regrow.read_as(model, KEEP, reading, example_inputs=X[:1])
        torch.testing.assert_close(values(s.model), values(s.plain))


def add_bridgeout(s, _):
    expected = values(s.plain)
    borrowed = [
        name for name, layer in unwrap(s.model).named_modules() if name == "conv3" and is_borrowed(layer)
    ]
    if borrowed:
        with pytest.raises(
            ValueError, match=r"'conv3' cannot have Bridgeout.* ends that.*exclude=\['conv3'\]"
        ):
            regrow.add_bridgeout(s.model)
    regrow.add_bridgeout(s.model, exclude=borrowed, seed=3)
    torch.testing.assert_close(values(s.model), expected)
    inner = unwrap(s.model).train()
    assert not torch.equal(inner(X), inner(X))
    regrow.remove_bridgeout(s.model)
    assert "bridgeout" not in states_of(s.model)
    torch.testing.assert_close(values(s.model), values(s.model))


def is_borrowed(layer):
    return "weight" not in dict(layer.named_parameters(recurse=False))


def remove_bridgeout(s, _):
    expected = values(s.plain)
    if "bridgeout" not in states_of(s.model):  # fold_norms leaves none, and a lazy layer takes none
        with pytest.raises(ValueError, match="this model has no Bridgeout"):
            regrow.remove_bridgeout(s.model)
        return
    regrow.remove_bridgeout(s.model)
    assert "bridgeout" not in states_of(s.model)
    torch.testing.assert_close(values(s.model), expected)


def fold_norms(s, _):
    deployed, record = regrow.fold_norms(s.model, example_inputs=X[:1])
    torch.testing.assert_close(values(deployed), values(s.plain))
    assert record["folded"] or states_of(s.model).get("folded") is not None
    assert not set(states_of(deployed)) & {"bridgeout", "narrowed", "masked", "in a cycle"}


def save(s, path):
    regrow.save(s.model, path / "saved.safetensors")
    if states_of(s.model).keys() & {"pruning masks", "weight hooks"}:  # load refuses such a model
        from safetensors.torch import load_file

        stored = load_file(path / "saved.safetensors")
        assert all(torch.equal(stored[name], tensor) for name, tensor in s.model.state_dict().items())
        return
    with torch.inference_mode(False):
        loaded = regrow.load(s.fresh(), path / "saved.safetensors")
    torch.testing.assert_close(values(loaded), values(s.plain))


def load(s, path):
    other = s.fresh()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    if "placed" in states_of(s.model):
        other = copy.deepcopy(s.model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.1)
    regrow.save(other, path / "other.safetensors")
    regrow.load(s.model, path / "other.safetensors")
    torch.testing.assert_close(values(s.model), values(other))


def export_onnx(s, path):
    import onnxruntime

    regrow.export_onnx(s.model, path / "model.onnx", example_inputs=X[:2])
    session = onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.tensor(found), values(s.plain), rtol=1e-3, atol=1e-4)


def reestimate_norms(s, _):
    if "folded" in states_of(s.model):
        with pytest.raises(ValueError, match="no batch norm"):
            regrow.reestimate_norms(s.model, [X])
        return
    for model in (s.model, s.plain):
        regrow.reestimate_norms(model, [X])
    torch.testing.assert_close(values(s.model), values(s.plain))


def match_norms(s, _):
    if "folded" in states_of(s.model):
        with pytest.raises(ValueError, match="same batch norms"):
            regrow.match_norms(s.model, s.plain, [X])
        return
    regrow.match_norms(s.model, s.model, [X])  # like itself: nothing moves
    torch.testing.assert_close(values(s.model), values(s.plain))


def plain_layers(s, _):
    plain = regrow.plain_layers(s.model)
    torch.testing.assert_close(values(plain), values(s.plain))
    assert not set(states_of(plain)) & {"bridgeout", "narrowed", "masked", "in a cycle", "placed"}


def drawn_anew(s, method, **settings):
    """``method`` draws the parameters that it names anew, and no others; new norms may be as they were."""
    lazy = nn.parameter.is_lazy
    before = {name: p.clone() for name, p in unwrap(s.model).named_parameters() if not lazy(p)}
    named = method(s.model, sgd(s.model), **settings)["parameters"]
    assert named
    for name, parameter in unwrap(s.model).named_parameters():
        assert "norm" in name or torch.equal(parameter, before[name]) is (name not in named), name
    assert values(s.model).isfinite().all()


def shrink_and_perturb(s, _):
    drawn_anew(s, regrow.shrink_and_perturb)


def reinitialize(s, _):
    drawn_anew(s, regrow.reinitialize, last=2)
    drawn_anew(s, regrow.reinitialize)


def redo(s, _):
    record = regrow.redo(s.model, sgd(s.model), batches=[X], example_inputs=X[:1], threshold=1)
    assert record["dormant"]
    for name, units in record["dormant"].items():
        assert not unwrap(s.model).get_submodule(name).bias[units].any()
    assert values(s.model).isfinite().all()


def continual_backprop(s, _):
    inner, optimizer = unwrap(s.model), sgd(s.model)
    method = regrow.ContinualBackprop(s.model, optimizer, example_inputs=X[:1], rate=0.5, maturity=1)
    chosen = []
    for _ in range(3):
        optimizer.zero_grad()
        inner.train()(X).square().mean().backward()
        optimizer.step()
        chosen.append(method.step())
    assert not chosen[0]
    assert chosen[1]
    method.remove()
    assert "replacing units" not in states_of(s.model)
    assert values(s.model).isfinite().all()


def knowledge_evolution(s, _):
    evolution = regrow.KnowledgeEvolution(s.model, split=0.5)
    before = {name: p.clone() for name, p in unwrap(s.model).named_parameters()}
    assert evolution.evolve(sgd(s.model))["drawn"]
    for name, mask in evolution.fixed().items():
        assert torch.equal(unwrap(s.model).get_parameter(name) == before[name], mask)


def dense_sparse_dense(s, _):
    inner, optimizer = unwrap(s.model), sgd(s.model)
    method = regrow.DenseSparseDense(s.model, optimizer)
    held = method.sparsify()["held"]
    for _ in range(2):
        optimizer.zero_grad()
        inner.train()(X).square().mean().backward()
        optimizer.step()
    for name, count in held.items():
        assert int((inner.get_parameter(name) == 0).sum()) >= count > 0
    method.densify()
    assert "sparse" not in states_of(s.model)


DO = dict(
    zip(
        OPERATIONS,
        (
            repr_, restart, cut, prune_, compensate, read_as, add_bridgeout, remove_bridgeout,
            fold_norms, save, load, export_onnx, reestimate_norms, match_norms, plain_layers,
            shrink_and_perturb, reinitialize, redo, continual_backprop, knowledge_evolution,
            dense_sparse_dense,
        ),
        strict=True,
    )
)  # fmt: skip


def make(case, operation):
    """The situation of ``case``; for the removal of Bridgeout one in which Bridgeout was added before."""
    _, enter = CASES[case]
    if operation != "remove_bridgeout" or case in ("bridgeout", "lazy"):
        return enter(net())
    if case == "placed":
        situation = enter(net())
        regrow.add_bridgeout(situation.model)
        return situation
    model = net()
    regrow.add_bridgeout(model, exclude=["conv3"], seed=1)
    situation = enter(model)
    strip(situation.plain)
    return situation


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "operation",
    [
        pytest.param(each, marks=[pytest.mark.needs_torch("2.13", each)] * (each == "export_onnx"))
        for each in OPERATIONS
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_every_operation_in_every_state(case, operation, tmp_path, request):
    if (case, operation) == ("observed", "RePr"):  # ranges of whole layers do not fit narrow ones
        request.applymarker(pytest.mark.gives_up)
    state, _ = CASES[case]
    runs = operation in REFUSED[state] or hasattr(torch.cpu.Stream, "record_event")
    if case == "sharded" and not runs:
        pytest.skip("this PyTorch runs no sharded model on a CPU")
    situation = make(case, operation)
    with context(state):
        assert state in states_of(situation.model)
    if operation not in REFUSED[state]:
        with context(state):
            DO[operation](situation, tmp_path)
        return
    before = snapshot(situation.model)
    _, end = STATES[state]
    refusal = pytest.raises(ValueError, match=f"^{operation} was refused, because the model ")
    with context(state), refusal as caught:
        DO[operation](situation, tmp_path)
    assert str(caught.value).endswith(end)
    assert_same(before, snapshot(situation.model))
    assert not list(tmp_path.glob("saved*"))


@pytest.mark.parametrize("compact", [True, False])
def test_batches_of_any_size_re_estimate_the_norms_of_a_sub_phase(compact):
    situation = in_sub_phase(net(), compact)
    batches = [X[:1, :, :1, :2], X[1:6]]  # a batch of two values a channel, and a larger one
    for model in (situation.model, situation.plain):
        regrow.reestimate_norms(model, batches)
    torch.testing.assert_close(values(situation.model), values(situation.plain))


def test_the_table_names_known_states_and_operations():
    assert REFUSED.keys() == STATES.keys() == {state for state, _ in CASES.values()}
    assert all(refused <= {*OPERATIONS} for refused in REFUSED.values())
    assert states_of(net()) == {}


def test_the_page_for_users_has_the_same_table():
    lines = (DOCS / "own-loop.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ") and line.count(" | ") == 2]
    shown = {row[0].removeprefix("| "): (row[1], row[2].removesuffix(" |")) for row in rows[1:]}
    for state, refused in REFUSED.items():
        says, operations = shown.pop(state)
        assert says == STATES[state][0]
        named = {operation for operation in OPERATIONS if f"`{operation}`" in operations}
        assert (set(OPERATIONS) - named if operations.startswith("all but") else named) == refused
    assert not shown


@pytest.mark.parametrize(
    ("layer", "name", "put"),
    [
        ("conv1", "bias", lambda layer: prune.random_unstructured(layer, "bias", 0.5)),
        ("norm2", "weight", lambda layer: prune.l1_unstructured(layer, "weight", 2)),
        ("head", "weight", lambda layer: prune.ln_structured(layer, "weight", 0.5, n=2, dim=1)),
        ("conv2", "weight", lambda layer: prune.identity(layer, "weight")),
    ],
)
def test_masks_on_any_tensor_of_any_layer_are_seen_and_their_removal_ends_the_state(layer, name, put):
    model = net()
    put(model.get_submodule(layer))
    model(X)
    assert states_of(model) == {"pruning masks": layer}
    with pytest.raises(ValueError, match=rf"\(see '{layer}'\). Call torch.nn.utils.prune.remove"):
        regrow.prune(model, fraction=0.3, example_inputs=X[:1], compensate=False)
    prune.remove(model.get_submodule(layer), name)
    assert states_of(model) == {}
    regrow.prune(model, fraction=0.3, example_inputs=X[:1], compensate=False)


def test_spectral_norm_by_hooks_is_seen():
    model = net()
    torch.nn.utils.spectral_norm(model.conv2)
    model(X)
    assert states_of(model) == {"weight hooks": "conv2"}
    torch.nn.utils.remove_spectral_norm(model.conv2)
    assert states_of(model) == {}


@pytest.mark.parametrize("case", ["narrowed", "masked", "in a cycle", "bridgeout", "placed", "folded"])
def test_a_mark_is_seen_from_the_whole_and_from_a_part(case):
    state, enter = CASES[case]
    situation = enter(net())
    model = situation.model
    for other in (nn.Sequential(model, nn.Identity()), nn.ModuleList([model]), model.conv3, model.norm2):
        parts = set(other.modules())
        if case in ("in a cycle", "bridgeout", "folded") and model.norm2 in parts and model not in parts:
            continue  # nothing is on this norm
        if case in ("narrowed", "masked", "placed") and model.conv3 in parts and model not in parts:
            continue  # the first filters to go may be of other layers
        assert state in states_of(other), other


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("width", [4, 6])
def test_a_cut_in_the_sub_phase_is_refused_and_right_after_the_release(compact, width):
    situation = in_sub_phase(net(), compact)
    keep = {"conv1": torch.arange(4) > 0} if width == 4 else KEEP
    expected = values(situation.model)
    with pytest.raises(ValueError, match=r"cut was refused.*cycle.remove\(\).*regrow.release\(model\)"):
        regrow.cut(situation.model, keep, example_inputs=X[:1])
    torch.testing.assert_close(values(situation.model), expected)
    regrow.release(situation.model)
    remove_filters(situation.plain, keep, example_inputs=X[:1])
    regrow.cut(situation.model, keep, example_inputs=X[:1])
    torch.testing.assert_close(values(situation.model), values(situation.plain))


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("lost", ["cycle", "cycle and optimizer"])
def test_a_model_is_given_back_where_the_cycle_is_lost(compact, lost):
    situation = in_sub_phase(net(), compact)
    model, (cycle, optimizer) = situation.model, situation.kept
    dropped = {
        name: (~mask).nonzero().flatten().tolist() for name, mask in cycle.keep.items() if not mask.all()
    }
    situation.kept = cycle = None
    if lost != "cycle":
        optimizer = None
    gc.collect()
    assert states_of(model).keys() == {"narrowed" if compact else "masked"}
    expected = values(model)
    record = regrow.release(nn.DataParallel(model))
    assert record == json.loads(json.dumps(record)) == {"version": 1, "dropped": dropped}
    assert states_of(model) == {}
    assert [type(module) for module in model.modules()] == [type(module) for module in net().modules()]
    assert not any(key.startswith("_regrow") for module in model.modules() for key in vars(module))
    torch.testing.assert_close(values(model), expected)
    with torch.no_grad():
        for name in dropped:
            model.get_submodule(name).weight.fill_(1)
    optimizer = optimizer or sgd(model)
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()
    for name, filters in dropped.items():
        assert model.get_submodule(name).weight[filters].all()
    train_a_cycle(model, {"fraction": 0.4})


def test_a_release_ends_the_cycle_and_leaves_a_plain_model_alone():
    situation = in_a_cycle(net())
    cycle, _ = situation.kept
    assert regrow.release(situation.model) == {"version": 1, "dropped": {}}
    with pytest.raises(ValueError, match="has been removed"):
        cycle.step()
    assert regrow.release(situation.model) == {"version": 1, "dropped": {}}


def test_a_cycle_that_is_done_or_lost_is_no_obstacle():
    model = net()
    cycle = regrow.RePr(model, sgd(model), example_inputs=X[:1], full=1, sub=1, cycles=1)
    for _ in range(2):
        cycle.step()
    assert states_of(model) == {}
    again = regrow.RePr(model, sgd(model), example_inputs=X[:1])
    assert states_of(model).keys() == {"in a cycle"}
    del again
    gc.collect()
    assert states_of(model) == {}


def test_the_removal_of_a_done_cycle_leaves_the_mark_of_a_later_one():
    model = net()
    done = regrow.RePr(model, sgd(model), example_inputs=X[:1], full=1, sub=1, cycles=1)
    for _ in range(2):
        done.step()
    later = regrow.RePr(model, sgd(model), example_inputs=X[:1])
    done.remove()
    assert states_of(model).keys() == {"in a cycle"}
    later.remove()
    assert not any("_regrow_cycle" in vars(module) for module in model.modules())


def test_copies_and_pickles_in_a_sub_phase_are_plain(tmp_path):
    for case in ("narrowed", "masked", "in a cycle"):
        model = CASES[case][1](net()).model
        torch.save(model, tmp_path / "model.pt")
        for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
            assert states_of(twin) == {}
            torch.testing.assert_close(values(twin), values(model))


def test_the_message_names_what_the_user_called_and_where(tmp_path):
    cut = net()
    regrow.cut(cut, KEEP, example_inputs=X[:1])
    regrow.save(cut, tmp_path / "cut.safetensors")
    model = net()
    regrow.add_bridgeout(model, exclude=["conv1"])
    with pytest.raises(ValueError, match=r"^load was refused, because the model has Bridgeout"):
        regrow.load(model, tmp_path / "cut.safetensors")
    check(model, "save")
