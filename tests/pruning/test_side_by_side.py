"""Networks side by side, as they are and deployed: rows, batches, and accuracies that are those of each."""

import json

import pytest
import torch
from torch import nn

import regrow.pruning.side_by_side
from regrow.looking.noise import unsettle
from regrow.pruning.accuracy import top1
from regrow.pruning.side_by_side import compare_latency

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def networks(make_net):
    nets = {"uncut": make_net(), "cut": make_net((4, 4, 4))}
    with torch.no_grad():
        for net in nets.values():
            unsettle(net, torch.Generator().manual_seed(0))
    return nets


def test_the_rows_of_two_networks(networks, monkeypatch):
    timed = []

    def clock(models, inputs):
        timed.append((models, inputs))
        return [{"median": float(number)} for number, _ in enumerate(models)]

    monkeypatch.setattr(regrow.pruning.side_by_side, "measure_latency", clock)
    inputs = torch.randn(60, 3, 8, 8)
    pictures = [(inputs, torch.arange(60) // 3 % 4)]
    expected = {name: top1(net, pictures)[0] for name, net in networks.items()}
    networks["cut"].train()
    record = compare_latency(
        networks, example_inputs=X, batches=[1, 5], validation=iter(pictures), dtype=torch.bfloat16
    )
    assert record == json.loads(json.dumps(record))
    assert record["batches"] == [1, 5]
    assert record["form"] == {"dtype": "bfloat16", "channels_last": True, "mode": "auto"}
    assert [(row["network"], row["deployed"], row["mode"]) for row in record["rows"]] == [
        ("uncut", False, "eager"), ("uncut", True, "eager"), ("cut", False, "eager"), ("cut", True, "eager"),
    ]  # fmt: skip
    # One call of the clock for a batch: all take turns. Row by row in the order of the table.
    assert [inputs.shape[0] for _, inputs in timed] == [1, 5]
    assert torch.equal(timed[0][1], X[:1])
    assert torch.equal(timed[1][1], torch.cat([X, X[:2]]))
    for number, row in enumerate(record["rows"]):
        assert row["latency"] == {"1": {"median": number}, "5": {"median": number}}
    assert timed[0][0][0] is networks["uncut"]
    assert timed[0][0][3].network.conv1.weight.dtype == torch.bfloat16
    for row in record["rows"]:
        same = row["accuracy"] == expected[row["network"]]
        assert same or (row["deployed"] and abs(row["accuracy"] - expected[row["network"]]) < 0.1)
    assert [row["difference"] for row in record["rows"][::2]] == [None, None]
    assert all(0 < row["difference"] < 0.08 for row in record["rows"][1::2])
    assert networks["cut"].training


def test_without_pictures_and_with_a_clock(networks):
    record = compare_latency({"cut": networks["cut"]}, example_inputs={"input": X}, batches=(2,))
    assert [row["accuracy"] for row in record["rows"]] == [None, None]
    for row in record["rows"]:
        assert 0 < row["latency"]["2"]["lowest"] <= row["latency"]["2"]["median"]


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (nn.Conv2d(3, 4, 3), {}, "takes networks by name, .* got a Conv2d"),
        ({}, {}, "takes networks by name"),
        ({0: nn.Conv2d(3, 4, 3)}, {}, "takes networks by name"),
        ({"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 4, 3, device="meta")}, {}, "are on cpu and meta"),
        ({"a": nn.Conv2d(3, 4, 3)}, {"batches": [0]}, r"such as \[1, 32\], and got \[0\]"),
        ({"a": nn.Conv2d(3, 4, 3)}, {"batches": 8}, "and got 8"),
        ({"a": nn.Conv2d(3, 4, 3)}, {"example_inputs": torch.tensor(1.0)}, "batch as first dimension"),
        ({"a": nn.Conv2d(3, 4, 3)}, {"example_inputs": (X, X[:1])}, "batch as first dimension"),
        ({"a": nn.Conv2d(3, 4, 3)}, {"validation": X}, "validation"),
        ({"a": nn.Conv2d(3, 4, 3)}, {"mode": "graph"}, "the model is on cpu"),
    ],
)
def test_what_is_refused(models, options, message):
    with pytest.raises(ValueError, match=message):
        compare_latency(models, **{"example_inputs": X, **options})
