"""A PyTorch whose exporter is too old: export_onnx says so ahead of all work."""

import pytest
import torch

from nets import chain
from regrow.shipping import onnx

X = torch.randn(2, 3, 8, 8)


@pytest.fixture
def _old(monkeypatch):
    monkeypatch.setattr(onnx, "_OLDEST", "99.1")


@pytest.mark.usefixtures("_old")
def test_an_older_pytorch_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"^export_onnx needs PyTorch 99\.1 or newer, and this") as refusal:
        onnx.export_onnx(chain(), tmp_path / "net.onnx", example_inputs=X)
    assert "regrow.save" in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_this_pytorch_is_refused_exactly_where_the_tests_of_exports_are_left_out(tmp_path):
    if torch.__version__ < "2.13":
        with pytest.raises(ValueError, match=r"needs PyTorch 2\.13 or newer"):
            onnx.export_onnx(chain(), tmp_path / "net.onnx", example_inputs=X)
    else:
        assert onnx.export_onnx(chain(), tmp_path / "net.onnx", example_inputs=X)["difference"] < 1e-4
