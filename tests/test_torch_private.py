"""The private names of PyTorch and torch-pruning: that they are there, that one file alone uses them, and
that their fallbacks do."""

import ast
import copy
from pathlib import Path

import pytest
import torch
import torch_pruning
from torch import nn

from regrow import torch_private as private

SOURCE = Path(private.__file__).parent

NAMES = {
    "_BatchNorm": nn.modules.batchnorm,
    "_ConvNd": nn.modules.conv,
    "_DropoutNd": nn.modules.dropout,
    "_parameters": nn.Linear(1, 1),
    "_buffers": nn.Linear(1, 1),
    "_modules": nn.Linear(1, 1),
    "_forward_hooks": nn.Linear(1, 1),
    "_forward_pre_hooks": nn.Linear(1, 1),
    "_backward_hooks": torch.ones(1),
    "_post_accumulate_grad_hooks": torch.ones(1),
    "_compiled_call_impl": nn.Linear(1, 1),
    "_orig_mod": torch.compile(nn.Linear(1, 1), backend="eager"),
    "_lazy_clone": torch,
    "_is_cow_tensor": torch._C,
    "_version": torch.ones(1),
    "_cdata": torch.ones(1).untyped_storage(),
    "_current_autograd_node": torch._C,
    "_are_functorch_transforms_active": torch._C,
    "_DisableFuncTorch": torch._C,
    "_get_sequence_nr": torch.autograd,
    "_sequence_nr": (torch.ones(1, requires_grad=True) * 2).grad_fn,
    "_HybridIndex": torch_pruning._helpers,
    "_set_grad_enabled": torch._C,
    "_current_level": torch.autograd.forward_ad,
    "_foreach_copy_": torch,
    "_top_saved_tensors_default_hooks": torch._C._autograd,
    "_len_torch_dispatch_stack": torch._C,
    "_len_torch_function_stack": torch._C,
    "_DisableTorchDispatch": torch._C,
    "DisableTorchFunction": torch._C,
    "_symbolic_trace": torch.fx,
    "_schema": torch.ops.aten.relu.default,
    "_should_skip_dynamo": torch.utils._python_dispatch.TorchDispatchMode,
}
LATER = ("_top_saved_tensors_default_hooks", "_should_skip_dynamo")  # PyTorch 2.6 has not got them


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=[pytest.mark.needs_torch("2.13", each)] * (each in LATER)) for each in NAMES],
)
def test_a_private_name_is_still_there(name):
    assert hasattr(NAMES[name], name), f"{name} is gone: torch_private falls back; look for a successor"


def test_the_private_names_of_torch_pruning_s_nodes_are_still_there():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4 * 4, 2)

        def forward(self, x):
            return self.head((self.a(x) + self.b(x)).flatten(1))

    graph = torch_pruning.DependencyGraph().build_dependency(Net(), example_inputs=torch.ones(1, 3, 2, 2))
    operations = [private.pruning_operation(node.module) for node in graph.module2node.values()]
    assert any(operation.startswith("AddBackward") for operation in operations)
    mappings = [
        m for node in graph.module2node.values() for edge in node.dependencies for m in edge.index_mapping
    ]
    assert 4 in [private.pruning_stride(mapping) for mapping in mappings if mapping is not None]


def private_names(path):
    """(line, name) of every private attribute or import in ``path``, other than of ``self`` and ``cls``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            found = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            found = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            found = [part for alias in node.names for part in alias.name.split(".")]
        else:
            continue
        yield from (
            (node.lineno, name) for name in found if name.startswith("_") and not name.startswith("__")
        )


def own_names(path):
    """The private names that regrow itself defines in ``path``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name | ast.Attribute):
            yield node.target.id if isinstance(node.target, ast.Name) else node.target.attr


def test_no_other_file_uses_a_private_name():
    files = [path for path in SOURCE.rglob("*.py") if path.name != "torch_private.py"]
    own = {name for path in files for name in own_names(path)}
    used = [
        f"{path.relative_to(SOURCE)}:{line} {name}"
        for path in files
        for line, name in private_names(path)
        if name not in own and name != "_exit"  # os._exit is public for all its underscore
    ]
    assert used == []


class Bare:
    """Something without attributes, as an object of PyTorch would be whose private names are gone."""


def test_fallbacks(monkeypatch):
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2))
    monkeypatch.delattr(torch, "_lazy_clone")
    monkeypatch.delattr(torch._C, "_is_cow_tensor")
    twin = private.lazy_copy(net[0].weight)
    twin.add_(1)
    assert not torch.equal(twin, net[0].weight)
    assert not private.is_unwritten(net[0].weight)
    monkeypatch.delattr(torch._C, "_current_autograd_node")
    monkeypatch.delattr(torch.autograd, "_get_sequence_nr")
    assert private.backward_node() is None
    assert private.nodes_made() == private.made_as(Bare()) == 0
    monkeypatch.delattr(torch._C, "_are_functorch_transforms_active")
    monkeypatch.delattr(torch._C, "_DisableFuncTorch")
    assert not torch.func.vmap(lambda _: torch.tensor(private.is_transformed(twin)))(twin).any()
    with private.outside_transforms():
        pass
    monkeypatch.delattr(torch._C, "_len_torch_function_stack")
    assert private.modes_running() is None
    monkeypatch.delattr(torch._C, "_DisableTorchDispatch")
    monkeypatch.delattr(torch._C, "DisableTorchFunction")
    with private.outside_modes():
        pass
    monkeypatch.delattr(torch_pruning._helpers, "_HybridIndex")
    assert [(place.idx, place.root_idx) for place in private.pruning_places(2)] == [(0, 0), (1, 1)]
    assert private.pruning_stride(Bare()) == 1
    assert private.pruning_operation(Bare()) == ""
    for name in ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"):
        assert name in vars(net[1])
    listed = dict(net[1].named_parameters()), dict(net[1].named_buffers()), dict(net.named_children())
    assert (private.own_parameters(net[1]), private.own_buffers(net[1]), private.own_modules(net)) == listed
    assert not private.has_hooks(net)
    net.register_forward_hook(lambda *_: None)
    assert private.has_hooks(net)


@pytest.mark.parametrize("shown", [True, False])
def test_hooks_on_saved_tensors_are_seen(monkeypatch, shown):
    if not shown:
        monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks", raising=False)
    packed, x = [], torch.ones(2, requires_grad=True)
    assert not private.saved_tensors_go_elsewhere()
    with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda _: x):
        assert private.saved_tensors_go_elsewhere()
        assert packed == []
        x * x
        assert len(packed) == 2
    assert not private.saved_tensors_go_elsewhere()
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks"):
        assert not private.saved_tensors_go_elsewhere()
        with pytest.raises(RuntimeError, match="no hooks"), torch.autograd.graph.save_on_cpu():
            pass


def test_deepcopy_has_a_book_of_memories():
    whole = torch.arange(4.0)
    memo, twin = {}, whole.clone()
    private.remember_storage(memo, whole, twin)
    part = copy.deepcopy(whole[1:3], memo)
    twin.zero_()
    assert part.tolist() == [0, 0]


def test_hooks_that_run_before_a_layer_and_on_gradients():
    net, weight = nn.Linear(1, 1), torch.ones(1, requires_grad=True)
    net.register_forward_hook(lambda *_: None)
    assert not private.has_pre_hooks(net)
    net.register_forward_pre_hook(lambda *_: None)
    assert private.has_pre_hooks(net)
    assert private.has_pre_hooks(Bare())
    assert not private.has_gradient_hooks(weight)
    handle = weight.register_hook(lambda gradient: gradient)
    assert private.has_gradient_hooks(weight)
    handle.remove()
    assert not private.has_gradient_hooks(weight)
    weight.register_post_accumulate_grad_hook(lambda _: None)
    assert private.has_gradient_hooks(weight)
    assert private.has_gradient_hooks(Bare())


def test_a_tensor_that_keeps_its_address_is_marked_as_pytorch_marks_it():
    theirs, ours = torch.zeros(1), torch.zeros(1)
    torch._dynamo.mark_static_address(theirs, guard=True)
    assert private.keeps_its_address(ours) is ours
    assert vars(ours) == vars(theirs)


def test_writes_are_counted_and_not_under_inference_mode():
    x = torch.zeros(2)
    before = private.writes_to(x)
    x.add_(1)
    assert private.writes_to(x) == before + 1
    with torch.inference_mode():
        assert private.writes_to(torch.zeros(1).add_(1)) == 0


def test_an_optimizer_that_takes_no_hooks():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner, self.param_groups = inner, inner.param_groups

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    assert private.takes_step_hooks(optimizer)
    assert not private.takes_step_hooks(Wrapper(optimizer))
    assert not optimizer._optimizer_step_post_hooks


def test_an_export_is_known_without_pytorch_s_function_for_it():
    seen = []

    class Net(nn.Module):
        def forward(self, x):
            seen.append((private._is_exporting(), private.is_exporting()))
            return x + 1

    net = Net()
    net(torch.ones(2))
    torch.export.export(net, (torch.ones(2),), strict=False)
    assert seen[0] == (False, False)
    assert seen[-1] == (True, True)
