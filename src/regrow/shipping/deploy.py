"""Make of a trained network the form in which it is used, and confirm that it computes the same."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.given import check_inputs, kind_of
from regrow.log import first_line
from regrow.looking.calls import PassFailed, call, evaluating, floating, undisturbed
from regrow.looking.copies import dtypes
from regrow.looking.precision import rounds_to_tf32, without_tf32
from regrow.marks import check
from regrow.modules import device_of, unwrap
from regrow.shipping.agreement import difference
from regrow.shipping.deployed import Deployed, Graphed
from regrow.shipping.fold import fold_norms
from regrow.shipping.onnx import export_onnx
from regrow.short import short
from regrow.suggest import nearest

_VERSION = 1
MODES = ("auto", "eager", "graph", "compile")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# How far an output may be off, as a share of its largest value. In half precision that is ten times the
# rounding of one operation; torchvision's classifiers are off by 0.5 to 3 times as much.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.08}


@dataclass(frozen=True)
class Form:
    """How a network is deployed: as ``deploy`` takes it.

    Raises:
        ValueError: a value is of another kind, or unknown.
    """

    dtype: torch.dtype | None = None
    channels_last: bool = True
    mode: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise ValueError(
                f"dtype is {', '.join(map(str, _DTYPES))} or None, which leaves the network's, and got "
                f"{short(self.dtype)}."
            )
        if not isinstance(self.channels_last, bool):
            raise ValueError(f"channels_last is True or False, and got {kind_of(self.channels_last)}.")
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {short(self.mode)}{nearest(str(self.mode), MODES)}")

    def record(self) -> dict[str, Any]:
        """JSON-able: the three options."""
        dtype = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return {"dtype": dtype, "channels_last": self.channels_last, "mode": self.mode}

    def check(self, device: torch.device) -> None:
        """Raise ``ValueError`` if a network on ``device`` has no such form."""
        if self.mode == "graph" and device.type != "cuda":
            raise ValueError(
                f"mode='graph' captures a CUDA graph, and the model is on {device}. Write model.cuda() "
                "first, or mode='compile' or 'eager'."
            )


def form_of(deployed: bool | Mapping[str, Any]) -> Form | None:
    """The form that ``deployed`` asks for: True, or the options of ``deploy`` as a dict; None for False.

    Raises:
        ValueError: it is something else, or an option is unknown.
    """
    if isinstance(deployed, bool):
        return Form() if deployed else None
    known = tuple(Form.__dataclass_fields__)
    if not isinstance(deployed, Mapping):
        raise ValueError(
            f"deployed is True, or options of deploy, such as {{'dtype': torch.float16}}, and got "
            f"{kind_of(deployed)}."
        )
    if wrong := [key for key in deployed if key not in known]:
        raise ValueError(f"deploy has no option {short(wrong[0])}{nearest(str(wrong[0]), known)}")
    return Form(**deployed)


def deploy(
    model: nn.Module,
    *,
    example_inputs: Any,
    dtype: torch.dtype | None = None,
    channels_last: bool = True,
    mode: str = "auto",
    onnx: str | os.PathLike[str] | None = None,
    tolerance: float | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a copy of a trained ``model`` in the form in which networks run fast, confirmed by running it.

    Batch norms are folded into convolutions (``fold_norms``); weights and pictures are in channels-last
    order; numbers have the precision ``dtype``; on a GPU a pass is one launch. ``compare_latency`` shows
    what that is worth for this network on this machine. The copy takes the inputs
    of ``model``, in float32 too, and gives its outputs in the precision of ``model``. It is in evaluation
    mode, on the device of ``model``, and computes no gradients. It cannot be pruned or trained: save
    ``model``, and deploy it anew.

    Args:
        model: any module, cut or not; wrappers are looked through. It is only read.
        example_inputs: the inputs of ``model``: a tensor, a tuple of arguments or a dict of keywords. Give
            real ones, because outputs are compared on them, and as many as a call will have.
        dtype: ``torch.float16`` or ``torch.bfloat16`` for half precision. None: the model's own.
        channels_last: False leaves the memory format as it is, which may be faster for small pictures on a
            CPU.
        mode: ``"eager"`` runs operation by operation. ``"graph"``, on a GPU, replays a captured CUDA graph
            for inputs of the shape of ``example_inputs``, and runs others as ``"eager"``. ``"compile"`` is
            ``torch.compile``, on a GPU inside of a captured graph. ``"auto"``: ``"graph"`` on a GPU if
            passes can be captured, else ``"eager"``.
        onnx: of a file to write as well, with the folded network in its own precision (``export_onnx``).
        tolerance: how far an output may be off, as a share of its largest value. None: 1e-4 in float32, 0.01
            in float16, and in float32 on a GPU where PyTorch rounds to TF32, 0.08 in bfloat16.

    Returns:
        The deployed module, and a JSON-able record: version; dtype, channels_last, mode (what was done);
        folded and left, as of ``fold_norms``; difference (the largest one of a floating-point output, as a
        share of its largest value); tolerance; onnx (the record of ``export_onnx``, or None);
        not_captured (why ``"auto"`` found no graph on a GPU; empty otherwise).

    Raises:
        ValueError: an argument is of another kind; the model cannot be copied or run, or not in this form;
            an output is off by more than ``tolerance``, or of another shape. No file is written then.
    """
    check(model, "fold_norms", called="deploy")
    check_inputs(example_inputs, "deploy")
    form = Form(dtype, channels_last, mode)
    inner = unwrap(model)
    form.check(device_of(inner))
    if tolerance is not None and (
        not isinstance(tolerance, int | float) or isinstance(tolerance, bool) or not tolerance > 0
    ):
        raise ValueError(
            f"tolerance is a share of the output's largest value, above 0, and got {short(tolerance)}."
        )
    allowed = tolerance or _tolerance(inner, form)
    whole, done = in_form(inner, example_inputs, form)
    try:
        with torch.no_grad(), evaluating(inner), undisturbed(inner), without_tf32():
            expected = floating(call(inner, example_inputs))
        with torch.no_grad(), _drawing_aside(inner):
            found = floating(call(whole, example_inputs))
    except PassFailed as error:
        raise _unfit(form, error) from error
    off = _confirmed(expected, found, allowed, form)
    written = None
    if onnx is not None:
        folded, _ = fold_norms(inner, example_inputs=example_inputs)
        written = export_onnx(folded, onnx, example_inputs=example_inputs)
    return whole, {"version": _VERSION, **done, "difference": off, "tolerance": allowed, "onnx": written}


def in_form(model: nn.Module, example_inputs: Any, form: Form) -> tuple[nn.Module, dict[str, Any]]:
    """The copy that ``deploy`` makes, not yet confirmed, and the part of its record about how it was made.

    Raises:
        ValueError: the model cannot be copied or run, or not in this form.
    """
    given = _own_dtype(model)
    folded, record = fold_norms(model, example_inputs=example_inputs)
    if form.dtype is not None:
        folded = folded.to(form.dtype)
    if form.channels_last:
        folded = folded.to(memory_format=torch.channels_last)
    for parameter in folded.parameters():
        parameter.requires_grad = False
    whole: nn.Module = Deployed(folded, form.dtype, given, form.channels_last)
    gpu, mode, why = device_of(model).type == "cuda", form.mode, ""
    if mode == "auto":
        mode = "graph" if gpu else "eager"
    if mode == "compile":
        whole.compile()
    try:
        with torch.no_grad(), _drawing_aside(model):
            call(whole, example_inputs)  # its errors are plainer than those of a capture
    except PassFailed as error:
        raise _unfit(form, error) from error
    if gpu and mode != "eager":
        try:
            with _drawing_aside(model):
                whole = Graphed(whole, example_inputs)
        except (ValueError, RuntimeError) as error:  # of the capture, or of a pass in it
            why = first_line(error)
            if form.mode != "auto":
                raise ValueError(
                    f"a pass cannot be captured as a CUDA graph: {why}. Write mode='eager'."
                ) from error
            mode = "eager"
    return whole, {
        "dtype": str(form.dtype or given).removeprefix("torch."),
        "channels_last": form.channels_last,
        "mode": mode,
        "not_captured": why,
        "folded": record["folded"],
        "left": record["left"],
    }


def _drawing_aside(model: nn.Module) -> Any:
    """The random generators continue afterwards as if nothing had run. Autocast stays as the user has it."""
    device = device_of(model)
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _own_dtype(model: nn.Module) -> torch.dtype:
    """The precision of the first parameter with a point; float32 for a model without any."""
    found = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return next(found, torch.float32)


def _tolerance(model: nn.Module, form: Form) -> float:
    used = {form.dtype} if form.dtype is not None else dtypes(model) or {torch.float32}
    if torch.float32 in used and device_of(model).type == "cuda" and rounds_to_tf32():
        used = {*used, torch.float16}  # TF32 has as many bits behind the point
    return max(_TOLERANCE.get(each, _TOLERANCE[torch.bfloat16]) for each in used)


def _confirmed(expected: list[Tensor], found: list[Tensor], allowed: float, form: Form) -> float:
    """Return the largest difference. ``ValueError`` if it is over ``allowed``, or shapes differ."""
    shapes = [[list(tensor.shape) for tensor in each] for each in (expected, found)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"deployed, the model gives outputs of shapes {short(shapes[1])} in place of {short(shapes[0])}: "
            "its outputs depend on rounding, as a detector's boxes do. Give another example, or leave dtype "
            "out."
        )
    every = list(map(difference, expected, found))
    worst = [each for each in every if not each <= allowed]
    if not worst:
        return max(every, default=0.0)
    overflow = form.dtype == torch.float16 and any(
        bool(theirs.isfinite().logical_not().any()) and bool(ours.isfinite().all())
        for ours, theirs in zip(expected, found, strict=True)
    )
    hint = (
        "numbers grow beyond float16's 65,504: write dtype=torch.bfloat16"
        if overflow
        else "give real inputs as the example, another dtype, or the tolerance= that you allow"
    )
    raise ValueError(
        f"deployed, an output is off by {max(worst):.3g} of its largest value, and {allowed:g} is allowed: "
        f"{hint}."
    )


def _unfit(form: Form, error: Exception) -> ValueError:
    where = "" if form.dtype is None else f" in {str(form.dtype).removeprefix('torch.')}"
    advice = "" if form.dtype is None else " Leave dtype out, or cast in the model where it fixes another."
    return ValueError(f"the model does not run deployed{where}: {first_line(error)}.{advice}")
