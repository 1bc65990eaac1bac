import dataclasses

from xformer_train.launcher.config.optimizers import OptimizerConfig
from xformer_train.launcher.config.schema import ScheduleConfig
from xformer_train.launcher.reporting.report import ClosingFacts, StartupFacts, closing_summary, startup_report

STARTUP = StartupFacts(
    name="bert_large",
    run_dir="runs/bert_large",
    model_type="bert",
    num_layers=24,
    hidden_size=1024,
    num_parameters=336_226_108,
    num_parameters_without_embeddings=303_301_632,
    train_batch_size=256,
    micro_batch_size=32,
    num_replicas=2,
    tensor_parallel=1,
    sequence_parallel=False,
    gradient_accumulation_steps=4,
    max_seq_length=128,
    precision="bf16",
    precision_reason="the GPU has it",
    kernels="Triton, for CUDA devices",
    devices="2 x NVIDIA H200",
    num_documents=3211,
    num_tokens=1_234_567,
    num_samples=9600,
    num_held_out_samples=512,
    tokenizer_kind="wordpiece, trained on the sources",
    vocab_size=8192,
    start_step=1200,
    max_steps=7500,
    schedule_steps=7500,
    optimizer=OptimizerConfig(type="lamb", lr=11e-3, max_coeff=0.3, bias_correction=False, convention="deepspeed"),
    schedule=ScheduleConfig(type="EE", warmup_proportion=0.06, lr_offset=1e-3, decay_rate=0.9, decay_steps=250),
    resumed_from="checkpoint step00001200 of runs/bert_large",
)
CLOSING = ClosingFacts(
    name="bert_large",
    run_dir="runs/bert_large",
    ending="stopped by SIGTERM",
    step=1500,
    max_steps=7500,
    steps_now=300,
    samples=384_000,
    samples_now=76_800,
    training_time_s=40.0,
    wall_time_s=233.0,
    best_val_loss=1.8234,
    best_val_step=1400,
    checkpoint_id="step00001500",
    resume_command="xformer-train --config configs/bert_large_seq128.yaml --output_dir '/data/my runs' --resume auto --seed 1",
)


def test_the_report_derives_the_batch_in_words():
    assert "256 sequences = 32 per process x 2 processes x 4 micro-batches," in startup_report(STARTUP)
    single = dataclasses.replace(STARTUP, train_batch_size=32, num_replicas=1, gradient_accumulation_steps=1)
    assert "32 sequences = 32 per process x 1 process x 1 micro-batch," in startup_report(single)


def test_the_report_says_what_processes_share():
    assert "parallel" not in startup_report(STARTUP)
    shared = dataclasses.replace(STARTUP, tensor_parallel=4)
    text = startup_report(shared)
    assert "256 sequences = 32 per replica x 2 replicas x 4 micro-batches," in text
    assert "4 processes share the layers, embedding and head of a replica" in text
    assert "embedding, head and tokens of a replica" in startup_report(
        dataclasses.replace(shared, sequence_parallel=True)
    )


def test_the_report_is_aligned_and_fits_a_screen():
    lines = startup_report(STARTUP).splitlines()
    assert lines[0] == "run bert_large"
    assert len(lines) <= 20 and max(map(len, lines)) <= 104
    assert all(line[:2] == "  " and line[11:13] == "  " and line[13] != " " for line in lines[1:])


def test_the_report_tells_model_data_steps_and_origin():
    text = " ".join(startup_report(STARTUP).split())
    for part in (
        "bert: 24 layers, hidden size 1,024, 336.2 M parameters (303.3 M without embeddings)",
        "bf16: the GPU has it",
        "3,211 documents, 1,234,567 tokens, 9,600 samples per epoch, 512 samples held out",
        "wordpiece, trained on the sources, 8,192 symbols",
        "7,500, 1,200 of them done; 168.00 epochs to go",
        "lamb, lr 0.011, betas 0.9 0.999, weight decay 0.01, deepspeed convention,"
        " trust ratio from 0.01 to 0.3, no bias correction",
        "EE: warm-up of 450 steps, then x 0.9 every 250 steps, plus 0.001 throughout",
        "from checkpoint step00001200 of runs/bert_large",
    ):
        assert part in text


def test_the_report_of_a_new_run_on_a_stream_claims_nothing_it_does_not_know():
    facts = dataclasses.replace(
        STARTUP,
        num_documents=None,
        num_tokens=None,
        num_samples=None,
        num_held_out_samples=0,
        start_step=0,
        resumed_from=None,
        optimizer=OptimizerConfig(type="lamb", min_coeff=None, max_coeff=None),
        schedule=ScheduleConfig(type="wsd"),
    )
    text = " ".join(startup_report(facts).split())
    assert "data streamed, size unknown, none held out" in text
    assert "steps 7,500 optimizer" in text
    assert "start from new weights" in text
    assert "trust ratio unbounded" in text
    assert "wsd: no warm-up, then constant, and decay to 0 over the last 20% of 7,500 steps" in text


def test_every_schedule_and_a_billion_parameters_can_be_reported():
    for kind in ("EE", "LE", "EP", "linear", "cosine", "constant", "wsd"):
        schedule = ScheduleConfig(type=kind, warmup_steps=1)
        facts = dataclasses.replace(
            STARTUP, schedule=schedule, num_parameters=1_310_000_000, num_parameters_without_embeddings=42_000
        )
        text = startup_report(facts)
        assert f"{kind}: warm-up of 1 step, then" in text
        assert "1.31 B parameters (42,000 without embeddings)" in text


def test_the_summary_divides_the_samples_of_this_start_by_the_time_in_steps():
    text = closing_summary(CLOSING)
    assert "1,920 sequences/s on average" in text
    assert "1,500 of 7,500 (300 since this start)" in text
    assert "3m53s, 40s of it in steps" in text
    assert "best loss 1.8234 at step 1,400" in text
    assert text.startswith("run bert_large stopped by SIGTERM\n")


def test_the_command_to_resume_stays_on_one_line_as_it_was_given():
    assert closing_summary(CLOSING).splitlines()[-1].endswith(f"  {CLOSING.resume_command}")


def test_a_run_without_steps_evaluation_or_checkpoint_has_a_summary():
    facts = dataclasses.replace(
        CLOSING,
        step=0,
        steps_now=0,
        samples=0,
        samples_now=0,
        training_time_s=0.0,
        best_val_loss=None,
        best_val_step=None,
        checkpoint_id=None,
    )
    text = closing_summary(facts)
    assert "n/a sequences/s" in text
    assert "held-out" not in text and "resume" not in text
    assert "checkpoint  none" in text


def test_a_path_is_never_divided():
    """textwrap breaks at hyphens too, and of half a path nothing can be copied."""
    path = "/data/" + "many-words-joined-by-hyphens/" * 6 + "checkpoints/step00001200"
    assert path in startup_report(dataclasses.replace(STARTUP, resumed_from=path))
