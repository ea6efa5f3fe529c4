import json
from pathlib import Path

import pytest

from regrow.study import records
from regrow.study.config import make_config
from regrow.study.launch import run_comparison


def test_a_comparison_trains_what_is_missing_prints_a_table_and_writes_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"width": 4, "train_size": 200, "epochs": 4, "threads": 1}

    def configs(seeds: int) -> list:
        pairs = [(seed, method) for seed in range(seeds) for method in ("standard", "repr")]
        return [make_config({**small, "method": method, "seed": seed}) for seed, method in pairs]

    page = run_comparison(configs(2), tmp_path)
    assert page == tmp_path / "report.html"
    assert page.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "RePr" in printed
    assert "95 %" in printed
    assert json.loads((tmp_path / "comparison.json").read_text()) == {
        "version": 1,
        "baseline": "standard",
        "methods": ["standard", "repr"],
        "seeds": [0, 1],
        "runs": ["standard-seed0", "repr-seed0", "standard-seed1", "repr-seed1"],
    }
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/result.json")}

    run_comparison(configs(3), tmp_path)
    assert capsys.readouterr().out.count("finished before") == 4
    assert len(records.find_runs(tmp_path)) == 6
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
