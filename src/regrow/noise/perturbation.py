"""Batch Bridgeout's noise on one weight tensor (arXiv 2009.10893)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regrow.given import check_weight, kind_of
from regrow.noise.draws import Place, base
from regrow.noise.groups import Part, noisy, noisy_gradients, smallest, together
from regrow.noise.transforms import slope, transformed
from regrow.noise.vectors import Strength
from regrow.torch_private import is_transformed

_ONE = Part(Place(base(0), 0), transposed=0, alone=False)


def bridgeout(
    weight: Tensor,
    p: float = 0.3,
    q: float = 1.5,
    *,
    target_fraction: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One draw of w̃ = w + |w|^(q/2) ⊙ (m/(1−p) − 1), m ~ Bernoulli(1−p) (Batch Bridgeout, arXiv 2009.10893).

    E[w̃] = w and Var[w̃] = |w|^q · p/(1−p); with q = 2 and weights ≥ 0 it is DropConnect. A weight of 0
    stays 0. ∂w̃/∂w = 1 + (q/2)·noise/w, which has mean 1. For q < 2 it is unbounded at 0, so |w| in the
    denominator is taken as at least 1e-6: the derivative is then at most
    1 + (q/2)·1000^(2−q)·max(1, p/(1−p)) in size, its mean is still 1, and it is exactly 1 at w = 0.

    Args:
        weight: [filters, ...], real floating point. Below 32 bits the arithmetic is done in float32.
        p: probability that a weight's m is 0, 0 ≤ p < 1. With p = 0 the result equals ``weight``.
        q: the norm of the penalty that the noise is equivalent to, above 0.
        target_fraction: share of each filter's weights that is perturbed: the smallest in magnitude, rounded
            to a whole number of weights. Of equal magnitudes the first are taken.
        generator: supplies one number, which decides the whole draw; None takes PyTorch's global generator
            of the CPU.

    Returns:
        A new tensor like ``weight``, which can be differentiated any number of times.

    Raises:
        ValueError: p, q or target_fraction out of range, or ``weight`` is a scalar or has another type.
    """
    check_weight(weight, "bridgeout")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator is a torch.Generator or None, and got {kind_of(generator)}. For a seed write "
            "torch.Generator().manual_seed(0)."
        )
    check_noise(p, q, target_fraction)
    if not weight.is_floating_point() or weight.dim() == 0:
        raise ValueError(
            f"weight must be a real floating-point tensor [filters, ...], got {weight.dtype} of shape "
            f"{list(weight.shape)}."
        )
    device = "cpu" if generator is None else generator.device
    number = torch.randint(2**63 - 1, (), generator=generator, device=device)
    return drawn(weight, _ONE, number, Strength(p, q, target_fraction, False))


def check_noise(p: float, q: float, target_fraction: float) -> None:
    """Raise ``ValueError`` unless 0 ≤ p < 1, 0 < q < ∞ and 0 < target_fraction ≤ 1."""
    for name, value in (("p", p), ("q", q), ("target_fraction", target_fraction)):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{name} must be a number, got {value!r}.")
    if not 0 <= p < 1:
        raise ValueError(f"p is the probability of dropping a weight, 0 <= p < 1, got {p!r}. Try p=0.3.")
    if not 0 < q < math.inf:
        raise ValueError(f"q is the norm of the penalty, a finite number above 0, got {q!r}. Try q=1.5.")
    if not 0 < target_fraction <= 1:
        raise ValueError(
            "target_fraction is the share of each filter's weights that is perturbed, "
            f"0 < target_fraction <= 1, got {target_fraction!r}. For all of them write target_fraction=1.0."
        )


def drawn(weight: Tensor, part: Part, number: Tensor, strength: Strength) -> Tensor:
    """w̃ of one weight, in compiled code and inside of a transform of torch.func too: there it is equal up to
    rounding. See ``groups.together``."""
    if torch.compiler.is_compiling():
        return perturbed(weight, *_flat(part), number, *strength)
    if not is_transformed(weight):
        return together([weight], [part], number, strength)[0]
    # With q = 2, a weight of 1 becomes m/(1−p). The draw depends on the order of the weights in memory.
    ones = torch.ones_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    factor = perturbed(ones, *_flat(part), number, strength.p, 2.0, 1.0, False) - 1
    if strength.target_fraction < 1:
        factor = factor * smallest(weight, strength.target_fraction, part.transposed)
    return transformed(weight, factor, strength.q)


def _flat(part: Part) -> tuple[int, int, int]:
    return part.place.base, part.place.offset, part.transposed


# A custom operator, so that torch.compile calls it and does not trace into it.
@torch.library.custom_op("regrow::bridgeout", mutates_args=())
def perturbed(
    weight: Tensor, base: int, offset: int, transposed: int, number: Tensor, p: float, q: float,
    target_fraction: float, compiled: bool,
) -> Tensor:  # fmt: skip
    """``bridgeout`` with a draw that depends only on ``base``, ``offset``, ``number`` and the memory layout.

    The device and ``compiled`` have no influence on which weights are dropped.

    Args:
        base, offset, transposed: see ``groups.Part``.
        number: [] an integer in a tensor, because torch.compile compiles again for every plain number.
    """
    return noisy([weight], number, [offset], [transposed], base, p, q, target_fraction, compiled)[0]


@perturbed.register_fake
def _(weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, *_, ctx.q, _, ctx.compiled = inputs
    # This needs no extra memory: the convolution saves w̃ too, and the parameter exists anyway.
    ctx.save_for_backward(weight, output)


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    weight, noisy = ctx.saved_tensors
    if torch.is_grad_enabled():  # the caller differentiates once more
        return (gradient * slope(weight, noisy, ctx.q)).to(gradient.dtype), *[None] * 8
    return scaled(gradient, weight, noisy, ctx.q, ctx.compiled), *[None] * 8


perturbed.register_autograd(_gradient, setup_context=_remember)


@torch.library.custom_op("regrow::bridgeout_gradient", mutates_args=())
def scaled(gradient: Tensor, weight: Tensor, noisy: Tensor, q: float, compiled: bool) -> Tensor:
    """``gradient`` · ∂w̃/∂w, where ∂w̃/∂w = 1 + (q/2)·(w̃ − w)/w."""
    return noisy_gradients([gradient], [weight], [noisy], [0], [False], q, compiled)[0]


@scaled.register_fake
def _(_: Tensor, weight: Tensor, *__: Any) -> Tensor:
    return torch.empty_like(weight)
