"""Files of callbacks in checkpoints, and from which checkpoint the Trainer of transformers resumes."""

from __future__ import annotations

import inspect
import io
from pathlib import Path
from typing import Any

import torch


def as_bytes(state: dict[str, Any]) -> bytes:
    """A state as a file of ``torch.save`` has it, which ``torch.load`` reads with ``weights_only=True``."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def saved_in(args: Any, state: Any) -> Path:
    """The folder of the checkpoint that the Trainer writes after ``state.global_step`` steps."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def resumed_from(args: Any, state: Any) -> Path | None:
    """The folder of the checkpoint that the running ``Trainer.train`` goes on from; None if it starts anew.

    The Trainer tells its callbacks the number of the step, and not the folder, which may be one that was
    copied from elsewhere. The folder is an argument of the methods that run now, ``train`` among them.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if "resume_from_checkpoint" in frame.f_locals and "self" in frame.f_locals:
            given = frame.f_locals["resume_from_checkpoint"]
            if not isinstance(given, bool):
                return None if given is None else Path(given)
        frame = frame.f_back
    return saved_in(args, state) if state.global_step else None
