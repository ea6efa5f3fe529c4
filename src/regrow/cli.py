"""The command ``regrow``. It imports PyTorch and most of the study only when a command needs them."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from regrow.study.config import RunConfig, make_config, read_settings

app = typer.Typer(
    help="Train better convolutional filters with RePr, and find out whether it helps you.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Option("--out", help="Folder to write to.", rich_help_panel="Run")]
Rerun = Annotated[bool, typer.Option("--rerun", help="Train finished runs again.", rich_help_panel="Run")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file of settings; flags override it.", rich_help_panel="Run"),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        help="Runs to train at a time; they share the CPUs evenly (default: one per CPU).",
        rich_help_panel="Where runs run",
    ),
]


def _with_settings(without: Sequence[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag for every setting in ``RunConfig``; it receives those given as ``settings``."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(command, eval_str=True).parameters.values()
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters if p.name != "settings"]
        flags = [_flag(name) for name in RunConfig.model_fields if name not in without]

        def run(**given: Any) -> None:
            settings = {flag.name: given.pop(flag.name) for flag in flags}
            command(**given, settings={k: v for k, v in settings.items() if v is not None and v != []})

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature([*flags, *own])  # type: ignore[attr-defined]
        return run

    return decorate


def _flag(name: str) -> inspect.Parameter:
    field = RunConfig.model_fields[name]
    flag = "--" + name.replace("_", "-")
    names = [f"{flag}/--no-{flag[2:]}" if field.annotation is bool else flag]
    extra = field.json_schema_extra
    panel = extra["panel"] if isinstance(extra, dict) else None
    help = field.description or ""
    if field.default not in (None, ()):
        shown = ("on" if field.default else "off") if field.annotation is bool else field.default
        help += f" (default: {shown})"
    kind: Any = list[str] if name == "exclude" else field.annotation
    option = typer.Option(*names, help=help, rich_help_panel=str(panel), show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


@app.command()
@_with_settings()
def train(out: Out, settings: dict[str, Any], config: ConfigFile = None, rerun: Rerun = False) -> None:
    """Train one network and write a run folder: settings, a record of every epoch and cut, weights.

    Example: regrow train --data digits --model convnet --method repr --seed 3 --epochs 14 --out runs/one
    """
    run_config = make_config({**(read_settings(config) if config else {}), **settings})
    from regrow.study import records
    from regrow.study.processes import is_first
    from regrow.study.progress import Progress
    from regrow.study.train import train as run

    ran = run(run_config, out, rerun=rerun, progress=Progress())
    if not is_first():
        return
    result = records.read_run(out).result or {}
    typer.echo(
        f"{'' if ran else 'already finished (--rerun trains it again): '}"
        f"test accuracy {result['test_accuracy']:.2%}, trained in {result['train_seconds']:.1f} s, see {out}"
    )


@app.command()
@_with_settings(without=["method", "seed"])
def compare(
    out: Out,
    settings: dict[str, Any],
    methods: Annotated[
        str, typer.Option(help="Methods to compare, the baseline first.", rich_help_panel="Comparison")
    ] = "standard,repr",
    seeds: Annotated[
        str,
        typer.Option(
            help="Seeds, such as 0,1,2 or 0-4; each method trains with each.", rich_help_panel="Comparison"
        ),
    ] = "0-2",
    config: ConfigFile = None,
    rerun: Rerun = False,
    jobs: Jobs = None,
) -> None:
    """Train every method with every seed, compare them pair by pair, and write a report.

    Example: regrow compare --data digits --epochs 30 --seeds 0-4 --out runs/digits
    """
    from regrow.study.seeds import parse_methods, parse_seeds

    pairs = [(method, seed) for seed in parse_seeds(seeds) for method in parse_methods(methods)]
    shared = {**(read_settings(config) if config else {}), **settings}
    shared = {key: value for key, value in shared.items() if key not in ("method", "seed")}
    configs = [make_config({**shared, "method": method, "seed": seed}) for method, seed in pairs]
    from regrow.study.launch import local, run_comparison

    if not run_comparison(configs, out, rerun=rerun, launcher=local(jobs, rerun=rerun)):
        raise typer.Exit(1)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="YAML file: methods, seeds, models, data, settings.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write to (default: runs/NAME of the study).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what is done and what would run, and stop.")
    ] = False,
    jobs: Jobs = None,
    launcher: Annotated[
        str, typer.Option(help="Where runs run: local processes, or ray.", rich_help_panel="Where runs run")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            help="Address of the Ray cluster: auto, host:port or ray://host:port (default: start one here).",
            rich_help_panel="Where runs run",
        ),
    ] = None,
    cpus_per_run: Annotated[
        int | None,
        typer.Option(help="CPUs of the cluster for each run (default: 1).", rich_help_panel="Where runs run"),
    ] = None,
    gpus_per_run: Annotated[
        float | None,
        typer.Option(
            help="GPUs of the cluster for each run; 0.5 lets two share one (default: 0).",
            rich_help_panel="Where runs run",
        ),
    ] = None,
) -> None:
    """Train the runs of a study's file that are not done, and write a report for every comparison in it.

    Example: regrow study study.yaml --dry-run
    """
    from regrow.study.launch import choose_launcher, run_study

    chosen = choose_launcher(
        launcher, jobs=jobs, address=address, cpus_per_run=cpus_per_run, gpus_per_run=gpus_per_run
    )
    if not run_study(file, out, dry_run=dry_run, launcher=chosen):
        raise typer.Exit(1)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or folders that contain some.")],
    out: Annotated[
        Path | None, typer.Option(help="The page to write (default: report.html in the first folder).")
    ] = None,
    baseline: Annotated[str, typer.Option(help="The method that the others are compared with.")] = "standard",
    tensorboard: Annotated[
        Path | None, typer.Option(help="Folder to write the records to as TensorBoard event files, too.")
    ] = None,
) -> None:
    """Write one self-contained HTML page about finished runs: numbers, curves, which filter was off when."""
    from regrow.study.gather import gather
    from regrow.study.report import write_report
    from regrow.study.variants import variant_names

    runs, left_out = gather(*folders)
    for why in left_out.values():
        typer.secho(f"regrow: left out: {why}", fg="yellow", err=True)
    variants = variant_names({run.folder: run.config for run in runs})
    page = write_report(
        runs,
        out or folders[0] / "report.html",
        baseline=baseline,
        variants=variants,
        left_out=left_out,
    )
    typer.echo(f"report: {page}")
    if tensorboard is not None:
        from regrow.study.tensorboard import write_tensorboard

        files = write_tensorboard(runs, tensorboard, variants)
        typer.echo(f"{len(files)} event files: tensorboard --logdir {tensorboard}")


@app.command()
def curve(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or folders that contain some.")],
    criterion: Annotated[
        str, typer.Option(help="How to rank the filters; the lowest go first: l2, l1, ortho, random, …")
    ] = "l2",
    scope: Annotated[
        str, typer.Option(help="layer cuts the same share of every layer, global ranks all together.")
    ] = "layer",
    fractions: Annotated[
        str, typer.Option(help="Filters to cut, per cent: 0-90 (every 10), 0-95:5 (every 5), or 0,25,50.")
    ] = "0-90",
    readings: Annotated[
        str, typer.Option(help="The meanings of a cut to measure, with commas between.")
    ] = "zeroed,removed,compensated",
    split: Annotated[
        str, typer.Option(help="Pictures to measure on: test, or validation to choose settings.")
    ] = "test",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for curve.json, curve.svg and curve.png (default: the folder given)."),
    ] = None,
    rerun: Annotated[bool, typer.Option("--rerun", help="Measure existing points again.")] = False,
) -> None:
    """Cut more and more filters of trained networks, without fine-tuning, and measure their accuracy.

    Example: regrow curve runs/digits --split validation
    """
    from regrow.study.fractions import parse_fractions, parse_readings

    wanted = parse_fractions(fractions), parse_readings(readings)
    from regrow.study.measure import run_curves

    run_curves(
        folders,
        fractions=wanted[0],
        readings=wanted[1],
        criterion=criterion,
        scope=scope,
        split=split,
        out=out,
        rerun=rerun,
    )


@app.command()
def prune(
    network: Annotated[
        str,
        typer.Argument(help="Run folder, or the name of a torchvision or timm network.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write to.", rich_help_panel="Output")],
    fraction: Annotated[
        float | None,
        typer.Option(help="Share of the filters to remove: 0.5.", rich_help_panel="Target (one)"),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Points of validation accuracy it may lose: 1.", rich_help_panel="Target (one)"),
    ] = None,
    macs: Annotated[
        float | None,
        typer.Option(help="Share of the multiply-accumulates to leave: 0.5.", rich_help_panel="Target (one)"),
    ] = None,
    params: Annotated[
        float | None, typer.Option(help="Share of the parameters to leave.", rich_help_panel="Target (one)")
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(
            help="Share of the time for one picture to leave, measured here.", rich_help_panel="Target (one)"
        ),
    ] = None,
    criterion: Annotated[
        str,
        typer.Option(
            help="How to rank the filters; the lowest go first: l2, l1, ortho, random, …",
            rich_help_panel="Which filters",
        ),
    ] = "l2",
    scope: Annotated[
        str,
        typer.Option(
            help="layer cuts the same share of every layer, global ranks all filters together, isomorphic "
            "those in layers of one kind.",
            rich_help_panel="Which filters",
        ),
    ] = "layer",
    coupled: Annotated[
        str | None,
        typer.Option(
            help="Remove filters that are added together jointly or individually (default: jointly; for "
            "--latency the faster of the two)",
            rich_help_panel="Which filters",
        ),
    ] = None,
    round_to: Annotated[
        int, typer.Option(help="Make every width a multiple of this.", rich_help_panel="Which filters")
    ] = 1,
    floor: Annotated[
        float, typer.Option(help="Share of each layer that stays.", rich_help_panel="Which filters")
    ] = 0.1,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="Layer to leave alone; may be given several times.", rich_help_panel="Which filters"
        ),
    ] = None,
    compensate: Annotated[
        bool,
        typer.Option(
            help="Make up for removed filters with 512 training pictures, without labels.",
            rich_help_panel="Which filters",
        ),
    ] = True,
    weights: Annotated[
        str,
        typer.Option(
            help="Weights of a network by name: default, none (random), or IMAGENET1K_V1, …",
            rich_help_panel="Network",
        ),
    ] = "default",
    data: Annotated[
        str | None,
        typer.Option(
            help="Pictures for a network by name: folder, cifar10, … (a run has its own).",
            rich_help_panel="Network",
        ),
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="Where the data lies.", rich_help_panel="Network")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side of the pictures in pixels.", rich_help_panel="Network")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, … (default: the run's).", rich_help_panel="Network")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", rich_help_panel="Network")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write ONNX too.", rich_help_panel="Output")] = False,
) -> None:
    """Make a trained network smaller for good, by a fraction or within a budget, without training.

    Example: regrow prune runs/one --max-drop 1 --out small
    """
    from regrow.study.prune_run import run_prune

    targets = {"fraction": fraction, "max_drop": max_drop, "macs": macs, "params": params, "latency": latency}
    run_prune(
        network,
        out,
        targets=targets,
        criterion=criterion,
        scope=scope,
        coupled=coupled,
        round_to=round_to,
        floor=floor,
        exclude=exclude or (),
        compensate=compensate,
        weights=weights,
        data=data,
        data_dir=data_dir,
        image_size=image_size,
        device=device,
        threads=threads,
        onnx=onnx,
    )


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    # Python's own format shows a place in the source, which does not help a person who types a command.
    del category, filename, lineno, file, line
    typer.secho(f"regrow: warning: {message}", fg="yellow", err=True)


def main() -> None:
    """Run the command; an error that the user can correct becomes one line on stderr, and exit code 1."""
    warnings.showwarning = _show_warning
    try:
        app(standalone_mode=True)
    except (ValueError, ArithmeticError, OSError) as error:
        typer.secho(f"regrow: {error}", fg="red", err=True)
        sys.exit(1)
