"""RePr, Batch Bridgeout and cuts for the networks of Ultralytics YOLO.

Nothing here imports ultralytics: the model and the trainer that the user has are read as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from regrow.integrations.arguments import check_bridgeout, check_repr
from regrow.integrations.yolo_network import head_of, keep_placed_norms, pictures_like
from regrow.integrations.yolo_training import Bridgeout, RePr
from regrow.pruning import prune as pruning
from regrow.pruning.report import Report


def add_repr(
    yolo: Any, *, exclude: Iterable[str] | None = None, example_inputs: Any = None, **settings: Any
) -> RePr:
    """Let ``yolo.train()`` drop and restore filters: ``regrow.RePr`` on the backbone and the neck.

    It puts callbacks on ``yolo``. ``full`` and ``sub`` count epochs. The trainer's EMA, which is what
    Ultralytics validates, saves and returns, follows. The state of the cycle lies beside ``last.pt``, as
    ``last.regrow.pt``, and training with ``resume=True`` goes on with it.

    Args:
        yolo: an ``ultralytics.YOLO``, or another model of Ultralytics with the same trainer.
        exclude: as in ``regrow.RePr``; None leaves the head alone, ``[]`` nothing.
        example_inputs: as in ``regrow.RePr``; None takes one picture of noise, of the size in training.
        settings: all other arguments of ``regrow.RePr``.

    Returns:
        An object with ``events``, what happened, and ``cycle``, the ``regrow.RePr`` while training lasts.

    Raises:
        ValueError: this is no network of Ultralytics, or one with the callbacks of ``add_repr``. When
            training begins: what ``regrow.RePr`` raises, or a resumed run has no state beside its checkpoint.
        TypeError: ``regrow.RePr`` takes no such argument.
    """
    check_repr(example_inputs, "epoch", settings)
    return RePr(yolo, {"exclude": exclude, "example_inputs": example_inputs, **settings})


def add_bridgeout(
    yolo: Any, p: float = 0.3, q: float = 1.5, *, exclude: Iterable[str] | None = None, **settings: Any
) -> None:
    """Let ``yolo.train()`` draw Batch Bridgeout's noise: ``regrow.add_bridgeout`` on the backbone and neck.

    Args:
        yolo: as in ``add_repr``. You may call both, in either order.
        p, q: see ``regrow.bridgeout``.
        exclude: as in ``add_repr``.
        settings: all other arguments of ``regrow.add_bridgeout``.

    Raises:
        ValueError: this is no network of Ultralytics, or one with the callbacks of ``add_bridgeout``. When
            training begins: as in ``add_repr``.
        TypeError: ``regrow.add_bridgeout`` takes no such argument.
    """
    settings = {"p": p, "q": q, "exclude": exclude, **settings}
    check_bridgeout(settings)
    Bridgeout(yolo, settings)


def prune(
    yolo: Any, *, exclude: Iterable[str] | None = None, example_inputs: Any = None, **settings: Any
) -> Report:
    """Cut ``yolo.model`` in place by ``regrow.prune``; ``yolo`` then validates, predicts and saves this one.

    To train on afterwards: ``yolo.train(trainer=trainer_for(yolo))``.

    Args:
        yolo: a trained ``ultralytics.YOLO``.
        exclude: as in ``add_repr``.
        example_inputs: as in ``regrow.prune``; None takes one picture of noise, of the size in training.
        settings: all other arguments of ``regrow.prune``: a target, and ``calibration``, float pictures
            [n, 3, height, width] between 0 and 1 as the network takes them, without labels.

    Raises:
        ValueError: this is no network of Ultralytics; its norms are folded; what ``regrow.prune`` raises.
    """
    net = yolo.model
    head = head_of(net)
    if net.is_fused():
        raise ValueError(
            "the norms of this network are folded, as yolo.fuse() does: load it anew, YOLO('best.pt'), and "
            "cut it before that."
        )
    if example_inputs is None:
        example_inputs = pictures_like(net, int(getattr(net, "args", {}).get("imgsz") or 640))
    frozen = not any(each.requires_grad for each in net.parameters())  # as Ultralytics' checkpoints are
    try:
        if frozen:
            net.requires_grad_(True)
        report = pruning.prune(
            net, example_inputs=example_inputs, exclude=[head] if exclude is None else exclude, **settings
        )
    finally:
        if frozen:
            net.requires_grad_(False)
    keep_placed_norms(net)
    yolo.predictor = None
    return report


def trainer_for(yolo: Any) -> type:
    """A class for ``yolo.train(trainer=…)`` that trains ``yolo.model`` itself.

    Ultralytics' own trainer builds the network anew from its description, and a cut would be lost.
    """

    def get_model(*_: Any, **__: Any) -> nn.Module:
        net: nn.Module = yolo.model
        return net

    return type("Trainer", (yolo.task_map[yolo.task]["trainer"],), {"get_model": get_model})
