"""Runs that are resumed with another number of processes, another ZeRO stage and another tensor-parallel size; gloo."""

import json

import pytest
from distributed.workers.runs import runs_worker
from helpers.runs import BERT, GPT, losses, metrics, write_config
from helpers.spawn import free_port, run_processes

from xformer_train.launcher.checkpoint.resharding import Saved
from xformer_train.launcher.processes.topology import quiet

SAME = {  # without dropout, the number of processes changes nothing but the order of sums
    "model__hidden_dropout_prob": 0.0,
    "model__attention_probs_dropout_prob": 0.0,
    "model__num_attention_heads": 4,
    "model__intermediate_size": 32,
    "training__micro_batch_size": None,
    "schedule__type": "constant",
    "schedule__total_steps": None,
    "optimizer__lr": 0.01,
    "checkpoint__keep_last": None,
}
# (processes, tensor-parallel size, ZeRO stage) of each part of a run, of three steps each
CHAIN = [(2, 1, 0), (1, 1, 1), (4, 2, 3), (2, 1, 2)]
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    quiet(debug=False)
    path = tmp_path_factory.mktemp("chain")
    lamb = {"optimizer__type": "lamb", "training__gradient_clipping": 0.5}
    bert, gpt = write_config(path, BERT, **SAME, **lamb, name="bert"), write_config(path, GPT, **SAME, name="gpt")
    last = f"training.max_steps={STEPS * len(CHAIN)}"
    straight = [
        (bert, ["name=bert_straight", last], False, free_port()),
        (gpt, ["name=gpt_straight", last, "training.precision=bf16"], False, free_port()),
    ]
    for part, (processes, tensor, stage) in enumerate(CHAIN):
        sets = [
            f"training.max_steps={STEPS * (part + 1)}",
            f"parallel.tensor={tensor}",
            f"deepspeed.zero_optimization.stage={stage}",
        ]
        runs = [
            (bert, ["name=bert_chain", *sets], part > 0, free_port()),
            (gpt, ["name=gpt_chain", "training.precision=bf16", *sets], part > 0, free_port()),
        ]
        if processes == 1:
            runs += straight
        printed = run_processes(runs_worker, processes, processes, runs)[0]
        assert all("finished" in text for text in printed), printed
    return path


def test_a_chain_of_resumes_trains_as_one_straight_run(folder):
    """Losses depend on weights and moments of all steps before, of LAMB on whole tensors."""
    ours, theirs = (folder / "runs" / name for name in ("bert_chain", "bert_straight"))
    assert sorted(losses(ours)) == list(range(1, STEPS * len(CHAIN) + 1))
    # fp32 sums in another order, fed back through the optimizer
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)
    norms = [[row["grad_norm"] for row in metrics(run) if "grad_norm" in row] for run in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=2e-3)


def test_a_chain_in_bf16_keeps_its_fp32_weights(folder):
    """bf16 gradients summed in another order differ in the third digit."""
    ours, theirs = (losses(folder / "runs" / name) for name in ("gpt_chain", "gpt_straight"))
    assert ours == pytest.approx(theirs, rel=5e-3)


def test_fp32_weights_of_a_bf16_run_are_loaded_bit_for_bit(folder):
    """With a learning rate of nothing, a run elsewhere saves the weights that it loaded."""
    newest = sorted((folder / "runs/gpt_chain/checkpoints").glob("step*"))[-1]
    source = Saved(newest, json.loads((newest / "state.json").read_text()))
    sets = [
        "training.precision=bf16",
        "name=gpt_copy",
        f"load.path={newest}",
        f"training.max_steps={STEPS * len(CHAIN) + 1}",
        "optimizer.lr=1e-30",
        "parallel.tensor=2",
        "deepspeed.zero_optimization.stage=3",
    ]
    run_processes(runs_worker, 4, 4, [(folder / "gpt.yaml", sets, False, free_port())])
    (copied,) = (folder / "runs/gpt_copy/checkpoints").glob("step*")
    copy = Saved(copied, json.loads((copied / "state.json").read_text()))
    assert set(copy.names) == set(source.names)
    for parameter in source.names:
        assert copy.whole(parameter, "weight").equal(source.whole(parameter, "weight").float()), parameter
        assert int(copy.state(parameter)["step"]) == int(source.state(parameter)["step"]) + 1
