"""The scenes of benchmarks/tasks, and that a detector, a segmenter and a net with questions can be cut."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regrow
from pages import running
from regrow.looking.calls import floating
from regrow.looking.noise import unsettle
from regrow.surgery.removal import remove_filters

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "tasks"))

import scenes  # noqa: E402
from tasks import TASKS, Task  # noqa: E402


def garments() -> tuple[Tensor, Tensor]:
    """40 rectangles of grey, in black frames, four of each kind."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.zeros(40, 1, 28, 28, dtype=torch.uint8)
    for picture in pixels:
        top, left = torch.randint(0, 8, (2,), generator=generator).tolist()
        picture[:, top : 28 - left, left : 28 - top] = 120 + 10 * top
    return pixels, torch.arange(40) % 10


# Passes in train mode without targets fail, and so do those with noise in place of the targets' boxes.
NAMES = [pytest.param(name, marks=pytest.mark.gives_up if name == "detection" else ()) for name in TASKS]
SCENES = scenes.compose(*garments(), 40, seed=5)


def test_boxes_contain_the_garments_pixels_and_no_more() -> None:
    for labelled, boxes, kinds in zip(SCENES.maps, SCENES.boxes, SCENES.kinds, strict=True):
        assert 2 <= len(boxes) <= 4
        assert labelled.unique().tolist() == [0, *sorted(1 + kind for kind in kinds.tolist())]
        for (left, top, right, bottom), kind in zip(boxes.long().tolist(), kinds.tolist(), strict=True):
            rows, columns = (labelled == 1 + kind).nonzero().unbind(1)
            assert (left, top) == (columns.min(), rows.min())
            assert (right, bottom) == (columns.max() + 1, rows.max() + 1)
            assert set(labelled[top:bottom, left:right].unique().tolist()) <= {0, 1 + kind}


def test_a_garment_covers_its_pixels_of_the_picture() -> None:
    at = SCENES.maps > 0
    assert SCENES.pictures[:, 0][at].min() > scenes.VISIBLE
    assert SCENES.pictures.min() >= 0
    assert SCENES.pictures.max() <= 1


def test_a_seed_gives_the_same_scenes_again() -> None:
    again, other = (scenes.compose(*garments(), 40, seed=seed) for seed in (5, 6))
    assert torch.equal(again.pictures, SCENES.pictures)
    assert torch.equal(again.questions, SCENES.questions)
    assert torch.equal(torch.cat(again.boxes), torch.cat(SCENES.boxes))
    assert not torch.equal(other.pictures, SCENES.pictures)


def box(x: float, y: float) -> tuple[float, float, float, float]:
    return x - 10, y - 10, x + 10, y + 10


@pytest.mark.parametrize(
    ("side", "asked", "answer"),
    [
        ("left", "bag", "boot"),
        ("right", "bag", "coat"),
        ("left", "boot", "nothing"),
        ("left", "coat", None),  # the bag and the boot
        ("above", "bag", "nothing"),
        ("below", "bag", None),
        ("above", "boot", None),  # the coat is as high
        ("below", "coat", None),
    ],
)
def test_what_lies_where_on_a_scene_composed_by_hand(side: str, asked: str, answer: str | None) -> None:
    placed = {"boot": box(10, 50), "bag": box(30, 12), "coat": box(52, 51)}
    things = [(scenes.GARMENTS.index(name), each) for name, each in placed.items()]
    assert scenes.lies(things, side, scenes.GARMENTS.index(asked)) == answer


def test_the_answers_of_composed_scenes_are_right() -> None:
    seen = set()
    for number in range(len(SCENES)):
        question, answer = scenes.read(SCENES.questions[number]), scenes.ANSWERS[SCENES.answers[number]]
        named = [scenes.GARMENTS[kind] for kind in SCENES.kinds[number]]
        middle = {name: (b[:2] + b[2:]) / 2 for name, b in zip(named, SCENES.boxes[number], strict=True)}
        seen.add(question.split()[0])
        if question == "how many":
            assert answer == {2: "two", 3: "three", 4: "four"}[len(named)]
        elif found := re.fullmatch(r"is there a (\w+)", question):
            assert answer == ("yes" if found[1] in named else "no")
        else:
            side, asked = re.fullmatch(r"what is (\w+) (?:of )?(\w+)", question).groups()  # type: ignore[union-attr]
            axis, ahead = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}[side]
            there = [name for name in named if ahead * (middle[name] - middle[asked])[axis] > 0]
            assert there == ([] if answer == "nothing" else [answer])
    assert seen == {"how", "is", "what"}


def random_net(task: Task) -> nn.Module:
    torch.manual_seed(0)
    net = task.build(4)
    with torch.no_grad():  # norms as after training: one that maps 0 to 0 would hide a mistake
        unsettle(net, torch.Generator().manual_seed(0))
    return net


def in_double(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    if isinstance(inputs, dict):
        return {key: in_double(value) for key, value in inputs.items()}
    return type(inputs)(map(in_double, inputs))


def outputs(net: nn.Module, inputs: Any) -> list[Tensor]:
    torch.manual_seed(1)  # a detector draws a part of its proposals in train mode
    with torch.no_grad():
        return floating(net(*inputs) if isinstance(inputs, tuple) else net(inputs))


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_network_computes_what_the_masked_one_does(name: str) -> None:
    task = TASKS[name]
    net = random_net(task).double()
    trained_on = in_double(task.training_inputs(SCENES, torch.arange(4)))
    asked = in_double(task.inputs(SCENES, torch.arange(4)))
    keep = regrow.select(regrow.score(net, "l1", exclude=heads(net)), 0.3)
    masked, small = copy.deepcopy(net), copy.deepcopy(net)
    example = in_double(task.training_inputs(SCENES, torch.arange(1)))
    remove_filters(masked.eval(), keep, example_inputs=example)
    regrow.cut(small.eval(), keep, example_inputs=example)
    assert sum(map(Tensor.numel, small.parameters())) < sum(map(Tensor.numel, net.parameters()))
    for training, inputs in ((False, asked), (True, trained_on)):
        expected, found = (outputs(each.train(training), inputs) for each in (masked, small))
        assert len(expected) > 0
        assert max(map(Tensor.numel, expected)) > 0
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def heads(net: nn.Module) -> list[str]:
    """The convolutions whose filters are outputs."""
    ends = ("_classifier", "cls_logits", "bbox_pred")
    return [name for name, each in net.named_modules() if isinstance(each, nn.Conv2d) and name.endswith(ends)]


@pytest.mark.parametrize("name", NAMES)
def test_a_cycle_of_repr_drops_and_restores(name: str) -> None:
    task = TASKS[name]
    net = random_net(task).train()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    example = task.training_inputs(SCENES, torch.arange(2))
    cycle = regrow.RePr(net, optimizer, example_inputs=example, full=1, sub=1, cycles=1, scope="layer")
    assert not {*heads(net)} & cycle.keep.keys()

    def epoch() -> None:
        for at in torch.arange(8).split(4):
            optimizer.zero_grad()
            task.loss(net, SCENES, at).backward()
            optimizer.step()

    epoch()
    dropped = cycle.step()
    assert dropped is not None
    assert dropped.kind == "drop"
    if name == "detection":
        assert {"backbone.fpn.inner_blocks.0.0", "rpn.head.conv.0.0"} <= dropped.filters.keys()
    epoch()
    for layer, gone in dropped.filters.items():
        assert not net.get_submodule(layer).weight[gone].any()
    restored = cycle.step()
    assert restored is not None
    assert restored.kind == "restore"
    for layer, gone in dropped.filters.items():
        assert net.get_submodule(layer).weight[gone].flatten(1).any(1).all()
    epoch()
    assert all(each.isfinite().all() for each in outputs(net.eval(), task.inputs(SCENES, torch.arange(2))))
    cycle.remove()


@pytest.mark.gives_up
def test_a_detector_is_reconstructed_from_pictures_of_several_sizes() -> None:
    # Lists of pictures, by keyword, as loaders of detection data have them. The boxes' head reads proposals.
    net = random_net(TASKS["detection"]).eval()
    pictures = [torch.rand(1, 64, 48 + 16 * (number % 2)) for number in range(16)]
    keep = regrow.select(regrow.score(net, "l1", exclude=heads(net)), 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there are few of them
        done = regrow.compensate(
            net,
            keep,
            [{"images": pictures[:8]}, {"images": pictures[8:]}],
            example_inputs={"images": pictures[:1]},
        )
    assert done["images"] == 16
    assert done["unfolded"] == {}
    assert "roi_heads.box_head.fc6" in done["layers"]


def lines_about(words: str) -> str:
    return next(block for block in running("tasks.md") if words in block)


@pytest.mark.filterwarnings("ignore::UserWarning")  # there are few pictures, and a step is no training
@pytest.mark.parametrize("name", NAMES)
def test_the_lines_of_the_page_run_as_printed(name: str) -> None:
    task = TASKS[name]
    net = random_net(task)
    variable = {"detection": "detector", "segmentation": "segmenter", "questions": "answerer"}[name]
    pictures, targets = TASKS["detection"].training_inputs(SCENES, torch.arange(8))
    filters = []

    def train_one_epoch(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        task.loss(net.train(), SCENES, torch.arange(4)).backward()
        optimizer.step()
        filters.append(sum(bool(row.any()) for each in convs(net) for row in each.weight))

    scope: dict[str, Any] = {
        "regrow": regrow,
        variable: net,
        "optimizer": torch.optim.SGD(net.parameters(), 0.01),
        "train_one_epoch": train_one_epoch,
        "epochs": 20,
        "x": SCENES.pictures,
        "questions": SCENES.questions,
        "pictures": pictures,
        "targets": targets,
        "batches": [pictures[:4], pictures[4:]],
    }
    exec(lines_about(f"({variable},"), scope)
    assert filters[0] > filters[4] == filters[5] < filters[6] == filters[0]  # dropped for two epochs
    macs = scope["report"]["macs"]
    assert macs["after"] < 0.72 * macs["before"]
    assert set(heads(net)) <= scope["report"]["left_out"].keys()


def convs(net: nn.Module) -> list[nn.Conv2d]:
    return [each for each in net.modules() if isinstance(each, nn.Conv2d)]
