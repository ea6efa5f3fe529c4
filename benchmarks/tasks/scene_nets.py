"""Three small networks on one kind of backbone: a detector, a segmenter, and one that answers questions."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.segmentation.lraspp import LRASPP
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from scenes import ANSWERS, GARMENTS, SIDE, WORDS

KINDS = 1 + len(GARMENTS)  # background is 0


class Block(nn.Module):
    """Two convolutions beside a shortcut, as in ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Backbone(nn.Module):
    """Maps at 1/4 and 1/8 of the picture's side, {"low": 2 × width, "high": 4 × width channels}."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.low = nn.Sequential(Block(width, 2 * width, 2), Block(2 * width, 2 * width, 1))
        self.high = nn.Sequential(Block(2 * width, 4 * width, 2), Block(4 * width, 4 * width, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.low(self.stem(x))
        return OrderedDict(low=low, high=self.high(low))


class Pyramid(nn.Module):
    """A backbone and torchvision's feature pyramid, as its detectors take them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = Backbone(width)
        self.out_channels = 2 * width
        self.fpn = FeaturePyramidNetwork([2 * width, 4 * width], self.out_channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.fpn(self.body(x))
        return maps


def detector(width: int) -> FasterRCNN:
    """torchvision's Faster R-CNN for pictures of 64×64."""
    pyramid = Pyramid(width)
    return FasterRCNN(
        pyramid,
        min_size=SIDE,
        max_size=SIDE,
        image_mean=[0.2],
        image_std=[0.3],
        rpn_anchor_generator=AnchorGenerator(((16,), (24,)), ((0.5, 1.0, 2.0),) * 2),
        rpn_pre_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=60,
        rpn_post_nms_top_n_train=60,
        rpn_post_nms_top_n_test=30,
        rpn_batch_size_per_image=64,
        box_roi_pool=MultiScaleRoIAlign(["low", "high"], output_size=5, sampling_ratio=2, canonical_scale=24),
        box_head=TwoMLPHead(pyramid.out_channels * 25, 8 * width),
        box_predictor=FastRCNNPredictor(8 * width, KINDS),
        box_batch_size_per_image=32,
        box_detections_per_img=10,
    )


def segmenter(width: int) -> LRASPP:
    """torchvision's LR-ASPP; it returns {"out": scores [n, kinds, 64, 64]}."""
    return LRASPP(Backbone(width), 2 * width, 4 * width, KINDS, inter_channels=4 * width)


class Answerer(nn.Module):
    """Scores of answers to questions about pictures.

    A recurrent encoder reads the question. Its state is laid beside the picture's features at each place,
    with the place's coordinates, and convolutions look for the answer.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = Backbone(width)
        self.words = nn.Embedding(len(WORDS), 2 * width, padding_idx=0)
        self.reader = nn.GRU(2 * width, 4 * width, batch_first=True)
        layers: list[nn.Module] = []
        inputs = 4 * width + 4 * width + 2
        for _ in range(3):
            layers += [
                nn.Conv2d(inputs, 4 * width, 3, 1, 1, bias=False),
                nn.BatchNorm2d(4 * width),
                nn.ReLU(),
            ]
            inputs = 4 * width
        self.look = nn.Sequential(*layers)
        self.answer = nn.Sequential(
            nn.Linear(4 * width, 4 * width), nn.ReLU(), nn.Linear(4 * width, len(ANSWERS))
        )

    def forward(self, pictures: Tensor, questions: Tensor) -> Tensor:
        features = self.body(pictures)["high"]
        side = features.shape[-1]
        _, state = self.reader(self.words(questions))
        asked = state[0, :, :, None, None].expand(-1, -1, side, side)
        line = torch.linspace(-1, 1, side, device=features.device)
        places = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(len(features), -1, -1, -1)
        seen = self.look(torch.cat([features, asked, places], 1))
        scores: Tensor = self.answer(seen.amax((2, 3)))
        return scores
