"""Detection, segmentation and questions: what each task's network is given, its loss, and its metric.

The metrics need ``pip install torchmetrics pycocotools``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from scene_nets import KINDS, Answerer, detector, segmenter
from scenes import Scenes

AT_ONCE = 64  # scenes of a batch in evaluation


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        build: a network of a width.
        inputs: what the network takes in evaluation mode, of the scenes at some indices.
        training_inputs: what it takes in train mode.
        loss: of the network in train mode, on the scenes at some indices.
        measure: the metric of the network in evaluation mode on all scenes, 0 to 1.
        metric: its name.
        batch: scenes in a step of training.
        scenes: for training.
    """

    build: Callable[[int], nn.Module]
    inputs: Callable[[Scenes, Tensor], Any]
    training_inputs: Callable[[Scenes, Tensor], Any]
    loss: Callable[[nn.Module, Scenes, Tensor], Tensor]
    measure: Callable[[nn.Module, Scenes], float]
    metric: str
    batch: int
    scenes: int


def parts(scenes: Scenes) -> Iterator[Tensor]:
    """The indices of all scenes, in batches."""
    yield from torch.arange(len(scenes)).split(AT_ONCE)


def pictures(scenes: Scenes, at: Tensor) -> Tensor:
    return scenes.pictures[at]


# Detection: torchvision's detectors take targets in train mode, and return losses there.


def with_targets(scenes: Scenes, at: Tensor) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    targets = [{"boxes": scenes.boxes[i], "labels": 1 + scenes.kinds[i]} for i in at.tolist()]
    return list(scenes.pictures[at]), targets


def detection_loss(net: nn.Module, scenes: Scenes, at: Tensor) -> Tensor:
    losses: dict[str, Tensor] = net(*with_targets(scenes, at))
    return torch.stack(list(losses.values())).sum()


@torch.no_grad()
def mean_average_precision(net: nn.Module, scenes: Scenes) -> float:
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision()
    for at in parts(scenes):
        metric.update(net(pictures(scenes, at)), with_targets(scenes, at)[1])
    return float(metric.compute()["map"])


# Segmentation


def segmentation_loss(net: nn.Module, scenes: Scenes, at: Tensor) -> Tensor:
    return cross_entropy(net(pictures(scenes, at))["out"], scenes.maps[at])


@torch.no_grad()
def mean_iou(net: nn.Module, scenes: Scenes) -> float:
    from torchmetrics.classification import MulticlassJaccardIndex

    metric = MulticlassJaccardIndex(KINDS, average="macro")
    for at in parts(scenes):
        metric.update(net(pictures(scenes, at))["out"].argmax(1), scenes.maps[at])
    return float(metric.compute())


# Questions


def with_questions(scenes: Scenes, at: Tensor) -> tuple[Tensor, Tensor]:
    return scenes.pictures[at], scenes.questions[at]


def answer_loss(net: nn.Module, scenes: Scenes, at: Tensor) -> Tensor:
    return cross_entropy(net(*with_questions(scenes, at)), scenes.answers[at])


@torch.no_grad()
def answer_accuracy(net: nn.Module, scenes: Scenes) -> float:
    right = sum(
        int((net(*with_questions(scenes, at)).argmax(1) == scenes.answers[at]).sum()) for at in parts(scenes)
    )
    return right / len(scenes)


TASKS = {
    "detection": Task(
        detector, pictures, with_targets, detection_loss, mean_average_precision, "mAP", 16, 2000
    ),
    "segmentation": Task(segmenter, pictures, pictures, segmentation_loss, mean_iou, "mIoU", 16, 2000),
    "questions": Task(
        Answerer, with_questions, with_questions, answer_loss, answer_accuracy, "accuracy", 32, 6000
    ),
}
