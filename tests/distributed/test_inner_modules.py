"""What FSDP puts on the modules inside a layer, and what nobody may put there where processes share a layer."""

import pytest
from distributed.workers.inner_modules import INNER, worker
from helpers.spawn import run_processes


@pytest.fixture(scope="module")
def by_rank():
    return run_processes(worker, 2)


@pytest.mark.parametrize("way", ["fully_shard", "FullyShardedDataParallel"])
@pytest.mark.parametrize("what", ["layers", "modules inside"])
def test_fsdp_trains_as_one_process_whether_it_wraps_layers_or_modules_inside(by_rank, way, what):
    for results in by_rank:
        ours, expected = (results["losses"][name] for name in (f"{way} of {what}", "plain"))
        assert ours == pytest.approx(expected, rel=1e-5)
        assert len(set(expected)) == 3


@pytest.mark.parametrize("name", [*INNER, "word_embeddings", "adapter"])
def test_a_hook_or_an_adapter_inside_of_what_processes_share_is_refused_by_name(by_rank, name):
    for results in by_rank:
        assert results["said"][name].startswith("output of this" if name == "adapter" else name)
        assert "has hooks or a forward of its own, which know nothing of the 2 processes" in results["said"][name]
