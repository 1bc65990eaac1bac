"""te.checkpoint over two processes: what it keeps, what it computes again, what it refuses."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from helpers.spawn import PATIENCE_S
from saved_activations import count_saved_bytes
from torch import Tensor, nn

from xformer_train.kernels import te
from xformer_train.kernels.te.rng_tracker import RngStatesTracker, seed_tensor_parallel

S, B, HIDDEN, FFN, HEADS = 8, 2, 32, 64, 4
Pairs = Iterator[tuple[str, Any, Any]]


def step(run: Any, layer: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Output and gradients of one step; run(layer, x) is layer(x), and x is alike on all ranks."""
    layer.zero_grad()
    x = torch.randn(S, B, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()
    before = x.detach().clone()
    out = run(layer, x)
    assert torch.equal(x, before), "the caller's tensor was changed"
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=dtype))
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "input": x.grad, **gradients}


def recomputed(group: dist.ProcessGroup) -> Pairs:
    """Bit for bit what is kept, dropout masks of both kinds included, and the streams behind it."""
    tracker = RngStatesTracker("cpu")
    options = {"set_parallel_mode": True, "tp_group": group, "params_dtype": torch.float64}
    for sequence_parallel in (False, True):
        for distribute in (False, True) if not sequence_parallel else (False,):
            for tracked in (False, True):
                get_tracker = (lambda: tracker) if tracked else None
                seed_tensor_parallel(0, group, tracker)
                layer = te.TransformerLayer(
                    HIDDEN,
                    FFN,
                    HEADS,
                    **options,
                    sequence_parallel=sequence_parallel,
                    get_rng_state_tracker=get_tracker,
                )

                def first_form(layer, x, distribute=distribute, get_tracker=get_tracker):
                    return te.checkpoint(layer, distribute, get_tracker, group, x)

                def todays_form(layer, x, distribute=distribute, get_tracker=get_tracker):
                    return te.checkpoint(
                        layer,
                        x,
                        distribute_saved_activations=distribute,
                        tp_group=group,
                        get_rng_state_tracker=get_tracker,
                        use_reentrant=False,
                    )

                results = []
                for run in (nn.Module.__call__, first_form, todays_form):
                    seed_tensor_parallel(3, group, tracker)
                    results.append(step(run, layer))
                    results[-1] |= {f"rng {name}": state for name, state in tracker.get_states().items()}
                    results[-1]["rng"] = torch.get_rng_state()
                title = f"sequence_parallel={sequence_parallel}, distribute={distribute}, tracked={tracked}"
                for name, expected in results[0].items():
                    yield f"{title}, first form: {name}", results[1][name], expected
                    yield f"{title}, today's form: {name}", results[2][name], expected


def fp8_history(group: dist.ProcessGroup) -> Pairs:
    """Three steps with delayed scaling, reduced over the ranks: the same state after each."""
    states: list[dict[str, Tensor]] = []
    for distribute in (None, False, True):
        torch.manual_seed(0)
        dropouts = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
        layer = te.TransformerLayer(HIDDEN, FFN, 2, **dropouts, set_parallel_mode=True, tp_group=group)

        def run(layer: Any, x: Tensor, distribute: bool | None = distribute) -> Tensor:
            with te.fp8_autocast(fp8_recipe=te.DelayedScaling(amax_history_len=2), fp8_group=group):
                return layer(x) if distribute is None else te.checkpoint(layer, distribute, None, group, x)

        seen: dict[str, Tensor] = {}
        for number in range(3):
            result = step(run, layer, torch.float32)
            state = {name: tensor.clone() for name, tensor in layer.state_dict().items() if "fp8" in name}
            seen |= {f"{number} {name}": tensor for name, tensor in (result | state).items()}
        states.append(seen)
    for name, expected in states[0].items():
        yield f"fp8, kept whole: {name}", states[1][name], expected
        yield f"fp8, distributed: {name}", states[2][name], expected


def bytes_kept(group: dist.ProcessGroup) -> Pairs:
    """1/t of the argument, in elements as they stand in its shape, not in memory."""
    x = torch.randn(S, B, HIDDEN).transpose(0, 1).requires_grad_()  # not contiguous
    module = nn.Sequential(te.Linear(HIDDEN, FFN), nn.GELU(), te.Linear(FFN, HIDDEN))
    run = lambda: te.checkpoint(module, True, None, group, x)  # noqa: E731
    yield "bytes", count_saved_bytes(run, module.parameters()), x.nbytes // group.size()
    distributed, whole = run(), module(x)
    yield "output", distributed.detach(), whole.detach()
    (expected,) = torch.autograd.grad(whole.square().sum(), x)
    (gradient,) = torch.autograd.grad(distributed.square().sum(), x)
    yield "gradient", gradient, expected


def refusals(group: dist.ProcessGroup) -> Pairs:
    """What does not go with distribute_saved_activations."""
    parallel = {"parallel_mode": "column", "tp_group": group, "sequence_parallel": True}
    inside = te.LayerNormLinear(HIDDEN, FFN, **parallel)
    cases = {
        "numel": (torch.sin, torch.ones(3)),
        "not a tensor": (torch.sin, 3.0),
        "sequence parallel": (nn.Sequential(te.Linear(HIDDEN, FFN, **parallel)), torch.ones(4, HIDDEN)),
        "norm": (te.LayerNorm(HIDDEN, sequence_parallel=True), torch.ones(4, HIDDEN)),
        "in a closure": (lambda x, _=None: inside(x), torch.ones(4, HIDDEN)),
    }
    for name, (function, x) in cases.items():
        try:
            te.checkpoint(function, True, None, group, x)
            yield name, "no error", ""
        except ValueError as error:
            yield name, str(error), str(error)


CHECKS = (recomputed, fp8_history, bytes_kept, refusals)


def worker() -> dict[str, tuple[Any, Any]]:
    """All pairs of what is and what should be."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE_S))
    pairs = {name: (ours, expected) for check in CHECKS for name, ours, expected in check(dist.group.WORLD)}
    dist.destroy_process_group()
    return pairs
