"""All settings of a run in one table, which defines the command's flags, the YAML keys and the record."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from regrow.short import line, short
from regrow.study.names import DEFAULT_GENERATIONS, METHOD_ALIASES, PRECISION_ALIASES
from regrow.study.presets import with_names_resolved
from regrow.study.regimes import check_regime
from regrow.study.rounds import Rounds
from regrow.study.schedule import Cycle, place_cycle
from regrow.study.yamls import read_yaml
from regrow.suggest import nearest

_LISTED = 3
# Beyond these a run ends in an error of PyTorch or the system, or never.
_LONGEST, _MANY = 100_000, 10**9
_LAST_SEED = 2**63 - 1  # of PyTorch's generators
Augmentation = Literal["none", "shift", "flip", "shift-flip"]
Regime = Literal[
    "same",
    "permuted-labels",
    "permuted-pixels",
    "growing-data",
    "corrected-labels",
    "new-classes",
    "new-pictures",
    "new-domain",
]
_DATA, _MODEL, _TRAINING, _REPR, _NOISE, _LOSS, _ANEW, _RUN = (
    "Data", "Model", "Training", "RePr and restart", "Bridgeout and dropout", "Losses", "New weights", "Run",
)  # fmt: skip


def _setting(default: Any, panel: str, help: str, **limits: Any) -> Any:
    return Field(default, description=help, json_schema_extra={"panel": panel}, **limits)


class RunConfig(BaseModel):
    """The settings of one training run."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    data: Literal["digits", "fashion-mnist", "cifar10", "cifar100", "folder"] = _setting(
        "digits", _DATA, "Pictures to train on. digits come with scikit-learn."
    )
    data_dir: str | None = _setting(
        None,
        _DATA,
        "Where the data lies or is downloaded to (default: $REGROW_DATA, or ./data).",
        max_length=4096,
        pattern=r"^[^\x00]*$",
    )
    image_size: int | None = _setting(
        None,
        _DATA,
        "Side of the pictures in pixels: --data folder needs it, others shrink to it.",
        ge=4,
        le=4096,
    )
    train_size: int | None = _setting(None, _DATA, "Train on this many pictures only.", ge=1, le=_MANY)
    label_noise: float = _setting(0.0, _DATA, "Share of the training labels to falsify.", ge=0, lt=1)
    tasks: int = _setting(
        1,
        _DATA,
        "Tasks that follow each other in a run, with the same number of epochs.",
        ge=1,
        le=1000,
    )
    augmentation: Augmentation = _setting("shift", _DATA, "How training pictures are varied.")
    split_seed: int = _setting(
        0, _DATA, "Fixes the split into train, validation and test.", ge=0, le=_LAST_SEED
    )
    regime: Regime = _setting("same", _DATA, "How the data changes from task to task (docs/study.md).")
    second_data: Literal["none", "digits", "fashion-mnist", "cifar10", "cifar100"] = _setting(
        "none", _DATA, "The pictures of every second task of --regime new-domain."
    )

    model: str = _setting(
        "convnet",
        _MODEL,
        "convnet, c3 … c18 (the paper's nets), vgg, resnet (CIFAR family), wrn, densenet, or any "
        "torchvision or timm name.",
        max_length=200,
    )
    depth: int | None = _setting(
        None, _MODEL, "Layers: convnet 3, vgg 16 (7 to 19), resnet 20, wrn 16, densenet 40.", ge=1, le=200
    )
    width: float | None = _setting(
        None,
        _MODEL,
        "Filters: convnet 32, resnet 16, densenet 12 (growth); factor: vgg 1, wrn 4.",
        gt=0,
        le=10_000,
    )
    batch_norm: bool = _setting(True, _MODEL, "Batch norm behind the convolutions (convnet, vgg).")
    pooling: Literal["max", "avg", "max3", "none"] = _setting(
        "max",
        _MODEL,
        "Pooling between the convolutions (convnet, vgg): 2×2 pixels, max3: 3×3 with stride 2.",
    )
    head: Literal["average", "flatten"] = _setting(
        "average",
        _MODEL,
        "What the linear layer of convnet reads: each channel's average, or all pixels (the paper's net).",
    )
    kernel: int = _setting(3, _MODEL, "Side of the convolutions of convnet, an odd number.", ge=1, le=31)
    init: Literal["he", "torch", "truncated"] = _setting(
        "he",
        _MODEL,
        "First weights of convnet: He's, PyTorch's own, or normal of deviation 0.04 (the author's code).",
    )

    epochs: int = _setting(30, _TRAINING, "Passes over the training pictures.", ge=1, le=_LONGEST)
    batch_size: int = _setting(128, _TRAINING, "Pictures per step.", ge=2, le=1_000_000)
    optimizer: Literal["sgd", "adam", "adamw"] = _setting("sgd", _TRAINING, "sgd has Nesterov momentum.")
    lr: float | None = _setting(
        None, _TRAINING, "Highest learning rate (default: sgd 0.1, adam and adamw 0.002).", gt=0, le=1e30
    )
    momentum: float = _setting(0.9, _TRAINING, "Momentum of sgd.", ge=0, lt=1)
    weight_decay: float = _setting(5e-4, _TRAINING, "Weight decay.", ge=0, le=1e30)
    schedule: Literal["hold-cosine", "cosine", "step", "constant", "halving"] = _setting(
        "hold-cosine",
        _TRAINING,
        "Learning rate. hold-cosine holds it through the cycles and anneals after the last restore; "
        "standard training gets the same.",
    )
    halve_every: int = _setting(
        25_000, _TRAINING, "Steps after which the schedule halving halves the learning rate.", ge=1, le=_MANY
    )
    precision: Literal["float32", "bfloat16", "bf16", "float16"] = _setting(
        "float32",
        _TRAINING,
        "bfloat16 (or bf16) and float16 train by autocast; weights and measurements stay float32.",
    )

    method: Literal[
        "standard",
        "backprop",
        "repr",
        "bridgeout",
        "targeted-bridgeout",
        "dropout",
        "targeted-dropout",
        "orthogonal-loss",
        "distillation",
        "dsd",
        "ban",
        "shrink-and-perturb",
        "continual-backprop",
        "later-layer-forgetting",
        "knowledge-evolution",
        "restart",
        "new-head",
        "last-layers",
        "from-scratch",
        "redo",
        "shrink-and-perturb+new-head",
        "continual-backprop+new-head",
        "restart+new-head",
        "restart+last-layers",
        "restart+shrink-and-perturb+new-head",
        "redo+new-head",
        "repr+orthogonal-loss",
        "repr+distillation",
        "repr+orthogonal-loss+distillation",
        "repr+bridgeout",
    ] = _setting(
        "standard",
        _TRAINING,
        "How to train (docs/compare.md). backprop is another name of standard, which has weight decay and "
        "nothing else.",
    )
    fraction: float = _setting(0.3, _REPR, "Share of the filters to drop.", ge=0, lt=1)
    cycles: int | None = _setting(
        None, _REPR, "How often to drop and restore (default: placed in the epochs).", ge=1, le=_LONGEST
    )
    full: int | None = _setting(
        None, _REPR, "Epochs of a cycle with all filters (default: placed).", ge=1, le=_LONGEST
    )
    sub: int | None = _setting(
        None,
        _REPR,
        "Epochs of a cycle without the dropped filters; with 0 they are restored at once (default: placed).",
        ge=0,
        le=_LONGEST,
    )
    criterion: Literal[
        "ortho",
        "ortho-corrected",
        "l1",
        "l2",
        "random",
        "mean-activation",
        "apoz",
        "utility",
        "reconstruction",
        "gradient",
        "taylor",
        "hessian",
        "oracle",
    ] = _setting(
        "ortho",
        _REPR,
        "How to rank the filters. ortho is the paper's overlap; those from mean-activation on read 256 "
        "training pictures.",
    )
    consumers: Literal["zero", "keep", "init"] = _setting(
        "zero",
        _REPR,
        "Weights that read a restored filter: zero them (the output does not move), keep them, or init anew.",
    )
    rows: Literal["orthogonal", "init"] = _setting(
        "orthogonal",
        _REPR,
        "Weights of a restored filter: directions that no other filter uses, or drawn as in a new layer.",
    )
    scope: Literal["global", "layer"] = _setting(
        "global", _REPR, "Rank over the whole net or within each layer."
    )
    floor: float = _setting(0.1, _REPR, "Share of each layer that always stays alive.", ge=0, le=1)
    exclude: tuple[Annotated[str, Field(max_length=1000)], ...] = _setting(
        (), _REPR, "Layers to leave alone; may be given several times.", max_length=10_000
    )
    skip_first: bool = _setting(True, _REPR, "Leave the first convolution alone.")
    compact: bool | None = _setting(
        None,
        _REPR,
        "Do not compute dropped filters in the sub phase; with --no-compact they are computed and masked "
        "(default: what is quicker on this device).",
    )

    p: float = _setting(
        0.3, _NOISE, "Probability that Bridgeout drops a weight, or dropout an activation.", ge=0, lt=1
    )
    q: float = _setting(
        1.5, _NOISE, "The norm of the penalty that Bridgeout's noise amounts to.", gt=0, le=1000
    )
    target_fraction: float = _setting(
        0.75, _NOISE, "targeted-* methods drop only among this share, the smallest in magnitude.", gt=0, le=1
    )
    reestimate: bool = _setting(
        True, _NOISE, "Re-estimate batch-norm statistics when Bridgeout's noise is taken off at the end."
    )

    orthogonal: float = _setting(
        0.01, _LOSS, "Weight of the overlap of all filters in the loss.", ge=0, le=1e30
    )
    teacher: str | None = _setting(
        None,
        _LOSS,
        "Run folder of the network to learn from, or a folder with runs …-seedN, of which each run takes "
        "the one with its own seed.",
        max_length=4096,
        pattern=r"^[^\x00]+$",
    )
    temperature: float = _setting(
        4.0, _LOSS, "Divides the scores of teacher and student before they are compared.", gt=0, le=1e5
    )
    distillation_weight: float = _setting(
        0.9, _LOSS, "Weight of the teacher in the loss; labels have the rest.", ge=0, le=1
    )

    generations: int | None = _setting(
        None,
        _ANEW,
        "Equal parts of the epochs of a task; the method acts between them (default: docs/compare.md).",
        ge=1,
        le=1000,
    )
    last: int = _setting(2, _ANEW, "How many of the last layers are drawn anew.", ge=1, le=1000)
    shrink: float = _setting(
        0.4, _ANEW, "Share of the old weights that shrink-and-perturb keeps.", ge=0, le=10
    )
    perturb: float = _setting(0.1, _ANEW, "Share of new weights that shrink-and-perturb adds.", ge=0, le=10)
    replacement_rate: float = _setting(
        1e-4, _ANEW, "Share of the mature filters that continual backprop draws anew in a step.", ge=0, le=1
    )
    maturity: int = _setting(
        100, _ANEW, "Steps before continual backprop may draw a new filter anew.", ge=0, le=_MANY
    )
    fixed: float = _setting(
        0.8, _ANEW, "Share of the weights that knowledge-evolution never draws anew.", gt=0, lt=1
    )
    dormant: float = _setting(
        0.025,
        _ANEW,
        "redo draws a filter anew if its mean activation is at most this share of its layer's mean.",
        ge=0,
        le=1e6,
    )

    snapshots: int | None = _setting(
        None,
        _RUN,
        "Keep the weights every so many epochs, and around every drop and restore, for regrow analyse.",
        ge=1,
        le=_LONGEST,
    )
    seed: int = _setting(
        0, _RUN, "Initial weights, order of the pictures, augmentation, RePr's choices.", ge=0, le=_LAST_SEED
    )
    device: str = _setting(
        "auto", _RUN, "cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.", max_length=40
    )
    threads: int | None = _setting(None, _RUN, "CPU threads (default: PyTorch's choice).", ge=1, le=1024)

    @field_validator("method", mode="before")
    @classmethod
    def _one_name(cls, method: object) -> object:
        return METHOD_ALIASES.get(method, method) if isinstance(method, str) else method

    @field_validator("precision", mode="before")
    @classmethod
    def _long_name(cls, precision: object) -> object:
        return PRECISION_ALIASES.get(precision, precision) if isinstance(precision, str) else precision

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        if self.lr is not None:
            return self.lr
        return 0.1 if self.optimizer == "sgd" else 0.002

    @property
    def rounds(self) -> Rounds:
        """The rounds that the epochs are divided into."""
        return Rounds(self.epochs, self.tasks, self.generations_of_a_task)

    @property
    def generations_of_a_task(self) -> int:
        """``generations``, or the default of the method; 1 for a method that has none."""
        if self.method not in DEFAULT_GENERATIONS:
            return 1
        one, several = DEFAULT_GENERATIONS[self.method]
        return self.generations or (one if self.tasks == 1 else several)

    @property
    def cycle(self) -> Cycle:
        """Where RePr's cycles lie in the epochs of a task; the learning rate of all methods follows them."""
        of_task = max(1, self.epochs // self.tasks)
        return place_cycle(of_task, full=self.full, sub=self.sub, cycles=self.cycles)


def make_config(settings: Mapping[str, Any]) -> RunConfig:
    """A checked ``RunConfig``; ``preset`` and names such as C3(32) are replaced by what they stand for.

    Raises:
        ValueError: an unknown key (the nearest is suggested), a value of the wrong type or out of range,
            or cycles that do not fit into the epochs.
    """
    settings = with_names_resolved({key: value for key, value in settings.items() if key != "version"})
    _check_names(settings)
    for key in settings:
        if key not in RunConfig.model_fields:
            raise ValueError(f"unknown setting {short(key)}{nearest(str(key), RunConfig.model_fields)}")
    try:
        config = RunConfig.model_validate(settings)
    except ValidationError as error:
        raise ValueError(_listed(error)) from None
    check_regime(
        config.regime,
        config.tasks,
        label_noise=config.label_noise,
        data=config.data,
        second_data=config.second_data,
    )
    _check_method(config)
    return config


def _check_method(config: RunConfig) -> None:
    """Raise ``ValueError`` if the method cannot do anything with the other settings."""
    parts = config.method.split("+")
    config.rounds.check()
    if "repr" in parts:
        config.cycle.check(config.epochs // config.tasks)
    if "distillation" in parts and config.teacher is None:
        raise ValueError(
            f"teacher: {config.method} learns from another network, and none is given: set it to the folder "
            "of a finished run, or to a folder with runs that end in -seed0, -seed1 …"
        )
    if config.method in DEFAULT_GENERATIONS and config.rounds.count == 1:
        raise ValueError(
            f"method: {config.method} acts between tasks and between generations, and this run has one of "
            "each: set tasks or generations to 2 or more."
        )
    if config.method == "dsd" and config.rounds.length < 3:
        raise ValueError(
            f"epochs: dsd trains a third of each task with its smallest weights at 0: train for "
            f"{3 * config.tasks} epochs or more, not {config.epochs}."
        )


def _check_names(settings: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for a value that is none of the names that its setting takes."""
    for key, value in settings.items():
        kind = RunConfig.model_fields[key].annotation if key in RunConfig.model_fields else None
        names = get_args(kind) if get_origin(kind) is Literal else ()
        if names and isinstance(value, str) and value not in names:
            folder = key == "data" and os.path.isdir(value)
            hint = f". That is a folder: write --data folder --data-dir {line(value)}" if folder else ""
            raise ValueError(f"{key}: unknown name{nearest(value, names)} (got {value[:80]!r}){hint}")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML file: a flat mapping of the names in ``RunConfig``.

    Raises:
        ValueError: the file is not there, is not YAML as ``read_yaml`` takes it, or does not hold a mapping.
    """
    try:
        loaded, _ = read_yaml(path)
    except FileNotFoundError:
        raise ValueError(f"there is no configuration file {line(path)}.") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError(f"{line(path)} must hold settings, one 'name: value' a line, such as 'epochs: 30'.")
    return loaded


def _listed(error: ValidationError) -> str:
    """A message about the first three wrong settings, with the number of the other wrong ones."""
    errors = error.errors(include_url=False)
    listed = [
        f"{'.'.join(map(str, e['loc']))}: {e['msg'][:1].lower()}{line(e['msg'][1:])}, got {short(e['input'])}"
        for e in errors[:_LISTED]
    ]
    rest = len(errors) - _LISTED
    return "; ".join(listed) + (f"; and {rest:,} more settings are wrong" if rest > 0 else "")
