"""Orthogonal matrices near given ones, by Newton-Schulz iterations on many at once.

Source: Jordan et al., Muon, https://kellerjordan.github.io/posts/muon/. Coefficients and order are those of torch.optim.Muon.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315
_LEAST_NORM = 1e-7
_TOGETHER = 3  # an error of the product grows by a² from one iteration to the next; with more bf16 would run away
_LEAST_ROWS = 64  # the products of smaller matrices take no time
_BATCH_NUMEL = 1 << 24  # a larger batch is no faster, and takes memory


def orthogonalize(matrices: Sequence[Tensor], steps: int) -> list[Tensor]:
    """Return for each matrix U S V^T another one, U S' V^T, with S' between about 0.7 and 1.2 where S is not near 0.

    Computed in the dtype of the matrices, and wide where they are tall. A matrix of zeros stays one, and what has no elements
    stays as it is. Singular values far below the norm of their matrix need more than the usual 5 steps.
    """
    results = list(matrices)
    by_shape: dict[tuple[int, int], list[int]] = {}
    for number, matrix in enumerate(matrices):
        rows, columns = sorted(matrix.shape)
        if rows:
            by_shape.setdefault((rows, columns), []).append(number)
    for (rows, columns), numbers in by_shape.items():
        size = max(1, _BATCH_NUMEL // (rows * columns))
        for first in range(0, len(numbers), size):
            batch = numbers[first : first + size]
            wide = _iterate(torch.stack([_wide(matrices[number]) for number in batch]), steps)
            for number, result in zip(batch, wide, strict=True):
                results[number] = result if matrices[number].shape == result.shape else result.mT
    return results


def flops(rows: int, columns: int) -> int:
    """Return what one iteration multiplies and adds, to compare matrices by."""
    short, long = sorted((rows, columns))
    return 4 * short * short * long + 2 * short**3


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def _iterate(x: Tensor, steps: int) -> Tensor:
    """Return the iterations' result of a batch of wide matrices (B, m, n), whose m x m products are the cheaper ones.

    An iteration is x <- a x + p x with p = b g + c g² and g = x xᵀ. All these products of g commute, so that several iterations
    can share one: the next g is (a + p) g (a + p), of three small products in place of a long one, and x is multiplied once.
    """
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=_LEAST_NORM)  # no singular value above 1
    _, rows, columns = x.shape
    together = _TOGETHER if rows >= _LEAST_ROWS and columns >= 2 * rows else 1
    for first in range(0, steps, together):
        gram = torch.bmm(x, x.mT)
        count = min(together, steps - first)
        total = step = _polynomial(gram)
        for done in range(1, count):
            gram = torch.baddbmm(gram, step, gram, beta=_A)
            gram = torch.baddbmm(gram, gram, step, beta=_A)
            step = _polynomial(gram)
            total = torch.baddbmm(total, step, total, beta=_A).add_(step * _A**done)
        x = torch.baddbmm(x, total, x, beta=_A**count)
    return x


def _polynomial(gram: Tensor) -> Tensor:
    return torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
