"""The kernels for a GPU, as far as a CPU can try them: each test in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regrow.noise import vectors

pytest.importorskip("triton")
HERE = Path(__file__).parent


def run(what, **environment):
    done = subprocess.run(
        [sys.executable, str(HERE / "triton_on_cpu.py"), what],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_they_compute_what_pytorch_does():
    run("compare", TRITON_INTERPRET="1")


@pytest.mark.needs_torch("2.7", "the way in which the test calls Triton's compiler")
def test_they_compile_for_gpus():
    run("compile")


def test_they_serve_gpus_alone():
    assert vectors.quick_kernels(torch.ones(3)) is None


def test_without_triton_the_operations_of_pytorch_serve(monkeypatch):
    monkeypatch.setitem(sys.modules, "regrow.noise.triton_kernels", None)
    vectors._triton.cache_clear()
    assert vectors._triton(torch.device("cpu")) is None
    vectors._triton.cache_clear()


def test_where_they_do_not_run_the_operations_of_pytorch_serve():
    # Not interpreted, Triton finds no driver for a CPU.
    vectors._triton.cache_clear()
    assert vectors._triton(torch.device("cpu")) is None
    vectors._triton.cache_clear()
