"""Sharded models of transformers against whole ones, in groups of two and four of four processes."""

import pytest
from distributed.workers.shard import ALL, CHECKS, OVER_FOUR, SEQUENCE_PARALLEL, worker
from helpers.spawn import run_processes

# Sums in another order in fp32: some units of the last place of values up to some tens, and their sums over tokens.
OUTPUTS, GRADIENTS = 1e-5, 1e-4
ATTENTION_WHOLE = ("big_bird", "convbert", "longformer", "led", "fsmt", "xlnet", "funnel", "prophetnet", "mpnet_old")
WITHOUT_DROPOUT = ("llama", "gpt_neo", "gptj", "gpt_neox", "vit", "deit", "clip")  # by default


@pytest.fixture(scope="module")
def results():
    """By check, model and group size: what each process that ran it found."""
    found = {}
    for by_process in run_processes(worker, 4):
        for key, result in by_process.items():
            found.setdefault(key, []).append(result)
    return found


def of(results, check, name, size):
    found = results[check, name, size]
    assert len(found) == size
    for result in found:
        assert "error" not in result, result["error"]
    return found


def largest(errors):
    return max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize(("name", "size"), [*((name, 2) for name in ALL), *((name, 4) for name in OVER_FOUR)])
def test_outputs_gradients_and_state_are_those_of_one_process(results, name, size):
    for result in of(results, "equals_one_process", name, size):
        name_and_error = largest(result["outputs"])
        assert name_and_error[1] < OUTPUTS, name_and_error
        assert len(result["outputs"]) >= 4  # hidden states too
        name_and_error = largest(result["gradients"])
        assert name_and_error[1] < GRADIENTS, name_and_error
        assert all(result["state"].values()), [n for n, equal in result["state"].items() if not equal]
        # What is left whole is mostly positions and the heads of tiny models, and where the MLP alone is cut, attention.
        assert result["share"] < (0.9 if name in ATTENTION_WHOLE else 0.75)


@pytest.mark.parametrize(("name", "size"), [*((name, 2) for name in SEQUENCE_PARALLEL), ("bert", 4), ("gpt2", 4)])
def test_sequence_parallel_models_compute_the_same(results, name, size):
    for result in of(results, "equals_one_process_in_sequence", name, size):
        for errors, tolerance in ((result["outputs"], OUTPUTS), (result["gradients"], GRADIENTS)):
            name_and_error = largest(errors)
            assert name_and_error[1] < tolerance, name_and_error


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_sharded_model_is_saved_for_stock_transformers(results, name):
    for result in of(results, "saved", name, 4):
        name_and_error = largest(result["outputs"])
        assert name_and_error[1] < OUTPUTS, name_and_error


@pytest.mark.parametrize("name", [name for check, names, _ in CHECKS if check.__name__ == "steps" for name in names])
def test_five_steps_of_an_optimizer_have_the_same_losses(results, name):
    for result in of(results, "steps", name, 2):
        ours, expected = result["losses"]
        assert ours == pytest.approx(expected, abs=1e-4)  # AdamW's first steps are signs, whatever the gradient's size
        assert len(set(expected)) == 5


@pytest.mark.parametrize(
    ("check", "name"),
    [(check.__name__, name) for check, names, _ in CHECKS if check.__name__.startswith("dropout") for name in names],
)
def test_dropout_keeps_replicas_equal_and_is_replayed_by_gradient_checkpointing(results, check, name):
    for result in of(results, check, name, 2):
        assert all(result["equal"].values()), [n for n, equal in result["equal"].items() if not equal]
        assert set(result["replay"].values()) == {0.0}
        assert result["drops"] > 0 or name in WITHOUT_DROPOUT


def test_dropout_of_attention_differs_over_the_processes(results):
    for result in of(results, "attention_masks", "bert", 2):
        assert result["equal"] == [True, False]


def test_dropout_of_hidden_states_differs_where_the_tokens_do(results):
    for result in of(results, "hidden_masks", "bert", 2):
        assert result["equal"] == [True, False]


def test_processes_that_do_not_compute_the_same_are_told_so_at_once(results):
    for result in of(results, "disagreement", "bert", 2):
        batches, seeds, without_dropout = result["said"]
        assert "were given different batches" in batches
        assert "seed torch alike" in seeds
        assert without_dropout == ""


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_models_train_under_autocast(results, name):
    for result in of(results, "autocast", name, 2):
        assert result["sound"]
        ours, expected = result["losses"]
        assert ours == pytest.approx(expected, rel=5e-3)  # bf16 has 8 bits


@pytest.mark.parametrize("kind", ["deepcopy", "trained", "averaged", "assigned"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen3_plan", "forgetful"])
def test_copies_of_a_sharded_model_are_sharded_models(results, name, kind):
    for result in of(results, "copies", name, 2):
        found = result[kind]
        assert found["state"] and found["marks"]
        assert found["gradients"] < GRADIENTS


def test_what_would_make_another_model_of_a_sharded_one_is_refused(results):
    for said in of(results, "changes", "bert", 2):
        for resize in (said["resize"], said["inner resize"]):
            assert "is sharded" in resize and "resize_token_embeddings before shard(model, group)" in resize
        assert "this BertModel is sharded; on every process, call save_pretrained(folder, " in said["inner save"]
        assert "no parameter of this BertForPreTraining is marked as a shard" in said["unsharded"]
        for place, owner in (("query", "BertSelfAttention"), ("dense", "BertSelfOutput")):
            for moment in ("forward", "state"):
                assert f"{place} of a {owner} is a Lora now" in said[f"{place} {moment}"]
        assert "bert.encoder.layer.1.attention.self.key.weight is marked as a shard" in said["pruned"]


def test_a_norm_between_two_products_is_found_when_it_is_trained_later(results):
    for result in of(results, "unfrozen", "forgetful", 2):
        name_and_error = largest(result)
        assert name_and_error[1] < GRADIENTS, name_and_error


def test_hidden_states_that_enter_around_the_products_are_refused_by_name(results):
    for result in of(results, "around", "grouped", 2):
        assert "out: a row-parallel product of GatedBlock depends on gate.bias, gate.weight" in result["said"]
        assert "let attn_qkv() or mlp_in() of the policy name what takes hidden states there" in result["said"]


def test_every_check_ran_on_every_process_of_its_groups(results):
    expected = {(check.__name__, name, size) for check, names, size in CHECKS for name in names}
    assert results.keys() == expected
