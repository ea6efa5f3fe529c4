"""What a comparison or a study has recorded about its runs: names, order, baseline. Imports no PyTorch.

``regrow compare`` leaves ``comparison.json`` beside its run folders, and ``regrow study`` leaves
``study.json`` in the folder that holds the comparisons' folders. Later reports and figures follow them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from regrow.study import records


@dataclass(frozen=True)
class Recorded:
    """The record of one comparison.

    Attributes:
        baseline: the name of the method or variant that the others are compared with.
        title: of its report; None if that is model and data alone.
        names: {run folder, resolved: name of its method or variant}, in the order of the report.
        numbers: of the variants, as ``variants.variant_numbers`` gives them; a method alone has 0.
    """

    baseline: str
    title: str | None
    names: dict[Path, str]
    numbers: dict[str, int]


def find_recorded(runs: Iterable[Path]) -> tuple[list[Recorded], dict[Path, str]]:
    """The records of the comparisons that these run folders belong to, in their order, each once.

    Returns:
        The records, and {file: what is wrong} of those that cannot be read.
    """
    found: list[Recorded] = []
    left_out: dict[Path, str] = {}
    folders = [run.resolve() for run in runs]
    files = {
        path: read
        for folder in folders
        for path, read in (
            (records.comparison_path(folder.parent), _of_comparison),
            (records.study_path(folder.parent.parent), _of_study),
        )
    }
    for path, read in files.items():
        if not path.is_file():
            continue
        try:
            found += [each for each in read(path) if not each.names.keys().isdisjoint(folders)]
        except (ValueError, OSError) as error:
            left_out[path] = str(error)
    return found, left_out


def _of_comparison(path: Path) -> list[Recorded]:
    about = records.read_comparison(path)
    # The folders are named METHOD-seedN.
    names = {path.parent / str(run): str(run).rpartition("-seed")[0] for run in about["runs"]}
    return [Recorded(about["baseline"], None, names, dict.fromkeys(names.values(), 0))]


def _of_study(path: Path) -> list[Recorded]:
    found = []
    for each in records.read_study(path):
        # Studies of earlier versions have neither of these.
        title, numbers = each.get("title"), each.get("numbers")
        found.append(
            Recorded(
                each["baseline"],
                title if isinstance(title, str) else None,
                {path.parent / run: str(name) for run, name in each["runs"].items()},
                {
                    name: number
                    for name, number in (numbers if isinstance(numbers, dict) else {}).items()
                    if type(number) is int and number >= 0
                },
            )
        )
    return found
