"""Benchmarks that need a GPU are tried on the CPU, at tiny sizes: none of their parts fails."""

import json
from pathlib import Path

import forking

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def test_the_benchmark_for_a_gpu(tmp_path: Path) -> None:
    # The part that is left out runs tests.
    parts = ["Steps", "Cuts", "Latency", "Compiled and captured"]
    arguments = ["--device", "cpu", "--smoke", "--out", tmp_path / "out", "--parts", *parts]
    done = forking.script(SCRIPT, *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "out" / "gpu.json").read_text(encoding="utf-8"))["parts"]
    assert list(measured) == parts
    assert not [key for part in measured.values() for key in part if "failed" in key], measured
    ratios = measured["Steps"]["vanilla net, 3×32, bf16"]["ratios"]
    assert ratios["plain"]["median"] == 1
    assert {"full", "sub", "sub, compact", "sub, masked", "Bridgeout", "born small"} < ratios.keys()
    table = (tmp_path / "out" / "gpu.md").read_text(encoding="utf-8")
    assert all(f"\n## {part}\n" in table for part in parts)
