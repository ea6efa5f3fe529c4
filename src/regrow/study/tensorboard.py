"""Write records as TensorBoard event files. Imports no PyTorch, and sends nothing anywhere."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.study.records import RunRecord, write_bytes
from regrow.study.sequences import switches

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

# The key in a line of epochs.jsonl, and the tag that TensorBoard shows it by.
_SCALARS = {
    "train_loss": "loss/train",
    "validation_loss": "loss/validation",
    "train_accuracy": "accuracy/train",
    "validation_accuracy": "accuracy/validation",
    "learning_rate": "training/learning rate",
    "overlap": "filters/overlap",
    "alive": "filters/alive",
    "seconds": "training/seconds per epoch",
    "flops": "training/FLOPs per epoch",
}
_RESULTS = {
    "test_accuracy": "accuracy/test",
    "mean_accuracy_after_switch": "accuracy/test, mean of all tasks but the first",
    "test_loss": "loss/test",
    "train_seconds": "training/seconds",
    "train_flops": "training/FLOPs",
}


def write_tensorboard(
    runs: Sequence[RunRecord], folder: str | Path, variants: Mapping[Path, str] | None = None
) -> list[Path]:
    """Write one event file per run, below ``folder``, for ``tensorboard --logdir``; older ones are replaced.

    The files hold scalars for each epoch, test accuracy at the last epoch of each task, total costs at the
    last epoch, and the settings as hyperparameters. Records hold no dates: the first epoch begins at 0 on
    TensorBoard's clock, so that its relative time is training time.

    Args:
        runs: as ``gather`` gives them; of unfinished runs, the recorded epochs are written.
        folder: each run gets a folder in it, named after the run's folder.
        variants: {run's folder: name to give the run's method}. Default: its method.

    Returns:
        The files.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise ValueError("TensorBoard is not installed: pip install 'regrow[tensorboard]'.") from None
    files = []
    for name, run in _named(runs).items():
        file = Path(folder) / name / "events.out.tfevents.0.regrow"
        write_bytes(file, _file(_events(run, (variants or {}).get(run.folder, run.method))))
        files.append(file)
    return files


def _named(runs: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """A folder name for each run: that of its folder, numbered if another run has the same."""
    named: dict[str, RunRecord] = {}
    for run in runs:
        own = name = run.folder.resolve().name
        number = 1
        while name in named:
            number += 1
            name = f"{own}-{number}"
        named[name] = run
    return named


def _file(events: Iterator[Event]) -> bytes:
    from tensorboard.summary.writer.record_writer import RecordWriter

    data = io.BytesIO()
    writer = RecordWriter(data)
    for event in events:
        writer.write(event.SerializeToString())
    return data.getvalue()


def _events(run: RunRecord, name: str) -> Iterator[Event]:
    from tensorboard.compat.proto.event_pb2 import Event

    result = run.result or {}
    times = [0.0, *accumulate(epoch["seconds"] for epoch in run.epochs)]
    yield Event(wall_time=0, file_version="brain.Event:2")
    yield Event(wall_time=0, step=0, summary=_settings(run, name))
    accuracies = dict(zip(switches(run), result.get("task_accuracies") or [], strict=False))
    for epoch, time in zip(run.epochs, times[1:], strict=True):
        tested = {"test_accuracy": accuracies.get(epoch["epoch"])}
        for summary in (*_scalars(epoch, _SCALARS), *_scalars(tested, _RESULTS)):
            yield Event(wall_time=time, step=epoch["epoch"], summary=summary)
    last = run.epochs[-1]["epoch"] if run.epochs else 0
    for summary in _scalars(result, _RESULTS):
        yield Event(wall_time=times[-1], step=last, summary=summary)


def _scalars(values: Mapping[str, Any], tags: Mapping[str, str]) -> Iterator[Any]:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"))
    for key, tag in tags.items():
        value = values.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            yield Summary(value=[Summary.Value(tag=tag, simple_value=value, metadata=metadata)])


def _settings(run: RunRecord, name: str) -> Any:
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb

    settings: dict[str, Any] = {"method": name, "seed": run.seed}
    for key, value in run.config.items():
        if key not in ("version", "method", "seed"):
            plain = isinstance(value, bool | int | float | str)
            settings[key] = value if plain else "not set" if value is None else str(value)
    return hparams_pb(settings, trial_id=run.folder.name, start_time_secs=0)
