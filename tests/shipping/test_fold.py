"""Norms folded into convolutions: the same outputs, whole or cut, and what stays."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from nets import Standardised, decoder
from regrow.looking.noise import unsettle
from regrow.pruning.prune import prune
from regrow.shipping.checkpoint import save
from regrow.shipping.fold import fold_norms
from regrow.shipping.onnx import export_onnx
from regrow.shipping.plain import Placed
from regrow.surgery.cut import cut

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def settled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        unsettle(model, torch.Generator().manual_seed(0))
    return model.eval()


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-4 * one.abs().max())


class NormedInput(nn.Module):
    """A norm of the input, and two behind convolutions that write into a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last, self.norm3 = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.stem(self.norm3(x))).relu()
        x = (x + self.norm2(self.conv(x))).relu()
        return self.head(self.last(x).relu().mean((2, 3)))


@pytest.mark.devices
def test_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2, eps=1e-12)).eval()
    conv, norm = net
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1))
        norm.weight.copy_(torch.tensor([2.0, 1.0]))
        norm.bias.copy_(torch.tensor([5.0, 0.0]))
        norm.running_mean.copy_(torch.tensor([1.0, 2.0]))
        norm.running_var.copy_(torch.tensor([4.0, 0.25]))
    folded, record = fold_norms(net, example_inputs=torch.ones(1, 1, 2, 2))
    assert folded[0].weight.flatten().tolist() == pytest.approx([1.0, 6.0])
    assert folded[0].bias.tolist() == pytest.approx([4.0, -4.0])
    assert isinstance(folded[1], nn.Identity)
    assert record == {"version": 1, "folded": {"1": "0"}, "left": {}, "difference": 0.0}
    assert net[0].bias is None
    assert isinstance(net[1], nn.BatchNorm2d)


@pytest.mark.devices
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_every_dimension_and_the_model_as_it_was(make_net, dim):
    model = settled(make_net(dim=dim)).train()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, *[8] * dim)
    folded, record = fold_norms(model, example_inputs=x)
    assert record["folded"] == {f"norm{i}": f"conv{i}" for i in (1, 2, 3)}
    assert record == json.loads(json.dumps(record))
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules())
    assert not folded.training
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert close(model.eval()(x), folded(x))


@pytest.mark.parametrize("coupled", ["individually", "jointly"])
def test_a_cut_network_with_norms_that_place(coupled, tmp_path):
    model = settled(NormedInput())
    prune(model, fraction=0.5, example_inputs=X, compensate=False, coupled=coupled)
    folded, record = fold_norms(model, example_inputs=X)
    assert record["folded"] == {"norm1": "stem", "norm2": "conv"}
    assert record["left"] == {"norm3": "it does not read the output of one convolution alone"}
    assert any(isinstance(module, Placed) for module in folded.modules()) == (coupled == "individually")
    assert record["difference"] <= 1e-5
    fresh = torch.randn(5, 3, 8, 8)
    assert close(model(fresh), folded(fresh))
    program = torch.export.export(folded, (X,))
    assert close(program.module()(X), model(X))
    if torch.__version__ >= "2.13":
        assert export_onnx(folded, tmp_path / "small.onnx", example_inputs=X)["difference"] <= 1e-4


@pytest.mark.devices
def test_a_convolution_that_places_in_front_of_its_norm():
    class SumBehindActivations(NormedInput):
        """The norm serves two convolutions' sum in training, and one alone here."""

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm1(self.stem(x))
            return self.head(self.last(x.relu() + self.norm2(self.conv(x)).relu()).mean((2, 3)))

    model = settled(SumBehindActivations())
    keep = {"stem": torch.arange(8) < 5, "conv": torch.arange(8) % 3 > 0}
    cut(model, keep, example_inputs=X)
    folded, record = fold_norms(model, example_inputs=X)
    assert set(record["folded"]) == {"norm1", "norm2"}
    assert close(model(X), folded(X))


class Peeking(NormedInput):
    def forward(self, x: Tensor) -> Tensor:
        before = self.stem(x)
        x = self.norm1(before).relu() + before
        x = (x + self.norm2(self.conv(x))).relu()
        return self.head(self.last(x).relu().mean((2, 3)))


class WithActivation(nn.BatchNorm2d):
    """As timm's: a norm and what comes behind it in one."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


@pytest.mark.devices
def test_an_output_that_others_read_too_stays():
    model = settled(Peeking())
    folded, record = fold_norms(model, example_inputs=X)
    assert record["folded"] == {"norm2": "conv"}
    assert record["left"]["norm1"] == "forward passes did not confirm it"
    assert close(model(X), folded(X))


def test_what_computes_its_weights_stays_and_what_a_norm_does_besides_is_kept():
    model = settled(NormedInput())
    model.stem = Standardised(3, 8, 3, padding=1)
    model.norm2 = WithActivation(8)
    model.norm2.act.inplace = True
    model = settled(model)
    folded, record = fold_norms(model, example_inputs=X)
    assert record["folded"] == {"norm2": "conv"}
    assert isinstance(folded.norm2, nn.ReLU)
    assert close(model(X), folded(X))


@pytest.mark.devices
def test_one_norm_twice_one_convolution_twice_and_tied_weights():
    class SharedNormsAndWeights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.one, self.other, self.both = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.b.weight = self.a.weight
            self.of_a, self.of_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.conv(self.norm(self.conv(x)).relu())).relu()
            x = self.both(self.one(x)) + self.both(self.other(x))
            return self.of_a(self.a(x)) + self.of_b(self.b(x))

    model = settled(SharedNormsAndWeights())
    folded, record = fold_norms(model, example_inputs=X)
    assert record["folded"] == {"norm": "conv", "of_a": "a", "of_b": "b"}
    assert record["left"] == {"both": "it does not read the output of one convolution alone"}
    assert folded.a.weight is not folded.b.weight
    assert close(model(X), folded(X))


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(2, 6), nn.LayerNorm([6, 8, 8]), nn.InstanceNorm2d(6, affine=True)]
)
def test_norms_of_other_kinds_are_no_batch_norms(norm):
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    folded, record = fold_norms(settled(net), example_inputs=X)
    assert record["folded"] == {"4": "3"}
    assert record["left"] == {}
    torch.testing.assert_close(folded(X), net(X))


def test_a_convolution_that_makes_other_channels_than_its_filters_keeps_its_norm():
    class Shuffled(nn.Conv2d):
        def forward(self, x):
            return nn.functional.pixel_shuffle(super().forward(x), 2)

    net = settled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Shuffled(8, 16, 1), nn.BatchNorm2d(4)))
    folded, record = fold_norms(net, example_inputs=X)
    assert record["folded"] == {"1": "0"}
    assert record["left"] == {"3": "forward passes did not confirm it"}
    torch.testing.assert_close(folded(X), net(X))


def test_left_alone_and_why(make_net):
    model = settled(make_net())
    model.norm1 = nn.BatchNorm2d(6, track_running_stats=False)
    model.norm2.register_forward_hook(lambda _module, _inputs, output: output * 2)
    nn.utils.parametrizations.weight_norm(model.conv3)
    folded, record = fold_norms(model.eval(), example_inputs=X)
    assert record["folded"] == {}
    assert list(record["left"]) == ["norm1", "norm2", "norm3"]
    assert record["left"]["norm1"] == "it has no running statistics"
    assert "hooks" in record["left"]["norm2"]
    assert "parametrization" in record["left"]["norm3"]
    assert torch.equal(model(X), folded(X))


@pytest.mark.devices
def test_other_precisions_formats_and_inputs(make_net):
    model = settled(make_net()).to(memory_format=torch.channels_last).double()
    folded, _ = fold_norms(model, example_inputs=(X.double(),))
    assert folded.conv2.weight.dtype == folded.conv2.bias.dtype == torch.float64
    assert folded.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(folded(X.double()), model(X.double()))
    named, _ = fold_norms(nn.ModuleDict({"a": model})["a"], example_inputs={"input": X.double()})
    assert torch.allclose(named(X.double()), model(X.double()))


def test_inputs_that_do_not_fit(make_net):
    with pytest.raises(ValueError, match="cannot be copied and run on example_inputs"):
        fold_norms(make_net(), example_inputs=torch.randn(1, 5, 8, 8))


def test_what_is_folded_is_neither_cut_nor_saved(make_net, tmp_path):
    folded, _ = fold_norms(make_net(), example_inputs=X)
    for act in (
        lambda: prune(folded, fraction=0.5, example_inputs=X, compensate=False),
        lambda: cut(folded, {"conv1": torch.arange(6) < 3}, example_inputs=X),
        lambda: save(folded, tmp_path / "folded.safetensors"),
    ):
        with pytest.raises(ValueError, match="before fold_norms"):
            act()
    assert not list(tmp_path.iterdir())


@pytest.mark.devices
@pytest.mark.parametrize(("dim", "groups"), [(1, 1), (2, 1), (2, 2), (2, 4), (3, 1)])
def test_transposed_convolutions_take_the_norms_behind_them(dim, groups):
    up = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dim - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dim - 1]
    model = nn.Sequential(
        up(4, 8, 4, 2, 1, groups=groups, bias=False),
        norm(8),
        nn.ReLU(),
        up(8, 3, 2, 2),
        norm(3, affine=False),
    )
    if dim == 2:
        model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, *[3] * dim)
    folded, record = fold_norms(settled(model), example_inputs=x)
    assert record["folded"] == {"1": "0", "4": "3"}
    assert record["difference"] < 1e-5
    assert close(model(x), folded(x))
    assert folded[0].weight.stride() == model[0].weight.stride()


@pytest.mark.devices
def test_a_folded_transposed_convolution_by_hand():
    net = nn.Sequential(nn.ConvTranspose1d(2, 3, 1), nn.BatchNorm1d(3, eps=1e-12)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]).unsqueeze(2))
        net[0].bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
        net[1].weight.copy_(torch.tensor([2.0, 1.0, -1.0]))
        net[1].running_mean.copy_(torch.tensor([0.0, 5.0, 0.0]))
    folded, _ = fold_norms(net, example_inputs=torch.ones(1, 2, 1))
    assert folded[0].weight.flatten().tolist() == pytest.approx([2, 2, -3, 20, 20, -30])
    assert folded[0].bias.tolist() == pytest.approx([2, -5, 0])


@pytest.mark.needs_torch("2.13", "export_onnx")
@pytest.mark.parametrize("name", ["u-net", "generator", "sum", "depthwise"])
def test_a_cut_decoder_folds_and_is_exported(name, tmp_path):
    net, x = decoder(name)
    net, x = net.float(), x.float()
    prune(net, fraction=0.4, example_inputs=x, compensate=False)
    folded, record = fold_norms(net, example_inputs=x)
    assert record["left"] == {}
    assert record["difference"] < 1e-5
    assert export_onnx(folded, tmp_path / "small.onnx", example_inputs=x)["difference"] < 1e-5
