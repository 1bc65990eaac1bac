"""Tensor and sequence parallelism against one process, with groups of two and four of four processes; and what needs none."""

import copy
import pickle
from dataclasses import dataclass
from itertools import combinations

import pytest
import torch
from distributed.workers.tensor_parallel import CHECKS, worker
from distributed.workers.tensors import SEED
from helpers.spawn import run_processes
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from xformer_train.kernels import LayerConfig, LayerStack, te
from xformer_train.kernels.ops.dropout import draw_seed
from xformer_train.kernels.ops.linear import linear
from xformer_train.kernels.ops.loss.vocab_parallel import (
    vocab_parallel_embedding,
    vocab_parallel_linear_cross_entropy,
)
from xformer_train.kernels.ops.parallel_linear import column_parallel_linear, row_parallel_linear
from xformer_train.kernels.parallel import collectives as tp
from xformer_train.kernels.parallel.sharding import (
    Partition,
    initialize_sharded,
    is_sharded,
    join_state_dicts,
    keep_marks,
    mark_sharded,
    partitions_of,
    shard_state_dict,
    take_shard,
)
from xformer_train.kernels.te.rng_tracker import (
    MODEL_PARALLEL_RNG,
    RngStatesTracker,
    draw_dropout_seeds,
    seed_tensor_parallel,
)

# Sums in another order: some units of the last place, of values up to some tens.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
SIZES = [2, 4]
BIT_EQUAL = {"initialization", "overlap"}


@pytest.fixture(scope="module")
def by_rank():
    return run_processes(worker, 4)


@dataclass
class Processes:
    """A process group as far as argument checks look at it."""

    count: int
    place: int = 0

    def size(self):
        return self.count

    def rank(self):
        return self.place


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("check", sorted(CHECKS))
def test_results_and_gradients_are_those_of_one_process(by_rank, check, size):
    for rank, results in enumerate(by_rank):
        assert results[size][check]
        for what, ours, expected in results[size][check]:
            name = f"{what}, process {rank}"
            if check in BIT_EQUAL:
                assert torch.equal(ours, expected), name
            elif check == "half_precision_cross_entropies":
                # inputs are exact in bf16; the logits, their gradients and the results are rounded to 8 bits
                error = (ours.double() - expected).abs().max()
                assert error <= 0.02 * max(1.0, expected.abs().max()), (name, error)
            else:
                tolerance = TOLERANCES.get(expected.dtype, 0)
                torch.testing.assert_close(
                    ours, expected, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
                )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("parallel", [False, True])
def test_dropout_is_equal_or_different_over_the_group_as_the_activations_are(by_rank, parallel, size):
    places = [results[size]["dropout_masks"] for results in by_rank]
    for one, other in combinations(places, 2):
        (hidden, attention), (other_hidden, other_attention) = (p[f"SP {parallel}"]["masks"] for p in (one, other))
        same_place = one["rank"] == other["rank"]  # in two groups that were seeded alike
        assert torch.equal(hidden, other_hidden) == (not parallel or same_place)
        assert torch.equal(attention, other_attention) == same_place
        assert not torch.equal(hidden, attention)


@pytest.mark.parametrize("size", SIZES)
def test_streams_start_at_megatrons_seeds(by_rank, size):
    for results in by_rank:
        place = results[size]["dropout_masks"]

        def draws(seed):
            generator = torch.Generator().manual_seed(seed)
            return [torch.randint(0, 2**63 - 1, (), generator=generator).item() for _ in range(2)]

        ours = draws(SEED + 2718 + place["rank"])
        assert place["SP False"]["seeds"] == [draws(SEED)[0], ours[0]]
        assert place["SP True"]["seeds"] == [ours[1], ours[1]]


@pytest.mark.parametrize("group", [None, Processes(1)])
def test_one_process_pays_nothing(group):
    x = torch.randn(4, 3, requires_grad=True)
    for function in (
        tp.copy_to_group,
        tp.reduce_from_group,
        tp.gather_from_sequence,
        tp.reduce_scatter_to_sequence,
        tp.scatter_to_group,
        tp.gather_from_group,
    ):
        assert function(x, group) is x
    weight, bias = torch.randn(5, 3), nn.Parameter(torch.randn(5))
    for function in (column_parallel_linear, row_parallel_linear):
        assert torch.equal(function(x, weight, bias, group, sequence_parallel=True), linear(x, weight, bias))
    tp.sum_gradient_over(bias, group)
    assert not bias.sequence_parallel
    assert not bias._backward_hooks
    ids = torch.tensor([[1, 4]])
    assert torch.equal(vocab_parallel_embedding(ids, weight, group), weight[ids])


def test_padded_rows_get_no_probability_in_one_process_either():
    hidden, weight, labels = torch.randn(6, 3).double(), torch.randn(8, 3).double(), torch.tensor([0, 4, -100, 2, 1, 3])
    padded, real = weight.clone().requires_grad_(), weight[:5].clone().requires_grad_()
    loss = vocab_parallel_linear_cross_entropy(hidden, padded, None, labels, None, vocabulary_size=5)
    expected = nn.functional.cross_entropy(hidden @ real.T, labels, reduction="sum")
    (loss + expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(padded.grad[:5], real.grad, rtol=1e-12, atol=1e-12)
    assert not padded.grad[5:].any()


def test_summed_parameters_are_marked_even_when_frozen():
    weight = nn.Parameter(torch.ones(3), requires_grad=False)
    tp.sum_gradient_over(weight, Processes(2))
    assert weight.sequence_parallel
    assert not weight.requires_grad
    assert len(weight._backward_hooks) == 1


def test_deepspeed_counts_a_shard_on_every_process():
    from deepspeed.runtime.utils import is_model_parallel_parameter

    module = nn.Linear(4, 6)
    initialize_sharded(module.weight, nn.init.normal_, (6, 4), 0, None)
    assert is_model_parallel_parameter(module.weight)
    assert not is_model_parallel_parameter(module.bias)
    assert (module.weight.partition_dim, module.weight.partition_stride) == (0, 1)
    module.to(torch.bfloat16)
    assert is_model_parallel_parameter(module.weight)


class Fused(nn.Module):
    """A fused projection of 8 queries, 4 keys and 4 values, its row-parallel output, a tied name and a buffer."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(3, 16), nn.Linear(8, 3), nn.LayerNorm(3)
        self.register_buffer("steps", torch.tensor(7))
        for parameter in (self.qkv.weight, self.qkv.bias):
            mark_sharded(parameter, Partition(0, (8, 4, 4)))
        mark_sharded(self.out.weight, Partition(1))
        self.tied = self.qkv


def own_layers():
    module = Fused()
    keep_marks(module)
    return module


@pytest.mark.parametrize(
    "build",
    [
        lambda: LayerStack(LayerConfig(32, 2, 64), 2),
        lambda: te.TransformerLayer(32, 64, 2, set_parallel_mode=True),
        own_layers,
    ],
    ids=["layers", "te", "a layer of one's own"],
)
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), lambda module: AveragedModel(module).module],
    ids=["deepcopy", "pickle", "AveragedModel"],
)
def test_copies_keep_the_marks_of_their_parameters(build, copied):
    module = build()
    expected = {name for name, parameter in module.named_parameters() if is_sharded(parameter)}
    assert len(expected) > 2
    ours = copied(module)
    for _ in range(2):
        assert partitions_of(ours) == partitions_of(module)
        assert {name for name, parameter in ours.named_parameters() if is_sharded(parameter)} == expected
        ours.load_state_dict({name: tensor.clone() for name, tensor in module.state_dict().items()}, assign=True)


def test_a_marked_parameter_that_a_parametrization_hides_is_no_whole_one():
    module = own_layers()
    parametrize.register_parametrization(module.out, "weight", nn.Identity())
    with pytest.raises(
        ValueError, match=r"^out\.weight is marked as a shard, and the module has no such parameter any more"
    ):
        partitions_of(module)


def test_a_state_dict_goes_to_another_size_and_back():
    module = Fused()
    full, partitions = module.state_dict(), partitions_of(module)
    assert set(partitions) == {"qkv.weight", "qkv.bias", "out.weight", "tied.weight", "tied.bias"}
    before = copy.deepcopy(full)
    two, four = ([shard_state_dict(full, partitions, rank, size) for rank in range(size)] for size in (2, 4))
    assert torch.equal(two[1]["qkv.bias"], full["qkv.bias"][[4, 5, 6, 7, 10, 11, 14, 15]])
    assert torch.equal(two[1]["out.weight"], full["out.weight"][:, 4:])
    assert two[1]["qkv.weight"].is_contiguous()
    assert two[1]["out.weight"].untyped_storage().nbytes() == 3 * 4 * 4  # nothing of the full tensor is kept
    from_two = join_state_dicts(two, partitions)
    again = [shard_state_dict(from_two, partitions, rank, 4) for rank in range(4)]
    for name, tensor in full.items():
        assert torch.equal(from_two[name], tensor), name
        assert torch.equal(before[name], tensor), name
        assert all(torch.equal(ours[name], theirs[name]) for ours, theirs in zip(again, four, strict=True)), name


@pytest.mark.parametrize(
    ("copy_on_2", "difference"),
    [
        (torch.tensor([1.0, 2.5]), "has other values on process 2 than on process 0"),
        (torch.tensor([1.0]), r"is \(1,\) torch.float32 on process 2 and \(2,\) torch.float32 on process 0"),
        (torch.tensor([1, 2]), r"is \(2,\) torch.int64 on process 2 and \(2,\) torch.float32 on process 0"),
    ],
)
def test_an_entry_that_all_processes_hold_must_be_the_same_on_all(copy_on_2, difference):
    shards = [{"norm.bias": torch.tensor([1.0, 2.0])} for _ in range(4)]
    assert torch.equal(join_state_dicts(shards, {})["norm.bias"], torch.tensor([1.0, 2.0]))
    shards[2]["norm.bias"] = copy_on_2
    with pytest.raises(ValueError, match=f"norm.bias has no partition and {difference}"):
        join_state_dicts(shards, {})


def test_a_fork_leaves_the_default_generator_as_it_was():
    tracker = RngStatesTracker("cpu")
    seed_tensor_parallel(3, Processes(2, 1), tracker)
    before = torch.get_rng_state()
    with tracker.fork():
        first = draw_seed(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RuntimeError, match="inside"), tracker.fork():
        raise RuntimeError("inside")
    assert torch.equal(torch.get_rng_state(), before)
    assert tracker.active is None
    with tracker.fork():
        assert draw_seed(torch.device("cpu")) != first


def test_forks_within_forks_go_on_where_the_stream_is():
    def draws(depth):
        tracker = RngStatesTracker("cpu")
        tracker.add("a", 1)
        tracker.add("b", 2)
        torch.manual_seed(0)
        if depth == 0:
            with tracker.fork("a"):
                values = [torch.rand(2)]
            with tracker.fork("a"):
                values.append(torch.rand(2))
            with tracker.fork("b"):
                other = torch.rand(2)
        else:
            with tracker.fork("a"):
                values = [torch.rand(2)]
                with tracker.fork("a"):
                    values.append(torch.rand(2))
                    with tracker.fork("b"):
                        other = torch.rand(2)
        return torch.stack([*values, other, torch.rand(2)])

    assert torch.equal(draws(0), draws(1))


def test_states_replay_what_was_drawn_inside_a_fork_too():
    tracker = RngStatesTracker("cpu")
    seed_tensor_parallel(3, None, tracker)
    drop = nn.Dropout(0.5)

    def forward():
        mask = drop(torch.ones(64))
        with tracker.fork():
            return torch.cat([mask, drop(torch.ones(64))])

    states, default = tracker.get_states(), torch.get_rng_state()
    first = forward()
    assert not torch.equal(forward(), first)
    tracker.set_states(states)
    torch.set_rng_state(default)
    assert torch.equal(forward(), first)

    with tracker.fork():
        torch.rand(3)
        states, active = tracker.get_states(), tracker.active
        kept = copy.deepcopy(states)
        first = forward()
    assert active == MODEL_PARALLEL_RNG
    tracker.set_states(states)
    with tracker.fork(active):
        assert torch.equal(forward(), first)
    assert all(torch.equal(states[name], kept[name]) for name in kept)  # forks write to the tracker's own copies


def test_without_a_tracker_a_layer_draws_one_seed():
    torch.manual_seed(5)
    expected = draw_seed(torch.device("cpu"))
    torch.manual_seed(5)
    assert draw_dropout_seeds(torch.device("cpu"), None) == (expected, expected)


def test_wrong_use_is_said_in_one_sentence():
    two, x = Processes(2), torch.zeros(7, 3)
    tracker = RngStatesTracker("cpu")
    tracker.add("a", 1)
    partition = Partition(0, (4, 2))
    state = {"w": torch.zeros(3, 2)}
    wrong = [
        (lambda: tp.scatter_to_group(x, two), "dim -1 of x is 3, which the 2 processes"),
        (lambda: tp.reduce_scatter_to_sequence(x, two), "dim 0 of x is 7, which the 2 processes"),
        (
            lambda: row_parallel_linear(x, torch.zeros(4, 3), None, two, sequence_parallel=True),
            "sequence.* is 7, which",
        ),
        (lambda: column_parallel_linear(x, torch.zeros(4, 5), None, two), r"x is \(7, 3\), .*weight is \(4, 5\)"),
        (lambda: column_parallel_linear(x[0], torch.zeros(4, 3), None, two), r"x is \(3,\)"),
        (
            lambda: vocab_parallel_embedding(torch.zeros(7, dtype=torch.long), x, two, sequence_parallel=True),
            "input_ids, is 7, which",
        ),
        (
            lambda: vocab_parallel_linear_cross_entropy(x, x, None, x[:, 0], two, vocabulary_size=15),
            "vocabulary_size=15 is not in 1 .. 14",
        ),
        (
            lambda: vocab_parallel_linear_cross_entropy(x, x, None, x[:5, 0], two),
            "hidden has 7 rows in all, labels has 5",
        ),
        (lambda: take_shard(x, Partition(0), 0, 2, "w"), "w has 7 rows along dim 0, which 2 processes"),
        (lambda: take_shard(x, partition, 0, 2, "w"), r"w has 7 rows along dim 0, its parts \(4, 2\) add up to 6"),
        (
            lambda: initialize_sharded(nn.Parameter(x), nn.init.zeros_, (8, 3), 0, two),
            r"parameter is \(7, 3\), the shard of \(8, 3\) along dim 0 over 2 processes is \(4, 3\)",
        ),
        (lambda: join_state_dicts([state, {}], {}), r"differ in \['w'\]"),
        (lambda: join_state_dicts([state, {"w": x}], {"w": Partition(0)}), r"w has shards of \[\(3, 2\), \(7, 3\)\]"),
        (lambda: tracker.add("a", 2), "rng state 'a' is already added"),
        (lambda: tracker.fork("b").__enter__(), "rng state 'b' is not added; call seed_tensor_parallel"),
        (lambda: draw_dropout_seeds(torch.device("meta"), tracker), "rules cpu, the activations are on meta"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
