"""``prune`` in one call, and a model that is as it was after every error."""

import copy
import json

import pytest
import torch
from torch import nn

from nets import DECODERS, Residual, decoder
from regrow.criteria.score import score
from regrow.filters import convolutions
from regrow.noise.layers import add_bridgeout
from regrow.pruning.prune import prune
from regrow.shipping.checkpoint import load, save
from regrow.surgery.cut import cut

X = torch.randn(2, 3, 8, 8)
IMAGES = [torch.randn(64, 3, 8, 8)]


def residual():
    return Residual(8, 8, normed=False)


@pytest.mark.devices
def test_a_fraction_by_hand_and_a_report_that_is_true(make_net, tmp_path):
    model = make_net().train()
    fresh = copy.deepcopy(model)
    validation = [(torch.randn(30, 3, 8, 8), torch.randint(4, (30,)))]
    shares = []
    report = prune(
        model,
        fraction=0.5,
        example_inputs=X,
        calibration=IMAGES,
        validation=validation,
        criterion="l2",
        progress=lambda share, _what: shares.append(share),
    )
    assert report == json.loads(json.dumps(report))
    assert report["version"] == 1
    assert report["target"] == {"kind": "fraction", "value": 0.5, "reached": 0.5}
    assert report["filters"] == {"before": 22, "after": 11}
    assert report["layers"] == {
        "conv1": {"before": 6, "after": 3},
        "conv2": {"before": 8, "after": 4},
        "conv3": {"before": 8, "after": 4},
    }
    # weights, biases and norms: (3·9 + 3)·3 and so on; the head reads 4 and gives 4.
    after = (27 + 3) * 3 + (27 + 3) * 4 + (36 + 3) * 4 + 4 * 4 + 4
    assert report["parameters"]["after"] == sum(p.numel() for p in model.parameters()) == after
    assert report["macs"]["after"] == 2 * (64 * (27 * 3 + 27 * 4 + 36 * 4) + 16)
    assert report["memory"]["weights"]["after"] < report["memory"]["weights"]["before"]
    assert report["accuracy"]["images"] == 30
    assert report["compensation"]["images"] == 64
    assert report["left_out"] == report["masked"] == {}
    assert [len(report["dropped"][name]) for name in ("conv1", "conv2", "conv3")] == [3, 4, 4]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert model.conv2.out_channels == 4
    assert model.training
    save(model, tmp_path / "small.safetensors")
    assert torch.equal(load(fresh, tmp_path / "small.safetensors").eval()(X), model.eval()(X))


def test_lowest_l2_goes_in_each_layer(make_net):
    model = make_net(bias=False)
    norms = model.conv2.weight.detach().flatten(1).norm(dim=1)
    report = prune(model, fraction=0.25, example_inputs=X, compensate=False, exclude="conv1")
    assert report["dropped"]["conv2"] == sorted(norms.argsort()[:2].tolist())
    assert report["left_out"] == {"conv1": "excluded"}
    assert report["layers"]["conv1"] == {"before": 6, "after": 6}
    assert report["accuracy"] is report["compensation"] is None
    assert report["settings"]["exclude"] == ["conv1"]


@pytest.mark.devices
@pytest.mark.parametrize("criterion", ["mean-activation", "apoz", "gradient", "taylor", "hessian"])
def test_a_criterion_that_reads_the_calibration_pictures(make_net, criterion):
    model = make_net()
    labelled = [(torch.randn(40, 3, 8, 8), torch.randint(4, (40,))) for _ in range(2)]
    scores = score(model, criterion, batches=labelled)
    settings = {"fraction": 0.25, "criterion": criterion, "calibration": iter(labelled), "example_inputs": X}
    report = prune(model, compensate=False, round_to=1, **settings)
    assert report == json.loads(json.dumps(report))
    assert report["settings"]["criterion"] == criterion
    for name, values in scores.items():
        lowest = values.argsort(stable=True)[: round(len(values) / 4 + 1e-9)]
        assert report["dropped"][name] == sorted(lowest.tolist())


def test_a_criterion_takes_the_first_512_pictures_and_the_loss_given(make_net):
    model, read = make_net(), []
    labelled = [(torch.randn(300, 3, 8, 8), torch.randn(300)) for _ in range(3)]

    def loss(outputs, labels):
        read.append(len(labels))
        return (outputs[:, 0] - labels).square().mean()

    scores = score(model, "hessian", batches=labelled[:2], loss=loss)
    read.clear()
    report = prune(
        model, fraction=0.5, criterion="hessian", loss=loss, calibration=labelled, example_inputs=X
    )
    assert len(read) == 600
    assert report["compensation"]["images"] == 600
    for name, values in scores.items():
        assert report["dropped"][name] == sorted(values.argsort()[: len(values) // 2].tolist())


def test_a_function_as_the_criterion(make_net):
    def last_first(model):
        return {name: -torch.arange(conv.out_channels) for name, conv in convolutions(model).items()}

    report = prune(make_net(), fraction=0.5, criterion=last_first, example_inputs=X, compensate=False)
    assert report["dropped"] == {"conv1": [3, 4, 5], "conv2": [4, 5, 6, 7], "conv3": [4, 5, 6, 7]}
    assert report["settings"]["criterion"].endswith("last_first")
    json.dumps(report)


@pytest.mark.devices
@pytest.mark.parametrize("target", [{"macs": 0.5}, {"params": 0.4}, {"max_drop": 30.0, "criterion": "l2"}])
def test_a_budget_is_met(make_net, target):
    model = make_net((12, 12, 12)).eval()
    inputs = torch.randn(100, 3, 8, 8)
    report = prune(
        model,
        example_inputs=X,
        calibration=IMAGES,
        validation=iter([(inputs, model(inputs).argmax(1))]),
        **target,
    )
    kind, value = next(iter(target.items()))
    assert report["target"]["reached"] <= value
    measured = {
        "macs": report["macs"]["after"] / report["macs"]["before"],
        "params": sum(p.numel() for p in model.parameters()) / report["parameters"]["before"],
        "max_drop": 100 * (1 - report["accuracy"]["after"]),
    }
    assert report["target"]["reached"] == pytest.approx(measured[kind])
    assert report["filters"]["after"] < 36


@pytest.mark.devices
def test_coupled_filters_go_jointly_or_not():
    individual, joint = residual(), residual()
    joint.load_state_dict(individual.state_dict())
    settings = {"fraction": 0.5, "example_inputs": X, "compensate": False}
    alone = prune(individual, coupled="individually", **settings)["layers"]
    assert alone == {name: {"before": 8, "after": 4} for name in ("stem", "a", "b")}
    assert individual.head[2].in_features > 4  # what either of the two keeps
    report = prune(joint, **settings)
    assert report["settings"]["coupled"] == "jointly"
    assert report["dropped"]["stem"] == report["dropped"]["b"]
    assert joint.head[2].in_features == 4
    assert joint.stem.out_channels == joint.a.in_channels == joint.b.out_channels == 4


@pytest.mark.parametrize("faster", ["individually", "jointly"])
def test_for_latency_the_faster_way_is_taken(faster, monkeypatch):
    # In place of a clock. Cut jointly, the head reads no more than the stem gives.
    def clock(models, _inputs):
        small = models[1]
        jointly = small.head[2].in_features == small.stem.out_channels
        slower = 0.4 if jointly != (faster == "jointly") else 0.0
        return [{"median": 1.0}, {"median": 0.05 * small.stem.out_channels + slower}]

    monkeypatch.setattr("regrow.pruning.budget.measure_latency", clock)
    report = prune(residual(), latency=0.6, example_inputs=X, compensate=False)
    assert report["settings"]["coupled"] == faster
    assert report["target"]["reached"] <= 0.6


def test_widths_are_rounded(make_net):
    model = make_net((16, 20, 24))
    prune(model, fraction=0.5, example_inputs=X, compensate=False, round_to=8, scope="isomorphic")
    assert {model.get_submodule(f"conv{i}").out_channels % 8 for i in (1, 2, 3)} <= {0, 20 % 8}


def test_by_default_wide_layers_get_widths_that_8_divides(make_net):
    wide, exact = make_net((64, 100, 30)), make_net((64, 100, 30))
    report = prune(wide, fraction=0.3, example_inputs=X, compensate=False)
    assert {name: pair["after"] for name, pair in report["layers"].items()} == {
        "conv1": 48, "conv2": 72, "conv3": 21,
    }  # fmt: skip
    assert report["settings"]["round_to"] is None
    report = prune(exact, fraction=0.3, example_inputs=X, compensate=False, round_to=1)
    assert {name: pair["after"] for name, pair in report["layers"].items()} == {
        "conv1": 45, "conv2": 70, "conv3": 21,
    }  # fmt: skip


@pytest.mark.parametrize("target", [{"macs": 0.5}, {"params": 0.3}])
def test_a_budget_is_met_with_widths_that_8_divides(make_net, target):
    model = make_net((64, 72, 80))
    report = prune(model, example_inputs=X, compensate=False, **target)
    [(kind, value)] = target.items()
    counts = report["macs" if kind == "macs" else "parameters"]
    assert report["target"]["reached"] == counts["after"] / counts["before"] <= value
    assert all(pair["after"] % 8 == 0 for pair in report["layers"].values())


def test_each_layer_its_share(make_net):
    model = make_net((6, 8, 8))
    report = prune(model, fraction={"conv2": 0.5, "conv3": 0}, example_inputs=X, calibration=IMAGES)
    assert report == json.loads(json.dumps(report))
    assert report["target"] == {"kind": "fraction", "value": {"conv2": 0.5, "conv3": 0.0}, "reached": 0.25}
    assert report["layers"] == {
        "conv1": {"before": 6, "after": 6},
        "conv2": {"before": 8, "after": 4},
        "conv3": {"before": 8, "after": 8},
    }
    assert report["left_out"] == {"conv1": "the fraction gives no share for it"}
    assert report["filters"] == {"before": 16, "after": 12}


def test_a_container_and_its_exception(make_net):
    model = nn.Sequential()
    model.add_module("body", make_net((8, 8, 8)))
    shares = {"body.conv2": 0.25, "body": 0.5}
    report = prune(model, fraction=shares, example_inputs=X, compensate=False, exclude="body.conv3")
    assert {name: pair["after"] for name, pair in report["layers"].items()} == {
        "body.conv1": 4, "body.conv2": 6, "body.conv3": 8,
    }  # fmt: skip
    assert report["left_out"] == {"body.conv3": "excluded"}


def test_a_coupled_layer_without_a_share_stays_whole():
    model = residual()
    report = prune(model, fraction={"b": 0.5}, example_inputs=X, compensate=False)
    assert {name: pair["after"] for name, pair in report["layers"].items()} == {"stem": 8, "a": 8, "b": 4}


def test_coupled_layers_of_different_shares_say_which_keeps_more():
    with pytest.warns(UserWarning, match=r"fraction= asks for in 'stem': 0 of 8 .*coupled='jointly'"):
        prune(residual(), fraction={"stem": 0.5, "b": 0.0}, example_inputs=X, compensate=False)


def test_it_says_so_if_less_goes_than_was_asked_for(make_net):
    with pytest.warns(
        UserWarning, match=r"fraction=0\.8 asks for: 11 of 22 \(50\.0%\), because of floor=0\.45"
    ):
        prune(make_net(), fraction=0.8, example_inputs=X, compensate=False, floor=0.45)


def test_calibration_stops_at_512_images(make_net):
    given = []

    def endless():
        while True:
            given.append(100)
            yield torch.randn(100, 3, 8, 8), None

    report = prune(make_net(), fraction=0.5, example_inputs=X, calibration=endless())
    assert report["compensation"]["images"] == sum(given) == 600


def bridged(model):
    add_bridgeout(model, 0.3, 1.5, seed=0)
    return model


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (None, {"macs": 0.5}, "exactly one"),
        (None, {"fraction": None}, "exactly one"),
        (None, {"fraction": {"conv1": 0.5}, "macs": 0.5}, "exactly one"),
        (None, {"fraction": None, "macs": {"conv1": 0.5}}, "macs is one number.*fraction="),
        (None, {"fraction": None, "latency": {"conv1": 0.5}}, "latency is one number.*fraction="),
        (None, {"fraction": None, "max_drop": {"conv1": 0.5}}, "max_drop is one number.*fraction="),
        (None, {"fraction": {}}, "names no layer"),
        (None, {"fraction": {"conv9": 0.5}}, "no convolution is named 'conv9'; did you mean"),
        (None, {"fraction": {"conv1": 1.0}}, r"fraction\['conv1'\]"),
        (None, {"fraction": {"conv1": 0.5}, "scope": "global"}, "needs scope='layer'"),
        (None, {"fraction": {"conv1": 0.5}, "exclude": "conv1"}, "names 'conv1', where.*excluded"),
        (None, {"criterion": "l3"}, "did you mean 'l2'"),
        (
            None,
            {"criterion": "apoz", "calibration": None, "compensate": False},
            "pass calibration=, inputs of",
        ),
        (None, {"criterion": "taylor"}, "takes the cross entropy, so a batch is a pair"),
        (None, {"scope": "locally"}, "unknown scope"),
        (None, {"exclude": ["conv9"]}, "no convolution is named 'conv9'"),
        (None, {"calibration": None}, "compensate=False"),
        (None, {"calibration": []}, "yields no batch"),
        (None, {"calibration": [torch.randn(4, 5, 8, 8)]}, "fails on a batch"),
        (None, {"calibration": [torch.randn(4, 5, 8, 8)], "criterion": "l2"}, "fails on a calibration batch"),
        (None, {"fraction": None, "max_drop": 1}, "max_drop needs validation="),
        (None, {"fraction": None, "macs": 0.01, "floor": 0.5}, "cannot be met: the best cut leaves"),
        (None, {"validation": [torch.zeros(3)]}, "pair of inputs and labels"),
        (None, {"example_inputs": torch.randn(1, 2)}, "fails on example_inputs"),
        (None, {"criterion": "random"}, "needs a seed"),
        (nn.DataParallel, {}, "wrapped in DataParallel.*model.module"),
        (bridged, {}, "remove_bridgeout"),
        (lambda model: model.head, {}, "no convolution"),
    ],
)
def test_after_an_error_the_model_is_as_it_was(make_net, change, settings, message):
    plain = make_net()
    model = change(plain) if change else plain
    before = copy.deepcopy(plain.state_dict())
    owned = {name: id(parameter) for name, parameter in plain.named_parameters()}
    given = {"fraction": 0.5, "example_inputs": X, "calibration": IMAGES, **settings}
    if message == "no convolution":
        given["example_inputs"] = torch.randn(2, 8)
    with pytest.raises(ValueError, match=message):
        prune(model, **given)
    assert {name: id(parameter) for name, parameter in plain.named_parameters()} == owned
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert all(module.training for module in plain.modules())
    assert not any(module._forward_hooks for module in plain.modules()) or change is bridged


def test_a_ddp_model_is_refused(make_net, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(make_net())
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            prune(wrapped, fraction=0.5, example_inputs=X, calibration=IMAGES)
        assert wrapped.module.conv1.out_channels == 6
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.devices
@pytest.mark.parametrize("coupled", ["individually", "jointly"])
def test_a_net_that_was_cut_is_pruned_again(coupled, tmp_path):
    model = residual().eval()
    fresh = copy.deepcopy(model)
    settings = {"example_inputs": X, "compensate": False}
    prune(model, fraction=0.25, coupled=coupled, **settings)
    assert [model.stem.out_channels, model.a.out_channels, model.b.out_channels] == [6, 6, 6]
    given = copy.deepcopy(model)
    report = prune(model, fraction=0.5, coupled=coupled, **settings)
    assert report["layers"] == {name: {"before": 6, "after": 3} for name in ("stem", "a", "b")}
    assert report["filters"] == {"before": 18, "after": 9}
    assert report["parameters"]["before"] == sum(p.numel() for p in given.parameters())
    assert report["parameters"]["after"] == sum(p.numel() for p in model.parameters())
    assert report["macs"]["before"] > report["macs"]["after"]
    # What is dropped counts the filters that the cut net has.
    keep = {name: torch.ones(6, dtype=torch.bool) for name in report["dropped"]}
    for name, indices in report["dropped"].items():
        assert len(indices) == 3
        keep[name][indices] = False
    cut(given, keep, example_inputs=X)
    assert torch.allclose(given(X), model(X), rtol=1e-5, atol=1e-6)
    save(model, tmp_path / "twice.safetensors")
    assert torch.equal(load(fresh, tmp_path / "twice.safetensors").eval()(X), model(X))


@pytest.mark.devices
def test_pruned_again_within_a_budget_and_compensated(make_net):
    model = make_net((12, 12, 12)).eval()
    inputs = torch.randn(50, 3, 8, 8)
    settings = {"example_inputs": X, "calibration": IMAGES, "validation": [(inputs, torch.zeros(50).long())]}
    first = prune(model, macs=0.6, **settings)
    second = prune(model, macs=0.6, **settings)
    assert second["macs"]["before"] == first["macs"]["after"]
    assert second["macs"]["after"] <= 0.6 * first["macs"]["after"]
    assert second["accuracy"]["before"] == first["accuracy"]["after"]
    nothing = prune(model, fraction=0, **settings)
    assert nothing["dropped"] == {}
    assert nothing["compensation"] == {"method": "least-squares", "layers": {}, "unfolded": {}, "images": 0}
    assert nothing["parameters"]["after"] == second["parameters"]["after"]


def test_a_decoder_gets_as_small_as_an_encoder():
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 16, 4, 2, 1),
        nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1),
    )  # fmt: skip
    report = prune(net, fraction=0.5, example_inputs=X, calibration=IMAGES, criterion="l2")
    assert report["layers"] == {
        "0": {"before": 16, "after": 8}, "3": {"before": 16, "after": 8}, "6": {"before": 3, "after": 3},
    }  # fmt: skip
    # Positions, channels, filters and taps of each layer, for two pictures.
    assert report["macs"]["before"] == 2 * (64 * 3 * 16 * 9 + 64 * 16 * 16 * 16 + 256 * 16 * 3 * 16)
    assert report["macs"]["after"] == 2 * (64 * 3 * 8 * 9 + 64 * 8 * 8 * 16 + 256 * 8 * 3 * 16)
    assert report["left_out"] == {"6": "its filters are the network's output, like a classifier's"}
    assert report["masked"] == {}
    assert list(report["compensation"]["layers"]) == ["3", "6"]


@pytest.mark.parametrize("name", DECODERS)
def test_every_layer_of_a_decoder_is_cut_or_named(name):
    net, x = decoder(name)
    report = prune(net, fraction=0.4, example_inputs=x, compensate=False)
    for layer, size in report["layers"].items():
        named = layer in report["left_out"] or layer in report["masked"]
        assert size["after"] == size["before"] - len(report["dropped"].get(layer, ()))
        assert size["after"] < size["before"] or named
    grouped = {layer for layer, module in convolutions(net).items() if module.groups > 1}
    assert all(report["left_out"][layer] for layer in grouped)
    assert report["macs"]["after"] < (0.95 if name == "grouped" else 0.75) * report["macs"]["before"]
    widths = {layer: size["after"] for layer, size in report["layers"].items()}
    again = prune(net, fraction=0.3, example_inputs=x, compensate=False, round_to=1)
    assert {layer: size["before"] for layer, size in again["layers"].items()} == widths


@pytest.mark.parametrize("target", [{"macs": 0.5}, {"params": 0.5}])
@pytest.mark.parametrize("name", ["u-net", "generator", "audio", "depthwise"])
def test_a_decoder_meets_a_budget(name, target):
    net, x = decoder(name)
    report = prune(net, example_inputs=x, compensate=False, **target)
    assert 0.2 < report["target"]["reached"] <= 0.5


def test_class_scores_that_fixed_weights_scale_up_are_kept():
    net, x = decoder("class scores")
    report = prune(net, fraction=0.5, example_inputs=x, compensate=False)
    assert {"score_a", "score_b", "up_b", "up"} == set(report["left_out"])
    assert net.score_a.out_channels == net.score_b.out_channels == net.up_b.out_channels == 4
    assert (net.a.out_channels, net.b.out_channels) == (3, 3)


def test_the_report_of_networks_as_deployed(make_net, monkeypatch):
    seen = []

    def clock(models, _inputs):
        seen.extend(type(each).__name__ for each in models)
        return [{"median": 1.0}, {"median": 0.5}]

    monkeypatch.setattr("regrow.pruning.prune.measure_latency", clock)
    settings = {"fraction": 0.5, "example_inputs": X, "compensate": False}
    report = prune(make_net(), deployed={"dtype": torch.bfloat16}, **settings)
    assert report == json.loads(json.dumps(report))
    assert report["settings"]["deployed"] == {"dtype": "bfloat16", "channels_last": True, "mode": "auto"}
    assert report["latency"] == {"before": {"median": 1.0}, "after": {"median": 0.5}}
    assert seen == ["Deployed"] * 2
    assert prune(make_net(), **settings)["settings"]["deployed"] is None
    model = make_net()
    for deployed, message in (
        ({"mode": "graph"}, "the model is on cpu"),
        (3, "deployed is True, or options"),
    ):
        with pytest.raises(ValueError, match=message):
            prune(model, deployed=deployed, **settings)
    assert model.conv1.out_channels == 6


@pytest.mark.devices
def test_by_default_what_readers_can_make_up_for_goes_for_what_it_saves(make_net):
    model = make_net((8, 8, 8))
    with torch.no_grad():  # the first filters of conv2 come in pairs
        for tensor in (model.conv2.weight, model.conv2.bias):
            tensor[4:] = tensor[:4]
    scores = score(model, "reconstruction", batches=IMAGES)
    assert scores["conv2"].sort().values[3] < 0.1 * scores["conv2"].sort().values[4]
    twin = copy.deepcopy(model)
    report = prune(model, fraction=1 / 6, example_inputs=X, calibration=IMAGES, round_to=1)
    assert report == json.loads(json.dumps(report))
    assert (report["settings"]["criterion"], report["settings"]["scope"]) == ("reconstruction", "balanced")
    saves = {"conv1": 64 * (27 + 72), "conv2": 64 * (72 + 72), "conv3": 64 * 72 + 4}
    each = [
        (value / saves[name], name, i) for name in scores for i, value in enumerate(scores[name].tolist())
    ]
    lowest = sorted(each)[:4]
    assert {(name, i) for name, those in report["dropped"].items() for i in those} == {
        (name, i) for _, name, i in lowest
    }
    assert len(report["dropped"]["conv2"]) >= 3
    without = prune(twin, fraction=0.25, example_inputs=X, calibration=IMAGES, compensate=False)
    assert (without["settings"]["criterion"], without["settings"]["scope"]) == ("l2", "layer")


@pytest.mark.parametrize("target", [{"macs": 0.6}, {"params": 0.6}, {"fraction": 0.4}, {"latency": 0.999}])
@pytest.mark.parametrize("coupled", ["jointly", "individually"])
def test_a_residual_net_and_every_target_in_the_scope_balanced(target, coupled, monkeypatch):
    monkeypatch.setattr(
        "regrow.pruning.budget.measure_latency",
        lambda models, _x: [
            {"median": float(sum(p.numel() for p in model.parameters()))} for model in models
        ],
    )
    settings = {"example_inputs": X, "calibration": IMAGES, "coupled": coupled, **target}
    report = prune(Residual(8, 8), **settings)
    assert report["settings"]["scope"] == "balanced"
    [(kind, value)] = target.items()
    reached = report["target"]["reached"]
    assert reached <= value if kind != "fraction" else reached == pytest.approx(value, abs=0.1)
    assert all(pair["after"] >= 1 for pair in report["layers"].values())
    other = prune(Residual(8, 8), criterion="l2", scope="balanced", **settings)
    assert (other["settings"]["criterion"], other["settings"]["scope"]) == ("l2", "balanced")


def test_a_second_cut_in_the_scope_balanced():
    model = Residual(8, 8)
    for coupled in ("individually", "jointly"):
        report = prune(model, fraction=0.3, example_inputs=X, calibration=IMAGES, coupled=coupled, round_to=1)
        assert report["fraction"] > 0.2
        assert report["settings"]["scope"] == "balanced"
    assert model(X).shape == (2, 4)


def test_the_scope_balanced_refuses_scores_below_0(make_net):
    with pytest.raises(ValueError, match="the scores of 'ortho' are below 0"):
        prune(
            make_net(),
            fraction=0.3,
            example_inputs=X,
            calibration=IMAGES,
            criterion="ortho",
            scope="balanced",
        )


class Two(nn.Module):
    """Two pictures, each with a convolution of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Linear(16, 2)

    def forward(self, x, y):
        return self.head(torch.cat([self.a(x).relu().mean((2, 3)), self.b(y).relu().mean((2, 3))], 1))


@pytest.mark.parametrize("labelled", [False, True])
def test_a_model_of_two_inputs(labelled):
    torch.manual_seed(0)
    x, y, labels = torch.randn(40, 3, 4, 4), torch.randn(40, 3, 4, 4), torch.arange(40) % 2
    model = Two().eval()
    batches = [((x, y), labels)] if labelled else [(x, y)]
    report = prune(model, fraction=0.5, example_inputs=(x[:1], y[:1]), calibration=batches)
    assert report["settings"]["criterion"] == "reconstruction"
    assert list(report["compensation"]["layers"]) == ["head"]
    assert report["filters"]["after"] < report["filters"]["before"]
