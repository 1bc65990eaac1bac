"""The embedding and the loss over a vocabulary that processes share, beside the same computation in one process."""

from itertools import product as cases

import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed.workers.tensors import DTYPES, Triples, leaf, part, randn
from torch import Tensor

from xformer_train.kernels.ops.choices import IGNORED
from xformer_train.kernels.ops.loss import cross_entropy, vocab_parallel
from xformer_train.kernels.ops.loss.cross_entropy import linear_cross_entropy


def embeddings(group: dist.ProcessGroup) -> Triples:
    rows = 6 * group.size()
    for dtype, parallel in cases(DTYPES, (False, True)):
        ids = torch.randint(0, rows, (2 * group.size(), 3), generator=torch.Generator().manual_seed(5))
        full = leaf(randn(rows, 5, key=6, dtype=dtype))
        full_y = F.embedding(ids, full)
        dy = randn(*full_y.shape, key=7, dtype=dtype)
        full_y.backward(dy)
        weight = leaf(part(full, group, 0))
        y = vocab_parallel.vocab_parallel_embedding(ids, weight, group, sequence_parallel=parallel)
        y.backward(part(dy, group, 0) if parallel else dy)
        yield f"y, {dtype}, SP {parallel}", y, part(full_y, group, 0) if parallel else full_y
        yield f"dweight, {dtype}, SP {parallel}", weight.grad, part(full.grad, group, 0)
    for wrong in (-1, rows):
        try:
            vocab_parallel.vocab_parallel_embedding(torch.tensor([0, wrong]), weight, group)
            raised = False
        except IndexError:
            raised = True
        yield f"id {wrong} fails everywhere", torch.tensor(raised), torch.tensor(True)


def cross_entropies(group: dist.ProcessGroup, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Triples:
    """24 rows of vocabulary, 17 of them real where padded: a process of four then holds padding alone."""
    tokens, width, rows, scale = 12, 5, 24, 0.7
    cross_entropy._CHUNK_ELEMENTS = 5 * rows // group.size()  # three chunks, the last one shorter
    labels = torch.randint(0, 17, (tokens,), generator=torch.Generator().manual_seed(8))
    labels[[1, 7]] = IGNORED
    for dtype, parallel, biased, real in cases(dtypes, (False, True), (False, True), (24, 17)):
        wide = torch.float64 if dtype == torch.bfloat16 else dtype
        full = [
            randn(*shape, key=50 + i, dtype=dtype).to(wide) for i, shape in enumerate([(tokens, width), (rows, width)])
        ]
        full = [leaf(x) for x in [*full, 20 * randn(rows, key=52, dtype=dtype).to(wide)]]
        head_bias = full[2] if biased else None
        full_loss = linear_cross_entropy(full[0], full[1][:real], head_bias[:real] if biased else None, labels)
        (full_loss * scale).backward()
        hidden = leaf((part(full[0], group, 0) if parallel else full[0]).to(dtype))
        weight, bias = (leaf(part(x, group, 0).to(dtype)) for x in full[1:])

        def loss_of(
            hidden: Tensor, weight: Tensor, bias: Tensor | None, real: int = real, parallel: bool = parallel
        ) -> Tensor:
            return vocab_parallel.vocab_parallel_linear_cross_entropy(
                hidden, weight, bias, labels, group, vocabulary_size=real, sequence_parallel=parallel
            )

        loss = loss_of(hidden, weight, bias if biased else None)
        (loss * scale).backward()
        what = f"{dtype}, SP {parallel}, bias {biased}, {real} rows"
        with torch.no_grad():
            yield f"loss without gradient, {what}", loss_of(hidden, weight, bias if biased else None), full_loss
        yield f"loss, {what}", loss, full_loss
        yield f"dhidden, {what}", hidden.grad, part(full[0].grad, group, 0) if parallel else full[0].grad
        yield f"dweight, {what}", weight.grad, part(full[1].grad, group, 0)
        if biased:
            yield f"dbias, {what}", bias.grad, part(full[2].grad, group, 0)


def half_precision_cross_entropies(group: dist.ProcessGroup) -> Triples:
    return cross_entropies(group, (torch.bfloat16,))
