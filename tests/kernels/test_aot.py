"""What is counted of kernels that are compiled without a GPU, and every kernel for sm_80."""

import importlib.util

import pytest
from helpers.aot import check_every_kernel, rows_of

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_instructions_are_counted_loop_by_loop():
    (row,) = rows_of(80, "--cases", "softmax_loss_ V30522 bf16")
    assert row["kernel"] == "_softmax_loss_kernel"
    assert len(row["loops"]) == 2  # one pass sums, one writes; both take powers
    assert sum(row["loops"]) < row["all"]
    assert all(row["MUFU"])


@needs_triton
def test_packed_batches_of_any_number_of_tokens_share_their_kernels():
    rows = rows_of(90, "--cases", "attention of three packed batches")
    assert [row["kernel"] for row in rows] == [
        "attention_forward",
        "attention_backward_queries",
        "attention_backward_keys",
    ]


@pytest.mark.slow
@needs_triton
def test_every_kernel_compiles_without_spills_and_with_the_fast_instructions():
    check_every_kernel(80)
