"""The command ``regrow``. It imports PyTorch and most of the study only when a command needs them."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand

from regrow import __version__
from regrow.interrupts import exit_status, uninterrupted
from regrow.short import line
from regrow.study.config import RunConfig, make_config, read_settings
from regrow.study.flags import in_flags
from regrow.study.processes import is_first
from regrow.study.stopped import what_now
from regrow.study.typed import Mistyped, typed

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


class _Command(TyperCommand):
    """A command that says, when a signal ends it, what was done and what to do next."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if is_first():
                _complain(what_now(str(self.name), ctx.params))
            raise typer.Exit(exit_status() or 130) from None


_command = partial(app.command, cls=_Command)


def _say(text: str) -> None:
    typer.echo(text, file=sys.stdout)  # typer by itself writes UTF-8 where the terminal has asked for ASCII


def _complain(text: str, color: str = "yellow") -> None:
    typer.secho(f"regrow: {text}", file=sys.stderr, fg=color)


def _show_version(asked: bool) -> None:
    if asked:
        _say(f"regrow {__version__}, PyTorch {metadata.version('torch')}")
        raise typer.Exit()


@app.callback(help="Train better convolutional filters with RePr, and compare it with what else there is.")
def _regrow(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the versions and exit."),
    ] = False,
) -> None:
    pass


def _opt(help: str, *names: str, panel: str | None = None, show_default: bool = True) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=show_default)


_run = partial(_opt, panel="Run")
_where = partial(_opt, panel="Where runs run")
_comparison = partial(_opt, panel="Comparison")
_target = partial(_opt, panel="Target (one)")
_which = partial(_opt, panel="Which filters")
_network = partial(_opt, panel="Network")
_output = partial(_opt, panel="Output")

_LONGEST = 1000  # characters of an error message
_RANKING = "How to rank the filters; the lowest go first: l2, l1, ortho, taylor, hessian, apoz, random, …"
Folders = Annotated[list[Path], typer.Argument(help="Run folders, or folders that contain some.")]
Out = Annotated[Path, _run("Folder to write to.", "--out")]
Rerun = Annotated[bool, _run("Train finished runs again.", "--rerun")]
Preset = Annotated[
    str | None,
    _run("Settings under one name: paper or author (RePr's paper, its author's code).", "--preset"),
]
ConfigFile = Annotated[Path | None, _run("YAML file of settings; flags override it.", "--config")]
Jobs = Annotated[
    int | None,
    _where(
        "Runs to train at a time; they share the CPUs evenly, or the GPU (default: one per CPU).",
        *("--jobs", "--workers"),
    ),
]


def _with_settings(without: Sequence[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag per setting in ``RunConfig``; it receives the flags given as ``settings``."""

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


def _configs(
    file: Path | None, settings: dict[str, Any], each: Sequence[dict[str, Any]], preset: str | None
) -> list[RunConfig]:
    """Merge and check each run's settings: flags replace the file's, and the run's own replace both."""
    from regrow.study.launch import check_models
    from regrow.study.unused import check_used

    read = read_settings(file) if file else {}
    with typed():
        chosen = {} if preset is None else {"preset": preset}
        configs = [make_config({**read, **chosen, **settings, **own}) for own in each]
        check_used(settings, configs, lambda key: "--" + key.replace("_", "-"))
        check_models({config.model for config in configs})
    # A file that regrow has written, which has a version, holds the settings of all methods.
    if "version" not in read:
        check_used(read, configs, lambda key: f"{key!r} in {file}")
    return configs


def _flag(name: str) -> inspect.Parameter:
    field = RunConfig.model_fields[name]
    flag = "--" + name.replace("_", "-")
    is_switch = field.annotation in (bool, bool | None)
    names = [f"{flag}/--no-{flag[2:]}" if is_switch else flag]
    extra = field.json_schema_extra
    panel = extra["panel"] if isinstance(extra, dict) else None
    help = field.description or ""
    if field.default not in (None, ()):
        shown = ("on" if field.default else "off") if field.annotation is bool else field.default
        help += f" (default: {shown})"
    kind: Any = list[str] if name == "exclude" else field.annotation
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    option = _opt(help, *names, panel=str(panel), show_default=False)
    if choices:  # make_config refuses other names, and suggests the nearest
        kind, option.metavar, option.autocompletion = str, f"<{'|'.join(choices)}>", lambda: choices
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


@_command()
@_with_settings()
def train(
    out: Out,
    settings: dict[str, Any],
    preset: Preset = None,
    config: ConfigFile = None,
    rerun: Rerun = False,
) -> None:
    """Train one network and write a run folder: settings, a record of every epoch and cut, weights.

    Example: regrow train --data digits --model convnet --method repr --seed 3 --epochs 14 --out runs/one
    """
    (run_config,) = _configs(config, settings, [{}], preset)
    from regrow.study import records
    from regrow.study.progress import Progress
    from regrow.study.sequences import outcome

    with uninterrupted():  # PyTorch aborts when a signal raises an exception while it is imported
        from regrow.study.train import train as run

    ran = run(run_config, out, rerun=rerun, progress=Progress())
    if not is_first():
        return
    _say(
        f"{'' if ran else 'already finished (--rerun trains it again): '}"
        f"{outcome(records.read_run(out).result or {})}, see {out}"
    )


@_command()
@_with_settings(without=["method", "seed"])
def compare(
    out: Out,
    settings: dict[str, Any],
    methods: Annotated[str, _comparison("Methods to compare, the baseline first.")] = "standard,repr",
    seeds: Annotated[str, _comparison("Seeds, such as 0,1,2 or 0-4; each method trains with each.")] = "0-2",
    preset: Preset = None,
    config: ConfigFile = None,
    rerun: Rerun = False,
    jobs: Jobs = None,
) -> None:
    """Train every method with every seed, compare them pair by pair, and write a report.

    Example: regrow compare --data digits --epochs 30 --seeds 0-4 --out runs/digits
    """
    from regrow.study.seeds import parse_methods, parse_seeds

    with typed():
        names, numbers = parse_methods(methods), parse_seeds(seeds)
    each = [{"method": name, "seed": seed} for seed in numbers for name in names]
    configs = _configs(config, settings, each, preset)
    from regrow.study.launch import local, run_comparison

    with typed():
        launcher = local(jobs, rerun=rerun)
    if not run_comparison(configs, out, rerun=rerun, launcher=launcher):
        raise typer.Exit(1)


@_command()
def study(
    file: Annotated[Path, typer.Argument(help="YAML file: methods, seeds, models, data, settings.")],
    out: Annotated[
        Path | None, _opt("Folder to write to (default: runs/NAME of the study).", "--out")
    ] = None,
    dry_run: Annotated[bool, _opt("Show what is done and what would run, and stop.", "--dry-run")] = False,
    jobs: Jobs = None,
    launcher: Annotated[str, _where("Where runs run: local processes, or ray.")] = "local",
    address: Annotated[
        str | None,
        _where("Address of the Ray cluster: auto, host:port or ray://host:port (default: start one here)."),
    ] = None,
    cpus_per_run: Annotated[int | None, _where("CPUs of the cluster for each run (default: 1).")] = None,
    gpus_per_run: Annotated[
        float | None, _where("GPUs of the cluster for each run; 0.5 lets two share one (default: 0).")
    ] = None,
) -> None:
    """Train the runs of a study's file that are not done, and write a report for every comparison in it.

    Example: regrow study study.yaml --dry-run
    """
    from regrow.study.launch import choose_launcher, run_study

    with typed():
        chosen = choose_launcher(
            launcher, jobs=jobs, address=address, cpus_per_run=cpus_per_run, gpus_per_run=gpus_per_run
        )
    if not run_study(file, out, dry_run=dry_run, launcher=chosen):
        raise typer.Exit(1)


@_command()
def report(
    folders: Folders,
    out: Annotated[Path | None, _opt("The page to write (default: report.html in the first folder).")] = None,
    baseline: Annotated[
        str | None,
        _opt(
            "The method or variant that the others are compared with (default: the first of the comparison, "
            "else standard)."
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None, _opt("Folder to write the records to as TensorBoard event files, too.")
    ] = None,
) -> None:
    """Write one self-contained HTML page about finished runs: numbers, curves, which filter was off when."""
    from regrow.study.gather import gather
    from regrow.study.lineup import line_up
    from regrow.study.report import write_report

    runs, left_out = gather(*folders)
    shown = line_up(runs, baseline)
    left_out |= shown.left_out
    for why in left_out.values():
        _complain(f"left out: {why}")
    page = write_report(
        shown.runs,
        out or folders[0] / "report.html",
        title=shown.title,
        baseline=shown.baseline,
        variants=shown.names,
        numbers=shown.numbers,
        left_out=left_out,
    )
    _say(f"report: {page}")
    if tensorboard is not None:
        from regrow.study.tensorboard import write_tensorboard

        files = write_tensorboard(shown.runs, tensorboard, shown.names)
        _say(f"{len(files)} event files: tensorboard --logdir {tensorboard}")


@_command()
def curve(
    folders: Folders,
    criterion: Annotated[str, _opt(_RANKING)] = "l2",
    scope: Annotated[
        str, _opt("layer cuts the same share of every layer, global ranks all together.")
    ] = "layer",
    fractions: Annotated[
        str, _opt("Filters to cut, per cent: 0-90 (every 10), 0-95:5 (every 5), or 0,25,50.")
    ] = "0-90",
    readings: Annotated[
        str, _opt("The meanings of a cut to measure, with commas between.")
    ] = "zeroed,removed,compensated",
    split: Annotated[str, _opt("Pictures to measure on: test, or validation to choose settings.")] = "test",
    out: Annotated[
        Path | None, _opt("Folder for curve.json, curve.svg and curve.png (default: the folder given).")
    ] = None,
    rerun: Annotated[bool, _opt("Measure existing points again.", "--rerun")] = False,
) -> None:
    """Cut more and more filters of trained networks, without fine-tuning, and measure their accuracy.

    Example: regrow curve runs/digits --split validation
    """
    from regrow.study.fractions import parse_fractions, parse_readings

    with typed():
        wanted: dict[str, Any] = {
            "fractions": parse_fractions(fractions),
            "readings": parse_readings(readings),
        }
    with uninterrupted():
        from regrow.study.measure import run_curves

    run_curves(folders, **wanted, criterion=criterion, scope=scope, split=split, out=out, rerun=rerun)


@_command()
def analyse(
    folders: Folders,
    pictures: Annotated[int, _opt("Validation pictures to measure with.")] = 256,
    rerun: Annotated[bool, _opt("Analyse runs again that were analysed before.", "--rerun")] = False,
) -> None:
    """Look into trained networks: criteria against the oracle, filters dropped alone, likeness of runs.

    With weights that were kept during training (--snapshots) the criteria are followed over training.
    Example: regrow analyse runs/digits
    """
    with uninterrupted():
        from regrow.study.analyse_command import run_analyses

    run_analyses(folders, pictures=pictures, rerun=rerun)


@_command()
def prune(
    network: Annotated[
        str,
        typer.Argument(
            help="Run folder, name of a torchvision or timm network, or module.path:function of your own."
        ),
    ],
    out: Annotated[Path, _output("Folder to write to.", "--out")],
    fraction: Annotated[
        str | None, _target("Share of the filters to remove: 0.5, or of layers: layer3=0.6,layer4=0.5.")
    ] = None,
    max_drop: Annotated[float | None, _target("Points of validation accuracy it may lose: 1.")] = None,
    macs: Annotated[float | None, _target("Share of the multiply-accumulates to leave: 0.5.")] = None,
    params: Annotated[float | None, _target("Share of the parameters to leave.")] = None,
    latency: Annotated[
        float | None, _target("Share of the time for one picture to leave, measured here.")
    ] = None,
    criterion: Annotated[
        str | None,
        _which(
            "How to rank the filters; the lowest go first: reconstruction, l2, l1, taylor, hessian, … "
            "(default: reconstruction; with --no-compensate l2)"
        ),
    ] = None,
    scope: Annotated[
        str | None,
        _which(
            "layer cuts the same share of every layer, global ranks all filters together, isomorphic "
            "those in layers of one kind, balanced all by their score and the work that they save (default: "
            "balanced with the criterion reconstruction, else layer)"
        ),
    ] = None,
    coupled: Annotated[
        str | None,
        _which(
            "Remove filters that are added together jointly or individually (default: jointly; for "
            "--latency the faster of the two)"
        ),
    ] = None,
    round_to: Annotated[
        int | None,
        _which("Make every width a multiple of this (default: 8 where a layer has 64 filters or more)"),
    ] = None,
    floor: Annotated[float, _which("Share of each layer that stays.")] = 0.1,
    exclude: Annotated[list[str] | None, _which("Layer to leave alone; may be given several times.")] = None,
    compensate: Annotated[
        bool, _which("Make up for removed filters with 512 training pictures, without labels.")
    ] = True,
    weights: Annotated[
        str | None,
        _network(
            "Weights of a network by name: default, none (random), or IMAGENET1K_V1, …; of your own: "
            "a .safetensors, .pth or .pt file, or none (as the function returns it)."
        ),
    ] = None,
    data: Annotated[
        str | None,
        _network("Pictures for a network by name or function: folder, cifar10, … (a run has its own)."),
    ] = None,
    data_dir: Annotated[str | None, _network("Where the data lies.")] = None,
    image_size: Annotated[int | None, _network("Side of the pictures in pixels.")] = None,
    device: Annotated[str | None, _network("cpu, cuda, … (default: the run's).")] = None,
    threads: Annotated[int | None, _network("CPU threads.")] = None,
    onnx: Annotated[bool, _output("Write ONNX too.", "--onnx")] = False,
    deploy: Annotated[
        str | None,
        _output(
            "Time the network deployed too, in this precision: float32, float16, bfloat16; --latency counts "
            "so then."
        ),
    ] = None,
) -> None:
    """Make a trained network smaller for good, by a fraction or within a budget, without training.

    Example: regrow prune runs/one --max-drop 1 --out small

    Of your own: regrow prune nets:build --weights my.pth --data folder --data-dir DIR --image-size 64 --out S
    """
    from regrow.study.fractions import parse_shares

    with uninterrupted():
        from regrow.study.prune_run import run_prune

    with typed():
        shares = None if fraction is None else parse_shares(fraction)
    targets = {"fraction": shares, "max_drop": max_drop, "macs": macs, "params": params, "latency": latency}
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
        deploy=deploy,
    )


def _show_warning(message: Warning | str, *_place: Any, **_more: Any) -> None:
    """Show only the message: a place in the source does not help a person who types a command."""
    _complain(f"warning: {in_flags(str(message))}")


def _message(error: Exception) -> str:
    """The error's message, in the words of the command; without its number if it is one of the system."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return in_flags(str(error))


def main() -> None:
    """Run the command. An error that the user can correct ends it with one line on stderr.

    The exit code is 2 if a name or value on the command line cannot be right, and nothing has been done then;
    it is 1 for all other errors.
    """
    warnings.showwarning = _show_warning
    try:
        app(prog_name="regrow", standalone_mode=True)
    except (ValueError, ArithmeticError, OSError) as error:
        _complain(line(_message(error), _LONGEST), "red")
        sys.exit(2 if isinstance(error, Mistyped) else 1)
