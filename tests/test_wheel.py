"""The wheel has all that the source tree has, its page no broken link, and it needs no more than it says.

`make test-wheel` installs it in an empty environment, which takes minutes; here its files run in this
environment, without the packages that it does not declare.
"""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from email import message_from_string
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]

# At the start of every process that a test begins: the names that it is told are not found.
FORBIDDING = """
import os, sys

forbidden = frozenset(os.environ["FORBIDDEN"].split())

class Forbidding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        return None if top in forbidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Forbidding, sys.meta_path)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    zipfile.ZipFile(built).extractall(folder / "unpacked")
    return folder / "unpacked"


def about(wheel: Path):
    (path,) = wheel.glob("*.dist-info/METADATA")
    return message_from_string(path.read_text(encoding="utf-8"))


def plain(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def declared(requirements: Iterable[str], extra: str) -> set[str]:
    """The distributions that ``requirements`` name, and all that these need, by name."""
    found: dict[tuple[str, frozenset[str]], None] = {}
    left = [(Requirement(each), frozenset({extra})) for each in requirements]
    while left:
        requirement, extras = left.pop()
        met = [
            not requirement.marker or requirement.marker.evaluate({"extra": each}) for each in extras | {""}
        ]
        if not any(met):
            continue
        key = plain(requirement.name), frozenset(requirement.extras)
        if key in found:
            continue
        found[key] = None
        with suppress(metadata.PackageNotFoundError):
            left += [(Requirement(each), key[1]) for each in metadata.requires(key[0]) or []]
    return {name for name, _ in found}


def use(wheel: Path, *arguments: str, extra: str = "") -> None:
    """Run scripts/try_wheel.py where the package in ``wheel`` is found, and of others what it declares."""
    right = declared(about(wheel).get_all("Requires-Dist"), extra) | {"regrow"}
    homes = metadata.packages_distributions()
    wrong = {top for top, found in homes.items() if right.isdisjoint(map(plain, found))}
    (wheel / "sitecustomize.py").write_text(FORBIDDING, encoding="utf-8")
    of_test = {"FORBIDDEN": " ".join(sorted(wrong)), "PYTHONPATH": str(wheel)}
    script = ROOT / "scripts" / "try_wheel.py"
    done = subprocess.run(
        [sys.executable, "-P", script, *arguments], env=os.environ | of_test, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The wheel works.\n"


def test_the_library_needs_what_it_declares_and_no_more(wheel: Path) -> None:
    use(wheel)


def test_the_command_needs_what_the_study_extra_declares_and_no_more(wheel: Path) -> None:
    use(wheel, "--study", extra="study")


def test_what_is_not_declared_cannot_be_imported_in_these_tests(wheel: Path) -> None:
    with pytest.raises(AssertionError, match="compare"):
        use(wheel, "--study", extra="timm")


def test_the_page_of_a_package_index_has_no_pictures_and_no_links_to_files(wheel: Path) -> None:
    page = about(wheel).get_payload()
    assert "regrow.RePr(model, optimizer" in page
    assert "pip install 'regrow[study]'" in page
    assert "pip install ." not in page
    assert "<!--" not in page
    assert "![" not in page
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page, flags=re.DOTALL)
    assert re.findall(r"\]\((?!https://)[^)]*\)", prose) == []


def test_what_the_citation_says_is_the_version() -> None:
    from regrow import __version__

    lines = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert f"version: {__version__}" in lines
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(__version__)}\b", changes, re.MULTILINE)


def test_the_floors_are_those_that_are_tried() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["study"]]
    tried = re.findall(r"^([a-z-]+)={2,3}(.*)$", (ROOT / "constraints-floor.txt").read_text(), re.MULTILINE)
    assert {name for name, _ in tried} >= {"torch", "torchvision", "numpy", "safetensors", "torch-pruning"}
    for name, version in tried:
        (lowest,) = [found[1] for each in declared if (found := re.match(rf"{name}>=([\d.]+)", each))]
        assert re.fullmatch(rf"{re.escape(lowest)}(\.0)*", version), (name, lowest, version)
