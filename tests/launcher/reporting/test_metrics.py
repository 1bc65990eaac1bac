import dataclasses
import io
import json
import subprocess
import sys
import time
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer

from xformer_train.launcher.reporting import metrics
from xformer_train.launcher.reporting.metrics import RunLog
from xformer_train.launcher.reporting.record import StepRecord

RECORD = StepRecord(
    step=1200,
    epoch=24,
    samples=307_200,
    losses={"mlm": 1.801, "nsp": 0.041},
    loss=1.842,
    lr=8.31e-3,
    grad_norm=0.4141,
    loss_scale=None,
    skipped_steps=0,
    num_steps=10,
    step_time_s=4.0,
    data_wait_s=0.012,
    sequences=2560,
    real_tokens=300_000,
    padded_tokens=327_680,
    model_flops=1.8e15,
    memory_gib=61.23,
)


def record_at(step, **changes):
    return dataclasses.replace(RECORD, step=step, samples=256 * step, loss=10.0 / step, **changes)


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def points(run_dir, tag, kind="Scalars"):
    accumulator = EventAccumulator(str(run_dir / "tb"), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    return [(event.step, event) for event in getattr(accumulator, kind)(tag)]


def scalars(run_dir, tag):
    return [(step, pytest.approx(event.value, rel=1e-6)) for step, event in points(run_dir, tag)]


def test_a_line_says_everything_of_a_step(tmp_path, capsys):
    with closing(RunLog(tmp_path, 7500, peak_flops=1e15, tensorboard=False)) as log:
        log.log_step(RECORD)
    assert capsys.readouterr().out == (
        "step 1,200/7,500 16.0% | epoch 24 | loss 1.842 (mlm 1.80 nsp 0.04) | lr 8.31e-03 | gnorm 0.41"
        " | 640 seq/s 75,000 tok/s (padded 81,920) | mfu 45.0% | mem 61.2 GiB | data 0.3% | eta 42m00s\n"
    )


def test_unknown_quantities_read_as_not_available(tmp_path, capsys):
    record = dataclasses.replace(RECORD, losses={}, grad_norm=None, memory_gib=None, padded_tokens=300_000)
    with closing(RunLog(tmp_path, 7500, tensorboard=False)) as log:
        log.log_step(record)
    assert capsys.readouterr().out == (
        "step 1,200/7,500 16.0% | epoch 24 | loss 1.842 | lr 8.31e-03 | gnorm n/a"
        " | 640 seq/s 75,000 tok/s | mfu n/a | data 0.3% | eta 42m00s\n"
    )
    (row,) = rows(tmp_path)
    assert row["mfu"] is row["grad_norm"] is row["memory_gib"] is None


def test_loss_scale_is_told_in_fp16_only_and_skipped_steps_where_there_are_some(tmp_path, capsys):
    with closing(RunLog(tmp_path, 7500, tensorboard=False)) as log:
        log.log_step(RECORD)
        log.log_step(dataclasses.replace(RECORD, loss_scale=65536.0, skipped_steps=3))
        log.log_step(dataclasses.replace(RECORD, skipped_steps=1))
    first, second, third = capsys.readouterr().out.splitlines()
    assert "scale" not in first and "skipped" not in first and "| scale 65536 skipped 3 |" in second
    assert "scale" not in third and "| skipped 1 |" in third
    first_row, second_row, third_row = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert "loss_scale" not in first_row and (second_row["loss_scale"], second_row["skipped_steps"]) == (65536.0, 3)
    assert "loss_scale" not in third_row and third_row["skipped_steps"] == 1


def test_a_row_holds_rates_of_the_window(tmp_path):
    with closing(RunLog(tmp_path, 7500, peak_flops=2e15, tensorboard=False)) as log:
        log.log_step(RECORD)
    assert rows(tmp_path) == [
        {
            "step": 1200,
            "epoch": 24,
            "samples": 307_200,
            "loss": 1.842,
            "mlm": 1.801,
            "nsp": 0.041,
            "lr": 8.31e-3,
            "grad_norm": 0.4141,
            "seq_per_s": 640.0,
            "tokens_per_s": 75_000.0,
            "padded_tokens_per_s": 81_920.0,
            "mfu": 0.225,
            "step_time_s": 0.4,
            "data_wait_fraction": 0.003,
            "memory_gib": 61.23,
        }
    ]


def test_a_loss_is_written_to_the_last_bit(tmp_path):
    loss = torch.tensor(1.2345678).double().item() / 3
    with closing(RunLog(tmp_path, 7500, tensorboard=False)) as log:
        log.log_step(dataclasses.replace(RECORD, loss=loss))
    assert rows(tmp_path)[0]["loss"] == loss


def test_a_diverged_loss_is_null_in_valid_json_and_visible_on_the_console(tmp_path, capsys):
    with closing(RunLog(tmp_path, 7500, tensorboard=False)) as log:
        log.log_step(dataclasses.replace(RECORD, loss=float("nan"), grad_norm=float("inf")))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["loss"] is None
    assert "loss nan" in capsys.readouterr().out


def test_rows_reach_the_file_before_the_log_is_closed(tmp_path):
    log = RunLog(tmp_path, 7500)
    for step in range(1, 5):
        log.log_step(record_at(step))
    assert len(rows(tmp_path)) == 4
    assert len(points(tmp_path, "Train/lr")) == len(points(tmp_path, "Train/Samples/lr")) == 4
    log.close()


def test_an_evaluation_has_a_row_a_point_and_a_line(tmp_path, capsys):
    with closing(RunLog(tmp_path, 7500)) as log:
        log.log_evaluation(500, 128_000, {"loss": 2.5, "mlm": 2.25, "nsp": 0.25})
    assert rows(tmp_path) == [{"step": 500, "samples": 128_000, "val_loss": 2.5, "val_mlm": 2.25, "val_nsp": 0.25}]
    assert scalars(tmp_path, "Validation/Loss") == [(500, 2.5)]
    assert scalars(tmp_path, "Validation/mlm") == [(500, 2.25)]
    assert capsys.readouterr().out == "step 500/7,500 | held-out loss 2.500 (mlm 2.25 nsp 0.25)\n"


def test_tensorboard_has_the_tags_of_the_deepspeed_recipe_and_throughput(tmp_path):
    with closing(RunLog(tmp_path, 7500, peak_flops=1e15)) as log:
        log.log_step(dataclasses.replace(RECORD, histograms={"lamb_coeffs": (0.1, 0.2, 0.9)}))
    assert scalars(tmp_path, "Train/lr") == [(1200, 8.31e-3)]
    assert scalars(tmp_path, "Train/Samples/train_loss") == [(307_200, 1.842)]
    assert scalars(tmp_path, "Train/Samples/lr") == [(307_200, 8.31e-3)]
    assert scalars(tmp_path, "Train/grad_norm") == [(1200, 0.4141)]
    assert scalars(tmp_path, "Train/mlm") == [(1200, 1.801)]
    assert scalars(tmp_path, "Throughput/seq_per_s") == [(1200, 640.0)]
    assert scalars(tmp_path, "Throughput/tokens_per_s") == [(1200, 75_000.0)]
    assert scalars(tmp_path, "Throughput/mfu") == [(1200, 0.45)]
    ((step, event),) = points(tmp_path, "Train/lamb_coeffs", "Histograms")
    assert (step, event.histogram_value.num, event.histogram_value.max) == (1200, 3, 0.9)


def test_a_resumed_log_drops_what_lies_after_its_start_and_keeps_what_lies_before(tmp_path, monkeypatch):
    # Files of one process and second are read by the text of their numbers, in which 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    with closing(RunLog(tmp_path, 100)) as log:
        for step in (10, 20, 30, 40):
            log.log_step(record_at(step, histograms={"lamb_coeffs": (0.5,)}))
            log.log_evaluation(step, 256 * step, {"loss": 1.0 / step})
    with closing(RunLog(tmp_path, 100, start_step=20, start_samples=5120)) as log:
        assert [row["step"] for row in rows(tmp_path)] == [10, 10, 20, 20]
        log.log_step(record_at(30, lr=0.5))
    assert [row["step"] for row in rows(tmp_path)] == [10, 10, 20, 20, 30]
    lr = RECORD.lr
    assert scalars(tmp_path, "Train/lr") == [(10, lr), (20, lr), (30, 0.5)]
    assert scalars(tmp_path, "Train/Samples/lr") == [(2560, lr), (5120, lr), (7680, 0.5)]
    assert scalars(tmp_path, "Validation/Loss") == [(10, 0.1), (20, 0.05)]
    assert [step for step, _ in points(tmp_path, "Train/lamb_coeffs", "Histograms")] == [10, 20]


def test_a_run_is_one_entry_of_tensorboard_and_has_its_config_there(tmp_path):
    for start in (0, 10):
        with closing(RunLog(tmp_path, 100, start_step=start, hparams={"optimizer.lr": 0.1, "name": "a"})) as log:
            log.log_step(record_at(start + 10))
    assert {path.parent for path in tmp_path.rglob("*tfevents*")} == {tmp_path / "tb"}
    assert not list(tmp_path.rglob("*.partial"))
    accumulator = EventAccumulator(str(tmp_path / "tb")).Reload()
    content = accumulator.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    assert (found["optimizer.lr"].number_value, found["name"].string_value) == (0.1, "a")
    raw = b"".join(path.read_bytes() for path in tmp_path.rglob("*tfevents*"))
    assert raw.count(b"_hparams_/session_start_info") == 1


def test_points_that_a_kill_has_cut_short_do_not_end_a_resume(tmp_path):
    with closing(RunLog(tmp_path, 100)) as log:
        log.log_step(record_at(10))
        log.log_step(record_at(20))
    [path] = (tmp_path / "tb").iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    with closing(RunLog(tmp_path, 100, start_step=20, start_samples=5120)) as log:
        log.log_step(record_at(30))
    assert [step for step, _ in scalars(tmp_path, "Train/loss")] == [10, 20, 30]


def test_a_last_row_cut_short_by_a_kill_is_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 1.0}\n{"step": 2')
    RunLog(tmp_path, 100, start_step=20, tensorboard=False).close()
    assert path.read_text() == '{"step": 10, "loss": 1.0}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


class FullDisk(io.FileIO):
    """A file on a disk with room for so many bytes."""

    room = 0

    def write(self, data):
        taken = data[: self.room]
        if not taken:
            raise OSError(28, "No space left on device")
        self.room -= len(taken)
        return super().write(taken)


def test_a_full_disk_is_told_once_and_takes_the_rows_later(tmp_path, capsys):
    with closing(RunLog(tmp_path, 100, tensorboard=False)) as log:
        log.log_step(record_at(10))
        whole = log._file
        log._file = disk = FullDisk(tmp_path / "metrics.jsonl", "ab")
        disk.room = 20  # bytes of the next row
        log.log_step(record_at(20))
        log.log_step(record_at(30))
        log._file = whole
        log.log_step(record_at(40))
    assert [row["step"] for row in rows(tmp_path)] == [10, 20, 30, 40]
    printed = capsys.readouterr()
    assert printed.err.count("takes no more rows: No space left on device; free space there") == 1
    assert printed.out.count("step ") == 4


def test_tensorboard_on_a_full_disk_is_given_up_and_the_rows_go_on(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    with closing(RunLog(tmp_path, 100)) as log:
        monkeypatch.setattr(log._boards._writer.file_writer.event_writer, "flush", full)
        log.log_step(record_at(10))
        log.log_step(record_at(20))
    assert len(rows(tmp_path)) == 2
    assert (
        capsys.readouterr().err.count("TensorBoard gets no more points until the run is started again: No space") == 1
    )


def test_the_remaining_time_counts_evaluations_and_saves(tmp_path, capsys):
    with closing(RunLog(tmp_path, 7500, tensorboard=False)) as log:
        for step in range(1196, 1201):
            log.step_taken(step)
        log.log_step(RECORD)
        log.passed_beside(50.0)  # ten seconds for each of five steps
        log.log_step(RECORD)
    first, second = (line.rpartition("eta ")[2] for line in capsys.readouterr().out.splitlines())
    assert (first, second) == ("42m00s", "18h12m")  # 6,300 steps


def test_a_first_step_that_takes_long_is_told_before_the_first_losses(tmp_path, monkeypatch, capsys):
    with closing(RunLog(tmp_path, 100, tensorboard=False)) as log:
        log.step_taken(1)
    assert capsys.readouterr().out == ""
    now = time.monotonic()
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now))
    with closing(RunLog(tmp_path, 100, tensorboard=False)) as log:
        now += 64
        log.step_taken(1)
        now += 64
        log.step_taken(2)
    assert capsys.readouterr().out == "step 1/100 | taken after 1m04s\n"


def test_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n\n  \n{"step": 20}\n')
    RunLog(tmp_path, 100, start_step=15, tensorboard=False).close()
    assert path.read_text() == '{"step": 10}\n'


def test_a_row_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 10}\n{"step": 11, "a": "\xff"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a row of metrics, got '\{\"step\": 11"):
        RunLog(tmp_path, 100, start_step=15, tensorboard=False)


@pytest.mark.parametrize(
    "line", ["not json", "[1, 2]", '{"loss": 1.0}', '{"step": null}', '{"step": 1e999}', "[" * 100_000]
)
def test_a_broken_row_before_the_end_is_refused_by_file_and_line_and_left_in_place(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    text = f'{{"step": 10}}\n{line}\n{{"step": 20}}\n'
    path.write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a row of metrics"):
        RunLog(tmp_path, 100, start_step=15, tensorboard=False)
    assert path.read_text() == text


def test_every_console_line_is_one_write(tmp_path, monkeypatch):
    writes = []
    stream = io.StringIO()
    monkeypatch.setattr(stream, "write", writes.append)
    monkeypatch.setattr(sys, "stdout", stream)
    with closing(RunLog(tmp_path, 7500, tensorboard=False)) as log:
        log.log_step(RECORD)
        log.log_evaluation(1200, 307_200, {"loss": 1.0})
    assert len(writes) == 2 and all(text.endswith("\n") and text.count("\n") == 1 for text in writes)


def test_a_terminal_gets_a_bar_on_stderr_and_nothing_on_stdout(tmp_path, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    with closing(RunLog(tmp_path, 7500, start_step=1100, tensorboard=False)) as log:
        log.step_taken(1199)
        log.evaluation_begins(1199)
        log.log_step(RECORD)
        log.log_evaluation(1200, 307_200, {"loss": 1.0})
    assert capsys.readouterr().out == ""
    assert "step 1,199/7,500 | evaluating" in terminal.getvalue()
    assert " 16% |" in terminal.getvalue() and "step 1,200/7,500 | eta 42m00s | loss 1.842" in terminal.getvalue()
    assert "step 1,200/7,500 | held-out loss 1.000\n" in terminal.getvalue()
    assert len(rows(tmp_path)) == 2


def test_remaining_time_follows_recent_records_and_counts_steps_not_records(tmp_path, capsys):
    with closing(RunLog(tmp_path, 1000, tensorboard=False)) as log:
        log.log_step(record_at(5, num_steps=5, step_time_s=500.0))
        for step in range(15, 215, 10):
            log.log_step(record_at(step, num_steps=10, step_time_s=5.0))
        log.log_step(record_at(1000, num_steps=10, step_time_s=5.0))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("eta 1d03h")
    assert lines[-2].endswith("eta 6m38s")  # 795 steps of 0.5 s: the slow first record is no longer among the last 20
    assert lines[-1].endswith("eta 0s")


def test_a_run_that_ends_with_its_time_tells_how_much_of_it_is_over(tmp_path, capsys):
    spent = iter([300.0, 300.0, 700.0, 700.0])
    with closing(RunLog(tmp_path, lambda: (next(spent), 600.0), tensorboard=False)) as log:
        log.log_step(record_at(5, num_steps=5, step_time_s=1.0))
        log.log_step(record_at(9, num_steps=4, step_time_s=1.0))
        log.log_evaluation(9, 72, {"loss": 1.0})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 5 50.0% | epoch") and lines[0].endswith("eta 5m00s")
    assert lines[1].startswith("step 9 100.0% | epoch") and lines[1].endswith("eta 0s")
    assert lines[2] == "step 9 | held-out loss 1.000"


def test_tensorboard_is_imported_only_when_it_is_asked_for(tmp_path):
    code = (
        "import sys; from pathlib import Path; from xformer_train.launcher.reporting.metrics import RunLog;"
        f"RunLog(Path({str(tmp_path)!r}), 10, tensorboard=False).close();"
        "assert not {'torch', 'tensorboard'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
