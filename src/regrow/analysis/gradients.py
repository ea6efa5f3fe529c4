"""The gradient of regrown filters beside that of the others, over the steps after a restore."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regrow.filters import convolutions
from regrow.given import kind_of
from regrow.indexing import index_tensor
from regrow.marks import check_whole
from regrow.modules import filters_first, unwrap
from regrow.numbers import numbers
from regrow.suggest import nearest
from regrow.torch_private import own_parameters

VERSION = 1
# Between two looks the number of steps grows by a tenth: about 25 looks while it grows tenfold.
_GROWTH = 1.1
_TOGETHER = ("regrown", "kept")


def row_gradients(model: nn.Module, filters: Mapping[str, list[int]]) -> dict[str, tuple[float, float]]:
    """The mean length of the gradients of some filters, and of the other filters of their layers.

    Args:
        model: after ``backward()``, before the gradients are cleared.
        filters: {qualified name: indices of the filters}.

    Returns:
        {qualified name: (mean L2 norm of the gradients of these filters' rows, that of the other rows)},
        without the layers that have no gradient; NaN where a layer has no such row.
    """
    convs, names, found = convolutions(model), [], []
    for name, indices in filters.items():
        conv = convs[name]
        weight = own_parameters(conv).get("weight")
        if weight is None or (gradient := weight.grad) is None:
            continue
        lengths = torch.linalg.vector_norm(filters_first(conv, gradient.detach()).float().flatten(1), dim=1)
        chosen = torch.zeros(len(lengths), dtype=torch.bool)
        chosen[index_tensor(indices)] = True
        chosen = chosen.to(lengths.device)
        names.append(name)
        found += [_mean(lengths, chosen), _mean(lengths, ~chosen)]
    values = numbers(found)
    return dict(zip(names, zip(values[::2], values[1::2], strict=True), strict=True))


def _mean(lengths: Tensor, chosen: Tensor) -> Tensor:
    """The mean of the chosen lengths; NaN without any. No value is fetched from a GPU."""
    return torch.where(chosen, lengths, 0).sum() / chosen.sum()


class GradientWatch:
    """Records how large the gradients of regrown filters are, beside those of the filters that were kept.

    A restored filter whose readers are 0 gets no gradient at first, and one whose readers are old may get the
    wrong one (forward-active and backward-starved: arXiv 2605.15435). The ratio of the two lengths shows it::

        watch = regrow.GradientWatch(model)
        …
            loss.backward()
            optimizer.step()
            watch.step()              # before the gradients are cleared
        …
        watch.note(cycle.step())      # what RePr.step returns: a restore begins a record

    It looks at every step at first, and then at ever fewer of them: the gaps grow by a tenth of the steps
    since the restore. Between the looks it costs nothing.

    Args:
        model: the model that RePr works on, in its wrappers.

    Raises:
        ValueError: ``model`` is no module, or is sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        check_whole(model, "GradientWatch")
        self._model = unwrap(model)
        self._records: list[dict[str, Any]] = []
        self._open = False

    @property
    def records(self) -> list[dict[str, Any]]:
        """A JSON-able record for each restore.

        ``event`` is the restore. ``steps`` are the steps after it that were measured, from 1. ``regrown``
        and ``kept`` are the mean L2 norms of the gradients of regrown and other rows in each of these steps,
        over all layers that have regrown filters; ``layers`` has both for each layer, with the numbers of
        ``rows``. None stands for a gradient that is not finite, and for a layer without such rows. ``seen``
        counts the steps so far.
        """
        return self._records

    def note(self, event: Any) -> None:
        """Begin a record at a restore, and end the one before it at any drop or restore.

        Args:
            event: what ``RePr.step`` returned: an ``Event``, as an object or a dictionary, or None.

        Raises:
            ValueError: it is something else, or names a layer that the model does not have.
        """
        if event is None:
            return
        said = event if isinstance(event, Mapping) else getattr(event, "to_dict", dict)()
        if not isinstance(said.get("filters"), Mapping) or "kind" not in said:
            raise ValueError(f"note takes what RePr.step returns, and got {kind_of(event)}.")
        convs = convolutions(self._model)
        for name in said["filters"]:
            if name not in convs:
                raise ValueError(f"no convolution is named {name!r}{nearest(str(name), convs)}")
        filters = {name: list(indices) for name, indices in said["filters"].items() if len(indices)}
        self._open = said["kind"] != "drop" and bool(filters)
        if not self._open:
            return
        rows = {
            name: [len(indices), convs[name].out_channels - len(indices)] for name, indices in filters.items()
        }
        self._records.append(
            {
                "version": VERSION,
                "event": {key: said[key] for key in ("kind", "step", "epoch", "cycle") if key in said},
                "filters": filters,
                "seen": 0,
                "steps": [],
                "regrown": [],
                "kept": [],
                "layers": {name: {"rows": rows[name], "regrown": [], "kept": []} for name in filters},
            }
        )

    def step(self) -> None:
        """Count a training step, and look at the gradients if it is time. See the class for the place.

        Raises:
            ValueError: none of the layers has a gradient: it was cleared before.
        """
        if not self._open:
            return
        record = self._records[-1]
        record["seen"] += 1
        last = record["steps"][-1] if record["steps"] else 0
        if record["seen"] < max(last + 1, math.ceil(_GROWTH * last)):
            return
        found = row_gradients(self._model, record["filters"])
        if not found:
            record["seen"] -= 1
            raise ValueError(
                "there is no gradient to look at: call watch.step() after loss.backward() and before "
                "optimizer.zero_grad()."
            )
        record["steps"].append(record["seen"])
        for place, key in enumerate(_TOGETHER):
            total, rows = 0.0, 0
            for name, layer in record["layers"].items():
                value = found[name][place] if name in found else math.nan
                layer[key].append(value if math.isfinite(value) else None)
                if name in found and layer["rows"][place]:
                    total, rows = total + value * layer["rows"][place], rows + layer["rows"][place]
            mean = total / rows if rows else math.nan
            record[key].append(mean if math.isfinite(mean) else None)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on: numbers, strings, and lists and dictionaries of these."""
        return {"version": VERSION, "records": copy.deepcopy(self._records), "open": self._open}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            ValueError: it is of another version, or names layers that the model does not have.
        """
        if not isinstance(state, Mapping) or state.get("version") != VERSION:
            raise ValueError(f"this is no state of version {VERSION} of a GradientWatch.")
        convs = convolutions(self._model)
        for record in state["records"]:
            for name, layer in record["layers"].items():
                if name not in convs or sum(layer["rows"]) != convs[name].out_channels:
                    raise ValueError(f"the state does not fit the model: look at layer {name!r}.")
        self._records = copy.deepcopy(list(state["records"]))
        self._open = bool(state["open"])
