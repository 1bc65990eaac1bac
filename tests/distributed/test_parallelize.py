"""A model whose calls two processes on the CPU answer."""

import inspect
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.hf_models import MODELS, cache_of
from helpers.own_policies import MODELS_WITH_POLICIES, GroupedPolicy

from xformer_train.recipes.policies import parallelize
from xformer_train.recipes.policies.sharding.parallelize import _failure
from xformer_train.recipes.policies.swapping.fused_layer import CACHE_NAMES


def generate(model, **options):
    inputs = MODELS["gpt2"].make_inputs()
    inputs.pop("labels")
    return model.generate(**inputs, max_new_tokens=6, pad_token_id=1, **options)


@pytest.fixture(scope="module")
def gpt2():
    """The small GPT-2 in two processes, its output and continuation in one, and the processes."""
    model = MODELS["gpt2"].build()
    # To have recorded hidden states leaves hooks in a model that cannot be pickled.
    expected = model(**MODELS["gpt2"].make_inputs(), output_hidden_states=True), generate(model, do_sample=False)
    with parallelize(model, 2) as workers:
        yield model, *expected, workers


def test_a_call_gives_what_it_gave_before(gpt2):
    model, expected, continued, _ = gpt2
    output = model(**MODELS["gpt2"].make_inputs(), output_hidden_states=True)
    assert type(output) is type(expected)
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-5)  # sums in another order
    torch.testing.assert_close(output.loss, expected.loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.hidden_states, expected.hidden_states, rtol=0, atol=1e-5)
    assert set(expected) - set(output) == cache_of(expected).keys()  # each process has that of its heads
    generated = generate(model, do_sample=False, return_dict_in_generate=True)
    assert not set(CACHE_NAMES) & set(generated)
    assert torch.equal(generated.sequences, continued)
    assert not output.logits.requires_grad
    assert torch.equal(generate(model, do_sample=False), continued)
    assert "input_ids" in inspect.signature(model.forward).parameters  # which pipelines look at


def test_sampling_follows_the_seed_here(gpt2):
    model, *_ = gpt2
    samples = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(generate(model, do_sample=True))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_an_error_comes_back_and_the_model_answers_on(gpt2):
    model, expected, *_ = gpt2
    with pytest.raises(RuntimeError, match="process 0 of the parallelized GPT2LMHeadModel failed:\n") as error:
        model(input_ids=torch.full((1, 3), 999))
    assert isinstance(error.value.__cause__, IndexError)
    assert "Traceback" in str(error.value)
    output = model(**MODELS["gpt2"].make_inputs())
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="the model is parallelized already"):
        parallelize(model, 2)


def test_threads_take_turns(gpt2):
    model, *_ = gpt2
    inputs = [torch.full((1, 3), token) for token in range(8)]
    alone = [model(input_ids=ids).logits for ids in inputs]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda ids: model(input_ids=ids).logits, inputs * 3))
    assert all(map(torch.equal, together, alone * 3))


def test_an_exception_that_cannot_be_unpickled_comes_as_text():
    answer = pickle.loads(_failure(StubbornError(1, 2)))
    assert answer.error is not None and answer.cause is None


class StubbornError(Exception):
    """Pickled with one argument for two."""

    def __init__(self, first, second):
        super().__init__(first)


def test_when_a_process_dies_the_others_end_and_the_model_is_as_before(gpt2):
    model, expected, _, workers = gpt2
    processes = list(workers._processes)
    processes[1].kill()
    with pytest.raises(RuntimeError, match=r"process 1 .* failed:\nit ended with exit code -9"):
        model(**MODELS["gpt2"].make_inputs())
    assert not any(process.is_alive() for process in processes)
    assert not {"forward", "generate", "cpu"} & vars(model).keys()
    assert torch.equal(model(**MODELS["gpt2"].make_inputs()).logits, expected.logits)


def test_an_interrupted_call_leaves_no_answer_for_the_next(monkeypatch):
    model = MODELS_WITH_POLICIES["grouped"].build().eval()
    x = MODELS_WITH_POLICIES["grouped"].make_inputs()["x"]
    expected = model(x=x)["states"][-1]
    with parallelize(model, 1, policy=GroupedPolicy) as workers:
        (process,) = workers._processes

        def interrupt(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(workers, "_receive", interrupt)
            model(x=2 * x)
        torch.testing.assert_close(model(x=x)["states"][-1], expected, rtol=0, atol=1e-5)  # sums in another order
        assert not process.is_alive()


def test_a_script_that_would_start_itself_again_is_told_how_to_be_written(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from helpers.own_policies import MODELS_WITH_POLICIES, GroupedPolicy\n"
        "from xformer_train.recipes.policies import parallelize\n"
        "parallelize(MODELS_WITH_POLICIES['grouped'].build(), 1, policy=GroupedPolicy)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("a script must call parallelize below if __name__ == '__main__':\n"), done.stderr


def test_half_precision_with_a_policy_of_ones_own_until_the_model_is_taken_back():
    model = MODELS_WITH_POLICIES["grouped"].build()
    inputs = MODELS_WITH_POLICIES["grouped"].make_inputs()
    expected = model(**inputs)
    workers = parallelize(model, 2, fp16=True, policy=GroupedPolicy)
    processes = list(workers._processes)
    output = model(x=inputs["x"].half())
    assert output["states"][-1].dtype == torch.float16
    # fp16 has 11 bits
    torch.testing.assert_close(output["states"][-1].float(), expected["states"][-1], rtol=5e-3, atol=5e-3)
    assert model.cpu() is model
    assert not any(process.is_alive() for process in processes)
    assert torch.equal(model(**inputs).loss, expected.loss)
    workers.close()
