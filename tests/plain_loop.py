"""Gradients of single pictures from one pass for each, in double precision where the model is."""

import copy

import torch

from regrow.filters import eligible
from regrow.modules import filters_first, unwrap


def gradients(model, x, labels, loss):
    """{name: [pictures, filters, weights of a filter]}, from a copy in evaluation mode."""
    model = copy.deepcopy(unwrap(model)).eval()
    convs = eligible(model)
    found = {name: [] for name in convs}
    for one, label in zip(x.split(1), labels.split(1), strict=True):
        weights = [conv.weight for conv in convs.values()]
        given = torch.autograd.grad(loss(model(one), label), weights, allow_unused=True)
        for (name, conv), gradient in zip(convs.items(), given, strict=True):
            gradient = torch.zeros_like(conv.weight) if gradient is None else gradient
            found[name].append(filters_first(conv, gradient).flatten(1).double())
    return {name: torch.stack(parts) for name, parts in found.items()}


def scores(model, criterion, x, labels, loss):
    """What ``score`` says by "gradient" and "hessian", written out."""
    found = gradients(model, x, labels, loss)
    if criterion == "gradient":
        return {name: each.abs().mean((0, 2)) for name, each in found.items()}
    convs = eligible(unwrap(model))
    weights = {name: filters_first(conv, conv.weight.detach()).flatten(1) for name, conv in convs.items()}
    return {name: (weights[name].square() * each.square().mean(0)).sum(1) / 2 for name, each in found.items()}
