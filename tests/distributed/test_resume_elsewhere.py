"""Runs that are resumed with another number of processes, another ZeRO stage and another tensor-parallel size; gloo."""

import json

import pytest
import torch
from distributed.workers.runs import runs_worker
from helpers.runs import BERT, GPT, LLAMA, MODERNBERT, losses, metrics, write_config
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
    "training__ema_decay": 0.75,
    "data__validation_fraction": 0.2,
    "eval__every_steps": 3,
    "eval__batches": 2,
}
# (processes, tensor-parallel size, ZeRO stage) of each part of a run, of three steps each
CHAIN = [(2, 1, 0), (1, 1, 1), (4, 2, 3), (2, 1, 2)]
STEPS = 3


LAMB = {"optimizer__type": "lamb", "training__gradient_clipping": 0.5}
MUON = {"optimizer__type": "muon", "training__gradient_clipping": 0.5}
BF16 = {"training__precision": "bf16"}
MODELS = {"bert": (BERT, LAMB), "gpt": (GPT, BF16), "modernbert": (MODERNBERT, MUON), "llama": (LLAMA, BF16)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    quiet(debug=False)
    path = tmp_path_factory.mktemp("chain")
    configs = {name: write_config(path, base, **SAME, **keys, name=name) for name, (base, keys) in MODELS.items()}
    last = f"training.max_steps={STEPS * len(CHAIN)}"
    straight = [(file, [f"name={name}_straight", last], False, free_port()) for name, file in configs.items()]
    for part, (processes, tensor, stage) in enumerate(CHAIN):
        sets = [
            f"training.max_steps={STEPS * (part + 1)}",
            f"parallel.tensor={tensor}",
            f"deepspeed.zero_optimization.stage={stage}",
        ]
        runs = [(file, [f"name={name}_chain", *sets], part > 0, free_port()) for name, file in configs.items()]
        if processes == 1:
            runs += straight
        printed = run_processes(runs_worker, processes, processes, runs)[0]
        assert all("finished" in text for text in printed), printed
    return path


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_a_chain_of_resumes_trains_as_one_straight_run(folder, name):
    """Losses depend on weights and moments of all steps before, of LAMB and Muon on whole tensors."""
    ours, theirs = (folder / "runs" / f"{name}_{kind}" for kind in ("chain", "straight"))
    assert sorted(losses(ours)) == list(range(1, STEPS * len(CHAIN) + 1))
    # fp32 sums in another order, fed back through the optimizer
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)
    norms = [[row["grad_norm"] for row in metrics(run) if "grad_norm" in row] for run in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=2e-3)


@pytest.mark.parametrize(("name", "rel"), [("bert", 1e-4), ("modernbert", 1e-4), ("gpt", 5e-3), ("llama", 5e-3)])
def test_the_mean_of_the_weights_goes_through_a_chain(folder, name, rel):
    """It is measured at the end of each part, on the same samples: a batch has as many, however many processes share them."""
    rows = [metrics(folder / "runs" / f"{name}_{kind}") for kind in ("chain", "straight")]
    ours, theirs = ([row["val_ema"] for row in both if "val_ema" in row] for both in rows)
    assert len(ours) == len(CHAIN)
    assert ours == pytest.approx(theirs, rel=rel)
    assert ours[-1] != pytest.approx(rows[0][-1]["val_loss"], rel=10 * rel)


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_a_chain_in_bf16_keeps_its_fp32_weights(folder, name):
    """bf16 gradients summed in another order differ in the third digit."""
    ours, theirs = (losses(folder / "runs" / f"{name}_{kind}") for kind in ("chain", "straight"))
    assert ours == pytest.approx(theirs, rel=5e-3)


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_fp32_weights_of_a_bf16_run_are_loaded_bit_for_bit(folder, name):
    """With a learning rate of nothing, a run elsewhere saves the weights that it loaded."""
    newest = sorted((folder / f"runs/{name}_chain/checkpoints").glob("step*"))[-1]
    source = Saved(newest, json.loads((newest / "state.json").read_text()))
    sets = [
        f"name={name}_copy",
        f"load.path={newest}",
        f"training.max_steps={STEPS * len(CHAIN) + 1}",
        "optimizer.lr=1e-30",
        "parallel.tensor=2",
        "deepspeed.zero_optimization.stage=3",
    ]
    run_processes(runs_worker, 4, 4, [(folder / f"{name}.yaml", sets, False, free_port())])
    (copied,) = (folder / f"runs/{name}_copy/checkpoints").glob("step*")
    copy = Saved(copied, json.loads((copied / "state.json").read_text()))
    assert set(copy.names) == set(source.names)
    for parameter in source.names:
        assert copy.whole(parameter, "weight").equal(source.whole(parameter, "weight").float()), parameter
        assert int(copy.state(parameter)["step"]) == int(source.state(parameter)["step"]) + 1
        mean = torch.lerp(source.whole(parameter, "ema"), source.whole(parameter, "weight"), 0.25)
        torch.testing.assert_close(copy.whole(parameter, "ema"), mean, rtol=0, atol=1e-8)
