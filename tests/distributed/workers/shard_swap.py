"""What each of two processes does for test_shard_swap.py: models that are sharded and then swapped, beside whole ones."""

import traceback
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from distributed.workers.shard import ALL, Results, equal_on_all, error, run, sharded, tensors_of, whole_gradients
from helpers.hf_models import cache_of, text
from helpers.spawn import PATIENCE_S
from torch import Tensor, nn

from xformer_train.kernels.parallel.sharding import is_sharded, partitions_of
from xformer_train.recipes.policies import full_state_dict, revert, shard, swap

NAMES = ("bert", "roberta", "electra", "distilbert", "gpt2", "llama", "qwen3", "modernbert")
DECODERS = ("gpt2", "llama", "qwen3")


def make_inputs(name: str, seed: int = 1) -> dict[str, Any]:
    """With padding, for decoders on the right: a token that sees none, as on the left, differs from the stock model's."""
    return text(torch.Generator().manual_seed(seed)) if name in DECODERS else ALL[name].make_inputs(seed)


def both(name: str) -> nn.Module:
    """The small model, sharded and swapped."""
    model = sharded(name, dist.group.WORLD)
    assert swap(model) == 2
    return model


def equals_one_process(name: str) -> Results:
    """Outputs, gradients, state dicts and DeepSpeed's gradient norm, each beside those of the whole stock model."""
    whole, ours, group = ALL[name].build(), both(name), dist.group.WORLD
    inputs = make_inputs(name) | {"output_hidden_states": True}
    before, joined = whole.state_dict(), full_state_dict(ours, group)
    outputs = error(run(ours, inputs), run(whole, inputs))
    norms = [norm_over_processes(ours), torch.nn.utils.get_total_norm(p.grad for p in whole.parameters()).item()]
    revert(ours)
    gradients = error(whole_gradients(ours, group), {n: p.grad for n, p in whole.named_parameters()})
    equal = {n: torch.equal(joined[n], tensor) for n, tensor in before.items()}
    return {"outputs": outputs, "gradients": gradients, "norms": norms, "names": [*joined] == [*before], "equal": equal}


def norm_over_processes(model: nn.Module) -> float:
    """The gradient's norm as DeepSpeed counts it: of shards on every process, of all else on the first."""
    counted = [p.grad for p in model.parameters() if is_sharded(p) or dist.get_rank() == 0]
    square = torch.stack([gradient.double().square().sum() for gradient in counted]).sum()
    dist.all_reduce(square)
    return square.sqrt().item()


def reverts(name: str) -> Results:
    """What differs of a sharded model after swap and revert."""
    model = sharded(name, dist.group.WORLD)
    inputs = make_inputs(name)
    facts = [(n, type(module)) for n, module in model.named_modules()], partitions_of(model)
    bits = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected = run(model, inputs)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    swap(model)
    revert(model)
    found = dict(model.named_parameters())
    return {
        "facts": facts == ([(n, type(module)) for n, module in model.named_modules()], partitions_of(model)),
        "names": [*found] == [*bits],
        "bits": all(torch.equal(found[n], tensor) for n, tensor in bits.items()),
        "gradients": all(torch.equal(found[n].grad, gradient) for n, gradient in gradients.items()),
        "outputs": set(error(run(model, inputs), expected).values()),
    }


def steps(name: str) -> Results:
    """Losses of five steps of AdamW and one more, of both models; then what other models make of the trained state dicts."""
    ours, whole = both(name), ALL[name].build()
    losses = []
    for model in (ours, whole):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses.append([])
        for step in range(6):
            loss = model(**make_inputs(name, seed=step)).loss
            losses[-1].append(loss.item())
            if step < 5:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    whole.load_state_dict(full_state_dict(ours, dist.group.WORLD))
    losses.append([whole(**make_inputs(name, seed=5)).loss.item()])
    other = both(name)
    other.load_state_dict(ours.state_dict())
    parameters = zip(ours.named_parameters(), other.named_parameters(), strict=True)
    return {"losses": losses, "loaded": {one[0]: torch.equal(one[1], two[1]) for one, two in parameters}}


def dropout(name: str) -> Results:
    """Training with dropout: what is equal on both processes, and what a replay under gradient checkpointing makes of it."""
    inputs, gradients, outputs = make_inputs(name), [], []
    for checkpointing in (False, True):
        model = both(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(7)
        outputs.append(run(model, inputs))
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    replicated = {n: own for n, own in gradients[0].items() if n not in partitions_of(model)}
    return {
        "equal": {n: equal_on_all(tensor, dist.group.WORLD) for n, tensor in (replicated | outputs[0]).items()},
        "replay": error(*gradients),
        "drops": max(error(outputs[0], tensors_of(model(**inputs))).values()),
    }


def attention_dropout(name: str) -> Results:
    """Whether processes with equal heads attend equally, in evaluation and in training, by the gradient of their shards of
    the projection behind the heads; GPT-2 over a cache."""
    fields = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.5}
    if name == "gpt2":
        fields = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.5}
    model = ALL[name].build(**fields)
    layers = model.transformer.h if name == "gpt2" else model.bert.encoder.layer
    with torch.no_grad():
        for parameter in head_parameters(name, layers[0]):
            parameter.copy_(parameter[:4].repeat(4, *[1] * (parameter.dim() - 1)))
    shard(model, dist.group.WORLD)
    swap(model)
    inputs, equal = make_inputs(name), []
    for training in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        given = inputs
        if name == "gpt2":
            seen = cache_of(model.eval()(inputs["input_ids"][:, :3]))
            given = {key: inputs[key][:, 3:] for key in ("input_ids", "labels")} | seen
        model.train(training)(**given).loss.backward()
        equal.append(equal_on_all(layers[0].fused.attention_output.weight.grad, dist.group.WORLD))
    return {"equal": equal}


def head_parameters(name: str, layer: Any) -> list[Tensor]:
    """Views of the weights and biases of queries, keys and values, (H, ...) each."""
    if name == "gpt2":
        return [part for p in (layer.attn.c_attn.weight.t(), layer.attn.c_attn.bias) for part in p.chunk(3)]
    attention = layer.attention.self
    return [p for module in (attention.query, attention.key, attention.value) for p in module.parameters()]


def generation(name: str) -> Results:
    """Greedy tokens of both models, with a cache."""
    found = []
    for model in (both(name), ALL[name].build()):
        given = {key: value for key, value in ALL[name].make_inputs().items() if key != "labels"}
        found.append(model.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist())
    return {"tokens": found}


def autocast(name: str) -> Results:
    """Losses under torch.autocast, and whether every gradient is finite and of its parameter's dtype."""
    losses = []
    for model in (ALL[name].build(), both(name)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**make_inputs(name)).loss
        loss.backward()
        losses.append(loss.item())
    gradients = [p.grad for p in model.parameters()]
    return {"losses": losses, "sound": all(bool(g.isfinite().all()) and g.dtype == torch.float32 for g in gradients)}


def refusals(name: str) -> Results:
    """What wrong orders and sequence parallelism are told, and whether the model is as it was."""
    swapped, whole = ALL[name].build(), ALL[name].build()
    swap(swapped)
    in_sequence = sharded(name, dist.group.WORLD, sequence_parallel=True)
    inputs = make_inputs(name)
    said = []
    for call in (
        lambda: shard(swapped, dist.group.WORLD),
        lambda: swap(in_sequence),
        lambda: swap(both(name)),
        lambda: shard(both(name), dist.group.WORLD),
    ):
        try:
            call()
        except ValueError as refused:
            said.append(str(refused))
    expected = run(whole, inputs)
    return {"said": said, "outputs": error(run(swapped, inputs), expected) | error(run(in_sequence, inputs), expected)}


CHECKS = [
    (equals_one_process, NAMES),
    (reverts, NAMES),
    (steps, ("bert", "distilbert", "gpt2", "qwen3", "modernbert")),
    (dropout, ("bert", "distilbert", "gpt2")),
    (attention_dropout, ("bert", "gpt2")),
    (generation, DECODERS),
    (autocast, ("bert", "gpt2", "qwen3", "modernbert")),
    (refusals, ("bert", "gpt2")),
]


def worker() -> dict[tuple[str, str], Results]:
    """By check and model: what the check found, or the error it ended with."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE_S))
    results: dict[tuple[str, str], Results] = {}
    for check, names in CHECKS:
        for name in names:
            try:
                results[check.__name__, name] = check(name)
            except Exception:
                results[check.__name__, name] = {"error": traceback.format_exc()}
    dist.destroy_process_group()
    return results
