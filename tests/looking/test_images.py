import pytest
import torch
from torch import nn

from regrow.looking.calls import evaluating
from regrow.looking.images import (
    check_batches,
    check_finite_results,
    count_images,
    forward,
    inputs_of,
    parted,
    there,
)


def test_the_input_is_a_tensor_the_first_item_or_all_keywords() -> None:
    x, labels, model = torch.randn(2, 3), torch.tensor([0, 1]), nn.Linear(3, 2)
    batches = list(inputs_of(model, [x, (x, labels), [x, labels], {"x": x, "flag": True}]))
    assert all(batch is x for batch in batches[:3])
    assert batches[3] == {"x": x, "flag": True}


def test_inputs_go_to_the_model_s_device() -> None:
    model = nn.Linear(3, 2, device="meta")
    tensor, keywords = inputs_of(model, [torch.zeros(2, 3), {"x": torch.zeros(2, 3)}])
    assert tensor.device.type == keywords["x"].device.type == "meta"


@pytest.mark.parametrize(
    ("calibration", "message"),
    [([], "yields no batch"), (iter(()), "yields no batch"), ([3], "got int"), ([()], "got tuple")],
)
def test_what_is_no_batch_is_refused(calibration: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(inputs_of(nn.Linear(3, 2), calibration))  # type: ignore[arg-type]


@pytest.mark.parametrize("calibration", [torch.zeros(2, 3), {"x": torch.zeros(2, 3)}, "x", None, 7])
def test_one_batch_alone_is_not_an_iterable_of_batches(calibration: object) -> None:
    with pytest.raises(ValueError, match=r"calibration=\[x\]"):
        check_batches(calibration, "calibration")


def test_forward_counts_images_and_says_what_failed() -> None:
    model = nn.Linear(3, 2)
    assert forward(model, torch.zeros(5, 3)) == 5
    assert forward(model, {"input": torch.zeros(4, 3)}) == 4
    with pytest.raises(ValueError, match=r"fails on a calibration batch.*shapes"):
        forward(model, torch.zeros(5, 4))


def test_results_must_be_finite() -> None:
    check_finite_results("conv", torch.ones(2), None)
    with pytest.raises(ValueError, match="'conv'"):
        check_finite_results("conv", torch.ones(2), torch.tensor([1.0, float("nan")]))


def test_every_module_gets_its_own_mode_back_even_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model[1][0].eval()
    before = [module.training for module in model.modules()]

    def fail() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in model.modules()] == before == [True, True, True, False, True]


def test_lists_of_pictures_count_as_detectors_take_them() -> None:
    pictures = [torch.zeros(3, 8, 8), torch.zeros(3, 8, 6)]
    assert count_images({"images": pictures, "targets": [{}, {}]}) == 2
    assert count_images((pictures,)) == 2
    assert count_images({"scale": torch.tensor(1.0)}) == count_images(torch.tensor(1.0)) == 0
    assert count_images((torch.zeros(5, 3), pictures)) == 5


def test_a_list_of_pictures_is_one_argument_where_example_inputs_are_such_a_list() -> None:
    pictures, targets = [torch.zeros(3, 8, 8), torch.zeros(3, 8, 6)], [{}, {}]
    example = (pictures[:1],)
    assert parted((pictures, targets), example) == ((pictures,), targets)  # as detection loaders give it
    assert parted(pictures, example) == ((pictures,), None)
    assert parted((pictures,), example) == ((pictures,), None)
    assert parted(((pictures,), targets), example) == ((pictures,), targets)
    assert parted((pictures, targets), (pictures, targets)) == ((pictures, targets), None)
    assert parted((pictures, targets), {"images": pictures}) == ((pictures,), targets)
    x, labels = torch.zeros(5, 3, 8, 8), torch.zeros(5)
    inputs, found = parted((x, labels), example)  # pictures of one size in one tensor
    assert inputs is x
    assert found is labels


def test_lists_of_pictures_go_to_the_model_s_device() -> None:
    model = nn.Linear(3, 2, device="meta")
    for inputs in (([torch.zeros(3)],), {"images": [torch.zeros(3)]}):
        moved = there(model, inputs)
        (pictures,) = moved.values() if isinstance(moved, dict) else moved
        assert pictures[0].device.type == "meta"
