"""Check and describe the settings of a run whose data changes from task to task. Imports no PyTorch."""

from __future__ import annotations


def described(regime: str, tasks: int, *, data: str, second_data: str) -> str:
    """The data of a run in words, for a title: ``"digits, 4 tasks of permuted labels"``."""
    if regime == "new-domain":
        return f"{data} and {second_data} in turn, {tasks} tasks"
    if regime == "same":
        return data if tasks == 1 else f"{data}, {tasks} tasks of the same data"
    return f"{data}, {tasks} tasks of {str(regime).replace('-', ' ')}"


def check_regime(regime: str, tasks: int, *, label_noise: float, data: str, second_data: str) -> None:
    """Raise ``ValueError`` if a setting that ``regime`` needs is missing; each argument is a setting.

    ``tasks.check_tasks`` checks what depends on the pictures.
    """
    if regime != "same" and tasks < 2:
        raise ValueError(
            f"regime {regime!r} changes the data between tasks, and there is one task: set tasks to 2 or "
            "more."
        )
    if regime == "corrected-labels" and label_noise == 0:
        raise ValueError(
            "regime 'corrected-labels' corrects wrong labels, and label_noise is 0: set label_noise to the "
            "share of labels that are wrong in the first half of the tasks, such as 0.3."
        )
    if regime == "new-domain" and second_data in ("none", data):
        raise ValueError(
            f"regime 'new-domain' alternates between two data sets: set second_data to another one than "
            f"{data!r} with as many classes."
        )
