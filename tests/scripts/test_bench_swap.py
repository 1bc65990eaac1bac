"""bench_swap.py compares before it times, and its figures are of the models that it names."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("bench_swap")
    small = {"vocab_size": 50, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48}
    cases = {"small": module.Case("BertForMaskedLM", small, 2, 16, padded=True)}
    monkeypatch.setattr(module, "CASES", cases)
    monkeypatch.setattr(module, "default_device", lambda: torch.device("cpu"))
    return module


def run(bench, monkeypatch, *arguments):
    monkeypatch.setattr(
        sys, "argv", ["bench_swap.py", "--cases", "small", "--layers", "1", "--rounds", "1", *arguments]
    )
    bench.main()


def test_both_models_are_measured(bench, monkeypatch, tmp_path, capsys):
    run(bench, monkeypatch, "--dtype", "float32", "--out", str(tmp_path / "out.json"))
    (record,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert record["layers"] == 1
    assert record["speedup"] == pytest.approx(record["step_s"]["stock"] / record["step_s"]["swapped"])
    assert 0 < record["saved_share"] < 1  # the layer keeps less, whatever the machine
    assert "small, 1 layers, 2 x 16" in capsys.readouterr().out


def test_a_swapped_model_with_another_loss_is_not_timed(bench, monkeypatch, capsys):
    def wrong(model):
        torch.nn.init.ones_(model.cls.predictions.bias)
        model.bert.encoder.layer[0].output.dense.weight.data.mul_(5)
        return 1

    monkeypatch.setattr(bench, "swap", wrong)
    with pytest.raises(SystemExit, match="a swapped model is wrong"):
        run(bench, monkeypatch, "--dtype", "float32")
    assert "wrong: the losses of small are" in capsys.readouterr().err
