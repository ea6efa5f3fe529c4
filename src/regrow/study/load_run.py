"""The trained network of a run folder, in one's own Python. PyTorch is imported when it is asked for."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_NEEDED = ("pydantic", "yaml", "torchvision", "sklearn")


def load_run(folder: str | os.PathLike[str]) -> nn.Module:
    """Build the network of a finished run, with its final weights, on the CPU and in eval mode.

    The pictures of the run say how many classes and channels it has, so they must be where they were: a
    published data set is downloaded if it is not there.

    Args:
        folder: that ``regrow train`` or ``regrow compare`` wrote, with its config.yaml.

    Raises:
        ValueError: ``folder`` is not that of a finished run, its weights are missing or do not fit, or its
            data is missing.
        ImportError: the study extra is not installed.
    """
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ImportError(f"load_run needs {', '.join(missing)}: pip install 'regrow[study]'")
    from regrow.given import kind_of

    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise ValueError(f"load_run takes a run folder, such as 'runs/one', and got {kind_of(folder)}.")
    from regrow.study.trained import network_of_run

    model, _config, _splits = network_of_run(Path(folder))
    return model.eval()
