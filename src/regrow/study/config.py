"""All settings of a run in one table, which defines the command's flags, the YAML keys and the record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from regrow.short import line, short
from regrow.study.names import METHOD_ALIASES, PRECISION_ALIASES
from regrow.study.schedule import Cycle, place_cycle
from regrow.study.yamls import read_yaml
from regrow.suggest import nearest

_LISTED = 3
# Beyond these a run ends in an error of PyTorch or the system, or never.
_LONGEST, _MANY = 100_000, 10**9
_LAST_SEED = 2**63 - 1  # of PyTorch's generators
Augmentation = Literal["none", "shift", "flip", "shift-flip"]
_DATA, _MODEL, _TRAINING, _REPR, _NOISE, _RUN = (
    "Data", "Model", "Training", "RePr", "Bridgeout and dropout", "Run",
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
    augmentation: Augmentation = _setting("shift", _DATA, "How training pictures are varied.")
    split_seed: int = _setting(
        0, _DATA, "Fixes the split into train, validation and test.", ge=0, le=_LAST_SEED
    )

    model: str = _setting(
        "convnet",
        _MODEL,
        "convnet, vgg, resnet (CIFAR family), wrn, or any torchvision or timm name.",
        max_length=200,
    )
    depth: int | None = _setting(
        None, _MODEL, "Layers: convnet 3, vgg 16 (7 to 19), resnet 20, wrn 16.", ge=1, le=200
    )
    width: float | None = _setting(
        None, _MODEL, "Filters: convnet 32, resnet 16; factor: vgg 1, wrn 4.", gt=0, le=10_000
    )
    batch_norm: bool = _setting(True, _MODEL, "Batch norm behind the convolutions (convnet, vgg).")
    pooling: Literal["max", "avg", "none"] = _setting(
        "max", _MODEL, "Pooling between the convolutions of convnet."
    )

    epochs: int = _setting(30, _TRAINING, "Passes over the training pictures.", ge=1, le=_LONGEST)
    batch_size: int = _setting(128, _TRAINING, "Pictures per step.", ge=2, le=1_000_000)
    optimizer: Literal["sgd", "adam", "adamw"] = _setting("sgd", _TRAINING, "sgd has Nesterov momentum.")
    lr: float | None = _setting(
        None, _TRAINING, "Highest learning rate (default: sgd 0.1, adam and adamw 0.002).", gt=0, le=1e30
    )
    momentum: float = _setting(0.9, _TRAINING, "Momentum of sgd.", ge=0, lt=1)
    weight_decay: float = _setting(5e-4, _TRAINING, "Weight decay.", ge=0, le=1e30)
    schedule: Literal["hold-cosine", "cosine", "step", "constant"] = _setting(
        "hold-cosine",
        _TRAINING,
        "Learning rate. hold-cosine holds it through the cycles and anneals after the last restore; "
        "standard training gets the same.",
    )
    precision: Literal["float32", "bfloat16", "bf16", "float16"] = _setting(
        "float32",
        _TRAINING,
        "bfloat16 (or bf16) and float16 train by autocast; weights and measurements stay float32.",
    )

    method: Literal[
        "standard", "backprop", "repr", "bridgeout", "targeted-bridgeout", "dropout", "targeted-dropout"
    ] = _setting(
        "standard",
        _TRAINING,
        "How to train. backprop is another name of standard, which has weight decay and nothing else.",
    )
    fraction: float = _setting(0.3, _REPR, "Share of the filters to drop.", ge=0, lt=1)
    cycles: int | None = _setting(
        None, _REPR, "How often to drop and restore (default: placed in the epochs).", ge=1, le=_LONGEST
    )
    full: int | None = _setting(
        None, _REPR, "Epochs of a cycle with all filters (default: placed).", ge=1, le=_LONGEST
    )
    sub: int | None = _setting(
        None, _REPR, "Epochs of a cycle without the dropped filters (default: placed).", ge=1, le=_LONGEST
    )
    criterion: Literal[
        "ortho",
        "ortho-corrected",
        "l1",
        "l2",
        "random",
        "mean-activation",
        "apoz",
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
    def cycle(self) -> Cycle:
        """Where RePr's cycles lie in the epochs; the learning rate of standard training follows them too."""
        return place_cycle(self.epochs, full=self.full, sub=self.sub, cycles=self.cycles)


def make_config(settings: Mapping[str, Any]) -> RunConfig:
    """A checked ``RunConfig``.

    Raises:
        ValueError: an unknown key (the nearest is suggested), a value of the wrong type or out of range,
            or cycles that do not fit into the epochs.
    """
    settings = {key: value for key, value in settings.items() if key != "version"}
    _check_names(settings)
    for key in settings:
        if key not in RunConfig.model_fields:
            raise ValueError(f"unknown setting {short(key)}{nearest(str(key), RunConfig.model_fields)}")
    try:
        config = RunConfig.model_validate(settings)
    except ValidationError as error:
        raise ValueError(_listed(error)) from None
    if config.method == "repr":
        config.cycle.check(config.epochs)
    return config


def _check_names(settings: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for a value that is none of the names that its setting takes."""
    for key, value in settings.items():
        kind = RunConfig.model_fields[key].annotation if key in RunConfig.model_fields else None
        names = get_args(kind) if get_origin(kind) is Literal else ()
        if names and isinstance(value, str) and value not in names:
            raise ValueError(f"{key}: unknown name{nearest(value, names)} (got {value[:80]!r})")


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
