import dataclasses
import sys
from types import SimpleNamespace

from xformer_train.launcher.config.optimizers import OptimizerConfig
from xformer_train.launcher.config.phases import Phases
from xformer_train.launcher.config.schema import (
    CheckpointConfig,
    DataChanges,
    EvalConfig,
    LoggingConfig,
    OptimizerChanges,
    ParallelConfig,
    PhaseConfig,
    RunConfig,
    ScheduleConfig,
    TrainingChanges,
    TrainingConfig,
)
from xformer_train.launcher.processes.products import Products
from xformer_train.launcher.reporting.run_directory import RunDirectory
from xformer_train.launcher.training.loop import Tally
from xformer_train.launcher.training.phases import RunPhases
from xformer_train.launcher.training.report import closing_summary, startup_report
from xformer_train.launcher.training.start import Progress
from xformer_train.recipes.config import DataConfig, ModelConfig
from xformer_train.recipes.data.stream import DataSizes, PreparedData
from xformer_train.recipes.recipe import Packing

CONFIG = RunConfig(
    name="bert_large",
    model=ModelConfig(num_hidden_layers=24, hidden_size=1024),
    data=DataConfig(max_seq_length=128),
    optimizer=OptimizerConfig(type="lamb", lr=11e-3, max_coeff=0.3, bias_correction=False, convention="deepspeed"),
    training=TrainingConfig(train_batch_size=256, micro_batch_size=32, max_steps=7500),
    schedule=ScheduleConfig(type="EE", warmup_proportion=0.06, lr_offset=1e-3, decay_rate=0.9, decay_steps=250),
)
DATA = PreparedData(
    train=SimpleNamespace(num_samples=9600),
    validation=SimpleNamespace(num_samples=512),
    fingerprint="",
    sizes=DataSizes(documents=3211, tokens=1_234_567, samples=9600),
)
SETUP = SimpleNamespace(
    config=CONFIG,
    engine=SimpleNamespace(zero_optimization_stage=lambda: 2),
    precision="bf16",
    directory=RunDirectory.of(CONFIG),
    topology=SimpleNamespace(world_size=1),
    total_steps=7500,
)
TOKENIZER = SimpleNamespace(kind="wordpiece, trained on the sources", vocab_size=8192)
TALLY = Tally(
    Progress(step=1500, samples=384_000, best_loss=1.8234, best_step=1400),
    watch=SimpleNamespace(training_time_s=40.0),
    saved_id="step00001500",
    steps=300,
    samples=76_800,
)
FINISHED = dataclasses.replace(TALLY.progress, step=7500)
START = "checkpoint step00001200 of runs/bert_large"


def report(
    config=CONFIG, *, step=1200, start=START, parameters=(336_226_108, 303_301_632), data=DATA, replicas=2, **facts
):
    """The start-up report with sections of the config or facts changed. data: of all phases, or a list of that of each."""
    plan = Phases(config, replicas)
    phases = RunPhases(plan, data if isinstance(data, list) else [data] * len(plan.all), start=0)
    return startup_report(
        SimpleNamespace(**{**vars(SETUP), "config": config, "phases": phases, **facts}),
        Progress(step=step),
        TOKENIZER,
        parameters,
        ["NVIDIA H200", "NVIDIA H200"],
        products=Products("bf16", "the GPU has it"),
        kernels="Triton, for CUDA devices",
        start=start,
    )


def summary(config=CONFIG, end=7500, **facts):
    """The closing summary with sections of the config or facts of the tally changed."""
    directory = RunDirectory.of(config)
    setup = SimpleNamespace(**{**vars(SETUP), "config": config, "directory": directory, "total_steps": end})
    return closing_summary(setup, dataclasses.replace(TALLY, **facts), 233.0)


def changed(**sections):
    return CONFIG.model_copy(update=sections)


def test_the_report_derives_the_batch_in_words():
    assert "256 sequences = 32 per process x 2 processes x 4 micro-batches," in report()
    assert "32 sequences = 32 per process x 1 process x 1 micro-batch," in report(
        changed(training=TrainingConfig(train_batch_size=32, max_steps=7500)), replicas=1
    )


def test_the_report_says_what_processes_share():
    assert "parallel" not in report()
    text = report(changed(parallel=ParallelConfig(tensor=4)))
    assert "256 sequences = 32 per replica x 2 replicas x 4 micro-batches," in text
    assert "4 processes share the layers, embedding and head of a replica" in text
    text = report(changed(parallel=ParallelConfig(tensor=4, sequence=True)))
    assert "embedding, head and tokens of a replica" in text


def test_the_report_is_aligned_and_fits_a_screen():
    lines = report().splitlines()
    assert lines[0] == "run bert_large"
    assert len(lines) <= 20 and max(map(len, lines)) <= 104
    assert all(line[:2] == "  " and line[11:13] == "  " and line[13] != " " for line in lines[1:])


def test_the_report_tells_model_data_steps_and_origin():
    text = " ".join(report().split())
    for part in (
        "bert: 24 layers, hidden size 1,024, 336.2 M parameters (303.3 M without embeddings)",
        "bf16: the GPU has it",
        "2 x NVIDIA H200",
        "3,211 documents, 1,234,567 tokens, 9,600 samples per epoch, 512 samples held out",
        "wordpiece, trained on the sources, 8,192 symbols",
        "7,500, 1,200 of them done; 168.00 epochs to go, of up to 32,768 tokens a step, 206.4 M in all",
        "ZeRO stage 2",
        "saves at the end; the last 3 stay",
        "evaluates at the end",
        "lamb, lr 0.011, betas 0.9 0.999, weight decay 0.01, deepspeed convention,"
        " trust ratio from 0.01 to 0.3, no bias correction",
        "EE: warm-up of 450 steps, then x 0.9 every 250 steps, plus 0.001 throughout",
        "from checkpoint step00001200 of runs/bert_large",
    ):
        assert part in text


def test_the_report_tells_of_each_phase_and_counts_its_epochs_and_tokens():
    config = changed(
        phases=[
            PhaseConfig(
                from_step=7000,
                data=DataChanges(max_seq_length=512),
                training=TrainingChanges(train_batch_size=64),
                optimizer=OptimizerChanges(lr=2e-3),
            )
        ],
        training=TrainingConfig(train_batch_size=256, micro_batch_size=32, max_steps=7500),
    )
    longer = dataclasses.replace(DATA, train=SimpleNamespace(num_samples=2400))
    text = " ".join(report(config, data=[DATA, longer]).split())
    assert "phase 1 steps 1 to 7,000: 256 sequences, 32 in a micro-batch, of up to 128 tokens, lr 0.011 " in text
    second = (
        "phase 2 steps 7,001 to 7,500: 64 sequences, 32 in a micro-batch, of up to 512 tokens, lr 0.002 with a new EE"
    )
    assert f"{second} schedule; 2,400 samples per epoch, 512 held out; EE: warm-up of 30 steps, then" in text
    to_go = 5800 * 256 / 9600 + 500 * 64 / 2400
    assert f"{to_go:,.2f} epochs to go, of up to 32,768 tokens a step, 206.4 M in all" in text
    assert "EE: warm-up of 420 steps, then" in text, "the schedule of the start ends where the second begins"


def test_the_report_tells_how_a_batch_grows():
    training = TrainingConfig(
        train_batch_size=256, micro_batch_size=32, max_steps=7500, batch_warmup_from=64, batch_warmup_steps=1000
    )
    text = " ".join(report(changed(training=training)).split())
    assert "4 micro-batches, each up to 128 tokens, growing from 64 sequences over the first 1,000 steps" in text
    assert "of up to 32,768 tokens a step" in text


def test_the_report_tells_how_samples_are_packed():
    assert "packing" not in report()
    packing = Packing(rows=9600, samples=20_832, tokens=1_216_512, size=128)
    text = " ".join(
        report(data=dataclasses.replace(DATA, sizes=dataclasses.replace(DATA.sizes, packing=packing))).split()
    )
    assert "1,234,567 tokens, 9,600 rows per epoch, 512 rows held out" in text
    assert "packing 20,832 samples in 9,600 rows, 2.17 in each, 99.0% filled" in text


def test_the_report_of_a_new_run_without_validation_data_claims_nothing_it_does_not_have():
    config = changed(
        optimizer=OptimizerConfig(type="lamb", min_coeff=None, max_coeff=None), schedule=ScheduleConfig(type="wsd")
    )
    data = dataclasses.replace(DATA, validation=None)
    text = " ".join(report(config, data=data, step=0, start="new weights").split())
    assert "9,600 samples per epoch, none held out" in text
    assert "steps 7,500; 200.00 epochs to go, of up to 32,768 tokens a step, 245.8 M in all optimizer" in text
    assert "evaluates" not in text
    assert "start from new weights" in text
    assert "trust ratio unbounded" in text
    assert "wsd: no warm-up, then constant, and decay to 0 over the last 20% of 7,500 steps" in text


def test_the_report_tells_cadences_and_the_shares_of_sources():
    config = changed(
        checkpoint=CheckpointConfig(save_every_steps=100, keep_last=2, keep_every_steps=1000),
        eval=EvalConfig(every_steps=50, batches=1),
        data=DataConfig(sources=[{"kind": "builtin"}, {"kind": "text", "path": "a.txt"}]),
    )
    data = dataclasses.replace(DATA, train=SimpleNamespace(num_samples=9600, draws=[2400, 7200]))
    text = " ".join(report(config, data=data).split())
    assert "saves every 100 steps and at the end; the last 2 stay, and every 1,000 steps" in text
    assert "evaluates every 50 steps and at the end, of at most 1 micro-batch" in text
    assert "sources builtin 25.0%, text a.txt 75.0%" in text


def test_a_run_that_has_gone_further_than_it_is_asked_to_has_no_epochs_to_go():
    by_tokens = report(changed(training=TrainingConfig(train_batch_size=256, max_tokens=245_750_000)))
    assert "7,500 for training.max_tokens 245.8 M, 1,200 of them done; 168.00 epochs" in " ".join(by_tokens.split())
    by_hours = TrainingConfig(train_batch_size=256, max_hours=2)
    timed = changed(training=by_hours, schedule=ScheduleConfig(type="wsd", warmup_proportion=0.06))
    by_time = " ".join(report(timed, total_steps=None).split())
    assert "as many as training.max_hours 2 has time for, 0s of them over at step 1,200, of up to 32,768" in by_time
    assert "warm-up of 6.0% of the time, then constant, and decay to 0 over the last 20% of the time" in by_time
    assert "7,500, 9,000 of them done; 0.00 epochs to go" in report(step=9000)


def test_a_finished_run_is_told_with_what_can_be_done_with_it():
    lines = summary(progress=FINISHED, finished=True).splitlines()
    assert lines[0] == "run bert_large finished"
    assert [line.split(maxsplit=2)[2] for line in lines[-3:]] == [
        'xformer-train fill-mask --run runs/bert_large "a [MASK]"',
        "xformer-train export --run runs/bert_large --to DIR",
        "tensorboard --logdir runs/bert_large",
    ]
    config = changed(model=ModelConfig(type="gpt"), output_dir="my runs", logging=LoggingConfig(tensorboard=False))
    lines = summary(config, progress=FINISHED, finished=True).splitlines()
    assert lines[-2].endswith("""  xformer-train sample --run 'my runs/bert_large' --prompt "Once\"""")


def test_every_schedule_and_a_billion_parameters_can_be_reported():
    for kind in ("EE", "LE", "EP", "linear", "cosine", "constant", "wsd"):
        config = changed(schedule=ScheduleConfig(type=kind, warmup_steps=1))
        text = report(config, parameters=(1_310_000_000, 42_000))
        assert f"{kind}: warm-up of 1 step, then" in text
        assert "1.31 B parameters (42,000 without embeddings)" in text
    text = report(changed(schedule=ScheduleConfig(type="wsd", decay="1-sqrt")), parameters=(1, 1))
    assert "then constant, and 1-sqrt decay to 0 over the last 20% of" in text


def test_adamw_is_reported_without_what_only_lamb_has():
    text = report(changed(optimizer=OptimizerConfig(type="adamw", lr=1e-4)))
    assert "  adamw, lr 0.0001, betas 0.9 0.999, weight decay 0.01\n" in text


def test_muon_says_what_it_multiplies_in_and_what_adamw_steps():
    text = " ".join(report(changed(optimizer=OptimizerConfig(type="muon", lr=0.01, adamw_lr=0.003))).split())
    assert (
        "muon, lr 0.01, betas 0.9 0.999, weight decay 0.01, momentum 0.95 with Nesterov, 5 Newton-Schulz steps in bf16, "
        "match_rms_adamw, AdamW with lr 0.003 outside the layers' matrices" in text
    )


def test_the_summary_divides_the_samples_of_this_start_by_the_time_in_steps():
    text = summary()
    assert "1,920 sequences/s on average" in text
    assert "1,500 of 7,500 (300 since this start)" in text
    assert "3m53s, 40s of it in steps" in text
    assert "best loss 1.8234 at step 1,400" in text
    assert text.startswith("run bert_large stopped as asked\n")
    assert "1,500 in training.max_hours 2 (300 since" in summary(
        changed(training=TrainingConfig(max_hours=2)), end=None
    )


def test_the_command_to_resume_stays_on_one_line_as_it_was_given(monkeypatch):
    words = (
        "--config configs/bert_large_seq128.yaml --output_dir=/data/my-runs --seed 1 --set training.gradient_clipping=0"
    )
    monkeypatch.setattr(sys, "argv", ["/bin/xformer-train", *words.split(), "--job_name", "my run"])
    assert summary().splitlines()[-1].endswith(f"  xformer-train {words} --job_name 'my run' --resume auto")
    monkeypatch.setattr(sys, "argv", ["xformer-train", "--resume", "auto", *words.split()])
    assert summary().splitlines()[-1].endswith(f"  xformer-train --resume auto {words}")


def test_a_run_without_steps_evaluation_or_checkpoint_has_a_summary():
    watch = SimpleNamespace(training_time_s=0.0)
    text = summary(progress=Progress(), watch=watch, saved_id="", steps=0, samples=0)
    assert "n/a sequences/s" in text
    assert "held-out" not in text and "resume" not in text
    assert "checkpoint  none" in text


def test_a_path_is_never_divided():
    """textwrap breaks at hyphens too, and of half a path nothing can be copied."""
    path = "/data/" + "many-words-joined-by-hyphens/" * 6 + "checkpoints/step00001200"
    assert path in report(start=path)
