"""Scenes: some garments of Fashion-MNIST on a canvas, with boxes, masks, and questions with one-word answers.

Everything is a pure function of the garments and a seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

GARMENTS = ("tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
SIDE = 64
SIZES = (20, 24)  # of a garment, in pixels, both included
COUNTS = (2, 4)
VISIBLE = 25 / 255  # a garment's pixels are those above
CLEARLY = 3.0  # pixels between two centres, from which on one is left of the other, or above it

SIDES = ("left", "right", "above", "below")
NUMBERS = ("none", "one", "two", "three", "four")
ANSWERS = (*GARMENTS, "nothing", "yes", "no", *NUMBERS[COUNTS[0] : COUNTS[1] + 1])
WORDS = ("", "what", "is", "left", "right", "above", "below", "of", "there", "a", "how", "many", *GARMENTS)
LONGEST = 5  # words in a question

Thing = tuple[int, tuple[float, float, float, float]]  # a garment's kind, and its box


@dataclass(frozen=True)
class Scenes:
    """Scenes, in order.

    Attributes:
        pictures: float32 [n, 1, 64, 64], 0 to 1.
        maps: int64 [n, 64, 64]: 0 is background, 1 + kind a garment's pixel.
        boxes: of each scene float32 [garments, 4]: left, top, right and bottom edge in pixels.
        kinds: of each scene int64 [garments].
        questions: int64 [n, 5], words by number in ``WORDS``, filled up with 0 at the end.
        answers: int64 [n], by number in ``ANSWERS``.
    """

    pictures: Tensor
    maps: Tensor
    boxes: list[Tensor]
    kinds: list[Tensor]
    questions: Tensor
    answers: Tensor

    def __len__(self) -> int:
        return len(self.pictures)


def compose(pixels: Tensor, kinds: Tensor, count: int, seed: int) -> Scenes:
    """``count`` scenes of the garments ``pixels`` (uint8 [n, 1, 28, 28]) of ``kinds`` (int64 [n]).

    No kind is twice in a scene, and no boxes overlap. The background is a slope of grey with noise.
    """
    drawn = np.random.default_rng(seed)
    of_kind = [np.flatnonzero(kinds.numpy() == kind) for kind in range(len(GARMENTS))]
    pictures, maps, boxes, labels, questions, answers = [], [], [], [], [], []
    for _ in range(count):
        number = int(drawn.integers(COUNTS[0], COUNTS[1] + 1))
        chosen = drawn.choice(len(GARMENTS), number, replace=False)
        garments = []
        for kind in chosen:
            which = int(drawn.choice(of_kind[kind]))
            size = int(drawn.integers(SIZES[0], SIZES[1] + 1))
            garments.append(trimmed(resized(pixels[which, 0], size)))
        corners = places([garment.shape for garment in garments], drawn)
        picture, labelled = background(drawn), torch.zeros(SIDE, SIDE, dtype=torch.int64)
        things: list[Thing] = []
        for kind, garment, (top, left) in zip(chosen, garments, corners, strict=True):
            things.append((int(kind), put(picture, labelled, garment, int(kind), top, left)))
        words, answer = ask(things, drawn)
        pictures.append(picture.clamp(0, 1)[None])
        maps.append(labelled)
        boxes.append(torch.tensor([box for _, box in things]))
        labels.append(torch.tensor([kind for kind, _ in things]))
        questions.append(encoded(words))
        answers.append(ANSWERS.index(answer))
    return Scenes(
        torch.stack(pictures), torch.stack(maps), boxes, labels, torch.stack(questions), torch.tensor(answers)
    )


def resized(garment: Tensor, size: int) -> Tensor:
    """A picture uint8 [28, 28] as float32 [size, size], 0 to 1."""
    wide = garment[None, None].float() / 255
    return interpolate(wide, size=(size, size), mode="bilinear", antialias=True, align_corners=False)[0, 0]


def trimmed(garment: Tensor) -> Tensor:
    """A garment without the rows and columns at its edges that have no visible pixel."""
    seen = garment > VISIBLE
    rows, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
    return garment[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]


def places(shapes: list[torch.Size], drawn: np.random.Generator) -> list[tuple[int, int]]:
    """The top left corners of rectangles that do not overlap; all are drawn anew where one finds no place."""
    while True:
        found: list[tuple[int, int]] = []
        for height, width in shapes:
            for _ in range(30):
                top = int(drawn.integers(0, SIDE - height + 1))
                left = int(drawn.integers(0, SIDE - width + 1))
                if all(
                    top + height <= y or y + h <= top or left + width <= x or x + w <= left
                    for (y, x), (h, w) in zip(found, shapes, strict=False)
                ):
                    found.append((top, left))
                    break
        if len(found) == len(shapes):
            return found


def background(drawn: np.random.Generator) -> Tensor:
    """Grey from 0 to 0.3 that rises in a direction of its own, with noise."""
    ends = torch.from_numpy(drawn.uniform(0, 0.15, size=(2, 2)))
    slope = ends[0].sum() * torch.linspace(0, 1, SIDE)[:, None] + ends[1].sum() * torch.linspace(0, 1, SIDE)
    noise = torch.from_numpy(drawn.normal(0, 0.03, size=(SIDE, SIDE)))
    return (slope / 2 + noise).float().clamp_(0, 1)


def put(
    picture: Tensor, labelled: Tensor, garment: Tensor, kind: int, top: int, left: int
) -> tuple[float, float, float, float]:
    """Write the visible pixels of a garment into a picture and its map, in place; returns their box."""
    height, width = garment.shape
    here = slice(top, top + height), slice(left, left + width)
    seen = garment > VISIBLE
    picture[here][seen] = garment[seen]
    labelled[here][seen] = 1 + kind
    return float(left), float(top), float(left + width), float(top + height)


def ask(things: list[Thing], drawn: np.random.Generator) -> tuple[str, str]:
    """A question about a scene that has one answer only, and the answer: most are about places."""
    known = [
        (side, asked, answer)
        for side in SIDES
        for asked, _ in things
        if (answer := lies(things, side, asked)) is not None
    ]
    kind = drawn.uniform()
    if kind < 0.1 or not known:
        return "how many", NUMBERS[len(things)]
    if kind < 0.3:
        there = [each for each, _ in things]
        absent = [each for each in range(len(GARMENTS)) if each not in there]
        asked = int(drawn.choice(there if drawn.uniform() < 0.5 else absent))
        return f"is there a {GARMENTS[asked]}", "yes" if asked in there else "no"
    named = [each for each in known if each[2] != "nothing"]
    if named and drawn.uniform() < 0.85:
        known = named
    side, asked, answer = known[int(drawn.integers(len(known)))]
    of = "of " if side in ("left", "right") else ""
    return f"what is {side} {of}{GARMENTS[asked]}", answer


def lies(things: list[Thing], side: str, asked: int) -> str | None:
    """What lies on one side of a garment, by the boxes' centres; None where that is several, or unclear."""
    axis = 0 if side in ("left", "right") else 1
    sign = -1 if side in ("left", "above") else 1
    centres = {kind: (box[axis] + box[axis + 2]) / 2 for kind, box in things}
    ahead = {kind: sign * (at - centres[asked]) for kind, at in centres.items() if kind != asked}
    if any(abs(by) < CLEARLY for by in ahead.values()):
        return None
    there = [kind for kind, by in ahead.items() if by > 0]
    if len(there) > 1:
        return None
    return GARMENTS[there[0]] if there else "nothing"


def encoded(question: str) -> Tensor:
    """The words of a question, by number, int64 [5]."""
    numbers = [WORDS.index(word) for word in question.split()]
    return torch.tensor(numbers + [0] * (LONGEST - len(numbers)))


def read(question: Tensor) -> str:
    """A question in words."""
    return " ".join(WORDS[number] for number in question.tolist() if number)
