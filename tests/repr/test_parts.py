"""What the layers of a narrowed model share in a pass is what each of them would take by itself."""

import io
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cycles import X, repr_on, sgd
from nets import chain
from regrow.together import Together

Y = torch.arange(8) % 4
BOTH = pytest.mark.parametrize("compact", [True, False])


class Block(nn.Module):
    def __init__(self, channels, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 8, 3, padding=1), norm(8)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """Three blocks that run in the order of ``way``."""

    def __init__(self, way, norm=nn.BatchNorm2d):
        super().__init__()
        self.a, self.b, self.c = (Block(channels, norm) for channels in (3, 8, 8))
        self.head = nn.Linear(8, 4)
        self.way = way

    def forward(self, x):
        return self.way(self, x)

    def tail(self, x):
        return self.head(self.c(x).mean((2, 3)))


class OwnNorm(nn.BatchNorm2d):
    """Writes its statistics by operations of Python."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3))
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(variance, 0.1)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (x - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]


def in_sub_phase(net, compact=True):
    torch.manual_seed(0)
    model = net()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer, full=1, sub=9, fraction=0.4, skip_first=False, compact=compact)
    cycle.step()
    return model, optimizer, cycle


def train(model, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def shared_and_alone(net, use, compact, monkeypatch):
    found = []
    for alone in (False, True):
        with monkeypatch.context() as patch:
            if alone:
                patch.setattr(Together, "get", lambda *_: None)
            model, optimizer, _ = in_sub_phase(net, compact)
            use(model, optimizer)
            found.append({**model.state_dict(), **{f"∇{n}": p.grad for n, p in model.named_parameters()}})
    return found


def plainly(self, x):
    return self.tail(self.b(self.a(x)))


def twice(self, x):
    x = self.a(x)
    return self.tail(self.b(x) + self.c(self.b(x)))


def checkpointed_first(self, x):
    return self.tail(self.b(checkpoint(self.b, self.a(x), use_reentrant=False)))


def checkpointed_first_reentrant(self, x):
    return self.tail(self.b(checkpoint(self.b, self.a(x), use_reentrant=True)))


def checkpointed_last(self, x):
    return self.tail(checkpoint(self.b, self.b(self.a(x)), use_reentrant=True))


def other_weights_first(self, x):
    x = self.a(x)
    return self.tail(
        functional_call(self.b, {n: p * 2 for n, p in self.b.named_parameters()}, (x,)) + self.b(x)
    )


def inside_itself(self, x):
    if len(x) <= 4:
        return plainly(self, x)
    before = self.b(self.a(x))
    return self.tail(before) + torch.cat([self(x[:4]), self(x[4:])])


def reset_on_the_way(self, x):
    x = self.a(x)
    self.b.norm.reset_running_stats()
    return self.tail(self.b(x))


WAYS = [
    plainly, twice, checkpointed_first, checkpointed_first_reentrant, checkpointed_last, other_weights_first,
    inside_itself, reset_on_the_way,
]  # fmt: skip


@BOTH
@pytest.mark.parametrize("way", WAYS)
def test_all_is_as_if_each_layer_took_its_own(way, compact, monkeypatch):
    shared, alone = shared_and_alone(lambda: Net(way), train, compact, monkeypatch)
    for name, tensor in shared.items():  # a weight that is taken twice sums its gradients in another order
        torch.testing.assert_close(tensor, alone[name], rtol=1e-5, atol=1e-6)


def evaluated(model, optimizer):
    model.a.norm.eval()
    train(model, optimizer)


def frozen_meanwhile(model, optimizer):
    train(model, optimizer)
    model.b.requires_grad_(False)
    train(model, optimizer)
    model.b.requires_grad_(True)
    train(model, optimizer)


def formats(model, optimizer):
    for fmt in (torch.channels_last, torch.contiguous_format):
        train(model, optimizer)
        model.to(memory_format=fmt)
    train(model, optimizer)


def types(model, optimizer):
    train(model, optimizer)
    model.to(torch.bfloat16)
    optimizer.zero_grad()
    F.cross_entropy(model(X.bfloat16()), Y).backward()


def gaps(model, optimizer):
    model.b.conv.weight.data = torch.ones(8, 8, 3, 6)[..., ::2]
    model.c.norm.bias.data = torch.zeros(16)[::2]
    train(model, optimizer)


def errors(model, optimizer):
    train(model, optimizer)
    hook = model.c.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(X)
    hook.remove()
    train(model, optimizer)


def pending(model, optimizer):
    losses = [F.cross_entropy(model(X * scale), Y) for scale in (1, 2)]
    model.eval()
    losses.append(F.cross_entropy(model(X), Y))
    model.train()
    for loss in losses:
        loss.backward()
    optimizer.step()


def parts_of_it(model, optimizer):
    F.cross_entropy(model.tail(model.b(model.a(X))), Y).backward()
    optimizer.step()
    train(model, optimizer)


def hooked(model, optimizer):
    def shrink(module, _):
        module.weight.data.mul_(0.9)

    model.b.conv.register_forward_pre_hook(shrink)
    train(model, optimizer)


def autocast(model, optimizer):
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    train(model, optimizer)


USES = [
    evaluated, frozen_meanwhile, formats, types, gaps, errors, pending, parts_of_it, hooked, autocast
]  # fmt: skip


@BOTH
@pytest.mark.parametrize("use", USES)
def test_bit_for_bit_whatever_the_loop_does(use, compact, monkeypatch):
    shared, alone = shared_and_alone(lambda: Net(plainly), use, compact, monkeypatch)
    for name, tensor in shared.items():
        assert (tensor is None) == (alone[name] is None), name
        assert tensor is None or torch.equal(tensor, alone[name]), name


def test_a_norm_in_eval_mode_stays_valid_beside_one_that_counts(monkeypatch):
    shared, alone = shared_and_alone(lambda: Net(plainly, OwnNorm), evaluated, True, monkeypatch)
    assert all(torch.equal(tensor, alone[name]) for name, tensor in shared.items())


def test_a_layer_without_a_part_in_the_loss_gets_no_gradient():
    def beside(self, x):
        x = self.a(x)
        self.b(x)
        return self.tail(x)

    model, optimizer, _ = in_sub_phase(lambda: Net(beside), compact=False)
    train(model, optimizer)
    assert all(parameter.grad is None for parameter in model.b.parameters())
    assert all(parameter.grad is not None for parameter in model.a.parameters())


def test_weights_that_are_gone_lend_their_identity_to_no_others():
    kept = []

    def ensemble(self, x):
        outputs = []
        for scale in (1, 2, 3):
            values = {name: p * scale for name, p in self.a.named_parameters()}
            outputs.append(functional_call(self.a, values, (x,)))
            kept.append(weakref.ref(values["conv.weight"]))
            del values
        assert kept[0]() is not None  # the weights of which slices were taken live as long as the pass
        return torch.cat(outputs)

    model, *_ = in_sub_phase(lambda: Net(plainly, nn.Identity))
    model.way = ensemble
    with torch.no_grad():
        one, two, three = model(X).chunk(3)
    torch.testing.assert_close(two, 2 * one)
    torch.testing.assert_close(three, 3 * one)
    assert [reference() for reference in kept] == [None] * 3


@pytest.mark.filterwarnings("ignore:.*(is deprecated|side effects)")
@pytest.mark.parametrize("strict", [True, False])
@BOTH
def test_exported_programs_and_traces_hold_pytorch_s_operations_alone(compact, strict):
    model, _, cycle = in_sub_phase(chain, compact)
    model.eval()
    expected = model(X)
    program, traced = torch.export.export(model, (X,), strict=strict), torch.jit.trace(model, X)
    # PyTorch 2.6 does not say that it exports in the strict way.
    hidden = strict and not hasattr(torch.compiler, "is_exporting")
    assert ("ops.regrow" in str(program.graph)) is hidden
    assert "regrow::" not in str(traced.inlined_graph)
    torch.export.save(program, io.BytesIO())
    cycle.remove()
    torch.testing.assert_close(program.module()(X), expected)
    torch.testing.assert_close(traced(X), expected)
