"""What the tests of RePr's cycles share: a small net, its batches and steps, and its state in a file."""

import torch
from torch import nn
from torch.nn import functional as F

from nets import chain
from regrow.repr.cycle import RePr

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
SHORT = {"full": 2, "sub": 2, "cycles": 2}
STEPS = 10


def build(seed=0, filters=(6, 8, 8)):
    """conv1, norm1, relu1, conv2, norm2, … head, with the weights of the seed."""
    torch.manual_seed(seed)
    return chain(filters)


def sgd(model, **settings):
    return torch.optim.SGD(
        model.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, **settings}
    )


OPTIMIZERS = {
    "sgd": sgd,
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
}


def repr_on(model, optimizer=None, **settings):
    # By default nets as small as this one compute their dropped filters on a GPU.
    usual = {"example_inputs": X[:1], "fraction": 0.3, "compact": True, **SHORT}
    return RePr(model, optimizer or sgd(model), **{**usual, **settings})


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)


def fit(model, optimizer, step=0):
    x, y = batch(step)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def run(model, optimizer, cycle, steps, start=0):
    events = []
    for step in range(start, start + steps):
        fit(model, optimizer, step)
        events.append(cycle.step())
    return events


def is_dead(model, cycle):
    return all(not model.get_submodule(name).weight[~mask].any() for name, mask in cycle.keep.items())


def start(kind, seed=0, **settings):
    model = build(seed)
    optimizer = OPTIMIZERS[kind](model)
    return model, optimizer, repr_on(model, optimizer, **settings)


def save(path, model, optimizer, cycle):
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "cycle": cycle.state_dict()}
    torch.save(states, path)


def load(path, model, optimizer, cycle, order):
    states = torch.load(path, weights_only=True)
    for name in order.split("-"):
        {"model": model, "optimizer": optimizer, "cycle": cycle}[name].load_state_dict(states[name])


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same_models(one, other):
    return same_weights(one.state_dict(), other.state_dict())


def hooks(model, optimizer):
    return (
        len(optimizer._optimizer_step_post_hooks)
        + len(optimizer._optimizer_step_pre_hooks)
        + sum(len(p._backward_hooks or ()) for p in model.parameters())
        + sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    )


def widths(model, x=X):
    """How many channels each convolution emits."""
    seen = {}

    def note(name):
        return lambda _module, _inputs, output: seen.update({name: output.shape[1]})

    handles = [
        layer.register_forward_hook(note(name))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d)
    ]
    with torch.no_grad():
        copy_of_mode = model.training
        model.eval()(x)
        model.train(copy_of_mode)
    for handle in handles:
        handle.remove()
    return seen
