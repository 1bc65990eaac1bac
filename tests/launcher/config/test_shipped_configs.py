"""Every shipped config trains, scaled down; so does the command of DeepSpeed's transformer-kernel tutorial."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.runs import losses, write_text
from helpers.spawn import PATIENCE_S, free_port

from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.processes.topology import quiet

quiet(debug=False)

from xformer_train.launcher.training.train import run  # noqa: E402 - DeepSpeed is quiet only when told before

CONFIGS = Path(__file__).parents[3] / "configs"
DEEPSPEED_FILE = "deepspeed_bsz32K_lamb_config_seq512.json"


def scaled_down(folder):
    """`--set` values that leave a config's objective, optimizer and schedule as they are, and everything else tiny."""
    text = folder / "text.txt"
    if not text.exists():
        write_text(text, num_documents=150)
    return [
        "model.hidden_size=16",
        "model.intermediate_size=24",
        "model.num_hidden_layers=2",
        "model.num_attention_heads=2",
        f"data.sources=[{{kind: text, path: {text}}}]",
        f"data.cache_dir={folder / 'cache'}",
        "data.validation_fraction=0.1",
        "tokenizer={type: bytes}",
        "training.train_batch_size=4",
        "training.micro_batch_size=2",
        "training.precision=fp32",
        "schedule.warmup_steps=1",
        "eval.every_steps=null",
        f"output_dir={folder / 'runs'}",
    ]


@pytest.mark.parametrize("name", sorted(p.name for p in CONFIGS.iterdir() if p.name != DEEPSPEED_FILE))
def test_each_config_trains_scaled_down(name, tmp_path):
    sets = [*scaled_down(tmp_path), "training.max_steps=2", "schedule.total_steps=2"]
    if name == "bert_large_seq512.yaml":
        run(load_config(CONFIGS / "bert_large_seq128.yaml", sets), resume=False)
        sets.append(f"load.path={tmp_path / 'runs' / 'bert_large_seq128'}")
    config = load_config(CONFIGS / name).config
    if config.model.num_key_value_heads is not None:
        sets.append("model.num_key_value_heads=1")
    if config.phases is not None:
        phase = ("from_step=1", "training={train_batch_size: 6}", "schedule.warmup_proportion=null")
        sets += [f"phases.0.{one}" for one in phase]
    if config.training.batch_warmup_from is not None:
        sets += ["training.batch_warmup_from=2", "training.batch_warmup_steps=1"]
    run(load_config(CONFIGS / name, sets), resume=False)
    assert (tmp_path / "runs" / Path(name).stem / "checkpoints" / "latest").exists()


def test_the_tutorials_command_runs_after_a_first_phase(tmp_path):
    first = [
        *scaled_down(tmp_path),
        "training.max_steps=2",
        "schedule.total_steps=2",
        "checkpoint.id_format=epoch{epoch}_step{step}",
    ]
    run(load_config(CONFIGS / "bert_large_seq128.yaml", first), resume=False)

    numbers = json.loads((CONFIGS / DEEPSPEED_FILE).read_text())
    numbers |= {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2}
    (tmp_path / DEEPSPEED_FILE).write_text(json.dumps(numbers))
    (tmp_path / "bert_large_lamb.json").write_text((CONFIGS / "bert_large_lamb.json").read_text())
    script = f"""
        deepspeed --module xformer_train.launcher \\
        --cf bert_large_lamb.json \\
        --max_seq_length 512 \\
        --print_steps 100 \\
        --deepspeed \\
        --deepspeed_transformer_kernel \\
        --deepspeed_config {DEEPSPEED_FILE} \\
        --rewarmup \\
        --lr_schedule "EE" \\
        --lr_offset 0.0 \\
        --attention_dropout_checkpoint \\
        --load_training_checkpoint ${{CHECKPOINT_BASE_PATH}} \\
        --load_checkpoint_id ${{CHECKPOINT_EPOCH150_NAME}} """
    small = " ".join(f"--set '{one}'" for one in [*scaled_down(tmp_path), "training.max_steps=2"])
    # DeepSpeed's launcher takes the same port on every machine, which another run on this one may have.
    script = script.replace("deepspeed --module", f"deepspeed --master_port {free_port()} --module")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "CHECKPOINT_BASE_PATH": str(tmp_path / "runs" / "bert_large_seq128"),
        "CHECKPOINT_EPOCH150_NAME": "epoch0",
    }
    done = subprocess.run(
        ["sh", "-c", script + small],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert "epoch0_step2 (weights, optimizer" in " ".join(done.stdout.split())
    assert sorted(losses(tmp_path / "runs" / "bert_large_lamb")) == [4]
