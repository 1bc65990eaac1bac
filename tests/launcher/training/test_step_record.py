"""What is said of steps without a token to predict."""

from types import SimpleNamespace

import pytest
import torch

from xformer_train.launcher.training import step_record
from xformer_train.launcher.training.step_record import Watch
from xformer_train.launcher.training.steps import StepResult, mean_losses

SETUP = SimpleNamespace(topology=SimpleNamespace(is_main=True))


def steps(watch, *predictions):
    for _ in watch.timed(()):
        pass
    for count in predictions:
        watch.step_ends(torch.tensor([count, 8, 100], dtype=torch.float64), 8, 128)


def test_a_part_of_the_loss_without_terms_is_no_zero():
    sums = {"mlm": torch.tensor(0.0), "nsp": torch.tensor(4.0)}
    result = StepResult(sums, torch.tensor([0.0, 8.0, 100.0], dtype=torch.float64))
    losses = mean_losses(result, SimpleNamespace(sum=lambda value: value))
    assert losses["nsp"] == 0.5 and losses["mlm"] != losses["mlm"]


def test_steps_without_a_token_to_predict_are_told_of_once_and_refused_when_they_go_on(capsys):
    watch = Watch()
    steps(watch, 5, 0, 0)
    step_record._check_predicts(SETUP, 3, watch)
    steps(watch, *[0] * 17)
    step_record._check_predicts(SETUP, 20, watch)
    assert capsys.readouterr().err.count("step 3: no token to predict in 2 steps in a row, so there is no loss") == 1
    steps(watch, 1, *[0] * 19)
    step_record._check_predicts(SETUP, 40, watch)
    steps(watch, 0)
    with pytest.raises(ValueError, match="step 41: no token to predict in 20 steps in a row"):
        step_record._check_predicts(SETUP, 41, watch)
    assert capsys.readouterr().err == ""
