"""Models of transformers that are sharded, then swapped, against whole stock ones, in two processes."""

import pytest
from distributed.workers.shard_swap import CHECKS, worker
from helpers.spawn import run_processes

pytest.importorskip("transformers")

# Sums in another order in fp32: some units of the last place of values up to some tens, and their sums over tokens.
OUTPUTS, GRADIENTS = 1e-5, 1e-4


@pytest.fixture(scope="module")
def results():
    return run_processes(worker, 2)


def models_of(check):
    return pytest.mark.parametrize("name", next(names for one, names in CHECKS if one.__name__ == check))


def of(results, check, name):
    for by_process in results:
        result = by_process[check, name]
        assert "error" not in result, result["error"]
        yield result


def assert_below(errors, tolerance):
    name_and_error = max(errors.items(), key=lambda item: item[1])
    assert name_and_error[1] < tolerance, name_and_error


def assert_all(equal):
    assert all(equal.values()), [name for name, one in equal.items() if not one]


@models_of("equals_one_process")
def test_outputs_gradients_and_state_are_those_of_the_whole_stock_model(results, name):
    for result in of(results, "equals_one_process", name):
        assert_below(result["outputs"], OUTPUTS)
        assert len(result["outputs"]) >= 5  # loss, logits and three hidden states
        assert_below(result["gradients"], GRADIENTS)
        assert result["names"]
        assert_all(result["equal"])


@models_of("equals_one_process")
def test_marks_give_the_gradient_norm_of_the_whole_model(results, name):
    for result in of(results, "equals_one_process", name):
        ours, expected = result["norms"]
        assert ours == pytest.approx(expected, rel=1e-5)  # fp32 gradients


@models_of("reverts")
def test_revert_gives_the_sharded_model_back_bit_for_bit(results, name):
    for result in of(results, "reverts", name):
        assert result == {"facts": True, "names": True, "bits": True, "gradients": True, "outputs": {0.0}}


@models_of("steps")
def test_five_steps_have_the_same_losses_and_their_state_dicts_load(results, name):
    for result in of(results, "steps", name):
        ours, expected, loaded = result["losses"]
        assert ours == pytest.approx(expected, abs=1e-4)  # AdamW's first steps are signs, whatever the gradient's size
        assert loaded == pytest.approx(ours[-1:], abs=1e-5)
        assert_all(result["loaded"])


@models_of("dropout")
def test_dropout_keeps_replicas_equal_and_is_replayed_by_gradient_checkpointing(results, name):
    for result in of(results, "dropout", name):
        assert_all(result["equal"])
        assert set(result["replay"].values()) == {0.0}
        assert result["drops"] > 0


@models_of("attention_dropout")
def test_dropout_of_attention_differs_over_the_processes(results, name):
    for result in of(results, "attention_dropout", name):
        assert result["equal"] == [True, False]


@models_of("generation")
def test_greedy_generation_is_the_stock_models(results, name):
    for result in of(results, "generation", name):
        ours, expected = result["tokens"]
        assert ours == expected


@models_of("autocast")
def test_models_train_under_autocast(results, name):
    for result in of(results, "autocast", name):
        assert result["sound"]
        expected, ours = result["losses"]
        assert ours == pytest.approx(expected, rel=5e-3)  # bf16 has 8 bits


@models_of("refusals")
def test_other_orders_and_sequence_parallelism_are_refused_and_change_nothing(results, name):
    for result in of(results, "refusals", name):
        swapped, in_sequence, twice, again = result["said"]
        assert "swap(model) made one fused layer of the modules" in swapped
        assert "shard a model first, then swap it" in swapped
        assert "sharded with sequence_parallel=True" in in_sequence
        assert "is swapped already" in twice
        assert "is sharded already" in again
        assert_below(result["outputs"], OUTPUTS)
