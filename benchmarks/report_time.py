"""Time to read the records of many runs and to write the report about them.

    python benchmarks/report_time.py --out benchmarks/report_time.md

The records are made up: ten methods and variants with fifty seeds each, thirty epochs a run, the layers of a
ResNet-20, drops and restores with RePr, training FLOPs, no curves of filters cut. Each round starts a fresh
process, so that imports count. The process finds and reads the runs, as ``regrow report`` does, and writes
the page, the JSON and the CSV.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import regrow
from regrow.study import records
from regrow.study.config import RunConfig, make_config

VARIANTS: list[dict[str, Any]] = [
    *({"method": "repr", "fraction": fraction} for fraction in (0.1, 0.2, 0.3, 0.4)),
    *({"method": "bridgeout", "p": p} for p in (0.1, 0.2, 0.3)),
    {"method": "standard"},
    {"method": "dropout"},
    {"method": "targeted-dropout"},
]
FILTERS = {f"layers.{layer}.conv": 16 * 2 ** (layer // 7) for layer in range(19)}
WORK = """
import json, sys, time
begun = time.perf_counter()
from pathlib import Path
from regrow.study.gather import gather
from regrow.study.report import write_report
from regrow.study.variants import variant_names
runs, left_out = gather(sys.argv[1])
read = time.perf_counter()
variants = variant_names({run.folder: run.config for run in runs})
page = write_report(runs, Path(sys.argv[2]), variants=variants, left_out=left_out)
done = time.perf_counter()
print(json.dumps({"read": read - begun, "write": done - read, "all": done - begun}))
"""


def make_run(folder: Path, config: RunConfig) -> None:
    """The records of a finished run, as training leaves them."""
    draw = random.Random(f"{folder.name}")
    settings = {**config.model_dump(mode="json"), "lr": config.rate}
    records.write_yaml(records.config_path(folder), {"version": records.VERSION, **settings})
    where = records.environment("cpu", threads=1) | {"command": "regrow study made-up.yaml"}
    records.write_json(records.environment_path(folder), where)
    total, best, flops, events = sum(FILTERS.values()), 0.9 + draw.gauss(0, 0.01), 10**12, []
    off, lines = 0, []
    seconds = 30.0 + draw.gauss(0, 0.3)
    for epoch in range(1, config.epochs + 1):
        lines.append(
            {
                "version": records.VERSION,
                "epoch": epoch,
                "phase": "sub" if off else "full",
                "learning_rate": 0.1 * (1 - epoch / (config.epochs + 1)),
                "train_loss": 1 / epoch,
                "train_accuracy": 0.95,
                "validation_loss": 1.1 / epoch,
                "validation_accuracy": min(1.0, best - 0.5 / epoch + draw.gauss(0, 0.005)),
                "overlap": 100.0 + draw.gauss(0, 3),
                "alive": total - off,
                "filters": total,
                "seconds": seconds,
                "flops": flops,
            }
        )
        cycle, place = divmod(epoch, config.cycle.full + config.cycle.sub)
        if config.method != "repr" or cycle + (place > 0) > config.cycle.cycles:
            continue
        kind = {config.cycle.full: "drop", 0: "restore"}.get(place)
        if kind == "drop":
            chosen = {name: draw.sample(range(n), round(config.fraction * n)) for name, n in FILTERS.items()}
        if kind is not None:
            off = sum(map(len, chosen.values())) if kind == "drop" else 0
            number = cycle + (kind == "drop")
            events.append({"version": records.VERSION, "epoch": epoch, "kind": kind, "cycle": number})
            events[-1] |= {"filters": {k: sorted(v) for k, v in chosen.items()}, "notes": []}
    for path, found in ((records.epochs_path(folder), lines), (records.events_path(folder), events)):
        records.write_text(path, "".join(json.dumps(line) + "\n" for line in found))
    result = {
        "version": records.VERSION,
        "test_accuracy": best,
        "test_loss": 0.5,
        "validation_accuracy": lines[-1]["validation_accuracy"],
        "train_seconds": seconds * config.epochs,
        "train_flops": flops * config.epochs,
        "seconds": seconds * config.epochs + 10,
        "parameters": 270_000,
        "filters": FILTERS,
    }
    records.write_json(records.result_path(folder), result)


def measure(root: Path, *, seeds: int, epochs: int, rounds: int) -> list[dict[str, float]]:
    for number, variant in enumerate(VARIANTS):
        for seed in range(seeds):
            config = make_config({**variant, "seed": seed, "epochs": epochs, "model": "resnet"})
            make_run(root / f"{variant['method']}{number}-seed{seed}", config)
    times = []
    for number in range(rounds + 1):
        command = [sys.executable, "-c", WORK, str(root), str(root / "report.html")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        # The first round fills the file cache and compiles modules.
        if number:
            times.append(json.loads(done.stdout))
            print(times[-1], flush=True)
    return times


def shown(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds (n)")
    parser.add_argument("--seeds", type=int, default=50, help="seeds of each of the ten methods and variants")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = measure(Path(folder), seeds=arguments.seeds, epochs=arguments.epochs, rounds=arguments.rounds)
        size = Path(folder, "report.html").stat().st_size / 1e6
    runs = arguments.seeds * len(VARIANTS)
    where = records.environment("cpu", threads=1)
    columns = [[each[part] for each in times] for part in ("read", "write", "all")]
    lines = [
        "# Time to report on many runs",
        "",
        f"`python benchmarks/report_time.py --rounds {arguments.rounds} --seeds {arguments.seeds} "
        f"--epochs {arguments.epochs}`: n = {arguments.rounds} rounds, each a fresh process that imports, "
        "reads the made-up records and writes the page. Seconds: median (lowest to highest).",
        "",
        f"{where['processor']}, {where['cores']} cores; Python {platform.python_version()}, matplotlib "
        f"{metadata.version('matplotlib')}, scipy {metadata.version('scipy')}, regrow {regrow.__version__}.",
        "",
        "| runs | epochs each | import and read, s | compute and write, s | together, s | page, MB |",
        "|---|---|---|---|---|---|",
        f"| {runs} | {arguments.epochs} | {' | '.join(map(shown, columns))} | {size:.1f} |",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
