"""Phases of a run config: which step is in which phase, what each phase comes to, and what is refused before a run."""

import pytest

from xformer_train.launcher.config.batch import BatchPlan
from xformer_train.launcher.config.loading import dump_config
from xformer_train.launcher.config.phases import Phases

RUN = """
model: {hidden_size: 16, num_attention_heads: 2, num_hidden_layers: 2, intermediate_size: 24, max_position_embeddings: 64}
data: {max_seq_length: 32, sources: [{kind: builtin}, {kind: text, path: a.txt}]}
objective: {max_predictions_per_seq: 5}
optimizer: {lr: 0.001}
schedule: {type: EE, warmup_steps: 5, total_steps: 30}
"""
TRAINING = "training: {train_batch_size: 16, micro_batch_size: 4, max_steps: 100}"
PHASES = """
phases:
- from_step: 20
  data: {max_seq_length: 64, source_weights: [3, 1]}
  objective: {mlm_probability: 0.3, max_predictions_per_seq: 10}
- from_share: 0.29
  training: {train_batch_size: 24}
- from_step: 60
  optimizer: {lr: 0.002}
- from_step: 80
  schedule: {type: cosine, warmup_steps: 3}
  training: {micro_batch_size: 8}
"""


@pytest.fixture
def plan(load):
    def plan(phases, training=TRAINING, num_replicas=1):
        return Phases(load(RUN + training + phases, world_size=num_replicas).config, num_replicas)

    return plan


@pytest.fixture
def texts(problems):
    """The problems of a run config with phases, without their places; a section given with the phases replaces that of RUN."""

    def texts(phases, training=TRAINING, **kwargs):
        given = phases.partition(":")[0]
        run = "\n".join(line for line in RUN.splitlines() if not line.startswith(f"{given}:"))
        return [text.split(": ", 1)[1] for text in problems(f"{run}\n{training}\n{phases}", **kwargs)]

    return texts


def test_a_phase_holds_what_all_phases_up_to_it_have_changed(plan):
    configs = [phase.config for phase in plan(PHASES).all]
    assert [phase.first for phase in plan(PHASES).all] == [0, 20, 29, 60, 80]
    assert all(config.phases is None for config in configs)
    assert [config.data.max_seq_length for config in configs] == [32, 64, 64, 64, 64]
    assert [[source.weight for source in config.data.sources] for config in configs] == [
        [None, None],
        *[[3.0, 1.0]] * 4,
    ]
    assert [config.objective.mlm_probability for config in configs] == [0.15, 0.3, 0.3, 0.3, 0.3]
    assert [config.objective.max_predictions_per_seq for config in configs] == [5, 10, 10, 10, 10]
    assert [config.optimizer.lr for config in configs] == [0.001, 0.001, 0.001, 0.002, 0.002]
    assert [config.schedule.type for config in configs] == ["EE"] * 4 + ["cosine"]
    assert [config.schedule.total_steps for config in configs] == [30, 30, 30, None, None]


def test_each_step_is_in_one_phase_with_its_batch_and_its_schedule(plan):
    phases = plan(PHASES)
    steps = {0: 0, 19: 0, 20: 1, 28: 1, 29: 2, 59: 2, 60: 3, 79: 3, 80: 4, 99: 4, 500: 4}
    assert {step: phases.at(step).number for step in steps} == steps
    assert phases.batch(28) == BatchPlan(16, 4, 4, 1)
    assert phases.batch(29) == BatchPlan(24, 4, 6, 1)
    assert phases.batch(80) == BatchPlan(24, 8, 3, 1)
    assert [phase.schedule_first for phase in phases.all] == [0, 0, 0, 60, 80]
    assert [phases.schedule_end(phase) for phase in phases.all] == [60, 60, 60, 80, None]


@pytest.mark.parametrize("warmup", ["", ", batch_warmup_from: 4, batch_warmup_steps: 17"])
def test_samples_and_tokens_between_two_steps_are_those_of_each_step_in_turn(warmup, plan):
    phases = plan(PHASES, TRAINING.replace("}", warmup + "}"))
    sizes = [phases.batch(step).train_batch_size for step in range(110)]
    tokens = [size * phases.at(step).config.data.max_seq_length for step, size in enumerate(sizes)]
    for first, last in ((0, 110), (0, 3), (5, 20), (16, 18), (19, 21), (20, 29), (28, 61), (70, 70), (99, 110)):
        assert phases.samples(first, last) == sum(sizes[first:last])
        assert phases.tokens(first, last) == sum(tokens[first:last])


def test_a_growing_batch_is_whole_micro_batches_of_all_replicas_and_linear_in_the_step(plan):
    growing = "max_steps: 100, batch_warmup_from: 16, batch_warmup_steps: 10"
    phases = plan("", f"training: {{train_batch_size: 48, micro_batch_size: 4, {growing}}}", num_replicas=2)
    sizes = [phases.batch(step).train_batch_size for step in range(12)]
    assert sizes == [16, 16, 16, 24, 24, 32, 32, 32, 40, 40, 48, 48]
    assert {phases.batch(step).micro_batch_size for step in range(12)} == {4}
    assert all(one.train_batch_size == 8 * one.gradient_accumulation_steps for one in map(phases.batch, range(12)))


def test_a_batch_of_one_key_or_of_micro_batches_and_accumulation_may_change(plan):
    phase = "\nphases: [{{from_step: 5, training: {{{}}}}}]"
    one = plan(phase.format("train_batch_size: 12"), "training: {train_batch_size: 8, max_steps: 9}", 2)
    assert one.batch(5) == BatchPlan(12, 6, 1, 2)
    by_steps = "training: {micro_batch_size: 4, gradient_accumulation_steps: 3, max_steps: 9}"
    assert plan(phase.format("micro_batch_size: 2"), by_steps).batch(5) == BatchPlan(6, 2, 3, 1)
    assert plan(phase.format("train_batch_size: 8"), by_steps).batch(5) == BatchPlan(8, 4, 2, 1)
    all_three = "training: {train_batch_size: 12, micro_batch_size: 4, gradient_accumulation_steps: 3, max_steps: 9}"
    assert plan(phase.format("train_batch_size: 8"), all_three).batch(5) == BatchPlan(8, 4, 2, 1)


def test_a_config_with_phases_is_shown_with_what_they_give_and_loads_back(load):
    config = load(RUN + TRAINING + PHASES).config
    shown = dump_config(config)
    assert (
        "  - from_share: 0.29\n    training:\n      train_batch_size: 24\n  - from_step: 60\n    optimizer:\n" in shown
    )
    assert load(shown, name="again.yaml").config == config
    changed = load(shown, ["phases.1.training.train_batch_size=8", "phases.2.from_step=61"], name="again.yaml")
    assert [phase.first for phase in Phases(changed.config, 1).all] == [0, 20, 29, 61, 80]
    assert changed.origins["phases.2.from_step"] == "--set"


ONE = "phases: [{{from_step: 20, {}}}]"
WARM = "training: {{train_batch_size: 16, micro_batch_size: 4, max_steps: 100, {}}}"


@pytest.mark.parametrize(
    ("phases", "text"),
    [
        ("phases: []", "phases: is an empty list; give a phase, or null for none"),
        ("phases: 3", "phases: got 3, must be a list"),
        ("phases: [3]", "phases.0: got 3, must be a mapping"),
        (
            "phases: [{data: {max_seq_length: 64}}]",
            "phases.0.from_step: is missing; say here at which step the phase begins",
        ),
        (
            "phases: [{from_step: 3, from_share: 0.5, data: {max_seq_length: 64}}]",
            "phases.0.from_share: got 0.5, but from_step 3 is given too; keep one of the two",
        ),
        ("phases: [{from_step: 0, data: {max_seq_length: 64}}]", "phases.0.from_step: got 0, must be greater than 0"),
        ("phases: [{from_share: 1, data: {max_seq_length: 64}}]", "phases.0.from_share: got 1, must be less than 1.0"),
        (
            "phases: [{from_share: 0.001, data: {max_seq_length: 64}}]",
            "which is step 0, must be later than the start of the run",
        ),
        (
            "phases: [{from_step: 30, data: {max_seq_length: 64}}, {from_step: 30, optimizer: {lr: 1}}]",
            "phases.1.from_step: got 30, must be later than phases.0, which begins at step 30; give the phases in the order",
        ),
        (
            "phases: [{from_step: 30, data: {max_seq_length: 64}}, {from_share: 0.2, optimizer: {lr: 1}}]",
            "phases.1.from_share: got 0.2, which is step 20, must be later than phases.0, which begins at step 30",
        ),
        (
            "phases: [{from_step: 100, data: {max_seq_length: 64}}]",
            "phases.0.from_step: got 100, must be before the run ends at training.max_steps 100; raise that",
        ),
        (ONE.format("data: {}"), "phases.0: changes nothing; give a value other than the one before it"),
        (ONE.format("data: {max_seq_length: 32}"), "phases.0: changes nothing"),
        (ONE.format("dat: {max_seq_length: 32}"), "phases.0.dat: unknown key (did you mean data?)"),
        (
            ONE.format("data: {cache_dir: x}"),
            "phases.0.data.cache_dir: unknown key; phases.0.data has max_seq_length, source_weights",
        ),
        (
            ONE.format("model: {hidden_size: 32}"),
            "phases.0.model: unknown key; phases.0 has from_step, from_share, data",
        ),
        (
            ONE.format("data: {max_seq_length: 128}"),
            "phases.0.data.max_seq_length: got 128, must be at most model.max_position_embeddings 64",
        ),
        (
            ONE.format("data: {source_weights: [1]}"),
            "phases.0.data.source_weights: got 1 of them, must be 2: one for each of data.sources, in their order",
        ),
        (ONE.format("data: {source_weights: [1, 0]}"), "phases.0.data.source_weights.1: got 0, must be greater than 0"),
        (
            ONE.format("data: {source_weights: [1, -2]}"),
            "phases.0.data.source_weights.1: got -2, must be greater than 0",
        ),
        (
            ONE.format("training: {train_batch_size: 3}"),
            "phases.0.training.train_batch_size: got 3, must be a multiple of micro_batch_size 4 times 1 replica",
        ),
        (
            ONE.format("objective: {max_predictions_per_seq: 40}"),
            "phases.0.objective.max_predictions_per_seq: got 40, must be at most data.max_seq_length 32",
        ),
        (
            "objective: {max_predictions_per_seq: 20}\n" + ONE.format("data: {max_seq_length: 16}"),
            "phases.0.data.max_seq_length: makes objective.max_predictions_per_seq wrong: got 20, must be at most",
        ),
        (
            "deepspeed: {train_batch_size: 16}\n" + ONE.format("training: {train_batch_size: 32}"),
            "phases.0.training.train_batch_size: makes deepspeed.train_batch_size wrong: got 16, but training.train_batch",
        ),
        (
            ONE.format("schedule: {warmup_steps: 90}"),
            "phases.0.schedule.warmup_steps: got 90, must be at most the 80 steps of this schedule",
        ),
        (
            "schedule: {warmup_steps: 25}\n" + ONE.format("optimizer: {lr: 1}"),
            "schedule.warmup_steps: got 25, must be at most the 20 steps of this schedule",
        ),
    ],
)
def test_each_fault_of_a_phase_is_one_sentence_that_names_its_key(phases, text, texts):
    (found,) = texts(phases)
    assert text in found


def test_a_model_that_predicts_every_token_has_no_masks_to_change(problems):
    phases = "phases: [{from_step: 20, objective: {mlm_probability: 0.4}}]"
    (text,) = problems(f"model: {{type: gpt}}\nobjective: {{type: clm}}\n{TRAINING}\n{phases}")
    assert "phases.0.objective.mlm_probability: got 0.4, but objective.type clm predicts every token; remove it" in text


def test_a_batch_below_the_processes_is_refused_for_its_phase(texts):
    (text,) = texts(ONE.format("training: {train_batch_size: 8}"), world_size=4)
    assert (
        "phases.0.training.train_batch_size: got 8, must be a multiple of micro_batch_size 4 times 4 replicas" in text
    )


@pytest.mark.parametrize(
    ("keys", "phases", "text"),
    [
        (
            "batch_warmup_from: 4",
            "",
            "training.batch_warmup_steps: is missing, though training.batch_warmup_from is given",
        ),
        (
            "batch_warmup_steps: 4",
            "",
            "training.batch_warmup_from: is missing, though training.batch_warmup_steps is given",
        ),
        (
            "batch_warmup_from: 16, batch_warmup_steps: 9",
            "",
            "training.batch_warmup_from: got 16, must be less than training.train_batch_size 16, to which the batch grows",
        ),
        (
            "batch_warmup_from: 6, batch_warmup_steps: 9",
            "",
            "training.batch_warmup_from: got 6, must be a multiple of training.micro_batch_size 4 times 1",
        ),
        (
            "batch_warmup_from: 4, batch_warmup_steps: 21",
            ONE.format("training: {train_batch_size: 32}"),
            "phases.0.from_step: got 20, must be at least 21, for the phase sets another batch",
        ),
    ],
)
def test_each_fault_of_a_growing_batch_is_one_sentence(keys, phases, text, texts):
    (found,) = texts(phases, WARM.format(keys))
    assert text in found


def test_a_length_in_passes_has_no_shares_and_no_growing_batch(texts):
    training = WARM.format("batch_warmup_from: 4, batch_warmup_steps: 9").replace("max_steps: 100", "num_epochs: 3")
    found = texts("phases: [{from_share: 0.5, data: {max_seq_length: 64}}]", training)
    assert sorted(text.split(":")[0] for text in found) == ["phases.0.from_share", "training.batch_warmup_steps"]
    assert "it is a share of training.max_steps, which is not given; give from_step" in "".join(found)
    assert "with training.num_epochs 3 the length of the run is no number of steps" in "".join(found)
