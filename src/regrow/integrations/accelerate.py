"""What ``Accelerator.register_for_checkpointing`` takes, for the noise of Batch Bridgeout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from regrow.noise.layers import bridgeout_state, load_bridgeout_state


class BridgeoutState:
    """The state of a model's noise, as an object to register: ``bridgeout_state`` and its inverse.

    A ``regrow.RePr`` is such an object itself.

    Args:
        model: the module that was given to ``add_bridgeout``, in its wrappers or without.

    Raises:
        ValueError: ``add_bridgeout`` was not called on ``model``.
    """

    def __init__(self, model: nn.Module) -> None:
        bridgeout_state(model)
        self._model = model

    def state_dict(self) -> dict[str, Any]:
        return bridgeout_state(self._model)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_bridgeout_state(self._model, state)
