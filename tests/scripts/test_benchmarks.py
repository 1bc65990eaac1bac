"""The benchmarks say what they should and refuse what they must; what they measure is not looked at."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import write_text
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
BENCHMARKS = SCRIPTS / "bench"


@pytest.fixture
def script(monkeypatch):
    """Imports a script by name, as its neighbours in the folder do."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def bench(script):
    return script("bench_layer")


@pytest.mark.parametrize(("shape", "expected_ms"), [("bert-large-128", 0.93), ("bert-large-512", 0.96)])
def test_the_floor_of_a_layer_is_that_of_an_independent_count(bench, shape, expected_ms):
    """Worked out by hand for 790 TFLOP/s and 4.3 TB/s, rounded to two digits."""
    script_device = sys.modules["bench_device"]
    work = bench.work_of(bench.SHAPES[shape], torch.bfloat16, packed=False)
    assert 1e3 * work.floor_s(script_device.Ceilings(790e12, 4.3e12)) == pytest.approx(expected_ms, abs=0.005)


@pytest.mark.parametrize("causal", [False, True])
def test_the_matrix_products_counted_are_those_of_the_written_out_layer(bench, causal):
    shape = bench.Shape(32, 2, 3, 16, causal=causal)
    row = bench.plain(bench.make_task(shape, torch.float32, torch.device("cpu"), p=0.0))
    x = torch.randn(3, 16, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:  # it does not know torch's attention on a CPU
        row.call(x).sum().backward()
    assert counter.get_total_flops() == bench.work_of(shape, torch.float32, packed=False).matmul_flop


def test_natural_lengths_fill_about_half_of_the_batch_and_unpadded_work_counts_them_alone(bench):
    shape = bench.SHAPES["bert-large-128-natural"]
    lengths = shape.lengths()
    assert torch.equal(lengths, shape.lengths())
    assert lengths.min() >= 1
    assert lengths.max() == shape.length
    fill = lengths.sum().item() / (shape.batch * shape.length)
    assert fill == pytest.approx(0.5, abs=0.01)
    padded, packed = (bench.work_of(shape, torch.bfloat16, packed=packed) for packed in (False, True))
    assert packed.matmul_flop == pytest.approx(fill * padded.matmul_flop)
    assert packed.attention_flop == pytest.approx(padded.attention_flop / 3, rel=0.02)  # the mean of s^2, s uniform


@pytest.mark.parametrize("fault", ["output", "input gradient"])
def test_a_row_with_a_wrong_output_or_gradient_is_refused(bench, monkeypatch, fault):
    task = bench.make_task(bench.Shape(16, 2, 3, 8, padding="natural"), torch.float32, torch.device("cpu"), p=0.1)
    right = bench.rows_of(task.without_dropout())["ours"]()
    assert bench.Reference(task).check("ours") < 1e-6

    def wrong(x):
        if fault == "output":
            return 1.001 * right.call(x) - 0.001 * right.call(x).detach()[:1]
        return right.call(x.detach()) + (x - x.detach())

    monkeypatch.setattr(bench, "rows_of", lambda _: {"ours": lambda: bench.Row(right.module, wrong)})
    with pytest.raises(ValueError, match=f"its {fault} is off by"):
        bench.Reference(task).check("ours")


@pytest.mark.parametrize("shape", [{"padding": "natural"}, {"causal": True}], ids=str)
def test_every_row_is_measured_or_listed_with_its_reason(bench, monkeypatch, tmp_path, capsys, shape):
    monkeypatch.setitem(bench.SHAPES, "small", bench.Shape(16, 2, 3, 8, **shape))
    monkeypatch.setattr("shutil.which", lambda _: None)  # no torch.compile, which takes half a minute
    monkeypatch.setattr(bench, "default_device", lambda: torch.device("cpu"))
    out = tmp_path / "layer.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench_layer.py", "--shapes", "small", "--rounds", "1", "--out", str(out)])
    bench.main()
    head, *records = map(json.loads, out.read_text().splitlines())
    assert {"machine", "dtype", "matmul_flop_per_s"} <= head.keys()
    assert [record["row"] for record in records][:2] == ["ours", "ours, all memory flags"]
    assert {record["row"] for record in records if "both_s" in record} >= {"ours, unpadded", "torch, written out"}
    reasons = {record["row"]: record["not_run"] for record in records if "both_s" not in record}
    assert reasons["ours, CUDA graph"] == "needs CUDA"
    assert reasons["torch.compile of it"] == "needs a C++ compiler"
    assert not any(record.get("failed") for record in records)
    printed = capsys.readouterr().out
    assert all(record["row"] in printed for record in records)


def test_rows_in_fp8_and_stages_of_te_modules_are_checked_and_measured(bench, monkeypatch, tmp_path):
    monkeypatch.setitem(bench.SHAPES, "small", bench.Shape(32, 2, 3, 8, causal=True, te_stages=True))
    monkeypatch.setattr("shutil.which", lambda _: None)  # no torch.compile, which takes half a minute
    monkeypatch.setattr(bench, "default_device", lambda: torch.device("cpu"))
    out = tmp_path / "layer.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench_layer.py", "--shapes", "small", "--rounds", "1", "--out", str(out)])
    bench.main()
    records = {record["row"]: record for record in map(json.loads, out.read_text().splitlines()[1:])}
    checked = {name: record["error"] for name, record in records.items() if record.get("error") is not None}
    in_fp8 = {name for name in checked if "FP8" in name}
    assert len(checked) == 7
    assert len(in_fp8) == 3
    assert all(name.endswith("(emulated)") for name in in_fp8)  # a CPU gains nothing, and the table says so
    assert all((error > 1e-5) == (name in in_fp8) for name, error in checked.items())
    assert records["torch, written out"]["speed_over_torch"] == 1
    assert {name for name in records.keys() - checked.keys() if "CUDA graph" not in name} == {
        "torch, written out",
        "torch.compile of it",
        "Transformer Engine, pre-LN",
    }


def test_the_steps_of_two_engines_are_timed_without_data(script, monkeypatch):
    bench = script("bench_train")
    arguments = argparse.Namespace(micro_batch_size=2, layers=1, steps=3, turns=1)
    result = bench.measure_engines(arguments, str(ROOT / "configs" / "bert_tiny.yaml"))
    assert result["sequences_per_s"].keys() == {"xformer-train", "CUDA graph", "transformers"}
    step = bench.random_step(bench.engine_config(arguments, str(ROOT / "configs" / "bert_tiny.yaml")), seed=0)
    (batch,) = step.micro_batches
    assert step.real_tokens == batch["input_ids"].numel()
    assert len(batch["masked_positions"].unique()) == step.counts["mlm"]


@pytest.mark.parametrize("shape", ["nanogpt", "bert_tiny"])
def test_a_plain_model_computes_the_loss_of_ours_from_the_same_weights(script, shape):
    bench = script("bench_small_step")
    path, sets, symbols, plain = bench.SHAPES[shape]
    config = bench.load_config(path, [*sets, "training.train_batch_size=3", "training.micro_batch_size=3"]).config
    other, ours = plain(config, symbols), bench.our_model(config, symbols)
    for module in (param for param in other.parameters() if param.ndim == 1):
        torch.nn.init.normal_(module, 1.0, 0.5)
    assert ours.load_state_dict(other.state_dict())
    step = bench.random_batches(config, symbols)[0]
    (batch,) = step.micro_batches
    loss = sum(value / step.counts[part] for part, value in ours(**batch).items())
    torch.testing.assert_close(other(**batch), loss)


def test_steps_of_ours_and_of_a_plain_model_are_timed_in_turns(script, monkeypatch, capsys):
    bench = script("bench_small_step")
    small = ["--set", "model.num_hidden_layers=1", "training.train_batch_size=2", "training.micro_batch_size=2"]
    rows = ["ours fp32", "plain bf16"]
    sizes = ["--rounds", "1", "--steps", "1", "--threads", "1", "--rows", *rows]
    monkeypatch.setattr(sys, "argv", ["bench_small_step.py", *small, *sizes])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the script sets it
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:12].strip() for line in lines if not line.startswith(("nanogpt", "bert_tiny", " "))] == 2 * rows


@pytest.mark.slow
def test_a_run_and_a_plain_model_are_measured_beside_a_program_that_never_rests(script, monkeypatch, capsys):
    bench = script("bench_busy")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(bench, "_SETTLE_S", 0.0)
    monkeypatch.setattr(sys, "argv", ["bench_busy.py", "--rounds", "1", "--seconds", "0.1"])
    bench.main()
    title, columns, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("nanogpt, ")
    assert columns.split() == ["sequences/s", "free", "one", "busy", "slower"]
    assert [row[:12].strip() for row in rows] == ["ours", "plain", "ours / plain"]
    assert all(float(figure.removesuffix("x")) > 0 for row in rows for figure in row[12:].split())


def test_the_share_of_every_optimizer_in_a_step_is_printed(script, monkeypatch, capsys):
    bench = script("bench_optimizer")
    small = [
        "model.num_hidden_layers=1",
        "model.hidden_size=16",
        "model.intermediate_size=24",
        "model.num_attention_heads=2",
    ]
    monkeypatch.setattr(sys, "argv", ["bench_optimizer.py", "--repeats", "1", "--set", *small])
    monkeypatch.setattr(bench, "median_ms", lambda take, repeats: (take(), 2.0)[1])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[::4]] == [
        f"{s} in {p}" for s in ("nanogpt", "bert_base") for p in ("fp32", "bf16")
    ]
    assert [line.split() for line in lines[1:4]] == [
        [kind, "2.00", "ms", "50.0%"] for kind in ("lamb", "adamw", "muon")
    ]
    assert all(line.endswith("1.5%") for line in lines[9:12])  # of 64 micro-batches of BERT-base


def test_texts_with_and_without_a_cache_are_compared_before_their_speeds_are_printed(script, monkeypatch, capsys):
    bench = script("bench_sample")
    config = str(ROOT / "configs" / "gpt_tiny.yaml")
    monkeypatch.setattr(sys, "argv", ["bench_sample.py", "--config", config, "--tokens", "5", "--turns", "1"])
    bench.main()
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split(":")[0] for line in lines] == ["gpt_tiny, greedy", "gpt_tiny, by chance"]
    monkeypatch.setattr(bench, "without_cache", lambda *_: [1, 2])
    with pytest.raises(ValueError, match="the text with a cache is not that without"):
        bench.main()


def test_an_interrupt_leaves_the_rows_that_are_ready(bench, monkeypatch, tmp_path, capsys):
    """As when a limit of time ends a compilation that takes too long."""
    monkeypatch.setitem(bench.SHAPES, "small", bench.Shape(16, 2, 3, 8))

    def too_slow():
        raise KeyboardInterrupt

    def rows(task):
        all_rows = bench.layer_rows(task)
        return {"ours": all_rows["ours"], "slow": too_slow, "torch, written out": all_rows["torch, written out"]}

    monkeypatch.setattr(bench, "rows_of", rows)
    monkeypatch.setattr(bench, "default_device", lambda: torch.device("cpu"))
    out = tmp_path / "layer.jsonl"
    monkeypatch.setattr(
        sys, "argv", ["bench_layer.py", "--shapes", "small", "bert-tiny", "--rounds", "1", "--out", str(out)]
    )
    with pytest.raises(SystemExit, match="interrupted"):
        bench.main()
    records = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    assert [record["row"] for record in records if "both_s" in record] == ["ours"]
    assert {record["shape"] for record in records} == {"small"}
    assert "not run: slow: interrupted before it was ready" in capsys.readouterr().out


def test_a_row_that_fails_while_it_is_timed_is_lost_alone(bench, monkeypatch):
    def fails_once_timed(step, inputs):
        if step.row == "large":
            raise torch.OutOfMemoryError("no room beside the others")
        return [(1.0, 2.0)]

    monkeypatch.setattr(bench, "time_steps", fails_once_timed)
    found = {row: bench.Contender(None, None, argparse.Namespace(row=row), None) for row in ("small", "large")}
    assert bench.timed(found, rounds=2) == {"small": [(1.0, 2.0)] * 2, "large": []}
    assert found["large"] == bench.Absent("OutOfMemoryError: no room beside the others", failed=True)


def test_only_rows_that_exist_can_be_asked_for(bench, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "small", bench.Shape(16, 2, 3, 8))
    monkeypatch.setattr(bench, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(
        sys, "argv", ["bench_layer.py", "--shapes", "small", "--rounds", "1", "--rows", "ours", "ours, on paper"]
    )
    with pytest.raises(SystemExit, match="no shape has a row called ours, on paper"):
        bench.main()


def test_an_engine_that_fails_loses_its_row_alone(script, monkeypatch):
    bench = script("bench_train")
    monkeypatch.setattr(bench, "stock_model", lambda config: 1 / 0)
    arguments = argparse.Namespace(micro_batch_size=2, layers=1, steps=3, turns=1)
    result = bench.measure_engines(arguments, str(ROOT / "configs" / "bert_tiny.yaml"))
    assert result["step_time_s"].keys() == {"xformer-train", "CUDA graph"}
    assert "transformers: failed" in result["notes"]


def test_a_step_that_runs_out_of_memory_loses_its_line_alone(script, monkeypatch, tmp_path, capsys):
    bench = script("bench_memory")

    def peaks(run, batch, topology):
        if run.config.training.activation_checkpointing == "none":
            raise torch.OutOfMemoryError("no room")
        return {"allocated": 5, "reserved": 7}

    monkeypatch.setattr(bench, "peaks_of_step", peaks)
    topology = argparse.Namespace(device=torch.device("cpu"))
    out = tmp_path / "memory.jsonl"
    bench.write_table("peaks", bench.peak_records(topology, [128], 1, 2), out)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["allocated"] for record in records] == ["out of memory", "out of memory", 5]
    assert capsys.readouterr().out.count("out of memory") == 2


def test_the_benchmark_of_packing_tells_fill_and_times(script, monkeypatch, capsys, tmp_path):
    write_text(tmp_path / "text.txt", num_documents=20)
    settings = ["--lengths", "32", "--samples", "1000", "--text", str(tmp_path / "text.txt")]
    monkeypatch.setattr(sys, "argv", ["bench_packing.py", *settings])
    script("bench_packing").main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("32 tokens: ") and "% filled; padded, they fill " in lines[1]
    assert "for each token that is not padding: padded " in lines[2]
    assert len(lines) == 7
    for line in lines[3:]:  # one for each distribution of lengths
        assert line.startswith("  1,000 samples, ") and ", packed and written: " in line
        assert float(line.rpartition(" full to ")[2].rstrip("%")) > 95  # 1,000 do not all find partners


def test_models_are_compared_at_equal_tokens_and_equal_minutes(script, monkeypatch, tmp_path):
    """Both have about as many parameters, and each figure lies on the curve that was written."""
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "out.json"
    sizes = ["tokenizer.vocab_size=300", "training.train_batch_size=2"]
    settings = [f"--set={key}" for key in (*sizes, f"data.cache_dir={tmp_path}")]
    texts = [f"--train={text}", f"--validation={text}", f"--out={out}"]
    times = ["--minutes=0.005", "--turn=0.2"]
    arguments = ["compare_models.py", "classic_gpt", "modern_gpt", *texts, *times, *settings]
    monkeypatch.setattr(sys, "argv", arguments)
    script("compare_models").main()
    classic, modern = json.loads(out.read_text())["rows"]
    assert modern["parameters"] == pytest.approx(classic["parameters"], rel=0.02)
    for row in (classic, modern):
        seconds, tokens, losses = (np.array(row["curve"])[:, column] for column in (0, 2, 3))
        assert row["loss_at_equal_tokens"] == pytest.approx(np.interp(row["equal_tokens"], tokens, losses))
        assert row["loss_at_equal_minutes"] == pytest.approx(np.interp(row["equal_seconds"], seconds, losses))
        assert row["tokens_per_s"] == pytest.approx(tokens[-1] / seconds[-1])
    assert classic["equal_tokens"] == modern["equal_tokens"] == min(row["curve"][-1][2] for row in (classic, modern))


def test_the_benchmark_of_checkpoints_finds_its_run_config(script):
    assert script("bench_checkpoint").CONFIG.is_file()


def test_optimizers_are_compared_by_runs_of_their_own_lengths(script, monkeypatch, tmp_path, capsys):
    """A curve has the looks of a run, in order, and a loss is reached between the two looks around it."""
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "out.json"
    sizes = ["model.hidden_size=32", "model.num_hidden_layers=1", "data.max_seq_length=16", "schedule.warmup_steps=1"]
    settings = [f"--set={key}" for key in (*sizes, f"data.cache_dir={tmp_path}")]
    texts = [f"--train={text}", f"--validation={text}", f"--out={out}"]
    runs = ["char_gpt", "adamw=1e-3", "muon=1e-2:3", "--steps=4", "--batches=1"]
    monkeypatch.setattr(sys, "argv", ["compare_optimizers.py", *runs, *texts, *settings])
    compare = script("compare_optimizers")
    compare.main()
    adamw, muon = json.loads(out.read_text())["curves"]
    assert [look[0] for look in adamw["looks"]] == [1, 2, 3, 4]
    assert [look[0] for look in muon["looks"]] == [1, 2, 3]
    assert "| adamw | 1e-3 | " in capsys.readouterr().out
    curve = compare.Curve("adamw", "1e-3", [(10, 1.0, 4.0), (20, 2.0, 3.0), (30, 3.0, 2.0)])
    assert curve.first_at(2.25) == (27.5, 2.75)
    assert curve.first_at(1.0) is None
