"""The snippets of docs/losses.md and docs/restarts.md run as printed."""

import copy
import re
from pathlib import Path

import torch

import regrow
from relatives import X, net

DOCS = Path(regrow.__file__).parents[2] / "docs"
LABELS = torch.arange(8) % 3


def blocks(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def scope():
    model = net()
    return {
        "model": model,
        "teacher": copy.deepcopy(model),
        "optimizer": torch.optim.SGD(model.parameters(), 0.01, momentum=0.9),
        "loader": [(X, LABELS)] * 3,
        "x": X,
        "task": 1,
    }


def test_the_losses():
    pages = blocks("losses.md")
    assert len(pages) == 2
    for block in pages:
        names = scope()
        before = names["model"][0].weight.detach().clone()
        exec(block, names)
        assert not torch.equal(names["model"][0].weight, before)


def test_one_call_when_the_data_change():
    names = scope()
    exec(blocks("restarts.md")[0], names)
    assert names["record"]["version"] == 1


def test_the_methods():
    _, continual, evolution, dense_sparse = blocks("restarts.md")
    for block in (continual, evolution, dense_sparse):
        names, calls = scope(), []

        def train(model, optimizer, calls=calls):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(X), LABELS).backward()
            optimizer.step()
            calls.append(int((model[3].weight == 0).sum()))

        exec(block, names | {"train": train})
        if block is evolution:
            assert calls == [0, 0, 0]
        if block is dense_sparse:
            assert calls[0] == 0
            assert calls[1] == 64
