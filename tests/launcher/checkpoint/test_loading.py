"""Checkpoints of a tiny network loaded again: exact resume, and what is refused because it does not fit or is damaged."""

import itertools
import os
import pickle
import random

import numpy as np
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from distributed.workers.checkpoint import checkpoint_worker
from helpers.checkpoints import changed_state, flip_byte, save
from helpers.spawn import run_processes
from helpers.tiny import HIDDEN, MODEL, WIDTH, tiny_config, tiny_engine, tiny_model, train, whole_weights

from xformer_train.kernels.errors import UserError
from xformer_train.kernels.layers.projection import Projection
from xformer_train.launcher.checkpoint import loading
from xformer_train.launcher.checkpoint.files import read_file, write_file
from xformer_train.launcher.checkpoint.resharding import Saved
from xformer_train.launcher.checkpoint.store import read_state
from xformer_train.launcher.config.optimizers import OptimizerConfig
from xformer_train.launcher.optim.engine import build_engine
from xformer_train.launcher.optim.optimizer import build_optimizer, moments_of
from xformer_train.launcher.processes.topology import quiet, start_processes, stop_processes

UNTESTED = {"zero_allow_untested_optimizer": True}


@pytest.fixture(scope="module")
def alone():
    quiet(debug=False)
    topology = start_processes(60)
    yield topology
    stop_processes()


@pytest.fixture(scope="module")
def engine(alone):
    engine = tiny_engine(alone, 0, "fp32")
    train(engine, alone, 0, 1)
    return engine


def equal_weights(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


# Resume


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_at_stage_0_gives_the_same_bits_as_no_stop(alone, tmp_path, precision):
    straight = tiny_engine(alone, 0, precision)
    record = train(straight, alone, 0, 5)

    before = tiny_engine(alone, 0, precision)
    assert train(before, alone, 0, 3) == record[:3]
    save(before, tmp_path, "three", 3, alone)
    after = tiny_engine(alone, 0, precision)
    torch.manual_seed(5)
    assert loading.load(after, tmp_path / "three", MODEL, alone)
    assert train(after, alone, 3, 5) == record[3:]
    assert equal_weights(whole_weights(after), whole_weights(straight))
    assert after.global_steps == straight.global_steps


@pytest.mark.parametrize("stage", [1, 3])
def test_moments_of_any_name_are_brought_to_another_stage_bit_for_bit(alone, tmp_path, stage):
    before = tiny_engine(alone, 0, "fp32", amsgrad=True)
    train(before, alone, 0, 2)
    save(before, tmp_path, "stage_0", 2, alone)
    after = tiny_engine(alone, stage, "fp32", amsgrad=True)
    loading.load(after, tmp_path / "stage_0", MODEL, alone)
    save(after, tmp_path, "elsewhere", 2, alone)
    saved, moved = (Saved(tmp_path / name, read_state(tmp_path / name)) for name in ("stage_0", "elsewhere"))
    for name in saved.names:
        assert set(moved.state(name)) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
        assert int(moved.state(name)["step"]) == 2
        for key in ("weight", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert moved.whole(name, key).equal(saved.whole(name, key)), (name, key)


def saved_and_moved(before, after, alone, folder):
    """Train two steps in one engine, load them into another, and return what each saves."""
    train(before, alone, 0, 2)
    save(before, folder, "stage_0", 2, alone)
    loading.load(after, folder / "stage_0", MODEL, alone)
    save(after, folder, "elsewhere", 2, alone)
    return [Saved(folder / name, read_state(folder / name)) for name in ("stage_0", "elsewhere")]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_state_without_a_count_of_steps_is_brought_to_another_stage(alone, tmp_path, stage):
    def engine(stage):
        model = tiny_model()
        sgd = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        return build_engine(model, sgd, tiny_config(alone, stage, "fp32") | UNTESTED, alone)

    before, after = engine(0), engine(stage)
    saved, moved = saved_and_moved(before, after, alone, tmp_path)
    for name in saved.names:
        assert set(moved.state(name)) == {"momentum_buffer"}
        assert moved.whole(name, "momentum_buffer").equal(saved.whole(name, "momentum_buffer")), name


@pytest.mark.parametrize("stage", [2, 3])
def test_a_state_of_muon_and_adamw_is_brought_to_another_stage_and_refused_to_adamw_alone(alone, tmp_path, stage):
    def engine(stage):
        torch.manual_seed(11)
        model = torch.nn.Sequential(Projection(WIDTH, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, WIDTH))
        muon = build_optimizer(model, OptimizerConfig(type="muon"))
        return build_engine(model, muon, tiny_config(alone, stage, "fp32") | UNTESTED, alone)

    before, after = engine(0), engine(stage)
    saved, moved = saved_and_moved(before, after, alone, tmp_path)
    for name in saved.names:
        kept = {"momentum_buffer"} if name == "0.weight" else {"step", "exp_avg", "exp_avg_sq"}
        assert set(moved.state(name)) == kept
        for key in kept - {"step"}:
            assert moved.whole(name, key).equal(saved.whole(name, key)), (name, key)
    muon = OptimizerConfig(type="muon")
    loading.check_optimizer(tmp_path / "elsewhere", moments_of(muon), "muon")
    with pytest.raises(
        ValueError, match=r"kept exp_avg, exp_avg_sq, momentum_buffer .*=adamw keeps exp_avg, exp_avg_sq: set"
    ):
        loading.check_optimizer(tmp_path / "elsewhere", moments_of(OptimizerConfig()), "adamw")
    assert np.array(train(after, alone, 2, 5)) == pytest.approx(np.array(train(before, alone, 2, 5)), rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_an_optimizer_with_other_moments_is_refused(alone, tmp_path, stage, precision):
    engine = tiny_engine(alone, stage, precision)
    save(engine, tmp_path, "new", 0, alone)
    loading.check_optimizer(tmp_path / "new", {"momentum_buffer"}, "sgd")  # it has none yet
    train(engine, alone, 0, 1)
    save(engine, tmp_path, "a", 1, alone)
    loading.check_optimizer(tmp_path / "a", {"exp_avg", "exp_avg_sq"}, "adamw")
    for moments, told in (({"exp_avg"}, "exp_avg"), ({"momentum_buffer"}, "momentum_buffer"), (set(), "nothing")):
        message = rf"kept exp_avg, exp_avg_sq of its parameters; optimizer\.type=x keeps {told}: set that of the check"
        with pytest.raises(ValueError, match=message):
            loading.check_optimizer(tmp_path / "a", moments, "x")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, run_processes(checkpoint_worker, 2, folder, [1, 2, 3])


def test_resume_on_two_processes_at_stages_1_to_3_gives_the_same_bits_as_no_stop(two_processes):
    for results in two_processes[1]:
        for stage in (1, 2, 3):
            record, weights = results["resume"][stage]["straight"]
            resumed_record, resumed_weights = results["resume"][stage]["resumed"]
            assert resumed_record == record
            assert equal_weights(resumed_weights, weights)


def test_weights_are_read_from_the_shards_of_two_processes(two_processes):
    for results in two_processes[1]:
        for stage in (1, 2, 3):
            assert equal_weights(*results["resume"][stage]["saved"])


def test_one_process_with_a_full_disk_stops_the_save_on_all(two_processes):
    folder = two_processes[0] / "full"
    for results in two_processes[1]:
        message, ids, left, ids_after = results["full disk"]
        assert message.startswith(f"checkpoint second could not be saved in {folder}: No space left on device;")
        assert (ids, left, ids_after) == ("first", "first,latest", "first,second")


def test_two_processes_train_while_their_checkpoints_are_written(two_processes):
    """Steps and saves overlap, one save fails on one process, and nothing of it shows in losses or weights."""
    for rank, results in enumerate(two_processes[1]):
        beside = results["beside training"]
        assert beside["same"] and beside["resumed"]
        assert (beside["after two"], beside["in the end"], beside["problems"]) == (["one"], ["three"], [])
        assert equal_weights(*beside["saved"])
        assert beside["warning"].count("two could not be saved") == (rank == 0)


def test_a_process_waits_for_one_that_writes_longer_than_it_waits_for_a_step(two_processes):
    """The watchdog ends a run whose process does not live; gigabytes to a slow disk are no hang."""
    for results in two_processes[1]:
        assert min(results["beside training"]["timeouts_s"]) >= 24 * 3600


def test_every_global_generator_goes_on_where_it_was(alone, engine, tmp_path):
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(), random.random()

    np.random.randn()  # leaves half of a pair of normal numbers in numpy's state
    save(engine, tmp_path, "a", 1, alone)
    expected = draw()
    assert draw() != expected
    assert loading.load(engine, tmp_path / "a", MODEL, alone)
    assert draw() == expected


def test_random_state_is_left_alone_when_the_number_of_processes_changed(alone, engine, tmp_path):
    save(engine, tmp_path, "a", 1, alone)
    with changed_state(tmp_path / "a") as state:
        state["engine"]["world_size"] = 2
    before = torch.get_rng_state()
    assert not loading.load(engine, tmp_path / "a", MODEL, alone)
    assert torch.equal(torch.get_rng_state(), before)


def test_settings_changed_since_the_checkpoint_stay_changed(alone, engine, tmp_path):
    save(engine, tmp_path, "a", 1, alone)
    for stage in (0, 2):
        later = tiny_engine(alone, stage, "fp32")
        save(later, tmp_path, f"stage{stage}", 1, alone)
        groups = later.optimizer.param_groups
        groups[0]["weight_decay"], groups[1]["betas"] = 0.5, (0.8, 0.9)
        loading.load(later, tmp_path / f"stage{stage}", MODEL, alone)
        groups = later.optimizer.param_groups
        assert (groups[0]["weight_decay"], groups[1]["weight_decay"], groups[1]["betas"]) == (0.5, 0.0, (0.8, 0.9))


def test_weights_alone_start_a_new_optimizer(alone, engine, tmp_path):
    save(engine, tmp_path, "a", 1, alone)
    fresh = tiny_engine(alone, 0, "fp32").module
    assert not equal_weights(fresh.parameters(), engine.module.parameters())
    loading.load_weights(fresh, tmp_path / "a", MODEL, alone)
    assert equal_weights(fresh.parameters(), engine.module.parameters())


# Refusing


def test_a_checkpoint_of_another_model_is_refused_with_both_values(alone, engine, tmp_path):
    save(engine, tmp_path, "a", 1, alone)
    weights = whole_weights(engine)
    other = MODEL | {"hidden_size": 99, "vocab_size": 8}
    with pytest.raises(
        ValueError, match="another model: hidden_size is 13 there and 99 here; vocab_size is None there and 8"
    ):
        loading.load(engine, tmp_path / "a", other, alone)
    assert equal_weights(weights, whole_weights(engine))
    loading.load(engine, tmp_path / "a", MODEL | {"hidden_dropout_prob": 0.0}, alone)


def test_a_checkpoint_from_before_a_key_of_the_model_has_its_default(alone, engine, tmp_path):
    save(engine, tmp_path, "a", 1, alone)
    loading.load(engine, tmp_path / "a", MODEL | {"norm": "layer_norm", "head_dim": None, "rope_theta": 10000.0}, alone)
    with pytest.raises(ValueError, match="another model: norm is 'layer_norm' there and 'rms_norm' here"):
        loading.load(engine, tmp_path / "a", MODEL | {"norm": "rms_norm"}, alone)


def test_a_checkpoint_of_another_precision_is_refused(alone, engine, tmp_path):
    save(engine, tmp_path, "a", 1, alone)
    with changed_state(tmp_path / "a") as state:
        state["engine"]["precision"] = "bf16"
    with pytest.raises(ValueError, match="trained in bf16, this run has fp32"):
        loading.load(engine, tmp_path / "a", MODEL, alone)


@pytest.mark.parametrize(("there", "here"), list(itertools.permutations(range(4), 2)))
def test_a_checkpoint_of_another_stage_goes_on_exactly(alone, tmp_path, there, here):
    """Other stages clip by other sums of the same gradients, so losses are equal up to rounding, and weights at once."""
    before = tiny_engine(alone, there, "fp32", dropout=0.0)
    train(before, alone, 0, 2)
    save(before, tmp_path, "a", 2, alone)
    after = tiny_engine(alone, here, "fp32", dropout=0.0)
    assert loading.load(after, tmp_path / "a", MODEL, alone)
    assert equal_weights(whole_weights(after), whole_weights(before))
    ours, theirs = train(after, alone, 2, 4), train(before, alone, 2, 4)
    assert np.array(ours) == pytest.approx(np.array(theirs), rel=1e-5)
    for mine, other in zip(whole_weights(after), whole_weights(before), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_flipped_byte_in_any_file_is_refused_by_name(alone, tmp_path, stage):
    engine = tiny_engine(alone, stage, "fp32")
    train(engine, alone, 0, 1)
    save(engine, tmp_path, "a", 1, alone, {"tokenizer.json": "{}"})
    weights = whole_weights(engine)
    files = sorted(path for path in (tmp_path / "a").iterdir())
    assert len(files) == 5 + (stage > 0)
    for file in files:
        content = file.read_bytes()
        flip_byte(file)
        with pytest.raises(ValueError, match=f"{file.name} is not as it was written"):
            loading.load(engine, tmp_path / "a", MODEL, alone)
        file.write_bytes(content)
    assert equal_weights(weights, whole_weights(engine))
    assert loading.load(engine, tmp_path / "a", MODEL, alone)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("name", "other"), [("lr[1]", "lr1"), ("lr*", "lr-1"), ("l?", "lr"), ("[!a]{b}", "b{b}")])
def test_a_path_is_never_a_pattern(alone, tmp_path, stage, name, other):
    """The other run is what DeepSpeed finds, where it looks for a pattern."""
    engine = tiny_engine(alone, stage, "fp32")
    save(engine, tmp_path / other, name, 0, alone)
    save(engine, tmp_path / other, other, 0, alone)
    train(engine, alone, 0, 1)
    weights = whole_weights(engine)
    save(engine, tmp_path / name, name, 1, alone)
    after = tiny_engine(alone, stage, "fp32")
    assert not equal_weights(weights, whole_weights(after))
    loading.load(after, tmp_path / name / name, MODEL, alone)
    assert equal_weights(weights, whole_weights(after))
    elsewhere = tiny_engine(alone, 1 if stage != 1 else 0, "fp32")
    loading.load(elsewhere, tmp_path / name / name, MODEL, alone)
    assert equal_weights(weights, whole_weights(elsewhere))


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("to_stage", [0, 2])
def test_a_file_that_state_json_does_not_list_is_none_of_the_checkpoint(alone, tmp_path, stage, to_stage):
    engine = tiny_engine(alone, stage, "fp32")
    train(engine, alone, 0, 1)
    save(engine, tmp_path, "a", 1, alone)
    strays = ["mp_rank_01_model_states.pt", "zero_pp_rank_0_mp_rank_01_model_states.pt", "layout_rank1.json"]
    strays += [f"{prefix}_zero_pp_rank_0_mp_rank_00_optim_states.pt" for prefix in ("bf16", "copy_of")]
    for stray in strays:
        (tmp_path / "a" / stray).write_bytes(b"not ours")
    after = tiny_engine(alone, to_stage, "fp32")
    loading.load(after, tmp_path / "a", MODEL, alone)
    assert equal_weights(whole_weights(engine), whole_weights(after))


@pytest.mark.parametrize(
    "name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "rng_replica0.pt"]
)
def test_a_file_that_was_not_verified_is_not_loaded(alone, tmp_path, name):
    engine = tiny_engine(alone, 2, "fp32")
    save(engine, tmp_path, "a", 1, alone)
    with changed_state(tmp_path / "a") as state:
        del state["files"][name]
    with pytest.raises(ValueError, match=f"a has no file {name} among those of state.json; choose another checkpoint"):
        loading.load(engine, tmp_path / "a", MODEL, alone)


def test_missing_and_cut_files_are_named(alone, engine, tmp_path):
    save(engine, tmp_path, "a", 1, alone)
    file = tmp_path / "a/rng_replica0.pt"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"rng_replica0\.pt has {len(content) - 1} bytes instead of {len(content)}"):
        loading.load(engine, tmp_path / "a", MODEL, alone)
    file.unlink()
    with pytest.raises(ValueError, match=r"rng_replica0\.pt is missing"):
        loading.load(engine, tmp_path / "a", MODEL, alone)


class Evil:
    def __init__(self, folder):
        self.command = f"touch {folder}/executed"

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "rng_replica0.pt"])
@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_not_executed(alone, engine, tmp_path, name, kind):
    save(engine, tmp_path, "a", 1, alone)
    file = tmp_path / "a" / name
    if kind == "torch":
        torch.save({"module": Evil(tmp_path)}, file)
    else:
        file.write_bytes(pickle.dumps({"module": Evil(tmp_path)}, protocol=2))
    with changed_state(tmp_path / "a"):
        pass  # its checksums fit
    with pytest.raises(ValueError, match="could run any code"):
        loading.load(engine, tmp_path / "a", MODEL, alone)
    assert not (tmp_path / "executed").exists()


def test_code_in_a_stage_3_shard_is_not_executed(alone, tmp_path):
    sharded = tiny_engine(alone, 3, "fp32")
    save(sharded, tmp_path, "a", 1, alone)
    assert loading.weights(tmp_path / "a").keys() == dict(sharded.module.named_parameters()).keys()
    torch.save(Evil(tmp_path), tmp_path / "a/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(ValueError, match="could run any code"):
        loading.weights(tmp_path / "a")
    assert not (tmp_path / "executed").exists()


def test_the_dynamic_loss_scale_of_fp16_survives_safe_loading(tmp_path):
    scaler = DynamicLossScaler(2.0**10, 2.0, 1000, 1.0, 2, False, dtype=torch.half)
    write_file({"loss_scaler": scaler}, tmp_path / "scaler.pt")
    assert read_file(tmp_path / "scaler.pt")["loss_scaler"].cur_scale == 2.0**10


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_weight_of_one_element_is_not_spread_over_a_parameter(alone, tmp_path, stage):
    engine = tiny_engine(alone, stage, "bf16" if stage == 0 else "fp32")
    train(engine, alone, 0, 1)
    save(engine, tmp_path, "one", 1, alone)
    with changed_state(tmp_path / "one"):
        [path] = (tmp_path / "one").glob("mp_rank_00_model_states.pt" if stage == 0 else "*optim_states.pt")
        content = read_file(path)
        if stage == 0:
            content["optimizer"]["fp32_groups"][0][0] = torch.ones(1)
        else:
            inner = content["optimizer_state_dict"]
            inner["single_partition_of_fp32_groups" if stage == 2 else "fp32_flat_groups"][0] = torch.ones(1)
        write_file(content, path)
    with pytest.raises(UserError, match="holds something else than this program writes"):
        loading.weights(tmp_path / "one")
    if stage != 2:  # there DeepSpeed fills a short partition up with zeros, as it must for padding
        with pytest.raises(UserError, match="holds something else than this program writes"):
            loading.load(engine, tmp_path / "one", MODEL, alone)
