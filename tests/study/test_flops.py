import torch
from torch import nn

from regrow.noise.layers import add_bridgeout, bridgeout_state
from regrow.repr.cycle import RePr
from regrow.study.flops import step_flops

IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 4


def net():
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4),
    )  # fmt: skip


# Of one picture: 2 FLOPs for every weight of a filter at each of 36 places.
FIRST, SECOND, HEAD = 2 * 36 * 5 * 27, 2 * 36 * 4 * 5, 2 * 4 * 4


def test_by_hand():
    # Forwards once; backwards once for the weights and once for the input, which the first has no use for.
    assert step_flops(net(), IMAGES, LABELS) == (4 * (2 * FIRST + 3 * SECOND + 3 * HEAD), 4)


def test_bridgeout_and_what_it_leaves_as_it_was():
    model = net()
    plain = step_flops(model, IMAGES, LABELS)
    add_bridgeout(model, 0.3)
    model(IMAGES).sum().backward()
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [parameter.grad for parameter in model.parameters()]
    values = [gradient.clone() for gradient in gradients]
    noise, drawn = bridgeout_state(model), torch.get_rng_state()
    assert step_flops(model, IMAGES, LABELS) == plain
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(gradient, value) for gradient, value in zip(gradients, values, strict=True))
    assert bridgeout_state(model) == noise
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not model.training


def test_a_compact_sub_phase_takes_less_and_a_masked_one_the_same():
    for compact in (True, False):
        model = net()
        whole = step_flops(model, IMAGES, LABELS)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        cycle = RePr(
            model, optimizer, example_inputs=IMAGES[:1], fraction=0.4, full=1, sub=1, cycles=1,
            skip_first=False, compact=compact,
        )  # fmt: skip
        cycle.step()
        dropped = step_flops(model, IMAGES, LABELS)
        assert dropped < whole if compact else dropped == whole


def test_what_cannot_be_counted_is_none_and_leaves_no_trace():
    class Fails(nn.Module):
        def forward(self, _):
            raise RuntimeError("not under a counter")

    model = nn.Sequential(nn.BatchNorm2d(3), Fails())
    assert step_flops(model, IMAGES, LABELS) is None
    assert model[0].num_batches_tracked == 0
