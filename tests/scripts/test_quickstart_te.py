"""The example of Transformer Engine's modules: its versions of the layer are one function, and a wrong one is noticed."""

import importlib
from pathlib import Path

import pytest
import torch

SMALL = ["--device", "cpu", "--dtype", "float32", "--hidden", "32", "--ffn", "64", "--heads", "2"]
SMALL += ["--sequence", "7", "--batch", "2", "--steps", "1"]


@pytest.fixture
def quickstart(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    return importlib.import_module("quickstart_te")


def test_all_versions_agree(quickstart, capsys):
    assert quickstart.main(SMALL) == 0
    printed = capsys.readouterr().out
    for name in ("plain torch", "te.Linear", "te.LayerNormMLP", "te.TransformerLayer in FP8"):
        assert name in printed


def test_a_version_with_other_weights_fails(quickstart, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "share_weights", lambda *_: None)
    assert quickstart.main(SMALL) == 1
    assert "not the same function as plain torch: te.Linear, te.LayerNorm, te" in capsys.readouterr().out


def test_fp8_is_on_in_the_last_version_alone(quickstart):
    torch.manual_seed(0)
    *_, high, low = quickstart.versions(quickstart.Shape(32, 64, 2, 7, 2), torch.device("cpu"), torch.float32)
    x = torch.randn(7, 2, 32)
    high.layer.eval()
    assert not torch.equal(quickstart.step(high, x, x)[0], quickstart.step(low, x, x)[0])
    assert torch.equal(quickstart.step(high, x, x)[0], high.layer(x))
