"""Folding and exporting networks whose own forward method opens autocast."""

import onnxruntime
import pytest
import torch

import regrow
from autocasts import FORMS, pair

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.gives_up
@pytest.mark.parametrize("form", FORMS)
def test_norms_are_folded(form) -> None:
    plain, model, prefix = pair(form)
    smaller, record = regrow.fold_norms(model, example_inputs=X)
    expected, theirs = regrow.fold_norms(plain, example_inputs=X)
    assert record["folded"] == {prefix + norm: prefix + conv for norm, conv in theirs["folded"].items()}
    torch.testing.assert_close(smaller(X).float(), expected(X), rtol=0.05, atol=0.02)


@pytest.mark.needs_torch("2.13", "export_onnx")
@pytest.mark.parametrize("form", ["nested", "prepared"])
def test_an_exported_file_computes_in_float32(form, tmp_path) -> None:
    plain, model, _ = pair(form)
    record = regrow.export_onnx(model, tmp_path / "net.onnx", example_inputs=X)
    assert record["difference"] < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    found = session.run(None, {record["inputs"][0]: X.numpy()})[0]
    # Where code casts by hand, a number may fall to either side.
    torch.testing.assert_close(torch.as_tensor(found), plain(X), rtol=1e-2, atol=1e-3)
    assert model(X).isfinite().all()
