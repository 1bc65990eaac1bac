"""What each of four processes does for test_shard.py: sharded models beside whole ones, in groups of two and of four."""

import copy
import shutil
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.hf_models import MODELS
from helpers.hf_similar_models import SIMILAR_MODELS
from helpers.lora import Lora
from helpers.own_policies import GATED, MODELS_WITH_POLICIES
from helpers.spawn import PATIENCE_S
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from xformer_train.kernels.parallel.sharding import is_sharded, join_shards, partitions_of
from xformer_train.recipes.policies import full_state_dict, shard

Results = dict[str, Any]
OWN = MODELS | MODELS_WITH_POLICIES
ALL = OWN | SIMILAR_MODELS
TWO_KEY_HEADS = (
    "llama",
    "grouped",
    "forgetful",
    "apertus_plan",
    "llama_plan",
    "qwen3_plan",
)  # of no use to four processes
OVER_FOUR = tuple(name for name in OWN if name not in TWO_KEY_HEADS)
SEQUENCE_PARALLEL = (
    "bert",
    "roberta_prelayernorm",
    "electra",
    "ernie",
    "distilbert",
    "gpt2",
    "gpt_neo",
    "gptj",
    "gpt_neox",
    "opt",
    "llama",
    "mistral",
    "qwen3",
    "modernbert",
)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CHECKPOINTED = tuple(name for name in MODELS if name != "albert")  # in which transformers has no checkpointing


def tensors_of(value: Any, name: str = "") -> dict[str, Tensor]:
    """All float tensors in a model's output, by path, but attention weights."""
    if isinstance(value, Tensor):
        return {name: value.detach()} if value.is_floating_point() else {}
    if isinstance(value, dict):
        items = [(key, one) for key, one in value.items() if "past" not in key]
    elif isinstance(value, (tuple, list)):
        items = list(enumerate(value))
    else:
        return {}
    return {path: one for key, inner in items for path, one in tensors_of(inner, f"{name}.{key}").items()}


def whole_gradients(model: nn.Module, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """The gradients of the model as one process would have them."""
    partitions = partitions_of(model)
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        gradient = parameter.grad
        if name in partitions:
            shards = [torch.empty_like(gradient) for _ in range(group.size())]
            dist.all_gather(shards, gradient.contiguous(), group)
            gradient = join_shards(shards, partitions[name])[: partitions[name].rows]
        gradients[name] = gradient
    return gradients


def error(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of each tensor, in units of its largest value if that is above 1; infinite if one is missing."""
    return {
        name: ((ours[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1)).item()
        if name in ours and name in expected
        else float("inf")
        for name in ours.keys() | expected.keys()
    }


def sharded(name: str, group: dist.ProcessGroup, sequence_parallel: bool = False, **fields: Any) -> nn.Module:
    """The small model in shards; its weights are drawn differently on each process, the first's count."""
    small = (ALL | {"gated": GATED})[name]
    model = small.build(seed=group.rank(), **fields)
    shard(model, group, small.policy and small.policy(model.config), sequence_parallel)
    return model


def run(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The output's tensors; gradients are left on the parameters."""
    output = model(**inputs)
    loss = output.loss if hasattr(output, "loss") else output[0].square().sum()
    loss.backward()
    return tensors_of(output)


def equals_one_process(name: str, group: dist.ProcessGroup) -> Results:
    whole, ours = ALL[name].build(), sharded(name, group)
    inputs = ALL[name].make_inputs()
    if name != "clip":  # gives the hidden states of its towers only through them
        inputs["output_hidden_states"] = True
    before, joined = whole.state_dict(), full_state_dict(ours, group)
    outputs = error(run(ours, inputs), run(whole, inputs))
    gradients = error(
        whole_gradients(ours, group), {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
    )
    return {
        "outputs": outputs,
        "gradients": gradients,
        "state": {n: before.keys() == joined.keys() and torch.equal(before[n], joined[n]) for n in before},
        "share": sum(p.numel() for p in ours.parameters()) / sum(p.numel() for p in whole.parameters()),
    }


def equals_one_process_in_sequence(name: str, group: dist.ProcessGroup) -> Results:
    whole, ours = ALL[name].build(), sharded(name, group, sequence_parallel=True)
    inputs = ALL[name].make_inputs()
    outputs = error(run(ours, inputs), run(whole, inputs))
    gradients = error(
        whole_gradients(ours, group), {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
    )
    return {"outputs": outputs, "gradients": gradients}


def saved(name: str, group: dist.ProcessGroup) -> Results:
    """Outputs of the sharded model, and of the whole one that from_pretrained makes of its state, saved later."""
    model, inputs = sharded(name, group), MODELS[name].make_inputs()
    outputs, state = run(model, inputs), full_state_dict(model, group)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    with pytest.raises(ValueError, match=r"is sharded; on every process, call save_pretrained\(folder, state_dict="):
        copy.deepcopy(model).save_pretrained(folder[0])
    model.save_pretrained(folder[0], state_dict=state)  # writes on the first process of all
    dist.barrier()
    again = type(model).from_pretrained(folder[0]).eval()
    dist.barrier()
    shutil.rmtree(folder[0], ignore_errors=True)  # the first that comes here
    return {"outputs": error(outputs, run(again, inputs))}


def steps(name: str, group: dist.ProcessGroup) -> Results:
    """Losses of five steps of AdamW, of the sharded model and of the whole one."""
    losses = []
    for model in (sharded(name, group), MODELS[name].build()):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses.append([])
        for step in range(5):
            loss = model(**MODELS[name].make_inputs(seed=step)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    return {"losses": losses}


def dropout(name: str, group: dist.ProcessGroup, sequence_parallel: bool = False) -> Results:
    """Training with dropout: what is equal on all processes, and what a replay under gradient checkpointing makes of it."""
    inputs, gradients, outputs = MODELS[name].make_inputs(), [], []
    for checkpointing in (False, True):
        model = sharded(name, group, sequence_parallel).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(7)
        np.random.seed(7)
        outputs.append(run(model, inputs))
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    replicated = {n: own for n, own in gradients[0].items() if n not in partitions_of(model)}
    with torch.no_grad():
        again = tensors_of(model(**inputs))
    return {
        "equal": {n: equal_on_all(tensor, group) for n, tensor in (replicated | outputs[0]).items()},
        "replay": error(*gradients),
        "drops": max(error(outputs[0], again).values()),
    }


def dropout_in_sequence(name: str, group: dist.ProcessGroup) -> Results:
    return dropout(name, group, sequence_parallel=True)


def hidden_masks(name: str, group: dist.ProcessGroup) -> Results:
    """Whether processes drop the same of the hidden states, without and with sequence parallelism."""
    equal = []
    for sequence_parallel in (False, True):
        model = sharded(name, group, sequence_parallel).train()
        masks: list[Tensor] = []
        drop = model.bert.encoder.layer[1].output.dropout
        drop.register_forward_hook(lambda module, args, output, masks=masks: masks.append((output == 0).float()))
        torch.manual_seed(3)
        model(**MODELS[name].make_inputs())
        equal.append(equal_on_all(masks[0], group))
    return {"equal": equal}


def equal_on_all(tensor: Tensor, group: dist.ProcessGroup) -> bool:
    copies = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(copies, tensor.contiguous(), group)
    return all(torch.equal(copy, copies[0]) for copy in copies)


def attention_masks(name: str, group: dist.ProcessGroup) -> Results:
    """Whether processes with equal heads get equal contexts, in evaluation and in training with attention dropout."""
    model = MODELS[name].build(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    attention = model.bert.encoder.layer[0].attention
    with torch.no_grad():
        for projection in (attention.self.query, attention.self.key, attention.self.value):
            projection.weight.copy_(projection.weight[:4].repeat(4, 1))
            projection.bias.copy_(projection.bias[:4].repeat(4))
    shard(model, group)
    contexts: list[Tensor] = []
    attention.output.dense.register_forward_pre_hook(lambda _, args: contexts.append(args[0].detach()))
    for training in (False, True):
        torch.manual_seed(3)
        model.train(training)(**MODELS[name].make_inputs())
    return {"equal": [equal_on_all(context, group) for context in contexts]}


def disagreement(name: str, group: dist.ProcessGroup) -> Results:
    """What the first forward says where the processes have different batches, or different seeds with and without dropout."""
    said = []
    for model, other_batch, other_seed in (
        (sharded(name, group), True, False),
        (sharded(name, group).train(), False, True),
        (sharded(name, group, **NO_DROPOUT).train(), False, True),
    ):
        torch.manual_seed(group.rank() if other_seed else 0)
        try:
            model(**MODELS[name].make_inputs(seed=group.rank() if other_batch else 1))
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return {"said": said}


def autocast(name: str, group: dist.ProcessGroup) -> Results:
    """Losses under torch.autocast, and whether every gradient is finite and of its parameter's dtype."""
    losses, sound = [], True
    for model in (sharded(name, group), MODELS[name].build()):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**MODELS[name].make_inputs()).loss
        loss.backward()
        losses.append(loss.item())
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        sound &= all(bool(g.isfinite().all()) and g.dtype == torch.float32 for g in gradients)
    return {"losses": losses, "sound": sound}


def copies(name: str, group: dist.ProcessGroup) -> Results:
    """Whether copies of a sharded model have its whole state, its marks and its gradients, before and behind its first pass."""
    model, inputs = sharded(name, group), ALL[name].make_inputs()
    made = {"deepcopy": copy.deepcopy(model)}
    run(model, inputs)
    gradients, state = whole_gradients(model, group), full_state_dict(model, group)
    made |= {"trained": copy.deepcopy(model), "averaged": AveragedModel(model).module, "assigned": sharded(name, group)}
    made["assigned"].load_state_dict({n: tensor.clone() for n, tensor in model.state_dict().items()}, assign=True)
    made["assigned"].tie_weights()
    found: Results = {}
    for kind, ours in made.items():
        ours.zero_grad()
        run(ours, inputs)
        joined, marked = full_state_dict(ours, group), {n for n, p in ours.named_parameters() if is_sharded(p)}
        found[kind] = {
            "state": all(torch.equal(joined[n], state[n]) for n in joined.keys() | state.keys()),
            "marks": marked == {n for n, p in model.named_parameters() if is_sharded(p)} != set(),
            "gradients": max(error(whole_gradients(ours, group), gradients).values()),
        }
    return found


def said_by(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def changes(name: str, group: dist.ProcessGroup) -> Results:
    """What is said of changes to a sharded model that would make another one of it."""
    model, inputs = sharded(name, group), MODELS[name].make_inputs()
    said = {"resize": said_by(lambda: copy.deepcopy(model).resize_token_embeddings(64))}
    said["inner resize"] = said_by(lambda: copy.deepcopy(model).bert.resize_token_embeddings(64))
    said["inner save"] = said_by(lambda: model.bert.save_pretrained("/dev/null/refused"))
    said["unsharded"] = said_by(lambda: full_state_dict(MODELS[name].build(), group))
    run(model, inputs)
    attention = model.bert.encoder.layer[1].attention
    for place, owner in (("query", attention.self), ("dense", attention.output)):
        plain = getattr(owner, place)
        setattr(owner, place, Lora(plain))
        said[f"{place} forward"] = said_by(lambda: model(**inputs))
        said[f"{place} state"] = said_by(lambda: full_state_dict(model, group))
        setattr(owner, place, plain)
    prune.l1_unstructured(attention.self.key, "weight", 0.5)
    said["pruned"] = said_by(lambda: full_state_dict(model, group))
    return said


def unfrozen(name: str, group: dist.ProcessGroup) -> Results:
    """Gradients of a norm between two products that is trained from the second pass on."""
    whole, ours = ALL[name].build(), sharded(name, group)
    for model in (whole, ours):
        for trained in (False, True):
            for block in model.blocks:
                block.query_norm.requires_grad_(trained)
            model.zero_grad()
            run(model, ALL[name].make_inputs())
    return error(whole_gradients(ours, group), {n: p.grad for n, p in whole.named_parameters()})


def around(name: str, group: dist.ProcessGroup) -> Results:
    """What is said where hidden states reach a row-parallel product around the column-parallel ones."""
    return {"said": said_by(lambda: sharded("gated", group)(**GATED.make_inputs()))}


CHECKS: list[tuple[Callable[[str, dist.ProcessGroup], Results], tuple[str, ...], int]] = [
    (equals_one_process, tuple(ALL), 2),
    (equals_one_process, OVER_FOUR, 4),
    (equals_one_process_in_sequence, SEQUENCE_PARALLEL, 2),
    (equals_one_process_in_sequence, ("bert", "gpt2"), 4),
    (saved, ("bert", "gpt2"), 4),
    (steps, tuple(MODELS), 2),
    (dropout, CHECKPOINTED, 2),
    (dropout_in_sequence, ("bert", "gpt2"), 2),
    (attention_masks, ("bert",), 2),
    (hidden_masks, ("bert",), 2),
    (disagreement, ("bert",), 2),
    (autocast, ("bert", "gpt2"), 2),
    (copies, ("bert", "gpt2", "qwen3_plan", "forgetful"), 2),
    (changes, ("bert",), 2),
    (unfrozen, ("forgetful",), 2),
    (around, ("grouped",), 2),
]


def worker() -> dict[tuple[str, str, int], Results]:
    """By check, model and group size: what the check found, or the error it ended with. Groups of two take turns."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE_S))
    rank = dist.get_rank()
    halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]  # ranks within the group are not those of the world
    results: dict[tuple[str, str, int], Results] = {}
    for check, names, size in CHECKS:
        for index, name in enumerate(names):
            if size == 2 and index % 2 != rank % 2:
                continue
            try:
                result = check(name, halves[rank % 2] if size == 2 else dist.group.WORLD)
            except Exception:
                result = {"error": traceback.format_exc()}
            results[check.__name__, name, size] = result
    dist.destroy_process_group()
    return results
