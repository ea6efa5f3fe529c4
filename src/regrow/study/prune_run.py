"""``regrow prune``: make a trained network from a folder or a library smaller, and write it to files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from regrow.atomic import move, temporary_folder
from regrow.callers import warn
from regrow.criteria.score import DATA_CRITERIA, LABELLED_CRITERIA, check_criterion
from regrow.interrupts import uninterrupted
from regrow.looking.copies import copied
from regrow.pruning.accuracy import top1
from regrow.pruning.budget import check_target
from regrow.pruning.choosing import check_choice, settled
from regrow.pruning.cost import count_macs
from regrow.pruning.prune import prune
from regrow.pruning.side_by_side import compare_latency
from regrow.shipping.checkpoint import save
from regrow.shipping.deploy import deploy as deployed_copy
from regrow.shipping.onnx import export_onnx
from regrow.short import short
from regrow.study import records
from regrow.study.config import make_config
from regrow.study.own_network import is_own
from regrow.study.prune_page import WEIGHTS_FILE, write_prune_page
from regrow.study.prune_table import prune_tables
from regrow.study.trained import Loader, Trained, by_function, by_name, from_run
from regrow.study.typed import Mistyped, typed
from regrow.suggest import nearest
from regrow.surgery.cut import cut

_PRECISIONS = ("float32", "float16", "bfloat16")
REPORT_FILE, ONNX_FILE, PAGE_FILE = "prune.json", "pruned.onnx", "report.html"
_UNCUT, _CUT, _RECONSTRUCTED = "uncut", "cut", "cut and reconstructed"


def run_prune(
    network: str,
    out: Path,
    *,
    targets: dict[str, Any],
    criterion: str | None,
    scope: str | None,
    coupled: str | None,
    round_to: int | None,
    floor: float,
    exclude: Sequence[str],
    compensate: bool,
    weights: str | None = None,
    data: str | None = None,
    data_dir: str | None = None,
    image_size: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    onnx: bool = False,
    deploy: str | None = None,
) -> dict[str, Any]:
    """Prune a network, print what that changed, and write pruned.safetensors, prune.json and report.html.

    Validation pictures decide; if there are test pictures, accuracy on them is measured once before and once
    after. Where accuracy can be measured, the last table also has the same cut without making up for it.

    Args:
        network: a run folder, a name of torchvision's or timm's, or ``module.path:function``.
        out: folder for the files, made if missing.
        targets: the targets of ``prune``; one of them is not None.
        criterion, scope, coupled, round_to, floor, exclude, compensate: as ``prune``.
        weights, data, image_size: for a network by name or by a function, as ``by_name`` or ``by_function``.
        data_dir, device: as ``from_run``, ``by_name`` or ``by_function``.
        threads: CPU threads; None leaves their number as it is.
        onnx: write pruned.onnx as well.
        deploy: float32, float16 or bfloat16: the networks before and after are timed as ``deploy`` makes
            them in this precision, and ``prune`` times them so too. None: as they are.

    Returns:
        What prune.json holds: the report of ``prune``, and source, environment, test_accuracy (before and
        after, or None), deployed (the record of ``compare_latency``, or None) and networks (None where
        accuracy cannot be measured, else a list of rows "uncut", "cut" and, with ``compensate``, "cut and
        reconstructed": network, validation_accuracy and test_accuracy (0 to 1; None without test pictures),
        macs, latency (median in seconds), file_size (bytes of the file that ``save`` writes)). The two cut
        networks have the same shapes, so ``prune`` timed one of them for both.

    Raises:
        ValueError: as ``prune``, ``from_run``, ``by_name`` or ``by_function``; options that do not go
            together. Nothing is written then.
    """
    with typed():
        if criterion is not None:
            check_criterion(criterion)
        shares = isinstance(targets.get("fraction"), Mapping)
        _, settled_scope = settled(criterion, scope, reconstructs=compensate, shares=shares)
        check_target(targets, settled_scope)
        check_choice(settled_scope, floor, round_to, "jointly" if coupled is None else coupled)
        if deploy not in (None, *_PRECISIONS):
            raise ValueError(f"unknown precision {short(deploy)}{nearest(str(deploy), _PRECISIONS)}")
        given = {
            "data": data,
            "data_dir": data_dir,
            "threads": threads,
            "image_size": image_size,
            "device": device,
        }
        make_config({key: value for key, value in given.items() if value is not None})
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: give a folder.")
    if (out / "results.json").exists():  # stands beside the page of a comparison
        raise ValueError(
            f"--out {out} has the report of a comparison, which the page of the cut would replace: "
            "give another folder."
        )
    if threads is not None:
        torch.set_num_threads(threads)
    trained = _find(network, weights, data, data_dir, image_size, device)
    if compensate and trained.calibration is None:
        raise ValueError(
            "compensation for the removed filters needs pictures: pass --data (and --data-dir), or switch it "
            "off with --no-compensate."
        )
    if criterion in DATA_CRITERIA and trained.calibration is None:
        raise ValueError(
            f"criterion {criterion!r} reads pictures: pass --data (and --data-dir), or another --criterion, "
            "such as l2."
        )
    if criterion in LABELLED_CRITERIA and trained.labelled is None:
        raise ValueError(
            f"criterion {criterion!r} needs labelled pictures of the network's classes: {trained.unjudged}. "
            "Pass other --data, or another --criterion, such as l2."
        )
    if trained.validation is None and targets.get("max_drop") is not None:
        raise ValueError(
            f"--max-drop needs labelled pictures of the network's classes: {trained.unjudged}. "
            + (
                "Pass --data (and --data-dir)."
                if data is None
                else "Pass other --data, or --fraction or --macs."
            )
        )
    if trained.validation is None and data is not None:
        warn(f"the accuracy is not measured: {trained.unjudged}.")
    console = Console()
    before = top1(trained.model, trained.test) if trained.test is not None else None
    form = {} if deploy is None else {"dtype": getattr(torch, deploy)}
    pictures = trained.example if trained.calibration is None else trained.calibration[0]
    judged = trained.validation is not None
    uncut = copied(trained.model, torch.clone) if deploy is not None or judged else None
    if deploy is not None and uncut is not None:
        # What cannot be deployed is refused before the search.
        deployed_copy(uncut, example_inputs=pictures[:1], **form)
    with _Bar() as bar:
        report = prune(
            trained.model,
            example_inputs=trained.example,
            calibration=trained.labelled or trained.calibration,
            validation=trained.validation,
            criterion=criterion,
            scope=scope,
            coupled=coupled,
            round_to=round_to,
            floor=floor,
            exclude=exclude,
            compensate=compensate,
            deployed=False if deploy is None else form,
            seed=trained.seed if criterion == "random" else None,
            progress=bar.show,
            **targets,
        )
    report["source"] = trained.source
    report["environment"] = records.environment(report["device"], report["threads"])
    report["test_accuracy"] = None
    if before is not None and trained.test is not None:
        after = top1(trained.model, trained.test)
        report["test_accuracy"] = {"before": before[0], "after": after[0], "images": after[1]}
    report["deployed"] = None
    if deploy is not None and uncut is not None:
        report["deployed"] = compare_latency(
            {"before": uncut, "after": trained.model},
            example_inputs=pictures,
            validation=trained.validation if trained.test is None else trained.test,
            tolerance=math.inf,  # the table says how far it is off
            **form,
        )
    out.mkdir(parents=True, exist_ok=True)
    report["networks"] = _rows(uncut, trained, report, out) if judged and uncut is not None else None
    written = _write(trained, report, out, onnx)
    for table in prune_tables(report):
        console.print(table)
        console.print()
    for line in (f"Written: {', '.join(written)} in {out}", f"report: {out / PAGE_FILE}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return report


def _find(
    network: str,
    weights: str | None,
    data: str | None,
    data_dir: str | None,
    image_size: int | None,
    device: str | None,
) -> Trained:
    folder = Path(network)
    if records.config_path(folder).exists():
        given = {"--weights": weights, "--data": data, "--image-size": image_size}
        if unwanted := [flag for flag, value in given.items() if value is not None]:
            raise Mistyped(f"{network} is a run folder, which has that setting: leave {unwanted[0]} out.")
        return from_run(folder, device=device, data_dir=data_dir)
    if folder.is_dir():
        raise ValueError(f"{network} is not a run folder: it has no config.yaml.")
    if data is None and data_dir is not None:
        raise Mistyped("--data-dir is where the pictures of --data lie: pass --data too, or leave it out.")
    pictures: dict[str, Any] = {"data": data, "data_dir": data_dir, "image_size": image_size}
    if is_own(network):
        return by_function(network, weights=weights, device=device, **pictures)
    return by_name(network, weights=weights or "default", device=device, **pictures)


def _rows(uncut: nn.Module, trained: Trained, report: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    """The rows of the table that shows what the cut alone does, and what making up for it does."""
    plain = copied(uncut, torch.clone)
    keep = {}
    for name, gone in report["dropped"].items():
        keep[name] = torch.ones(report["layers"][name]["before"], dtype=torch.bool)
        keep[name][gone] = False
    cut(plain, keep, example_inputs=trained.example)
    networks = [(_UNCUT, uncut, "before"), (_CUT, plain, "after")]
    if report["compensation"] is not None:
        networks.append((_RECONSTRUCTED, trained.model, "after"))

    def accuracy(model: nn.Module, when: str, key: str, pictures: Loader | None) -> float | None:
        if pictures is None:
            return None
        return top1(plain, pictures)[0] if model is plain else float(report[key][when])

    with temporary_folder(out, "prune") as folder:
        return [
            {
                "network": name,
                "validation_accuracy": accuracy(model, when, "accuracy", trained.validation),
                "test_accuracy": accuracy(model, when, "test_accuracy", trained.test),
                "macs": count_macs(model, trained.example),
                "latency": report["latency"][when]["median"],
                "file_size": _file_size(model, folder / WEIGHTS_FILE),
            }
            for name, model, when in networks
        ]


def _file_size(model: nn.Module, file: Path) -> int:
    save(model, file)
    return file.stat().st_size


def _write(trained: Trained, report: dict[str, Any], out: Path, onnx: bool) -> list[str]:
    with temporary_folder(out, "prune") as folder:
        save(trained.model, folder / WEIGHTS_FILE)
        written = [WEIGHTS_FILE]
        if onnx:
            export_onnx(trained.model, folder / ONNX_FILE, example_inputs=trained.example)
            written.append(ONNX_FILE)
        write_prune_page(report, folder / PAGE_FILE, weights=str(out / WEIGHTS_FILE))
        records.write_json(folder / REPORT_FILE, report)
        written += [PAGE_FILE, REPORT_FILE]
        # The report goes first and comes last: a folder that has it has all files that it describes.
        with uninterrupted():
            (out / REPORT_FILE).unlink(missing_ok=True)
            for name in written:
                move(folder / name, out / name)
    return written


class _Bar:
    """A bar that shows what ``prune`` is doing, if standard error is a terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=1)

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, share: float, what: str) -> None:
        self._bar.update(self._task, completed=share, description=what)
