"""Compares the kernels for a GPU with PyTorch's operations, or compiles them for GPUs; no GPU is needed.

Tests run this file in processes of their own: Triton decides at its import whether it interprets kernels.
"""

import sys

import torch
from triton import compile as compiled
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from regrow.noise import triton_kernels, vectors
from regrow.noise.draws import base
from regrow.noise.vectors import Strength

COUNT = 2500  # two blocks and a half
CASES = [
    (torch.float32, 1.5, 0.3, False, 0), (torch.float32, 1.0, 0.6, True, 2**31 + 64),
    (torch.float32, 2.0, 0.3, False, 2**26), (torch.float32, 0.7, 0.1, False, 64),
    (torch.bfloat16, 1.5, 0.3, False, 128), (torch.float16, 2.5, 1e-7, True, 0),
]  # fmt: skip


def compare() -> None:
    torch.manual_seed(0)
    for i, (dtype, q, p, targeted, position) in enumerate(CASES):
        weight = (torch.randn(COUNT) * 0.05).to(dtype)
        weight[:3], weight[3] = torch.tensor([0.0, -0.0, 1e-7]), 1.0
        chosen = torch.rand(COUNT) < 0.5 if targeted else None
        number, seed = torch.tensor(10**i), base(i)
        strength = Strength(p, q, 1.0, False)
        found = []
        for quick in (None, triton_kernels):
            vectors.quick_kernels = lambda _, quick=quick: quick
            noisy, alike = torch.full((COUNT + 1,), 7.0, dtype=dtype), weight.clone()
            vectors.perturb(weight, noisy[:-1], position, number, seed, strength, chosen)
            vectors.perturb(alike, alike, position, number, seed, strength, chosen)
            assert noisy[-1] == 7  # nothing is written behind the end
            assert torch.equal(noisy[:-1], alike)
            found.append(alike)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found[1], found[0], rtol=16 * eps, atol=4 * eps)
        assert torch.equal(found[0] > weight, found[1] > weight)  # the same weights are kept
        assert torch.equal(found[0] < weight, found[1] < weight)
        if q == 2:  # dropped connections are exactly 0
            assert ((found[1] == 0) == (found[0] == 0)).all()
            assert (found[1][weight > 0] == 0).any()
        gradient, slopes = torch.randn(COUNT).to(dtype), []
        for quick in (None, triton_kernels):
            vectors.quick_kernels = lambda _, quick=quick: quick
            out, alike = torch.empty_like(gradient), gradient.clone()
            vectors.scale(gradient, weight, found[0], q, False, out)
            vectors.scale(alike, weight, found[0], q, False, alike)
            assert torch.equal(out, alike)
            slopes.append(out)
        torch.testing.assert_close(slopes[1], slopes[0], rtol=16 * eps, atol=16 * eps)
        assert torch.equal(slopes[1][:2], gradient[:2])  # at 0 the derivative is 1
    assert triton_kernels.works(torch.device("cpu"))


def compile_() -> None:
    numbers = {"base": "i64", "position": "i64", "last_kept": "i32", "scale": "fp32", "count": "i32"}
    for kind, half_q in (("fp32", 0.75), ("bf16", 0.35)):
        floats = dict.fromkeys(("source", "target", "gradient", "weight", "noisy"), f"*{kind}")
        given = {**floats, "chosen": "*u8", "number": "*i64", **numbers}
        settled = {"half_q": half_q, "targeted": True, "block": 1024}
        for kernel in (triton_kernels._noisy, triton_kernels._scaled):
            names = kernel.arg_names
            constants = {name: settled[name] for name in names if name in settled}
            signature = {name: given.get(name, "constexpr") for name in names}
            source = ASTSource(kernel, signature, constexprs=constants)
            assert "cubin" in compiled(source, target=GPUTarget("cuda", 90, 32)).asm


if __name__ == "__main__":
    {"compare": compare, "compile": compile_}[sys.argv[1]]()
