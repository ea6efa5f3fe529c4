"""Batch Bridgeout's noise by PyTorch's own operations: for the transforms of torch.func, and derivatives of
derivatives. It takes more memory than the kernels."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from regrow.noise.kernels import SMALLEST


def transformed(weight: Tensor, factor: Tensor, q: float) -> Tensor:
    """w̃ = w + |w|^(q/2) ⊙ ``factor``, with the derivative of ``bridgeout``; any transform may run.

    Args:
        factor: m/(1−p) − 1 for each weight; it has no derivative.
    """
    return cast(Tensor, _Perturbed.apply(weight, factor, q))


def slope(weight: Tensor, noisy: Tensor, q: float) -> Tensor:
    """∂w̃/∂w = 1 + (q/2)·(w̃ − w)/w, |w| taken as at least ``SMALLEST``; it can be differentiated."""
    whole = torch.promote_types(weight.dtype, torch.float32)
    weight, noisy = weight.to(whole), noisy.to(whole)
    # Two branches, because 1/w at 0 has an infinite derivative, and no mask turns that into a number.
    bounded = torch.where(
        weight.abs() < SMALLEST, torch.copysign(weight.new_tensor(SMALLEST), weight), weight
    )
    return 1 + (q / 2) * (noisy - weight) / bounded


class _Perturbed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, factor: Tensor, q: float) -> Tensor:
        whole = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return (whole + whole.abs() ** (q / 2) * factor).to(weight.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, _, ctx.q = inputs
        ctx.save_for_backward(weight, output)
        ctx.save_for_forward(weight, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, noisy = ctx.saved_tensors
        return (gradient * slope(weight, noisy, ctx.q)).to(gradient.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        weight, noisy = ctx.saved_tensors
        return (tangent * slope(weight, noisy, ctx.q)).to(tangent.dtype)
