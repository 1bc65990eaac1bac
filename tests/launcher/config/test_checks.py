import re

import pytest

MINIMAL = "training: {max_steps: 10, train_batch_size: 8}\n"


@pytest.mark.parametrize(
    "text,message",
    [
        ("name: ''", "name: got '', must be a plain name"),
        (
            "reliability: {nan: rollback}",
            "reliability.nan: got 'rollback', but without checkpoint.save_every_steps there is",
        ),
        (
            "deepspeed: {bf16: {check_grad_overflow: false}}",
            "deepspeed.bf16.check_grad_overflow: got false, but reliability.nan",
        ),
        (
            "deepspeed: {zero_optimization: {stage: 2, compute_grad_norm: false}}",
            "deepspeed.zero_optimization.compute_grad_norm: got false, but reliability.nan needs the norm",
        ),
        ("name: ..", "name: got '..', must be a plain name"),
        ("name: a/b", "name: got 'a/b', must be a plain name: no slash"),
        ("name: .hidden", "name: got '.hidden', must be a plain name"),
        ("output_dir: ''", "output_dir: got an empty path"),
        (
            "model: {hidden_size: 100}",
            "model.hidden_size: got 100, must be a multiple of model.num_attention_heads 12 unless model.head_dim is",
        ),
        ("model: {type: gpt}", "objective.type: got 'mlm', but model.type gpt needs 'clm'"),
        ("objective: {type: clm}", "objective.type: got 'clm', but model.type bert needs 'mlm'"),
        ("model: {type: gpt, pre_layer_norm: false}\nobjective: {type: clm}", "model.pre_layer_norm: got false, but"),
        ("model: {type: gpt}\nobjective: {type: clm, sentence_task: nsp}", "objective.sentence_task: got 'nsp', but"),
        ("model: {type: gpt}\nobjective: {type: clm}\nlayer: {unpad: true}", "layer.unpad: got true, but samples of"),
        (
            "layer: {cuda_graph: true}\ntraining: {max_steps: 1, train_batch_size: 1, activation_checkpointing: full}",
            "training.activation_checkpointing: got full, but a graph of layer.cuda_graph holds the memory",
        ),
        (
            "data: {packing: best_fit}",
            "data.packing: got 'best_fit', but objective.sentence_task nsp is judged by one [CLS] in each sequence",
        ),
        (
            "data: {packing: best_fit}\nmodel: {type: gpt}\nobjective: {type: clm}",
            "data.packing: got 'best_fit', but sequences of model.type gpt are full already",
        ),
        (
            "data: {packing: best_fit}\nobjective: {sentence_task: none}\nlayer: {unpad: true}",
            "layer.unpad: got true, but data.packing best_fit leaves no padding to remove; set false, or data.packing none",
        ),
        ("layer: {unpad: true, cuda_graph: true}", "layer.cuda_graph: got true, but without padding every batch has"),
        (
            "layer: {cuda_graph: true}\noptimizer: {type: adamw}\ndeepspeed: {zero_optimization: {stage: 3}}",
            "deepspeed.zero_optimization.stage: got 3, which moves parameters",
        ),
        (
            "data: {max_seq_length: 513}",
            "data.max_seq_length: got 513, must be at most model.max_position_embeddings 512",
        ),
        ("objective: {max_predictions_per_seq: 129}", "objective.max_predictions_per_seq: got 129, must be at most"),
        ("tokenizer: {path: t.json, type: bpe}", "tokenizer.type: got 'bpe', but the type of tokenizer.path 't.json'"),
        (
            "tokenizer: {type: bytes}\nmodel: {vocab_size: 255}",
            "model.vocab_size: got 255, but tokenizer.type bytes has",
        ),
        ("data: {sources: {kind: builtin, path: x}}", "data.sources.0.path: got 'x', but kind builtin is read from"),
        ("data: {sources: {kind: text}}", "data.sources.0.path: is missing; kind text needs a file, folder or glob"),
        (
            "data: {sources: {kind: hf}}",
            "data.sources.0.path: is missing; kind hf needs the name or folder of a dataset",
        ),
        (
            "data: {sources: {kind: text, path: x, text_field: y}}",
            "data.sources.0.text_field: got 'y', but kind text has",
        ),
        (
            "data: {sources: {kind: text, path: x, streaming: true}}",
            "data.sources.0.streaming: got true, but only kind hf",
        ),
        (
            "data: {sources: {kind: jsonl, path: x, documents: file}}",
            "data.sources.0.documents: got 'file', but only kind text",
        ),
        ("data: {sources: {kind: jsonl, path: x, subset: y}}", "data.sources.0.subset: got 'y', but only kind hf"),
        ("data: {sources: {kind: jsonl, path: x, split: y}}", "data.sources.0.split: got 'y', but only kind hf"),
        (
            "data: {sources: [{kind: builtin, weight: 1}, {kind: builtin}]}",
            "data.sources.1.weight: is missing, though other sources have one",
        ),
        ("data: {validation: []}", "data.validation: is an empty list"),
        (
            "data: {validation: {kind: builtin}, validation_fraction: 0.1}",
            "data.validation_fraction: got 0.1, but data.validation already gives held-out text",
        ),
        ("eval: {every_steps: 5}", "eval.every_steps: got 5, but there is no held-out data"),
        (
            "schedule: {warmup_steps: 1, warmup_proportion: 0.1}",
            "schedule.warmup_proportion: got 0.1, but schedule.warmup",
        ),
        ("schedule: {warmup_steps: 11}", "schedule.warmup_steps: got 11, must be at most training.max_steps 10"),
        (
            "schedule: {warmup_steps: 6, total_steps: 5, type: EE}",
            "schedule.warmup_steps: got 6, must be at most schedule",
        ),
        (
            "schedule: {type: wsd, warmup_steps: 11}",
            "schedule.warmup_steps: got 11, must be at most training.max_steps 10",
        ),
        ("schedule: {total_steps: 5}", "schedule.total_steps: got 5, but the run goes on to training.max_steps 10"),
        (
            "schedule: {type: wsd, warmup_steps: 5, decay_proportion: 0.6}",
            "schedule.decay_proportion: got 0.6, which with a warm-up of 0.5 is more than the whole schedule; must be at "
            "most 0.5",
        ),
        (
            "schedule: {min_lr: 0.1}",
            "schedule.min_lr: got 0.1, must be at most optimizer.lr 0.0001, from which lr falls",
        ),
        (
            "training: {train_batch_size: 1, max_hours: 2}\nschedule: {warmup_steps: 5}",
            "schedule.warmup_steps: got 5, but with training.max_hours 2 the schedule follows the time, and counts no steps; "
            "give schedule.warmup_proportion",
        ),
        (
            "training: {train_batch_size: 1, max_hours: 2}\nschedule: {total_steps: 5}",
            "schedule.total_steps: got 5, but with training.max_hours 2 the",
        ),
        (
            "training: {train_batch_size: 1, max_hours: 0.5}\nschedule: {type: LE}",
            "schedule.type: got 'LE', which decays by schedule.decay_steps, but with training.max_hours 0.5 the schedule",
        ),
        (
            "training: {train_batch_size: 1, max_hours: 2}\nphases: [{from_step: 3, optimizer: {lr: 1e-3}}]",
            "phases.0.optimizer.lr: begins a schedule of its own, but with training.max_hours one schedule goes through",
        ),
        (
            "phases: [{from_step: 3, schedule: {type: wsd}}]\nload: {path: x, decay: true}\nschedule: {type: wsd}",
            "phases.0.schedule: begins a schedule of its own, but with load.decay one schedule goes through the whole run",
        ),
        (
            "schedule: {type: cosine, min_lr: 1e-6, lr_offset: 1e-5}",
            "schedule.min_lr: got 1e-06, but schedule.lr_offset 1e-05 is added to lr at every step, so",
        ),
        ("schedule: {type: constant, min_lr: 1e-6}", "schedule.min_lr: got 1e-06, but schedule.type constant does not"),
        ("schedule: {type: cosine, decay: 1-sqrt}", "schedule.decay: got '1-sqrt', but only schedule.type wsd has"),
        ("optimizer: {min_coeff: 11}", "optimizer.min_coeff: got 11.0, must be at most optimizer.max_coeff 10.0"),
        ("training: {max_steps: 1}", "training.train_batch_size: no batch size is given"),
        ("training: {train_batch_size: 1}", "training.max_steps: is missing; give the length of the run"),
        (
            "training: {train_batch_size: 1, max_steps: 1, num_epochs: 2}",
            "training.num_epochs: got 2, but training.max_steps 1 is given too",
        ),
        (
            "training: {train_batch_size: 1, num_epochs: 2, max_tokens: 3}",
            "training.max_tokens: got 3, but training.num_epochs 2 is given too, and a run has one length; keep one",
        ),
        (
            "training: {train_batch_size: 7, micro_batch_size: 2, max_steps: 1}",
            "training.train_batch_size: got 7, must be",
        ),
        (
            "training: {train_batch_size: 8, max_steps: 1, precision: fp8}\nmodel: {intermediate_size: 3080}",
            "model.intermediate_size: got 3080, but the matrix products of training.precision fp8 need a multiple of 16",
        ),
        (
            "training: {train_batch_size: 8, max_steps: 1, precision: fp8}\nlayer: {gelu_checkpoint: true}",
            "layer.gelu_checkpoint: got true, but saves nothing with training.precision fp8",
        ),
        ("parallel: {tensor: 2}", "parallel.tensor: got 2, which does not divide the 1 process of the run"),
        (
            "parallel: {sequence: true}",
            "parallel.sequence: got true, but it divides tokens over the processes of parallel.tensor, which is 1",
        ),
        ("checkpoint: {id_format: latest}", "checkpoint.id_format: got 'latest', must hold {step}"),
        ("checkpoint: {id_format: 'e{epoch}'}", "checkpoint.id_format: got 'e{epoch}', must hold {step}"),
        (
            "checkpoint: {id_format: '{step}{x}'}",
            "checkpoint.id_format: got '{step}{x}', may hold {step} and {epoch} only",
        ),
        (
            "checkpoint: {id_format: '{step.real}'}",
            "checkpoint.id_format: got '{step.real}', may hold {step} and {epoch}",
        ),
        (
            "checkpoint: {id_format: '{step!r}'}",
            "checkpoint.id_format: got '{step!r}', may hold {step} and {epoch} only",
        ),
        ("checkpoint: {id_format: '{step:.1e}'}", "checkpoint.id_format: got '{step:.1e}', has {step:.1e}; only zero"),
        (
            "checkpoint: {id_format: '{step:8d}'}",
            "checkpoint.id_format: got '{step:8d}', has {step:8d}; only zero padding",
        ),
        ("checkpoint: {id_format: '{step'}", "checkpoint.id_format: got '{step', is not a format"),
        ("checkpoint: {id_format: 'a/{step}'}", "checkpoint.id_format: got 'a/{step}', must give a plain name"),
        ("checkpoint: {id_format: '.{step}'}", "checkpoint.id_format: got '.{step}', must give a plain name"),
        ("load: {rewarmup: true}", "load.rewarmup: got true, but load.path does not say where to load from"),
        ("load: {id: step3}", "load.id: got 'step3', but load.path does not say where to load from"),
        ("load: {what: weights}", "load.what: got 'weights', but load.path does not say"),
        (
            "load: {path: x, what: weights, rewarmup: true}",
            "load.rewarmup: got true, but load.what weights starts a new run",
        ),
        (
            "load: {path: x, what: weights, decay: true}\nschedule: {type: wsd}",
            "load.decay: got true, but load.what weights starts a new run",
        ),
        (
            "load: {path: x, rewarmup: true, decay: true}\nschedule: {type: wsd}",
            "load.decay: got true, but load.rewarmup begins the whole schedule at the loaded step; keep one of the two",
        ),
        (
            "load: {path: x, decay: true}",
            "load.decay: got true, but schedule.type linear has no decay of its own to begin; set schedule.type wsd, or",
        ),
        (
            "optimizer: {type: lamb}\ndeepspeed: {zero_optimization: {stage: 2, round_robin_gradients: true}}",
            "deepspeed.zero_optimization.round_robin_gradients: got true, but then it is not known which parameters",
        ),
        (
            "optimizer: {type: muon}\ndeepspeed: {zero_optimization: {stage: 1, round_robin_gradients: true}}",
            "deepspeed.zero_optimization.round_robin_gradients: got true, but then it is not known which parameters",
        ),
        (
            "optimizer: {nesterov: false}",
            "optimizer.nesterov: got false, but optimizer.type adamw has no such key; remove",
        ),
        (
            "optimizer: {type: lamb, adamw_lr: 1e-3}",
            "optimizer.adamw_lr: got 0.001, but optimizer.type lamb has no such",
        ),
        (
            "optimizer: {type: muon, convention: nvidia}",
            "optimizer.convention: got 'nvidia', but optimizer.type muon has no such key; remove it",
        ),
        (
            "optimizer: {type: muon, bias_correction: false}",
            "optimizer.bias_correction: got false, but optimizer.type muon has no such key",
        ),
        (
            "optimizer: {type: muon}\ndeepspeed: {optimizer: {type: Muon, params: {ns_method: gram}}}",
            "deepspeed.optimizer.params.ns_method: is not a parameter of optimizer.type muon; remove it",
        ),
        (
            "deepspeed: {bf16: {enabled: true}}\ntraining: {precision: fp16, max_steps: 1, train_batch_size: 1}",
            "deepspeed.bf16.enabled: got true, but training.precision fp16, for which it is false",
        ),
        ("deepspeed: {train_batch_size: 9}", "deepspeed.train_batch_size: got 9, but training.train_batch_size is 8"),
    ],
)
def test_an_impossible_combination_is_refused(problems, text, message):
    [problem] = problems(text + "\n" + ("" if "training:" in text else MINIMAL))
    place, _, rest = problem.partition(": ")
    assert re.fullmatch(r"run\.yaml(:\d+)?", place)
    assert rest.startswith(message), rest


@pytest.mark.parametrize(
    "text",
    [
        "model: {type: gpt}\nobjective: {type: clm}",
        "model: {type: gpt}\nobjective: {type: clm, sentence_task: none}",
        "checkpoint: {id_format: 'epoch{epoch}_step{step}'}",
        "checkpoint: {id_format: '{{x}}{epoch:03d}-{step:08}'}",
        "tokenizer: {path: t.json}",
        "data: {validation_fraction: 0.1}\neval: {every_steps: 5}",
        "schedule: {type: EE, total_steps: 5, warmup_proportion: 0.5}",
        "schedule: {type: wsd, warmup_proportion: 0.8}",
        "optimizer: {type: lamb}\ndeepspeed: {zero_optimization: {stage: 3}}",
        "optimizer: {type: muon, adamw_lr: 1e-3, newton_schulz_dtype: bf16, adjust_lr: original, nesterov: false}",
        "optimizer: {type: muon}\ndeepspeed: {optimizer: {type: muon, params: {momentum: 0.95, lr: auto}}}",
        "deepspeed: {zero_optimization: {stage: 2, round_robin_gradients: true}}",
        "deepspeed: {fp16: {enabled: true}}",  # whether auto comes to fp16 is known at the start of the run
        "load: {path: x, rewarmup: true}",
        "load: {path: x, decay: true}\nschedule: {type: wsd, warmup_steps: 90, total_steps: 5, min_lr: 1e-6}",
        "schedule: {type: cosine, total_steps: 5, min_lr: 1e-6}",
        "training: {train_batch_size: 1, max_hours: 2}\nschedule: {type: wsd, warmup_proportion: 0.1}",
        "training: {train_batch_size: 1, max_hours: 2}\nphases: [{from_step: 9, objective: {mlm_probability: 0.3}}]",
        "training: {train_batch_size: 1, max_hours: 2}\nload: {path: x, decay: true}\nschedule: {type: wsd, warmup_steps: 5}",
        "data: {sources: [{kind: builtin, weight: 1}, {kind: hf, path: x, split: y, subset: z, weight: 0.5}]}",
    ],
)
def test_a_possible_combination_is_accepted(load, text):
    load(text + "\n" + ("" if "training:" in text else MINIMAL))


def test_the_batch_is_checked_for_the_number_of_processes(load, problems):
    load(MINIMAL, world_size=4)
    [problem] = problems(MINIMAL, world_size=3)
    assert "training.train_batch_size: got 8, must be a multiple of 3 replicas" in problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "parallel: {tensor: 4}\nmodel: {num_attention_heads: 6, intermediate_size: 3080}",
            "parallel.tensor: got 4, must divide model.num_attention_heads 6: 1, 2, 3, 6",
        ),
        (
            "parallel: {tensor: 4}\nmodel: {intermediate_size: 1022}",
            "parallel.tensor: got 4, must divide model.intermediate_size 1022: 1, 2, 7, 14, 73, 146, 511, 1022",
        ),
        (
            "parallel: {tensor: 4}\nmodel: {vocab_size: 30522}",
            "parallel.tensor: got 4, must divide model.vocab_size 30522",
        ),
        (
            "parallel: {tensor: 2}\nmodel: {intermediate_size: 3000000001}",
            "parallel.tensor: got 2, must divide model.intermediate_size 3000000001: 1, ",
        ),
        (
            "parallel: {tensor: 4, sequence: true}\ndata: {max_seq_length: 126}",
            "parallel.tensor: got 4, must divide data.max_seq_length 126",
        ),
        (
            "parallel: {tensor: 4, sequence: true}\nlayer: {unpad: true}",
            "parallel.sequence: got true, but with layer.unpad the number of tokens changes",
        ),
        ("parallel: {tensor: 4}\nlayer: {cuda_graph: true}", "layer.cuda_graph: got true, but a graph cannot hold"),
        (
            "parallel: {tensor: 4}\nmodel: {hidden_size: 240, num_attention_heads: 4}\n"
            "training: {precision: fp8, train_batch_size: 8, max_steps: 1}",
            "model.hidden_size: got 240, but the matrix products of training.precision fp8 need a multiple of 16 times "
            "parallel.tensor 4",
        ),
    ],
)
def test_a_model_that_cannot_be_shared_is_refused(problems, text, message):
    [problem] = problems(text + "\n" + ("" if "training:" in text else MINIMAL), world_size=4)
    assert problem.partition(": ")[2].startswith(message), problem


def test_processes_that_share_a_replica_count_once_in_the_batch(load, problems):
    load(MINIMAL + "parallel: {tensor: 3, sequence: true}\ndata: {max_seq_length: 96}\n", world_size=12)
    load(MINIMAL + "parallel: {tensor: 2}\n", world_size=None)
    [problem] = problems(MINIMAL + "parallel: {tensor: 2}\n", world_size=6)
    assert "training.train_batch_size: got 8, must be a multiple of 3 replicas" in problem


def test_a_causal_objective_has_no_sentence_task_unless_one_is_asked_for(load):
    loaded = load(MINIMAL + "model: {type: gpt}\nobjective: {type: clm}\n")
    assert loaded.config.objective.sentence_task == "none"
    assert load(MINIMAL).config.objective.sentence_task == "nsp"
