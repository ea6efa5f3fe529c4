"""Which norms read the output of which layer, and which layers have norms of their own, as passes show."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from regrow.looking.calls import call, evaluating
from regrow.looking.hooks import hooked
from regrow.modules import Norm
from regrow.torch_private import ConvNd, writes_to


class NormFinder:
    """Watches passes; ``note`` is to be called behind every layer that makes channels and every norm."""

    def __init__(self) -> None:
        # Holding the outputs keeps their ids from being used again.
        self._made: dict[int, tuple[str, int, Tensor]] = {}
        self._norms: dict[str, list[str]] = {}
        self._sources: dict[str, set[str]] = {}

    def note(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """One call of a layer, as ``hooked`` shows it."""
        if not isinstance(module, Norm):
            self._made[id(output)] = (name, writes_to(output), output)
            self._norms.setdefault(name, [])
            return
        source, writes, _ = self._made.get(id(inputs[0]) if inputs else 0, ("", 0, None))
        unchanged = bool(source) and writes_to(inputs[0]) == writes
        self._sources.setdefault(name, set()).add(source if unchanged else "")
        if source:
            self._norms[source].append(name)

    def behind(self) -> dict[str, list[str]]:
        """{layer: the norms that read the tensor it made}, in the order in which the layers ran.

        Something may have written to the tensor in between.
        """
        return {name: list(dict.fromkeys(norms)) for name, norms in self._norms.items()}

    def own(self) -> dict[str, list[str]]:
        """{layer: the norms behind it}, where these norms read the layer's output, unchanged, in every call.

        Readers of the output that are no norms do not show.
        """
        return {
            name: norms
            for name, norms in self.behind().items()
            if norms and all(self._sources[norm] == {name} for norm in norms)
        }


def own_norms(model: nn.Module, example_inputs: Any) -> dict[str, list[str]]:
    """``NormFinder.own`` of convolutions, transposed ones too, and linear layers, from one pass in eval mode.

    Raises:
        PassFailed: the model's forward pass fails.
    """
    finder = NormFinder()
    layers = [each for each in model.named_modules() if isinstance(each[1], ConvNd | nn.Linear | Norm)]
    with evaluating(model), hooked(layers, finder.note):
        call(model, example_inputs)
    return finder.own()
