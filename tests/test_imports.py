"""What an import costs: checked in fresh processes, for this one has loaded everything already."""

import subprocess
import sys

import pytest

HEAVY = (
    "onnx",
    "onnxscript",
    "onnxruntime",
    "torchvision",
    "matplotlib",
    "timm",
    "typer",
    "lightning",
    "transformers",
    "accelerate",
    "torch_pruning",
    "scipy",
    "ray",
)


def loaded_by(code: str) -> set[str]:
    """The modules in ``sys.modules`` after a fresh process has run ``code``."""
    script = f"{code}\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_regrow_waits_for_nothing():
    loaded = loaded_by("import regrow; dir(regrow); regrow.__version__")
    assert "regrow" in loaded
    assert not loaded & {"torch", "numpy", "regrow.repr.cycle", "regrow.study", *HEAVY}


def test_every_public_name_is_there_and_none_needs_an_extra():
    loaded = loaded_by(
        "import regrow\nfor name in regrow.__all__: assert getattr(regrow, name) is not None, name"
    )
    assert {"torch", "regrow.repr.cycle", "regrow.criteria.score", "regrow.criteria.select"} <= loaded
    of_study = {name for name in loaded if name.startswith("regrow.study.")}
    assert of_study == {"regrow.study.load_run"}  # which imports the rest when it is called
    assert not loaded & {"regrow.cli", "pydantic", "yaml", "sklearn", *HEAVY}


def test_scores_of_pictures_do_not_load_the_compiler():
    loaded = loaded_by(
        "import torch, regrow; from torch import nn\n"
        "net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))\n"
        "x, y = torch.randn(2, 3, 6, 6), torch.tensor([0, 1])\n"
        "for name in ('taylor', 'apoz', 'gradient', 'hessian'):\n"
        "    regrow.score(net, name, batches=[(x, y)])"
    )
    assert "regrow.criteria.values" in loaded
    assert "torch._dynamo" not in loaded  # importing it takes seconds


@pytest.mark.parametrize(
    "module",
    [
        "regrow.cli",
        "regrow.study.records",
        "regrow.study.compare",
        "regrow.study.report",
        "regrow.study.launch",
        "regrow.study.cluster",
    ],
)
def test_what_reads_files_needs_no_torch(module):
    loaded = loaded_by(f"import {module}")
    assert module in loaded
    assert not loaded & {"torch", "torchvision", "timm", "ray", "regrow.repr.cycle"}


def test_help_names_the_commands_and_needs_no_torch():
    code = "import sys; sys.argv = ['regrow', '--help']\nfrom regrow.__main__ import main\n"
    code += "try: main()\nexcept SystemExit as stop: assert not stop.code\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("train", "compare", "report"):
        assert command in done.stdout


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("train", 1)])
def test_without_the_study_extra_the_command_says_how_to_get_it(argument, status, monkeypatch, capsys):
    from regrow import __main__ as command

    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "typer" else name)
    monkeypatch.setattr(sys, "argv", ["regrow", argument])
    with pytest.raises(SystemExit) as stop:
        command.main()
    said = capsys.readouterr().out if status == 0 else stop.value.code
    assert "pip install 'regrow[study]'" in said
    assert "needs typer" in said or "needs more: typer" in said
    assert (status == 0) == (stop.value.code == 0)


def test_an_unknown_name_is_an_attribute_error():
    import regrow

    with pytest.raises(AttributeError, match="module 'regrow' has no attribute 'repr_'"):
        _ = regrow.repr_
    assert set(regrow.__all__) <= set(dir(regrow))
