import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from regrow.looking.calls import call
from regrow.looking.hooks import carrying, hooked, idle, instead
from regrow.modules import channel_layers

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    return nn.Sequential(*layers).eval()


def test_what_stands_in_front_sees_the_layers_and_takes_their_place():
    model, seen = net(), []

    def before(name, _module, inputs):
        seen.append(f"to {name}")
        return (inputs[0] + 1,) if name == "0" else None

    def after(name, module, inputs, output):
        seen.append(name)
        torch.testing.assert_close(output, type(module).forward(module, inputs[0]))
        return output.zero_() if name == "4" else None

    with hooked(channel_layers(model), after, before):
        assert not model(X).any()
    assert seen == ["to 0", "0", "to 1", "1", "to 4", "4"]
    assert model(X).all()
    assert not any("forward" in vars(module) for module in model.modules())


class ByName(nn.Module):
    """Calls its layers by keyword: PyTorch's own, and one whose argument has another name."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.odd = nn.Conv2d(3, 4, 3), nn.GroupNorm(4, 4), Odd(4, 2, 1)

    def forward(self, x):
        return self.odd(scale=2, picture=self.norm(input=self.conv(input=x)))


class Odd(nn.Conv2d):
    def forward(self, picture, scale):
        return scale * super().forward(picture)


def test_an_input_given_by_keyword_is_seen_and_replaced():
    model, seen = ByName(), []
    expected = model(X + 1)

    def before(name, _module, inputs):
        seen.append((name, len(inputs)))
        return (inputs[0] + 1,) if name == "conv" else None

    def after(name, _module, inputs, output):
        assert inputs[0].shape[0] == output.shape[0] == len(X)
        return 3 * output if name == "odd" else None

    with hooked(list(model.named_children()), after, before):
        torch.testing.assert_close(model(X), 3 * expected)
        with pytest.raises(TypeError):
            model.odd(scale=2)
    assert seen == [("conv", 1), ("norm", 1), ("odd", 1), ("odd", 0)]
    with idle(list(model.named_children())):
        assert model.norm(input=model.conv(input=X)).count_nonzero() == 0


def test_it_stands_closer_to_the_layer_than_the_users_hooks():
    model, seen = net(), []
    model[0].register_forward_hook(lambda _module, _inputs, output: output * 2)
    model[0].register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 3,))
    with hooked(channel_layers(model)[:1], lambda *call: seen.append(call)):
        made = model[0](X)
    ((_, _, inputs, output),) = seen
    torch.testing.assert_close(inputs[0], 3 * X)
    torch.testing.assert_close(made, 2 * output)


def test_an_error_of_a_callback_is_no_error_of_the_model():
    class Catching(nn.Sequential):
        def forward(self, x):
            try:
                return super().forward(x)
            except Exception:
                return x

    def fail(*_):
        raise KeyError("own bug")

    for place in ({"after": fail}, {"before": fail}):
        model = Catching(*net())
        with pytest.raises(KeyError, match="own bug"), hooked(channel_layers(model), **place):
            call(model, X)
        assert not any("forward" in vars(module) for module in model.modules())
        with pytest.raises(KeyError, match="own bug"), instead([(model[0], carrying(fail))]):
            call(model, X)


def test_a_forward_of_the_models_own_comes_back_after_an_error():
    def fail(*_):
        raise ZeroDivisionError

    model = net()
    model[0].forward = own = lambda x: x[:, :1].repeat(1, 4, 1, 1)
    with pytest.raises(ZeroDivisionError), hooked(channel_layers(model), fail):
        model(X)
    assert model[0].forward is own
    assert "forward" not in vars(model[1])


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(data=st.data())
def test_idle_layers_make_zeros_of_the_shape_they_would_make(data):
    dims = data.draw(st.integers(1, 3))
    groups = data.draw(st.integers(1, 2))
    each = st.tuples(*[st.integers(1, 3)] * dims)
    settings = {"kernel_size": data.draw(each), "dilation": data.draw(each)}
    settings["padding"] = data.draw(
        st.sampled_from(["same", "valid"]) | st.tuples(*[st.integers(0, 2)] * dims)
    )
    if settings["padding"] != "same":
        settings["stride"] = data.draw(each)
    conv = getattr(nn, f"Conv{dims}d")(2 * groups, 4 * groups, groups=groups, **settings)
    batch = data.draw(st.sampled_from([(), (1,), (3,)]))
    x = torch.randn(*batch, 2 * groups, *data.draw(st.tuples(*[st.integers(7, 9)] * dims)))
    with idle([("", conv)]):
        made = conv(x)
    assert made.shape == conv(x).shape
    assert not made.any()


def test_large_idle_tensors_share_memory_and_small_ones_do_not():
    conv, x = nn.Conv2d(3, 16, 3, padding=1), torch.zeros(1, 3, 40, 40)
    with idle([("", conv)]):
        one, other = conv(x), conv(x)
        assert one.data_ptr() == other.data_ptr()
        one, other = conv(x[..., :8]), conv(x[..., :8])
        assert one.data_ptr() != other.data_ptr()
    with idle([("", conv)]):
        assert not conv(torch.zeros(2, 3, 40, 40)).any()
        assert conv(x.double()).dtype == torch.float64


def test_idle_linear_layers_norms_and_activations():
    linear, x = nn.Linear(4, 2), torch.randn(3, 5, 4)
    passive = nn.LayerNorm(4), nn.ReLU(), nn.BatchNorm1d(5), nn.ReLU6()
    with idle([("", layer) for layer in (linear, *passive)]):
        assert linear(x).shape == (3, 5, 2)
        assert not linear(x).any()
        assert all(layer(x) is x for layer in passive)
    assert linear(x).any()


def test_idle_layers_refuse_what_they_would_refuse():
    conv, linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
    for layer, wrong in (
        (conv, torch.zeros(1, 2, 5, 5)),
        (conv, torch.zeros(3, 5)),
        (conv, torch.zeros(1, 3, 2, 2)),
        (linear, torch.zeros(1, 5)),
    ):
        with pytest.raises(RuntimeError) as plain:
            layer(wrong)
        with idle([("", layer)]), pytest.raises(RuntimeError) as idled:
            layer(wrong)
        assert str(idled.value) == str(plain.value)


def test_layers_of_ones_own_are_not_idle():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    conv = Doubled(3, 4, 3)
    with idle([("", conv)]):
        assert conv(X).any()


@given(st.data())
def test_idle_transposed_convolutions_make_zeros_of_the_shape_they_would_make(data):
    dims = data.draw(st.integers(1, 3))
    each = st.tuples(*[st.integers(1, 3)] * dims)
    settings = {"kernel_size": data.draw(each), "dilation": data.draw(each), "stride": data.draw(each)}
    more = [
        data.draw(st.integers(0, max(pair) - 1))
        for pair in zip(settings["stride"], settings["dilation"], strict=True)
    ]
    settings["padding"], settings["output_padding"] = data.draw(st.tuples(*[st.integers(0, 1)] * dims)), more
    layer = getattr(nn, f"ConvTranspose{dims}d")(4, 6, groups=data.draw(st.integers(1, 2)), **settings)
    batch = data.draw(st.sampled_from([(), (1,), (3,)]))
    x = torch.randn(*batch, 4, *data.draw(st.tuples(*[st.integers(4, 6)] * dims)))
    made = layer(x)
    layer.output_padding = tuple(data.draw(st.integers(0, step - 1)) for step in layer.stride)
    size = layer(x).shape[len(batch) + 1 :]
    layer.output_padding = more
    with idle([("", layer)]):
        idled = layer(x)
        one, other = layer(x, size), layer(x, output_size=[*batch, 9, *size])
    assert idled.shape == made.shape
    assert one.shape == other.shape == (*batch, 6, *size)
    assert not any(tensor.any() for tensor in (idled, one, other))


@pytest.mark.parametrize("size", [[8, 8], [11, 9], [9], [9, 9, 9]])
def test_an_idle_transposed_convolution_refuses_sizes_that_it_cannot_make(size):
    layer, x = nn.ConvTranspose2d(3, 4, 3, stride=2), torch.zeros(1, 3, 4, 4)  # 9×9 or 10×10
    with pytest.raises(ValueError, match=r"output_size|requested") as plain:
        layer(x, size)
    with idle([("", layer)]), pytest.raises(ValueError, match=r"output_size|requested") as idled:
        layer(x, size)
    assert str(idled.value) == str(plain.value)
