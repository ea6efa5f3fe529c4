"""Export a model to ONNX, and compare the file's results in onnxruntime with the model's."""

from __future__ import annotations

import importlib.util
import inspect
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow.atomic import replacing
from regrow.given import check_inputs, check_path
from regrow.log import first_line, log
from regrow.looking.calls import PassFailed, call, evaluating, undisturbed
from regrow.looking.copies import copied
from regrow.looking.precision import without_tf32
from regrow.marks import check
from regrow.modules import device_of, unwrap
from regrow.shipping.agreement import difference
from regrow.torch_private import tree_leaves, tree_map

_VERSION = 1
_TOLERANCE = 1e-4
_CUDNN_BATCH = 65535
# The oldest release of PyTorch with which the exports of the tests were right.
_OLDEST = "2.13"


@torch.no_grad()
def export_onnx(model: nn.Module, path: str | os.PathLike[str], *, example_inputs: Any) -> dict[str, Any]:
    """Write ``model``, in evaluation mode, to one ONNX file that takes batches of any size.

    onnxruntime runs the file on ``example_inputs`` and on a larger batch. The file replaces ``path`` only
    if every output agrees with the model's, to 1e-4 of its largest value.

    Args:
        model: any module, cut or not; wrappers are looked through. It is left as it is, and in its mode.
        path: of the file.
        example_inputs: the inputs of ``model``: a tensor, a tuple of arguments or a dict of keywords. The
            first dimension of every tensor is the batch; other arguments (None, flags) become constants.

    Returns:
        JSON-able record: version, inputs and outputs (names in the file, in order), batches (the sizes
        compared), difference (the largest one, as a share of the output's largest value).

    Raises:
        ValueError: the extra ``onnx`` is not installed, PyTorch is older than 2.13, ``example_inputs`` do
            not fit, the model cannot be exported or onnxruntime cannot run it, or the results differ.
            Nothing is written then.
        FileNotFoundError: the folder of ``path`` does not exist.
    """
    check(model, "export_onnx")
    check_path(path, "export_onnx")
    check_inputs(example_inputs, "export_onnx")
    _check_installed()
    _check_torch()
    model = unwrap(model)
    inputs = _Inputs(example_inputs)
    # torch.export would make a first dimension of 1 a constant.
    traced = max(inputs.batch, 2)
    batches = [inputs.batch, traced + 1]
    with evaluating(model), undisturbed(model), without_tf32(), replacing(path) as temporary:
        expected = [_results(model, inputs.of(batch), batch) for batch in batches]
        with _quiet():
            _write(model, inputs.of(traced), temporary)
            session, found = _run(temporary, [inputs.of(batch) for batch in batches])
        runs = zip(batches, expected, found, strict=True)
        differences = [_difference(session, ours, theirs, batch) for batch, ours, theirs in runs]
    return {
        "version": _VERSION,
        "inputs": [node.name for node in session.get_inputs()],
        "outputs": [node.name for node in session.get_outputs()],
        "batches": batches,
        "difference": max(differences),
    }


def _check_installed() -> None:
    needed = ("onnx", "onnxscript", "onnxruntime")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"export_onnx needs {' and '.join(missing)}, not installed here: pip install 'regrow[onnx]'."
        )


def _check_torch() -> None:
    if torch.__version__ < _OLDEST:
        raise ValueError(
            f"export_onnx needs PyTorch {_OLDEST} or newer, and this is {torch.__version__}: save the model "
            "with regrow.save, and export it where PyTorch is newer."
        )


class _Inputs:
    """Makes batches of any size from ``example_inputs``."""

    def __init__(self, example_inputs: Any) -> None:
        self._example = dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs
        sizes = {len(leaf) for leaf in tree_leaves(self._example) if isinstance(leaf, Tensor) and leaf.dim()}
        if len(sizes) != 1 or sizes == {0}:
            raise ValueError(
                "export_onnx needs example_inputs whose tensors all have the batch as first dimension, of "
                f"one size and not empty; got sizes {sorted(sizes)}."
            )
        self.batch = sizes.pop()

    def of(self, batch: int) -> Any:
        """Return the examples, followed by halved copies of the first one until there are ``batch``."""

        def resized(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.dim() or batch == len(leaf):
                return leaf
            more = leaf[:1].expand(batch - len(leaf), *leaf.shape[1:])
            return torch.cat([leaf, more / 2 if leaf.is_floating_point() else more])

        return tree_map(resized, self._example)


def _results(model: nn.Module, inputs: Any, batch: int) -> list[Tensor]:
    try:
        results = [leaf for leaf in tree_leaves(call(model, inputs)) if isinstance(leaf, Tensor)]
    except PassFailed as error:
        raise ValueError(
            f"the model's forward pass fails on a batch of {batch} made from example_inputs: "
            f"{_short(error)}. Pass inputs that the model takes, the batch as first dimension of each tensor."
        ) from error
    if not results:
        raise ValueError("the model's forward pass returns no tensor, so there is nothing to export.")
    return results


def _write(model: nn.Module, inputs: Any, path: Path) -> None:
    try:
        program, shapes = _exported(model, inputs)
        # Given the module instead of a program, torch.onnx.export would fall back to a fixed batch.
        onnx = torch.onnx.export(program, dynamic_shapes=shapes, verbose=False)
        assert onnx is not None
        onnx.save(path)
    except Exception as error:  # the exporter may raise any kind of error
        raise ValueError(
            f"the model cannot be exported with a batch of any size: {_short(error)}. Its forward method "
            "must not depend on values, nor on one batch size (x.flatten(1) in place of x.view(8, -1))."
        ) from error
    if len(list(path.parent.iterdir())) > 1:
        raise ValueError("the model is too large for one ONNX file (2 GB).")


def _exported(model: nn.Module, inputs: Any) -> tuple[Any, Any]:
    """The program that ``torch.export`` makes of ``model``, and the shapes of its arguments.

    On a GPU, PyTorch asks whether cuDNN takes a norm's input, for which a batch has 65,535 pictures at most,
    and then refuses a batch of any size. So a copy on the CPU is exported. Only a model whose own code names
    its device is exported there, for batches of up to that size.
    """
    if device_of(model).type == "cpu":
        return _program(model, inputs)
    try:
        here = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, inputs)
        return _program(copied(model, Tensor.cpu).cpu(), here)
    except Exception as error:  # the exporter may raise any kind of error
        log.debug("a copy on the CPU was not exported: %s", first_line(error))
        return _program(model, inputs, most=_CUDNN_BATCH)


def _program(model: nn.Module, inputs: Any, most: int | None = None) -> tuple[Any, Any]:
    """As ``_exported``, of ``model`` where it is, for batches of any size, or of at most ``most``."""
    named: dict[str, Any] = inputs if isinstance(inputs, dict) else {}
    given = () if named else inputs
    positional = tuple(given) if isinstance(given, tuple | list) else (given,)
    batch = torch.export.Dim("batch", min=1, max=most)
    shapes = tree_map(
        lambda leaf: {0: batch} if isinstance(leaf, Tensor) and leaf.dim() else None,
        dict(inspect.signature(model.forward).bind(*positional, **named).arguments),
    )
    return torch.export.export(model, positional, named, dynamic_shapes=shapes, strict=False), shapes


def _run(path: Path, batches: list[Any]) -> tuple[Any, list[list[Tensor]]]:
    """Run the file in onnxruntime; return the session and the outputs for each of ``batches``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_inputs()]
        found = []
        for inputs in batches:
            given = [leaf.numpy(force=True) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
            results = session.run(None, dict(zip(names, given, strict=True)))
            found.append([torch.as_tensor(result) for result in results])
        return session, found
    except Exception as error:
        raise ValueError(
            f"onnxruntime cannot run the exported file: {_short(error)}. A model in another precision than "
            "float32 may have to be exported as model.float()."
        ) from error


def _difference(session: Any, expected: list[Tensor], found: list[Tensor], batch: int) -> float:
    """Return the largest difference, as a share of the output's largest value. ``ValueError`` over 1e-4."""
    shapes = [list(tensor.shape) for tensor in expected], [list(tensor.shape) for tensor in found]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"for a batch of {batch} the model gives outputs of shapes {shapes[0]} and onnxruntime "
            f"{shapes[1]}: this model cannot be exported faithfully."
        )
    differences = []
    for node, ours, theirs in zip(session.get_outputs(), expected, found, strict=True):
        off = difference(ours, theirs)
        if not off <= _TOLERANCE:
            raise ValueError(
                f"for a batch of {batch} onnxruntime's output {node.name!r} is off by {off:.3g} of the "
                f"largest value, and {_TOLERANCE:g} of it is allowed: this model cannot be exported "
                "faithfully (random numbers in evaluation mode, or half precision?)."
            )
        differences.append(off)
    return max(differences)


def _short(error: Exception) -> str:
    """Return the first line of the innermost cause: the exporter wraps errors in pages of advice."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return first_line(cause).rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's output, warnings and logs: the result or the error says all that matters."""
    disabled, said = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(said), redirect_stderr(said):
            yield
    finally:
        logging.disable(disabled)
