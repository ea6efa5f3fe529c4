"""A network of the user's own, as ``module.path:function`` names it, with weights from a file."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regrow.given import kind_of
from regrow.short import line, short
from regrow.study.own_weights import SUFFIXES, check_file, load_own_weights
from regrow.study.typed import Mistyped
from regrow.suggest import nearest

_FILE = re.compile(r"(?:\./)?(?P<module>[\w/]+)\.py(?::(?P<function>\w[\w.]*))?")
_DOTTED = re.compile(r"(?P<module>\w+(?:\.\w+)*)\.(?P<function>\w+)")
_LIBRARIES = ("torchvision", "timm")
_FORM = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")


def is_own(name: str) -> bool:
    """Whether ``name`` has the form ``module.path:function``, and does not name a library's network."""
    return _FORM.fullmatch(name) is not None and name.partition(":")[0] not in _LIBRARIES


def meant(name: str) -> str:
    """What ``name``, which is no network, may have been meant as, as the end of a message; else empty."""
    if Path(name).suffix in SUFFIXES:
        return f": name the function that builds its network, and add --weights {line(name)}"
    if found := _FILE.fullmatch(name):
        module = found["module"].strip("/").replace("/", ".")
        return f": write {module}:{found['function'] or 'build'}, with the function that builds the network"
    plain = name.removeprefix("./").removesuffix("()")
    if is_own(plain):
        return f": write {plain}"
    if "/" in name:
        return ": there is no such folder"
    if Path(f"{name.replace('.', '/')}.py").is_file():
        return f": write {name}:build, with the function that builds the network"
    found = _DOTTED.fullmatch(name)
    if found and any(Path(name.partition(".")[0] + end).exists() for end in ("", ".py")):
        return f": did you mean {found['module']}:{found['function']}?"
    return ""


def own_network(name: str, weights: str | None) -> nn.Module:
    """Call the function, or the class, that ``name`` names, and load ``weights`` into the network.

    Args:
        name: ``module.path:function``. The module is imported with the current folder first on the path;
            the function takes no arguments.
        weights: a file, as ``load_own_weights`` takes it; ``none`` for the network as the function made it.

    Raises:
        ValueError: there is no such module or function, it takes arguments, or what it returns is no network;
            the errors of ``load_own_weights``.
        RuntimeError: the user's own code raised a ``ValueError``, an ``ArithmeticError`` or an ``OSError``,
            which is the cause. Its other errors surface as they are.
    """
    if weights is None:
        raise Mistyped(
            f"pass the weights of {name}: --weights FILE (.safetensors, .pth or .pt), or --weights none for "
            "the network as the function returns it."
        )
    file = None if weights == "none" else Path(weights)
    if file is not None:
        check_file(file)
    with _here_first():
        model = _called(name)
    if file is not None:
        load_own_weights(model, file, name)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(
            f"the network of {name} has tensors without numbers, on the device meta: build it on cpu."
        )
    return model


@contextlib.contextmanager
def _here_first() -> Iterator[None]:
    """The current folder is the first on Python's path in the block."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _called(name: str) -> nn.Module:
    home, _, wanted = name.partition(":")
    module = _imported(home)
    function: Any = module
    for part in wanted.split("."):
        if not hasattr(function, part):
            known = [
                each for each, value in vars(module).items() if callable(value) and not each.startswith("_")
            ]
            raise Mistyped(
                f"{home} has no function {short(wanted)}{nearest(wanted, known) if known else '.'}"
            )
        function = getattr(function, part)
    if isinstance(function, nn.Module):
        raise Mistyped(f"{name} is a network: give a function that takes no arguments and returns it.")
    if not callable(function):
        raise Mistyped(f"{name} is {kind_of(function)}: give a function that returns the network.")
    if needed := _needed(function):
        raise Mistyped(
            f"{name} takes the arguments {', '.join(needed)}: write a function that takes none and returns "
            "the network."
        )
    with _own_code(name):
        model = function()
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        hint = " Give the function that makes what was scripted." if isinstance(model, nn.Module) else ""
        raise Mistyped(f"{name} returned {kind_of(model)}, and not a network, an nn.Module.{hint}")
    return model


@contextlib.contextmanager
def _own_code(name: str) -> Iterator[None]:
    """Let errors of the user's code end the command with their traceback, and do not let the code end it."""
    try:
        yield
    except SystemExit:
        raise Mistyped(
            f"{name} ended Python when it was imported or called, as a script that parses arguments does: "
            'write what the script does below if __name__ == "__main__", and name a function beside it.'
        ) from None
    except (ValueError, ArithmeticError, OSError) as error:  # the command shows one line of these
        raise RuntimeError(f"{name} raised an error: {type(error).__name__}: {error}") from error


def _imported(home: str) -> Any:
    try:
        with _own_code(home):
            return importlib.import_module(home)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{home}.".startswith(f"{error.name}."):
            raise  # a module that the user's own imports
        here = Path.cwd()
        first = home.partition(".")[0]
        in_src = (here / "src" / first).is_dir() or (here / "src" / f"{first}.py").is_file()
        hint = " It is in src: install your package, or write PYTHONPATH=src regrow …" if in_src else ""
        raise Mistyped(
            f"there is no module {short(error.name)}, neither in {line(here)} nor installed.{hint}"
        ) from None


def _needed(function: Any) -> list[str]:
    """The arguments that ``function`` cannot be called without."""
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.kind in kinds and each.default is each.empty]
