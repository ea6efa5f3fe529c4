"""Cycles beside what users put around a model: DDP, compilation, mixed precision, checkpoints."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cycles import STEPS, X, batch, build, fit, is_dead, repr_on, run, same_weights, sgd, start


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("order", ["ddp", "compiled", "ddp-compiled", "compiled-ddp"])
def test_wrapped_models_train_alike_and_their_states_fit_plain_ones(order):
    plain, plain_optimizer, plain_cycle = start("sgd")
    run(plain, plain_optimizer, plain_cycle, STEPS)

    inner, optimizer, cycle = start("sgd")
    cycle.remove()
    model = inner
    for wrapper in order.split("-"):
        if wrapper == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        else:
            model = torch.compile(model, backend="eager")
    cycle = repr_on(model, optimizer)
    assert set(cycle.keep) == {"conv2", "conv3"}
    run(model, optimizer, cycle, 3)
    assert is_dead(inner, cycle)
    states = copy.deepcopy((inner.state_dict(), optimizer.state_dict(), cycle.state_dict()))
    run(model, optimizer, cycle, STEPS - 3, start=3)
    assert same_weights(inner.state_dict(), plain.state_dict())

    unwrapped, optimizer, cycle = start("sgd", seed=99)
    for part, state in zip((unwrapped, optimizer, cycle), states, strict=True):
        part.load_state_dict(state)
    run(unwrapped, optimizer, cycle, STEPS - 3, start=3)
    assert same_weights(unwrapped.state_dict(), plain.state_dict())


@pytest.mark.devices
def test_gradient_accumulation_with_a_drop_in_the_middle():
    model = build()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer, full=3, sub=3)
    for step in range(12):  # one optimizer step for every two batches
        x, y = batch(step)
        F.cross_entropy(model(x), y).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
        cycle.step()
        assert is_dead(model, cycle)
        for name, mask in cycle.keep.items():
            grad = model.get_submodule(name).weight.grad
            assert grad is None or not grad[~mask].any()


def test_scaled_gradients_and_skipped_steps():
    model = build()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=100)
    skipped = 0
    for step in range(8):
        x, y = batch(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < before
        cycle.step()
        assert is_dead(model, cycle)
    assert skipped > 0
    assert cycle.phase == "done"


@pytest.mark.devices
def test_bfloat16():
    model = build().bfloat16()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer, example_inputs=X[:1].bfloat16())
    for _ in range(8):
        optimizer.zero_grad()
        model(X.bfloat16()).float().square().mean().backward()
        optimizer.step()
        event = cycle.step()
        assert is_dead(model, cycle)
        if event and event.kind == "restore":
            for name, indices in event.filters.items():
                weight = model.get_submodule(name).weight.detach().float().flatten(1)
                unit = F.normalize(weight)
                cosines = (unit @ unit.T).fill_diagonal_(0)[indices].abs()
                assert cosines.max() < 0.01  # what eight bits of mantissa leave
    assert cycle.phase == "done"


def test_a_model_that_changes_its_type_in_the_sub_phase():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cycle = repr_on(model, optimizer)
    run(model, optimizer, cycle, 3)
    model.double()
    optimizer.zero_grad()
    model(X.double()).square().mean().backward()
    optimizer.step()
    assert is_dead(model, cycle)
    assert cycle.step().kind == "restore"
    assert model.conv2.weight.dtype == torch.float64


def test_two_optimizers_are_refused_and_frozen_norms_are_not():
    model = build()
    convs = [p for name, p in model.named_parameters() if "conv" in name]
    with pytest.raises(ValueError, match=r"does not hold 'norm2\.weight'"):
        repr_on(model, sgd(model).__class__(convs, lr=0.1))
    for norm in (model.norm1, model.norm2):
        norm.requires_grad_(False)
    assert set(repr_on(model, sgd(model)).keep) == {"conv3"}


def test_weight_norm_layers_are_left_alone_and_what_they_read_is_not_touched():
    model = build()
    nn.utils.parametrizations.weight_norm(model.conv2)
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer, skip_first=False, consumers="zero", scope="layer")
    assert set(cycle.keep) == {"conv1", "conv3"}
    before = model.conv2.weight.detach().clone()
    events = [cycle.step() for _ in range(4)]
    assert set(events[3].filters) == {"conv1", "conv3"}
    assert torch.equal(model.conv2.weight, before)


@pytest.mark.devices
def test_a_model_used_under_checkpointing():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = build()

        def forward(self, x):
            x = checkpoint(self.net[:6], x, use_reentrant=False)
            return self.net[6:](x)

    model = Checkpointed()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer)
    for step in range(8):
        fit(model, optimizer, step)
        cycle.step()
        assert is_dead(model, cycle)
    assert cycle.phase == "done"
