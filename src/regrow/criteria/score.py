"""``score``: how much each filter is worth keeping, by the name of a criterion or by a function.

The criteria of weights are here, each a pure function of a weight. Those that read pictures are in
``activations``, ``gradients`` and ``oracle``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regrow.criteria.activations import ACTIVATION_CRITERIA, activation_scores
from regrow.criteria.batches import Loss
from regrow.criteria.gradients import LOSS_CRITERIA, loss_scores
from regrow.criteria.reconstruction import reconstruction_scores
from regrow.criteria.utility import utility_scores
from regrow.criteria.values import wide
from regrow.filters import check_finite, convolutions, eligible, row_lengths, rows, unit_rows
from regrow.given import check_mapping, check_module, check_seed, check_weight, kind_of, tensor_given
from regrow.looking.copies import copied
from regrow.marks import states_of, strip
from regrow.modules import Convolution, filters_first, unwrap
from regrow.numbers import at_least_float32, numbers
from regrow.suggest import nearest


def overlap(weight: Tensor) -> Tensor:
    """The overlap of each filter with the other filters of its layer (RePr, arXiv 1811.07275, eq. 1–2).

    ``O[f] = Σ_j |Ŵ Ŵᵀ − I|[f, j] / J``, where ``Ŵ`` has J rows of unit length. High = redundant.
    A row of zeros has overlap 0, and adds nothing to the overlap of the other rows.

    Args:
        weight: [filters, channels, *kernel] of an ungrouped convolution; of a transposed one, which has its
            channels first, ``weight.transpose(0, 1)``.

    Returns:
        Tensor[filters], each in [0, 1), float32 (float64 for float64 weights).

    Raises:
        ValueError: ``weight`` is not a tensor of real numbers, or is empty.
    """
    check_weight(weight, "overlap")
    if weight.dim() == 0 or not weight[:1].numel() or weight.is_complex():
        raise ValueError(
            f"overlap takes a weight [filters, channels, …] of real numbers, and got {weight.dtype} of shape "
            f"{list(weight.shape)}."
        )
    matrix = at_least_float32(rows(weight.detach()))
    unit = unit_rows(matrix)
    cosine = (unit @ unit.T).abs_()
    cosine.fill_diagonal_(0)
    return cosine.sum(1) / len(matrix)


def ortho(weight: Tensor) -> Tensor:
    """The negative overlap (RePr, eq. 2): high = no other filter has a similar direction. Tensor[filters]."""
    return -overlap(weight)


def ortho_corrected(weight: Tensor) -> Tensor:
    """``ortho`` divided by the |cos| that random unit vectors of dimension D have on average, about
    sqrt(2 / (π D)): without this, filters with few weights score lower. Tensor[filters]."""
    return ortho(weight) / math.sqrt(2 / (math.pi * rows(weight).shape[1]))


def l1(weight: Tensor) -> Tensor:
    """Sum of the absolute weights of each filter (Li et al. 2017). Tensor[filters], float64."""
    return row_lengths(rows(weight.detach()), 1)


def l2(weight: Tensor) -> Tensor:
    """Euclidean length of each filter. Tensor[filters], float64."""
    return row_lengths(rows(weight.detach()))


WEIGHT_CRITERIA = {"ortho": ortho, "ortho-corrected": ortho_corrected, "l1": l1, "l2": l2}
DATA_CRITERIA = (*ACTIVATION_CRITERIA, "utility", "reconstruction", *LOSS_CRITERIA, "oracle")
LABELLED_CRITERIA = (*LOSS_CRITERIA, "oracle")
NEGATIVE_CRITERIA = ("ortho", "ortho-corrected")  # no score is above 0
CRITERIA = (*WEIGHT_CRITERIA, "random", *DATA_CRITERIA)

Criterion = str | Callable[[nn.Module], Mapping[str, Tensor]]


def check_criterion(criterion: Any) -> None:
    """Raise ``ValueError``, with similar names, unless ``criterion`` is in ``CRITERIA`` or a function."""
    if isinstance(criterion, nn.Module | type) or not (isinstance(criterion, str) or callable(criterion)):
        raise ValueError(
            f"criterion is a name, such as 'ortho', or a function of the model that returns a score for each "
            f"filter, {{name: Tensor[filters]}}, and got {kind_of(criterion)}."
        )
    if isinstance(criterion, str) and criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}{nearest(criterion, CRITERIA)}")


def criterion_name(criterion: Criterion) -> str:
    """The name of a criterion for records; of a function, the one that it was defined by."""
    return (
        criterion
        if isinstance(criterion, str)
        else getattr(criterion, "__qualname__", type(criterion).__name__)
    )


def check_pictures(criterion: Criterion, batches: Any, loss: Any, argument: str = "batches") -> None:
    """Raise ``ValueError`` if ``criterion`` reads pictures and there are none, or ``loss`` is no function.

    Args:
        argument: what the caller's public function calls ``batches``.
    """
    if loss is not None and (not callable(loss) or isinstance(loss, type)):
        raise ValueError(
            f"loss is a function of outputs and labels that returns a tensor of one number, and got "
            f"{kind_of(loss)}. Try torch.nn.functional.cross_entropy."
        )
    if batches is None and criterion in DATA_CRITERIA:
        pairs = "pairs of inputs and labels" if criterion in LABELLED_CRITERIA else "inputs"
        raise ValueError(
            f"criterion {criterion!r} reads pictures: pass {argument}=, {pairs} of a few hundred pictures in "
            "all, such as itertools.islice(loader, 4), or [(x, y)] for one batch."
        )


def score(
    model: nn.Module,
    criterion: Criterion = "ortho",
    *,
    exclude: Iterable[str] = (),
    seed: int | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """Score every filter of every ungrouped convolution, transposed ones too; higher = keep.

    docs/criteria.md compares the criteria. Those that read pictures run the model in evaluation mode, in full
    precision, and leave its modes, buffers and gradients and the random generators as they were.

    Args:
        model: any module with convolutions; it is only read.
        criterion: ``"ortho"`` (RePr's overlap), ``"ortho-corrected"``, ``"l1"``, ``"l2"`` or ``"random"``;
            with pictures, ``"mean-activation"``, ``"apoz"``, ``"utility"``, ``"reconstruction"``,
            ``"gradient"``, ``"taylor"``, ``"hessian"`` or ``"oracle"``; or a function of the model without
            wrappers, that returns {name: Tensor[filters]}.
        exclude: qualified names of convolutions, or of containers of convolutions, to leave out.
        seed: for ``"random"``; the same seed gives the same scores.
        batches: pictures, in any iterable, such as a DataLoader: tensors, dicts of keywords, or pairs of
            such inputs (or a tuple of arguments) and labels, on any device. All are read, once.
            ``"gradient"``, ``"taylor"``, ``"hessian"`` and ``"oracle"`` take the loss.
        loss: a function of outputs and labels that returns a tensor of one number, for a batch of one
            picture too; the labels are None where a batch has none. None: the cross entropy.

    Returns:
        {qualified name: Tensor[filters]} on the device of the weights. A criterion that reads pictures gives
        0 to the filters of a layer that they do not reach.

    Raises:
        ValueError: unknown criterion or layer name, no convolution left, NaN, infinite or complex weights,
            ``"random"`` without a seed, a criterion without the pictures or labels that it needs, pictures
            that do not fit or give NaN, a function's scores that do not fit.
    """
    check_module(model, "score")
    check_criterion(criterion)
    check_pictures(criterion, batches, loss)
    convs = eligible(model, exclude)
    if not isinstance(criterion, str):
        return _checked(criterion(unwrap(model)), model, convs)
    check_finite(convs)
    if criterion in DATA_CRITERIA and batches is not None:
        if criterion == "oracle":
            from regrow.criteria.oracle import oracle_scores

            return oracle_scores(model, batches, loss, exclude=exclude)
        probe = unwrap(model)
        if "narrowed" in states_of(probe):  # its layers make the channels that are left; those of a copy, all
            probe = copied(probe)
            strip(probe)
        layers: dict[str, Any] = {name: probe.get_submodule(name) for name in convs}
        if criterion in ACTIVATION_CRITERIA:
            found = activation_scores(probe, layers, batches, criterion)
        elif criterion == "utility":
            found = utility_scores(probe, layers, batches)
        elif criterion == "reconstruction":
            found = reconstruction_scores(probe, layers, batches)
        else:
            found = loss_scores(probe, layers, batches, criterion, loss)
        return _complete(found, convs, criterion)
    if criterion != "random":
        of = WEIGHT_CRITERIA[criterion]
        scores = {name: of(filters_first(conv, conv.weight)) for name, conv in convs.items()}
        finite = numbers([values.isfinite().all() for values in scores.values()])
        if infinite := [name for name, is_finite in zip(scores, finite, strict=True) if not is_finite]:
            raise ValueError(
                f"the weights of {infinite[0]!r} are so large that {criterion} is beyond float64: "
                "divide them by 1e10, say."
            )
        return scores
    if seed is None:
        raise ValueError("criterion 'random' needs a seed: score(model, 'random', seed=0)")
    check_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(conv.out_channels, generator=generator).to(conv.weight.device)
        for name, conv in convs.items()
    }


def _complete(
    scores: Mapping[str, Tensor], convs: Mapping[str, Convolution], criterion: str
) -> dict[str, Tensor]:
    """``scores`` in the order of ``convs``, 0 for a layer that has none, because no pass reached it.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    found = {
        name: scores[name] if name in scores else wide(conv.weight.new_zeros(conv.out_channels))
        for name, conv in convs.items()
    }
    finite = numbers([values.isfinite().all() for values in found.values()])
    for name, is_finite in zip(found, finite, strict=True):
        if not is_finite:
            raise ValueError(
                f"the pictures give NaN or infinite values of criterion {criterion!r} in {name!r}: check the "
                "pictures, the labels and the model."
            )
    return found


def _checked(given: Any, model: nn.Module, convs: Mapping[str, Convolution]) -> dict[str, Tensor]:
    """The scores that a function gave for the layers ``convs``, in their order and on their devices.

    Raises:
        ValueError: a layer is unknown or missing, has another number of scores than of filters, or NaN.
    """
    check_mapping(given, "what the criterion returns", "one score per filter")
    every = convolutions(model)
    if unknown := [name for name in given if name not in every]:
        raise ValueError(f"the criterion returns scores for {unknown[0]!r}{nearest(unknown[0], every)}")
    found = {}
    for name, conv in convs.items():
        if name not in given:
            raise ValueError(
                f"the criterion returns no scores for {name!r}: add them, or exclude that layer."
            )
        values = tensor_given(given[name], f"what the criterion returns for {name!r}").detach()
        if values.shape != (conv.out_channels,) or values.is_complex():
            raise ValueError(
                f"the criterion returns for {name!r} one real number for each of its {conv.out_channels} "
                f"filters, and returned {values.dtype} of shape {list(values.shape)}."
            )
        found[name] = values.to(conv.weight.device)
    bad = numbers([values.isnan().any() for values in found.values()])
    if holds := [name for name, is_nan in zip(found, bad, strict=True) if is_nan]:
        raise ValueError(f"the criterion returns NaN for filters of {holds[0]!r}.")
    return found
