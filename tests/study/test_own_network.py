"""Networks that a function of the user's own makes, and weights from a file."""

import sys
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import regrow
from regrow.study.own_network import is_own, meant, own_network
from regrow.study.own_weights import load_own_weights
from regrow.study.trained import by_function
from regrow.study.typed import Mistyped

NETS = """
import torch
from torch import nn
from own_package import sizes

class Net(nn.Module):
    def __init__(self, width=sizes.WIDTH):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Linear(width, 10)
    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))

class Other:
    @staticmethod
    def build():
        return Net(5)

def build():
    return Net()

def grey_to_colour():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

def maps():
    return nn.Conv2d(1, 10, 3)

def sized(classes, *, width):
    return Net(width)

def forgets():
    Net()

def wrong():
    raise ValueError("my own")

def ends():
    raise SystemExit(3)

def two_inputs():
    class Two(Net):
        def forward(self, x, y):
            return super().forward(x) + y
    return Two()

def program():
    return torch.jit.ScriptModule()

def on_meta():
    return Net().to("meta")

made = Net()
number = 3
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    home = tmp_path / "own_package"
    home.mkdir()
    (home / "__init__.py").write_text("")
    (home / "sizes.py").write_text("WIDTH = 4\n")
    (home / "nets.py").write_text(NETS)
    (home / "script.py").write_text("import argparse\nargparse.ArgumentParser().parse_args(['x'])\n")
    (home / "broken.py").write_text("import not_there_at_all\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield
    assert sys.path == path
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_package"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "own"),
    [
        *[("nets:build", True), ("a.b:C.d", True), ("timm:resnet18", False), ("torchvision:vgg11", False)],
        *[("resnet18", False), ("nets:", False), (":build", False), ("./nets.py:build", False)],
    ],
)
def test_which_names_are_those_of_functions(name: str, own: bool) -> None:
    assert is_own(name) == own


@pytest.mark.parametrize(("function", "width"), [("build", 4), ("Net", 4), ("Other.build", 5)])
def test_a_function_and_a_class(function: str, width: int) -> None:
    model: Any = own_network(f"own_package.nets:{function}", "none")
    assert model.conv.out_channels == width


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_packag.nets:build", r"there is no module 'own_packag', neither in .* nor installed"),
        ("own_package.net:build", r"there is no module 'own_package.net', neither"),
        ("own_package.nets:biuld", r"own_package.nets has no function 'biuld'; did you mean 'build'"),
        ("own_package.sizes:build", r"own_package.sizes has no function 'build'\."),
        ("own_package.nets:Other.make", r"has no function 'Other.make'"),
        ("own_package.nets:sized", r"takes the arguments classes, width: write a function that takes none"),
        ("own_package.nets:forgets", r"own_package.nets:forgets returned None, and not a network"),
        ("own_package.nets:Other", r"returned an Other, and not a network"),
        ("own_package.nets:program", r"a ScriptModule, and not a network.* that makes what was scripted"),
        ("own_package.nets:made", r"is a network: give a function that takes no arguments and returns it"),
        ("own_package.nets:number", r"own_package.nets:number is an int: give a function"),
    ],
)
def test_what_makes_no_network(name: str, message: str) -> None:
    with pytest.raises(Mistyped, match=message):
        own_network(name, "none")


def test_an_error_in_the_users_own_code_surfaces() -> None:
    with pytest.raises(ModuleNotFoundError, match="No module named 'not_there_at_all'"):
        own_network("own_package.broken:build", "none")


def test_a_value_error_in_the_users_own_code_keeps_its_traceback() -> None:
    with pytest.raises(
        RuntimeError, match=r"own_package.nets:wrong raised an error: ValueError: my own"
    ) as error:
        own_network("own_package.nets:wrong", "none")
    assert isinstance(error.value.__cause__, ValueError)


@pytest.mark.parametrize("name", ["own_package.script:Net", "own_package.nets:ends"])
def test_a_script_that_ends_python(name: str) -> None:
    with pytest.raises(Mistyped, match=r'own_package.* ended Python .* below if __name__ == "__main__"'):
        own_network(name, "none")


def test_a_package_in_src() -> None:
    Path("src/package_in_src").mkdir(parents=True)
    with pytest.raises(Mistyped, match="It is in src: install your package, or write PYTHONPATH=src regrow"):
        own_network("package_in_src.nets:build", "none")


def test_a_network_without_numbers() -> None:
    with pytest.raises(ValueError, match=r"own_package.nets:on_meta has tensors without numbers"):
        own_network("own_package.nets:on_meta", "none")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_package/nets.py:Net", ": write own_package.nets:Net, with the function"),
        ("./nets.py", ": write nets:build, with the function"),
        ("own_package.nets.build", ": did you mean own_package.nets:build?"),
        ("own_package.nets", ": write own_package.nets:build, with the function"),
        ("./own_package.nets:build()", ": write own_package.nets:build"),
        ("resnet50.a1_in1k", ""),
        ("mine.pth", ": name the function that builds its network, and add --weights mine.pth"),
        ("runs/one", ": there is no such folder"),
        ("resnet19", ""),
    ],
)
def test_what_a_name_may_have_been_meant_as(name: str, message: str) -> None:
    assert meant(name).startswith(message)
    assert bool(meant(name)) == bool(message)


def trained_state() -> dict[str, Tensor]:
    model = own_network("own_package.nets:build", "none")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    return model.state_dict()


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return OrderedDict((prefix + name, tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("file", "stored"),
    [
        ("w.pth", lambda s: s),
        ("w.ckpt", lambda s: {"epoch": 3, "optimizer": {"lr": 0.1}, "state_dict": prefixed("net.", s)}),
        ("w.bin", lambda s: {"model": s, "ema": prefixed("module.", s)}),
        ("w.pth.tar", lambda s: {"model_state_dict": s, "best": torch.ones(1)}),
        (
            "w.pt",
            lambda s: {"model": {"state_dict": s}, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
        ),
        ("w.pth", lambda s: prefixed("module.", s)),
        ("w.pth", lambda s: prefixed("_orig_mod.module.", s)),
        ("w.pth", lambda s: {"n_averaged": torch.ones(1), **prefixed("module.", s)}),
        ("w.safetensors", lambda s: s),
        ("w.safetensors", lambda s: prefixed("_orig_mod.", s)),
    ],
)
def test_weights(tmp_path: Path, file: str, stored: Any) -> None:
    state = trained_state()
    (save_file if file == "w.safetensors" else torch.save)(stored(state), tmp_path / file)
    found = own_network("own_package.nets:build", str(tmp_path / file)).state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_compiled_network_takes_weights_saved_without_the_wrapper(tmp_path: Path) -> None:
    model = torch.compile(nn.Linear(2, 2))
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pth")
    load_own_weights(model, tmp_path / "w.pth", "nets:compiled")
    assert torch.equal(model.weight, torch.load(tmp_path / "w.pth")["weight"])


def test_a_network_whose_layers_have_no_shape_yet(tmp_path: Path) -> None:
    model, trained = nn.LazyLinear(2), nn.Linear(3, 2)
    torch.save(prefixed("net.", trained.state_dict()), tmp_path / "w.pth")
    load_own_weights(model, tmp_path / "w.pth", "nets:lazy")
    assert torch.equal(model.weight, trained.weight)


def test_what_is_not_the_networks_is_left_out_with_a_warning(tmp_path: Path) -> None:
    state = trained_state()
    torch.save({**prefixed("net.", state), "loss.weight": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="begins with 'net.' is loaded, and 'loss.weight' left out"):
        found = own_network("own_package.nets:build", str(tmp_path / "w.pth")).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_weights_that_regrow_has_cut(tmp_path: Path) -> None:
    model: Any = own_network("own_package.nets:build", "none")
    regrow.cut(
        model,
        {"conv": torch.tensor([True, False, True, True])},
        example_inputs=torch.zeros(1, 1, 8, 8),
    )
    regrow.save(model, tmp_path / "w.safetensors")
    found: Any = own_network("own_package.nets:build", str(tmp_path / "w.safetensors"))
    assert found.conv.out_channels == 3
    assert torch.equal(found.conv.weight, model.conv.weight)


def test_a_network_with_a_part_called_module_keeps_its_names(tmp_path: Path) -> None:
    model = nn.Sequential(OrderedDict(module=nn.Linear(2, 2)))
    weight = torch.randn(2, 2)
    torch.save({"module.weight": weight, "module.bias": torch.zeros(2)}, tmp_path / "w.pt")
    load_own_weights(model, tmp_path / "w.pt", "nets:parallel")
    assert torch.equal(model.module.weight, weight)


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "head.bias", "conv.weight"), "lacks 'conv.weight', 'head.bias'[.]"),
        (lambda s: without(s, *s), "lacks 'conv.weight', 'conv.bias', 'norm.weight' and 5 more"),
        (lambda s: {**s, "fc.bias": torch.ones(1)}, "the network has no 'fc.bias'[.]"),
        (
            lambda s: {**s, "head.weight": torch.ones(3, 4)},
            r"'head.weight' has shape \[3, 4\] in the file and \[10, 4\] in the network[.]",
        ),
        (lambda s: {**s, "epoch": 3}, "the network has no 'epoch'[.]"),
        (lambda s: {"net": s, "ema": s}, "more than once, under 'net', 'ema': save the one that you mean"),
        (lambda s: prefixed("a.", s) | prefixed("b.", s), "more than once, under 'a', 'b': save"),
        (lambda s: prefixed("a.", without(s, "head.bias")), "w.pth does not fit .* it lacks 'head.bias'[.]"),
        (lambda _: {"lr": 0.1, "epoch": 3}, "holds a dict with 'lr', 'epoch', and no state dict in it"),
        (lambda s: {"state_dict": s, "args": Namespace(lr=1)}, r"more than tensors [(]argparse.Namespace[)]"),
        (lambda _: [1], "holds a list, and not a state dict"),
        (lambda _: nn.Linear(2, 2), r"holds more than tensors.*save model.state_dict\(\)"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    torch.save(change(trained_state()), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        own_network("own_package.nets:build", str(tmp_path / "w.pth"))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("file", "message"),
    [
        (None, "pass the weights of own_package.nets:build: --weights FILE"),
        ("missing.pth", "there is no file --weights missing.pth"),
        ("IMAGENET1K_V1", "must end in .safetensors, .pth, .pt, .ckpt, .bin or .tar"),
        ("folder.pt", "folder.pt is a folder"),
        ("empty.pth", "empty.pth is not a whole file of torch.save"),
        ("empty.safetensors", "empty.safetensors is not a whole safetensors file"),
        ("text.pth", "text.pth is damaged, or holds more than tensors, which"),
        ("half.pth", "half.pth is not a whole file of torch.save"),
        ("script.pt", "script.pt holds a program of TorchScript"),
    ],
)
def test_files_that_are_no_weights(file: str | None, message: str) -> None:
    Path("folder.pt").mkdir()
    Path("empty.pth").write_bytes(b"")
    Path("empty.safetensors").write_bytes(b"")
    Path("text.pth").write_text("weights")
    torch.save({"a": torch.ones(9)}, "half.pth")
    Path("half.pth").write_bytes(Path("half.pth").read_bytes()[:800])
    if file == "script.pt":
        torch.jit.save(torch.jit.trace(nn.Identity(), torch.ones(1)), file)
    with pytest.raises(ValueError, match=message):
        own_network("own_package.nets:build", file)


def test_pictures_are_those_of_the_data_settings() -> None:
    found = by_function("own_package.nets:build", weights="none", data="digits", device="cpu")
    assert found.source == {"function": "own_package.nets:build", "weights": "none", "data": "digits"}
    assert found.example.shape == (1, 1, 8, 8)
    assert found.calibration is not None
    assert found.calibration[0].mean() == pytest.approx(0, abs=0.05)
    assert found.calibration[0].std() == pytest.approx(1, abs=0.05)
    assert found.validation is not None
    assert found.test is not None
    assert not found.model.training


def test_grey_pictures_for_a_network_of_three_channels() -> None:
    found = by_function("own_package.nets:grey_to_colour", weights="none", data="digits", device="cpu")
    assert found.example.shape == (1, 3, 8, 8)


def test_a_network_that_gives_no_scores_of_classes() -> None:
    found = by_function("own_package.nets:maps", weights="none", data="digits", device="cpu")
    assert found.validation is found.test is found.labelled is None
    assert found.unjudged == "the network does not return one score for each class of a picture"


def test_without_pictures() -> None:
    found = by_function("own_package.nets:build", weights="none", image_size=12, device="cpu")
    assert found.example.shape == (1, 1, 12, 12)


@pytest.mark.parametrize("data", ["digits", None])
def test_a_network_that_takes_no_pictures(data: str | None) -> None:
    message = (
        r"not take pictures of .* with 1 channel \(TypeError: .*missing.* 'y'\): .*regrow.prune in Python"
    )
    with pytest.raises(ValueError, match=message):
        by_function("own_package.nets:two_inputs", weights="none", data=data, device="cpu")
