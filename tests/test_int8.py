"""The example of cutting and then quantising: what its table says, at a tiny size."""

import re
from pathlib import Path

import pytest

import forking

EXAMPLE = Path(__file__).parents[1] / "examples" / "cut_then_int8.py"
TINY = f"""
import runpy
example = runpy.run_path({str(EXAMPLE)!r})
example["main"].__globals__.update(STEPS=60, PASSES=3, CALIBRATION=200)
example["main"]()
"""


@pytest.mark.needs_torch("2.13", "export_onnx")
def test_eight_bits_are_smaller_and_answer_alike(tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(TINY)
    done = forking.script(tmp_path / "tiny.py", 1, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    head, columns, *lines = done.stdout.splitlines()
    assert head.startswith("digits, seed 1: 359 test pictures")
    assert columns.split() == ["accuracy", "as", "uncut", "kB", "1", "picture", "16", "pictures"]
    rows = {}
    for line in lines:
        name, accuracy, same, size, one, many = re.fullmatch(
            r"(.*?) +([\d.]+)% +([\d.]+)% +(\d+) +([\d.]+) \(.*?\) +([\d.]+) \(.*?\)", line
        ).groups()
        rows[name] = (float(accuracy), float(same), int(size))
        assert float(one) > 0
        assert float(many) > 0
    uncut, uncut8, cut, made_up, made_up8 = rows.values()
    assert list(rows) == [
        "uncut", "uncut, int8", "cut", "cut and reconstructed", "cut and reconstructed, int8",
    ]  # fmt: skip
    assert uncut[1] == 100
    assert uncut[0] > 50
    assert cut[2] == made_up[2] < 0.7 * uncut[2]
    assert uncut8[2] < 0.5 * uncut[2]
    assert made_up8[2] < 0.6 * made_up[2]
    assert uncut8[1] > 95
    assert abs(made_up8[1] - made_up[1]) < 5
    assert made_up[0] > cut[0]
