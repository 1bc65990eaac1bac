"""Whole runs on a GPU: the number formats of a GPU, and steps that repeat."""

import math

import pytest
import torch
from helpers.runs import BERT, GPT, losses, merged, write_config

pytest.importorskip("deepspeed")
pytest.importorskip("pydantic")

from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.processes.topology import quiet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
UNPADDED = merged(BERT, {"layer.unpad": True})


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("base", [BERT, UNPADDED, GPT], ids=["bert", "bert without padding", "gpt"])
def test_a_run_learns_and_another_one_takes_the_same_steps(base, precision, tmp_path):
    quiet(debug=False)
    from xformer_train.launcher.training.train import run  # DeepSpeed is quiet only when told before

    path = write_config(tmp_path, base, training__precision=precision, optimizer__lr=0.01)
    for name in ("one", "other"):
        run(load_config(path, [f"name={name}"]), resume=False)
    one, other = (losses(tmp_path / "runs" / name) for name in ("one", "other"))
    assert all(math.isfinite(loss) for loss in one.values())
    assert one[12] < one[1] - 0.1
    assert one == other
