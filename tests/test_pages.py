"""The Python that the pages of docs/ show runs as printed, and the pages build without a warning."""

import copy
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from torch import nn

import regrow
from pages import DOCS, NOT_RUN, RUN, blocks, running

ROOT = Path(__file__).parents[1]
PAGES = sorted(DOCS.glob("*.md"))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip


def train_one_epoch(model: nn.Module, loader: list, optimizer: torch.optim.Optimizer) -> None:
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x), y).backward()
        optimizer.step()


def names() -> dict[str, object]:
    """What the pages take as given: a network, its optimizer, pictures and a loop."""
    model = network()
    x, labels = torch.randn(256, 1, 8, 8), torch.arange(256) % 4
    return {
        "regrow": regrow,
        "torch": torch,
        "itertools": itertools,
        "model": model,
        "uncut": copy.deepcopy(model),
        "optimizer": torch.optim.SGD(model.parameters(), 0.05, momentum=0.9),
        "x": x,
        "y": labels,
        "labels": labels,
        "loader": [(x, labels)],
        "batches": [(x, labels)],
        "held_out": [(x, labels)],
        "loss": nn.functional.cross_entropy,
        "train_one_epoch": train_one_epoch,
        "epochs": 4,
        "rate": 0.1,
        "task": 1,
    }


def wide() -> dict[str, object]:
    """As ``names``, with layers that ``round_to=8`` can make narrower."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16),
        nn.ReLU(), nn.Flatten(), nn.Linear(256, 4),
    )  # fmt: skip
    return {**names(), "model": model, "uncut": copy.deepcopy(model)}


def analysis() -> dict[str, object]:
    model = network().eval()
    x = torch.randn(256, 1, 8, 8)
    found = names()
    cycle = regrow.RePr(
        found["model"], found["optimizer"], example_inputs=x[:1], full=1, sub=1, cycles=1, consumers="keep"
    )
    a = model[:4](x).detach().mean((2, 3))
    return {
        **found, "cycle": cycle, "model_a": network(), "model_b": model, "a": a, "b": a,
        "loss_function": nn.functional.cross_entropy,
    }  # fmt: skip


def masked() -> dict[str, object]:
    from torch.nn.utils import prune

    found = names()
    for layer in (found["model"][0], found["model"][3]):
        prune.ln_structured(layer, "weight", 0.5, n=2, dim=0)
        prune.custom_from_mask(layer, "bias", layer.weight_mask.amax((1, 2, 3)))
    return found


# What the blocks of each page take as given. The blocks of other pages run in tests that name their page.
GIVEN = {
    "analysis.md": analysis,
    "bridgeout.md": names,
    "criteria.md": names,
    "index.md": names,
    "int8.md": wide,
    "own-criterion.md": names,
    "own-loop.md": names,
    "prune.md": names,
    "records.md": names,
    "several-processes.md": names,
}
# Pages whose blocks build on those before them.
JOINED = {"own-criterion.md", "records.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_block_of_python_says_whether_it_runs(page: Path) -> None:
    found = blocks(page.name)
    assert len(found) == page.read_text(encoding="utf-8").count("```python\n")
    for before, code in found:
        assert before.startswith((RUN, NOT_RUN)), f"no mark before this block:\n{code}"


def test_every_page_with_blocks_that_run_has_its_test() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for page in PAGES:
        if running(page.name):
            assert f'"{page.name}"' in tests, (
                f"no test runs the Python of {page.name}: give it a row in GIVEN"
            )


def needs(page: str) -> list[pytest.MarkDecorator]:
    """The mark of a page whose Python wants a newer PyTorch than the rest of them."""
    exports = "export_onnx(" in (DOCS / page).read_text()
    return [pytest.mark.needs_torch("2.13", "export_onnx")] * exports


@pytest.mark.parametrize("page", [pytest.param(each, marks=needs(each)) for each in GIVEN])
def test_the_python_of_a_page_runs_as_printed(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    if page == "several-processes.md":
        request.getfixturevalue("one_process")
    if page == "records.md":
        train_a_run(tmp_path / "runs" / "one")
    scope = None
    for code in running(page):
        if scope is None or page not in JOINED:
            scope = masked() if "keep_of_masks" in code else GIVEN[page]()
            if page == "own-loop.md":
                make_cycle(scope, code)
        exec(compile(code, page, "exec"), scope)


def make_cycle(scope: dict[str, object], code: str) -> None:
    if "cycle.state_dict()" in code:
        scope["cycle"] = regrow.RePr(scope["model"], scope["optimizer"], example_inputs=scope["x"][:1])


def train_a_run(folder: Path) -> None:
    from regrow.study.config import make_config
    from regrow.study.train import train

    train(
        make_config({"method": "repr", "epochs": 3, "full": 1, "sub": 1, "cycles": 1, "train_size": 100}),
        folder,
    )


@pytest.fixture
def one_process():
    """A group of this process alone, as ``torchrun`` makes one."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_notebook_runs() -> None:
    notebook = nbformat.read(DOCS / "first-steps.ipynb", 4)
    shown = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]
    assert len(shown) >= 5, "the notebook has been committed without its outputs"
    kernel = AsyncKernelManager(kernel_name="python3", transport="ipc")
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    kernel.extra_env = variables
    NotebookClient(notebook, timeout=120, km=kernel).execute(env=variables)
    text = "".join(each.get("text", "") for cell in notebook.cells for each in cell.get("outputs", ()))
    assert "restore" in text
    assert float(re.search(r"test accuracy ([\d.]+)%", text)[1]) > 90


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_public_name_has_its_place_in_the_pages(site: Path) -> None:
    page = (site / "reference.html").read_text(encoding="utf-8")
    assert [name for name in regrow.__all__ if f'.{name}" class="doc doc-heading"' not in page] == []


def test_the_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(
            r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=\"((?:https?:)?//[^\"]+)", text
        )
        assert loaded == [], page.name
        assert "cdnjs" not in text, page.name


def test_equations_are_mathml(site: Path) -> None:
    text = (site / "methods.html").read_text(encoding="utf-8")
    assert text.count("<math") > 20
    assert "arithmatex" not in text
    equations = re.findall(r"<math.*?</math>", text, re.DOTALL)
    assert [each for each in equations if "\\" in each] == []  # a command that the converter does not know


def test_every_flag_is_on_the_page_of_the_command(site: Path) -> None:
    text = (site / "command.html").read_text(encoding="utf-8")
    for flag in ("--max-drop", "--label-noise", "--launcher", "--tensorboard"):
        assert f"<code>{flag}" in text
