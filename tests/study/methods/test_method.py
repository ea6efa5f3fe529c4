"""The protocol of methods, several of them in one run, and their events."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regrow.study import records
from regrow.study.methods.method import Method, Several, event, replaced


class Part(Method):
    def __init__(self, name: str, loss: float | None = None, penalty: float | None = None) -> None:
        self.name, self._loss, self._penalty = name, loss, penalty
        self.calls: list[Any] = []
        self.kept: dict[str, Any] = {}

    @property
    def dropped(self) -> int:
        return len(self.name)

    def begin(self, number: int) -> None:
        self.calls.append(("begin", number))

    def loss(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor | None:  # noqa: ARG002
        return None if self._loss is None else torch.tensor(self._loss)

    def penalty(self) -> Tensor | None:
        return None if self._penalty is None else torch.tensor(self._penalty)

    def after_step(self) -> None:
        self.calls.append("step")

    def after_epoch(self) -> list[dict[str, Any]]:
        return [event("drop", 1, notes=[self.name])]

    def switch(self, number: int) -> list[dict[str, Any]]:
        return [event("fresh", number, notes=[self.name])]

    def finish(self) -> bool:
        self.calls.append("finish")
        return self.name == "a"

    def state_dict(self) -> dict[str, Any]:
        return self.kept

    def load_state_dict(self, state: Any) -> None:
        self.kept = {"loaded": state}


BATCH = torch.zeros(1), torch.zeros(1), torch.zeros(1)


def test_a_method_adds_nothing_by_itself() -> None:
    method = Method()
    assert (method.phase, method.dropped, method.captured) == ("full", 0, True)
    assert method.loss(*BATCH) is method.penalty() is None
    assert method.after_epoch() == method.switch(1) == []
    assert not method.finish()
    assert method.state_dict() == {}


def test_several_methods_all_take_part() -> None:
    one, other = Part("a", None, 1.5), Part("bb", 3.0, 2.0)
    both = Several([one, other])
    both.begin(4)
    both.after_step()
    assert both.dropped == 3
    assert float(both.loss(*BATCH) or 0) == 3.0
    assert float(both.penalty() or 0) == 3.5
    assert [each["notes"] for each in both.after_epoch() + both.switch(2)] == [["a"], ["bb"]] * 2
    assert both.finish()  # the first says so, and the second is finished all the same
    assert one.calls == other.calls == [("begin", 4), "step", "finish"]
    assert Several([]).loss(*BATCH) is Several([]).penalty() is None


def test_a_graph_holds_a_step_if_it_holds_those_of_all() -> None:
    one, other = Part("a"), Part("b")
    assert Several([one, other]).captured
    other.captured = False
    assert not Several([one, other]).captured


def test_each_method_gets_its_own_state() -> None:
    one, other = Part("a"), Part("b")
    both = Several([one, other])
    one.kept = {"x": 1}
    assert both.state_dict() == {"a": {"x": 1}}
    both.check_state_dict({"a": {"x": 2}}, 1)
    both.load_state_dict({"a": {"x": 2}})
    assert (one.kept, other.kept) == ({"loaded": {"x": 2}}, {})
    for wrong in ({}, {"b": {"x": 1}}, {"a": {}, "b": {}}, None, 3, [], {0: 1}):
        with pytest.raises(ValueError, match="the state is that of another method"):
            both.check_state_dict(wrong, 1)  # type: ignore[arg-type]


def test_events_are_records() -> None:
    made = event("restart", 2, filters={"conv": torch.tensor([1, 3])}, notes=["so"])  # type: ignore[dict-item]
    assert made == {"kind": "restart", "cycle": 2, "filters": {"conv": [1, 3]}, "notes": ["so"]}
    assert made["kind"] in records.KINDS
    records.check_events([{"version": records.VERSION, "epoch": 1, **made}], 1)


def test_units_of_linear_layers_are_in_the_notes() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2))
    made = replaced(model, 1, {"0": [2], "2": [0, 1]}, ["first"])
    assert made["filters"] == {"0": [2]}
    assert made["notes"] == ["first", "2 units of the linear layer 2 are new."]
