"""The number of threads of a run, which changes while it trains and evaluates."""

import itertools

import pytest
import torch
from helpers.runs import BERT, GPT, LLAMA, losses, merged, metrics, weights, write_config

from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.processes.topology import quiet

quiet(debug=False)

from xformer_train.launcher.training import prepare  # noqa: E402 - DeepSpeed is quiet only when told before
from xformer_train.launcher.training.train import run  # noqa: E402

WIDE = {  # so that torch divides its operators among threads
    "model.hidden_size": 64,
    "model.intermediate_size": 96,
    "data.validation_fraction": 0.2,
    "eval.batches": 2,
    "training.train_batch_size": 24,
    "training.micro_batch_size": 24,
    "training.max_steps": 5,
}
KINDS = {
    "bert, lamb": merged(BERT, WIDE | {"optimizer.type": "lamb", "training.gradient_clipping": 0.5}),
    "gpt, muon": merged(GPT, WIDE | {"optimizer.type": "muon"}),
    "llama, adamw": merged(LLAMA, WIDE),
}


class OtherNumberEachTime:
    """In the place of `Threads`: another number after each step, and at each look."""

    def __init__(self):
        self.numbers, self.steps, self.looks = itertools.cycle((2, 1, 3)), 0, 0

    def step_taken(self):
        self.steps += 1
        torch.set_num_threads(next(self.numbers))

    def look(self):
        self.looks += 1
        torch.set_num_threads(next(self.numbers))


@pytest.mark.parametrize("base", KINDS.values(), ids=KINDS)
def test_a_run_whose_number_of_threads_changes_equals_one_on_one_thread_bit_for_bit(base, tmp_path, monkeypatch):
    path, before = write_config(tmp_path, base), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(load_config(path, ["name=steady"]), resume=False)
        changing = OtherNumberEachTime()
        monkeypatch.setattr(prepare, "threads_of_run", lambda *of_run: changing)
        run(load_config(path, ["name=changing"]), resume=False)
        assert torch.get_num_threads() == 1, "a run leaves the number as it was"
    finally:
        torch.set_num_threads(before)
    steady, other = (tmp_path / "runs" / name for name in ("steady", "changing"))
    assert losses(steady) == losses(other)
    assert [row["val_loss"] for row in metrics(steady) if "val_loss" in row] == [
        row["val_loss"] for row in metrics(other) if "val_loss" in row
    ]
    ours, theirs = (weights(next((folder / "checkpoints").glob("step*"))) for folder in (steady, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (changing.steps, changing.looks) == (5, 2)
