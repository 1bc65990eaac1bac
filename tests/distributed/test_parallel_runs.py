"""Whole runs with tensor and sequence parallelism against the same run in one process; gloo."""

import json

import pytest
import torch
from distributed.workers.runs import runs_worker
from helpers.runs import BERT, GPT, LLAMA, MODERNBERT, losses, metrics, write_config
from helpers.spawn import free_port, run_processes

from xformer_train.launcher.checkpoint import loading
from xformer_train.launcher.processes.topology import quiet

STEPS = 6
ALIKE = {  # without dropout, the number of processes changes nothing but the order of sums
    "model__hidden_dropout_prob": 0.0,
    "model__attention_probs_dropout_prob": 0.0,
    "model__num_attention_heads": 4,
    "model__intermediate_size": 32,
    "training__micro_batch_size": None,
    "training__max_steps": STEPS,
    "schedule__total_steps": None,
    "data__validation_fraction": 0.2,
    "optimizer__lr": 0.01,
    "checkpoint__keep_last": None,
}
TWO = "parallel.tensor=2"
SEQUENCE = "parallel.sequence=true"


def named(name, *sets):
    return [f"name={name}", *sets]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs of BERT with LAMB and of GPT with AdamW in one process, in two that share a replica, in four of two replicas."""
    quiet(debug=False)
    folder = tmp_path_factory.mktemp("runs")
    lamb = {"optimizer__type": "lamb", "training__gradient_clipping": 0.5}
    bert = write_config(folder, BERT, **ALIKE, **lamb, name="bert")
    gpt = write_config(folder, GPT, **ALIKE, name="gpt")
    modernbert = write_config(folder, MODERNBERT, **ALIKE, **lamb, name="modernbert")
    llama = write_config(folder, LLAMA, **ALIKE, name="llama")
    half = f"training.max_steps={STEPS // 2}"
    printed = {}

    def start(world_size, *runs):
        with_ports = [(*run, free_port()) for run in runs]
        outputs = run_processes(runs_worker, world_size, world_size, with_ports)[0]
        printed.update({sets[0].removeprefix("name="): text for (_, sets, _), text in zip(runs, outputs, strict=True)})

    start(
        1,
        (bert, named("bert1"), False),
        (gpt, named("gpt1"), False),
        (modernbert, named("modernbert1"), False),
        (llama, named("llama1"), False),
        (bert, named("bert1to2", half), False),
    )
    start(
        2,
        (bert, named("bert2", TWO), False),
        (bert, named("bert2to1", TWO, half), False),
        (bert, named("bert1to2", TWO, SEQUENCE), True),
        (modernbert, named("modernbert2", TWO), False),
        (gpt, named("gpt2fp8", TWO, SEQUENCE, "training.precision=fp8", "model.hidden_size=64"), False),
        (llama, named("llama2fp8", TWO, SEQUENCE, "training.precision=fp8", "model.hidden_size=64"), False),
    )
    start(
        4,
        (gpt, named("gpt4", TWO, SEQUENCE), False),
        (bert, named("bert4zero1", TWO, "deepspeed.zero_optimization.stage=1"), False),
        (gpt, named("gpt4zero1", TWO, "deepspeed.zero_optimization.stage=1"), False),
        (gpt, named("gpt4zero2", TWO, SEQUENCE, "deepspeed.zero_optimization.stage=2", half), False),
        (gpt, named("gpt4zero2", TWO, SEQUENCE, "deepspeed.zero_optimization.stage=2"), True),
        (llama, named("llama4zero2", TWO, SEQUENCE, "deepspeed.zero_optimization.stage=2"), False),
    )
    start(1, (bert, named("bert2to1"), True))
    (folder / "printed.json").write_text(json.dumps(printed))
    return folder


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("bert2", "bert1"),
        ("bert4zero1", "bert1"),
        ("gpt4", "gpt1"),
        ("gpt4zero1", "gpt1"),
        ("gpt4zero2", "gpt1"),  # resumed half way
        ("bert2to1", "bert1"),  # resumed half way, by one process
        ("bert1to2", "bert1"),
        ("modernbert2", "modernbert1"),
        ("llama4zero2", "llama1"),
    ],
)
def test_a_shared_model_trains_as_a_whole_one(root, name, like):
    """Each loss depends on the gradients, the clipping and LAMB's norms of the steps before it."""
    ours, theirs = root / "runs" / name, root / "runs" / like
    assert sorted(losses(ours)) == list(range(1, STEPS + 1))
    # fp32 sums in another order, fed back through the optimizer
    assert losses(ours) == pytest.approx(losses(theirs), rel=5e-5)
    norms = [[row["grad_norm"] for row in metrics(run) if "grad_norm" in row] for run in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=5e-4)
    assert metrics(ours)[-1]["val_loss"] == pytest.approx(metrics(theirs)[-1]["val_loss"], rel=5e-5)


def test_the_weights_of_a_checkpoint_are_whole_whatever_shared_them(root):
    whole, joined = (loading.weights(root / f"runs/{name}/checkpoints/step{STEPS:08d}") for name in ("bert1", "bert2"))
    assert whole.keys() == joined.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(joined[name], weight, rtol=0, atol=2e-5)  # LAMB moves weights by about 0.01 a step


def test_the_report_says_what_is_shared(root):
    printed = json.loads((root / "printed.json").read_text())
    text = " ".join(printed["gpt4"].split())
    assert "4 per replica x 2 replicas x 1 micro-batch" in text
    assert "2 processes share the layers, embedding, head and tokens of a replica" in text
    parameters = [
        line.split(",")[-1] for name in ("gpt1", "gpt4") for line in printed[name].splitlines() if " model " in line
    ]
    assert parameters[0] == parameters[1]


@pytest.mark.parametrize("name", ["gpt2fp8", "llama2fp8"])
def test_fp8_says_that_it_is_emulated_and_trains(root, name):
    printed = json.loads((root / "printed.json").read_text())
    text = " ".join(printed[name].split())
    assert "fp8: as the config says" in text
    assert "FP8 emulated: same rounding, no speed" in text
    first, *_, last = losses(root / "runs" / name).values()
    assert last < first - 0.1
