import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import plain_loop
from autocasts import FORMS, pair
from nets import DECODERS, Ahead, Residual, Standardised, chain, conv, decoder, head, unsettled
from regrow.criteria.score import score

pytestmark = pytest.mark.devices

# Two filters of one weight, 1 and −2, a ReLU, and the sum 1 · (filter 0) + 3 · (filter 1) over two positions.
PICTURES = torch.tensor([[[1.0, -3.0]], [[2.0, 4.0]]])
LABELS = torch.tensor([18.0, 8.0])


def toy():
    model = nn.Sequential(nn.Conv1d(1, 2, 1, bias=False), nn.ReLU(), nn.Conv1d(2, 1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.view(-1).copy_(torch.tensor([1.0, -2.0]))
        model[2].weight.view(-1).copy_(torch.tensor([1.0, 3.0]))
    return model


X, Y = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(2)


def half_square(outputs, labels):
    """½ (o − y)² of the sum o of a picture's outputs; the mean over a batch."""
    return (outputs.flatten(1).sum(1) - labels).square().mean() / 2


# The sums are 1·(1 + 0) + 3·(0 + 6) = 19 and 1·(2 + 4) + 3·0 = 6, so dL/do = 19 − 18 = 1 and 6 − 8 = −2.
BY_HAND = {
    # dL/dw = dL/do · v · Σ x where the ReLU lets it pass: 1·1·1, −2·1·(2 + 4); 1·3·(−3), 0.
    "gradient": [(1 + 12) / 2, (9 + 0) / 2],
    # Σ a · dL/da: (1 + 0)·1·1, (2 + 4)·1·(−2); 6·3·1, 0.
    "taylor": [(1 + 12) / 2, (18 + 0) / 2],
    # ½ w² · mean of the squares of the gradients.
    "hessian": [0.5 * 1 * (1 + 144) / 2, 0.5 * 4 * (81 + 0) / 2],
}


@pytest.mark.parametrize("criterion", BY_HAND)
def test_by_hand(criterion):
    found = score(toy(), criterion, batches=[(PICTURES, LABELS)], loss=half_square)
    assert list(found) == ["0"]
    assert found["0"].tolist() == BY_HAND[criterion]


@pytest.mark.parametrize("criterion", BY_HAND)
def test_how_pictures_are_divided_into_batches_plays_no_part(criterion):
    data = torch.utils.data.TensorDataset(PICTURES.cpu(), LABELS.cpu())
    for batches in (
        [(PICTURES[:1], LABELS[:1]), [PICTURES[1:], LABELS[1:]]],
        ((PICTURES[i : i + 1], LABELS[i : i + 1]) for i in range(2)),
        [({"input": PICTURES}, LABELS)],
        [((PICTURES,), LABELS, "more")],
        torch.utils.data.DataLoader(data, batch_size=2, shuffle=True),
    ):
        assert score(toy(), criterion, batches=batches, loss=half_square)["0"].tolist() == BY_HAND[criterion]


@pytest.mark.parametrize("criterion", BY_HAND)
def test_a_sum_over_the_batch_gives_the_same_as_a_mean(criterion):
    def summed(outputs, labels):
        return half_square(outputs, labels) * len(labels)

    found = score(toy(), criterion, batches=[(PICTURES, LABELS)], loss=summed)
    assert found["0"].tolist() == BY_HAND[criterion]


@pytest.mark.parametrize("criterion", BY_HAND)
def test_a_loss_without_labels(criterion):
    labelled, seen = score(toy(), criterion, batches=[(PICTURES, LABELS * 0)], loss=half_square), []

    def loss(outputs, labels):
        seen.append(labels)
        return outputs.sum().square() / 2

    assert torch.equal(score(toy(), criterion, batches=[PICTURES], loss=loss)["0"], labelled["0"])
    assert seen == [None, None]


def mse(outputs, labels):
    return (outputs.flatten(1).mean(1) - labels).square().mean()


@pytest.mark.parametrize("criterion", ["gradient", "hessian"])
@pytest.mark.parametrize("name", sorted(set(DECODERS) - {"autoencoder, one picture"}))
def test_all_kinds_of_layers_as_in_a_plain_loop(name, criterion):
    model, x = decoder(name)
    labels = torch.randn(len(x), dtype=torch.float64)
    found = score(model, criterion, batches=[(x, labels)], loss=mse)
    for layer, values in plain_loop.scores(model, criterion, x, labels, mse).items():
        torch.testing.assert_close(found[layer], values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("criterion", ["gradient", "hessian"])
@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 2}, {"dilation": 2}, {"padding": (0, 2)}, {"padding": "same", "dilation": (1, 2)},
        {"padding": "same", "kernel_size": (2, 4)}, {"padding": "valid"}, {"kernel_size": 1, "stride": 3},
        {"padding": 1, "padding_mode": "reflect"}, {"padding": (1, 2), "padding_mode": "circular"},
        {"padding": "same", "padding_mode": "replicate"},
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_all_settings_of_a_convolution_as_in_a_plain_loop(settings, criterion):
    layer = nn.Conv2d(2, 3, **{"kernel_size": 3, **settings})
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), layer).double()
    x, labels = torch.randn(4, 1, 9, 10).double(), torch.randn(4).double()
    found = score(model, criterion, batches=[(x, labels)], loss=mse)
    for name, values in plain_loop.scores(model, criterion, x, labels, mse).items():
        torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-12)


class Shared(nn.Module):
    """A layer that is called twice, and one that is not used in the loss."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(4, 4), conv(4, 4)

    def forward(self, x):
        x = self.b(torch.relu(self.a(x)))
        self.c(x)
        return self.b(x.tanh())


class Borrowed(nn.Module):
    """A layer whose weight the model uses beside the layer too."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 4), conv(4, 4)

    def forward(self, x):
        x = torch.relu(self.a(x)) + F.conv2d(x.square(), self.a.weight, padding=1)
        return self.b(x)


class Folded(nn.Module):
    """Several frames of a picture in the first dimension of a layer's input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(1, 4), conv(4, 3)

    def forward(self, x):
        frames = self.b(torch.relu(self.a(x.flatten(0, 1).unsqueeze(1))))
        return frames.unflatten(0, x.shape[:2]).mean(1)


class Standardising(nn.Sequential):
    def __init__(self):
        super().__init__(Standardised(3, 4, 3), nn.ReLU(), Standardised(4, 3, 3))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 4), conv(4, 3)

    def forward(self, x):
        x = torch.utils.checkpoint.checkpoint(lambda y: torch.relu(self.a(y)), x, use_reentrant=False)
        return self.b(x)


ODD = [Shared, Borrowed, Folded, Standardising, Checkpointed]


@pytest.mark.parametrize("criterion", ["gradient", "hessian"])
@pytest.mark.parametrize("kind", ODD)
def test_odd_models_as_in_a_plain_loop(kind, criterion):
    model = kind().double()
    x, labels = torch.randn(4, 3, 6, 6).double(), torch.randn(4).double()
    found = score(model, criterion, batches=[(x, labels)], loss=mse)
    for name, values in plain_loop.scores(model, criterion, x, labels, mse).items():
        torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ODD)
def test_taylor_of_odd_models_is_that_of_their_single_pictures(kind):
    model = kind().double()
    x, labels = torch.randn(4, 3, 6, 6).double(), torch.randn(4).double()
    together = score(model, "taylor", batches=[(x, labels)], loss=mse)
    alone = score(model, "taylor", batches=zip(x.split(1), labels.split(1), strict=True), loss=mse)
    for name, values in alone.items():
        torch.testing.assert_close(together[name], values, rtol=1e-9, atol=1e-12)
        assert bool(values.any()) is (name != "c")


@pytest.mark.parametrize("kind", [lambda: Residual(6, 5), Ahead])
def test_taylor_is_the_slope_where_a_filter_is_switched_off(kind):
    """The derivative of the loss by a factor on a filter's value, from two passes with other factors."""
    model = unsettled(kind()).double()
    x, labels = torch.randn(3, 3, 8, 8).double(), torch.tensor([0, 2, 1])
    found = score(model, "taylor", batches=[(x, labels)], exclude=[])
    for name, place in (
        (("stem", "norm"), ("b", "norm_b")) if isinstance(model, Residual) else (("conv1", "conv1"),)
    ):
        for filter in range(3):
            slopes = torch.zeros(3).double()
            for sign in (1, -1):
                factor = torch.ones(getattr(model, name).out_channels).double()
                factor[filter] += sign * 1e-5
                scaled = copy.deepcopy(model)
                for tensor in (scaled.get_submodule(place).weight, scaled.get_submodule(place).bias):
                    tensor.data *= factor.view(-1, *([1] * (tensor.dim() - 1)))
                slopes += sign * F.cross_entropy(scaled(x), labels, reduction="none").detach() / 2e-5
            assert found[name][filter].item() == pytest.approx(slopes.abs().mean().item(), rel=1e-5)


def test_the_cross_entropy_where_no_loss_is_given():
    model = nn.Sequential(conv(3, 4), nn.ReLU(), head(4))
    x, labels = torch.randn(5, 3, 6, 6), torch.tensor([0, 3, 1, 1, 2])
    for criterion in BY_HAND:
        found = score(model, criterion, batches=[(x, labels)])
        given = score(model, criterion, batches=[(x, labels)], loss=nn.CrossEntropyLoss())
        torch.testing.assert_close(found["0"], given["0"])
    pixels = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 3))
    masks = torch.randint(0, 3, (5, 6, 6))
    found = score(pixels, "hessian", batches=[(x, masks)])
    expected = plain_loop.scores(pixels, "hessian", x, masks, F.cross_entropy)
    torch.testing.assert_close(found["0"].float(), expected["0"].float(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_in_the_model_changes_nothing(form):
    plain, autocast, prefix = pair(form)
    x, labels = torch.randn(4, 3, 8, 8).cpu(), torch.randint(0, 3, (4,)).cpu()
    plain, autocast = plain.cpu(), autocast.cpu()
    for criterion in ("mean-activation", "apoz", *BY_HAND):
        found, expected = (score(model, criterion, batches=[(x, labels)]) for model in (autocast, plain))
        for name, values in expected.items():
            torch.testing.assert_close(found[f"{prefix}{name}"], values, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("criterion", ["mean-activation", "apoz", *BY_HAND])
def test_weights_of_bfloat16(criterion):
    model = unsettled(chain((4, 5)))
    x, labels = torch.randn(4, 3, 8, 8).bfloat16(), torch.randint(0, 3, (4,))
    small = copy.deepcopy(model).bfloat16()
    expected = score(small.float(), criterion, batches=[(x.float(), labels)])
    found = score(small.bfloat16(), criterion, batches=[(x, labels)])
    for name, values in expected.items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], values, rtol=0.1, atol=0.05 * values.abs().max().item())


def test_layers_left_out_take_part_in_the_pass():
    model = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4), nn.ReLU(), conv(4, 4), nn.ReLU(), head(4))
    model[0].weight.requires_grad_(False)
    x, labels = torch.randn(4, 3, 6, 6), torch.randint(0, 4, (4,))
    for criterion in BY_HAND:
        every = score(model, criterion, batches=[(x, labels)])
        assert list(every) == ["2", "4"]
        torch.testing.assert_close(
            score(model, criterion, batches=[(x, labels)], exclude="4")["2"], every["2"]
        )

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(model[4], "weight", Doubled())
    assert list(score(model, "hessian", batches=[(x, labels)])) == ["2"]


@pytest.mark.parametrize(
    ("batches", "loss", "message"),
    [
        ([X], None, r"takes the cross entropy, so a batch is a pair .* got a tensor"),
        ([(X, torch.zeros(3))], half_square, "needs labels with one entry for each of the 2 pict.* tensor"),
        ([(X, 7)], half_square, "needs labels with one entry .* got an int"),
        ([(X, Y)], lambda o, _: o, "returns a tensor of one number, the mean loss, and got a tensor"),
        ([(X, Y)], lambda *_: 3.0, "returns a tensor of one number, the mean loss, and got a float"),
        ([(X, Y)], lambda o, _: o.detach().sum(), "loss has no gradient"),
        ([(torch.randn(2, 3, 4), Y)], half_square, "forward pass fails on a batch: .* channels"),
        ([(X[:0], Y[:0])], half_square, "no picture in it"),
        ([(["name"], Y)], half_square, "the inputs are a tensor.* got a list"),
        ([(X, Y)], lambda o, y: o.sum() / 0 * y, "give NaN or infinite values"),
        (X, half_square, r"write batches=\[x\]"),
        (iter(()), half_square, "batches yields no batch"),
    ],
)
def test_bad_batches_and_losses(batches, loss, message):
    with pytest.raises(ValueError, match=message):
        score(toy(), "taylor", batches=batches, loss=loss)


def test_outputs_of_another_kind_than_logits():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = toy()

        def forward(self, x):
            return {"out": self.layer(x), "name": "toy"}

    with pytest.raises(ValueError, match=r"cross entropy of logits .* got a dict and a tensor"):
        score(Named(), "hessian", batches=[(PICTURES, LABELS)])
    found = score(
        Named(), "hessian", batches=[(PICTURES, LABELS)], loss=lambda out, y: half_square(out["out"], y)
    )
    assert found["layer.0"].tolist() == BY_HAND["hessian"]


def test_detection_labels_one_of_a_list_for_each_picture():
    labels = [{"boxes": torch.ones(n, 4), "y": y} for n, y in zip((2, 3), LABELS, strict=True)]

    def loss(outputs, label):
        (one,) = label
        return half_square(outputs, one["y"].reshape(1))

    assert (
        score(toy(), "hessian", batches=[(PICTURES, labels)], loss=loss)["0"].tolist() == BY_HAND["hessian"]
    )


@settings(max_examples=15)
@given(st.integers(0, 9999), st.integers(1, 5), st.sampled_from(["mean-activation", "apoz", *BY_HAND]))
def test_scores_go_with_their_filters_and_not_with_the_batches(seed, size, criterion):
    generator = torch.Generator().manual_seed(seed)
    model = chain((4, 3), dim=1).double().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter)
    order = torch.randperm(4, generator=generator).to(model.conv1.weight.device)
    mixed = copy.deepcopy(model)
    for layer in (mixed.conv1, mixed.norm1):
        layer.weight.data, layer.bias.data = layer.weight[order], layer.bias[order]
    mixed.conv2.weight.data = model.conv2.weight[:, order]
    x = torch.randn(5, 3, 6, generator=generator).double()
    labels = torch.randint(0, 4, (5,), generator=generator)
    found = score(model, criterion, batches=[(x, labels)])
    again = score(mixed, criterion, batches=zip(x.split(size), labels.split(size), strict=True))
    torch.testing.assert_close(again["conv1"], found["conv1"][order], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(again["conv2"], found["conv2"], rtol=1e-9, atol=1e-12)
