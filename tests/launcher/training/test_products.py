"""A run goes on with the precision and the libraries that it began with; in one process."""

import json

import pytest
from helpers.runs import losses, write_config

from xformer_train.launcher.config.loading import load_config
from xformer_train.launcher.processes.topology import quiet

quiet(debug=False)

from xformer_train.kernels.ops.linear import available_cpu_libraries, cpu_libraries  # noqa: E402
from xformer_train.launcher.processes import products  # noqa: E402 - DeepSpeed is quiet only when told before
from xformer_train.launcher.processes.products import Cpu  # noqa: E402
from xformer_train.launcher.training import products as of_run  # noqa: E402
from xformer_train.launcher.training.train import run  # noqa: E402


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that starts a run in which bf16 is much faster, and returns what is printed of its precision."""
    monkeypatch.setattr(products, "_LEAST_FLOP", 1)
    change = {"training__precision": "auto", "training__max_steps": 4, "checkpoint__save_every_steps": 2}
    path = write_config(tmp_path, **change, schedule__type="constant", schedule__total_steps=None)

    def start(*sets, cpu="a CPU", bf16="avx512_bf16", speed=200.0, resume=False):
        found = dict.fromkeys(available_cpu_libraries(), (100.0, 100.0)) | {"bf16": (speed, speed)}
        monkeypatch.setattr(of_run, "this_cpu", lambda: Cpu(cpu, bf16, available_cpu_libraries()))
        monkeypatch.setattr(products, "measure", lambda shape, names: {name: found[name] for name in names})
        run(load_config(path, list(sets)), resume=resume)
        return tmp_path / "runs"

    return start


def precision(captured):
    return next(line.split()[1].rstrip(":") for line in captured.out.splitlines() if line.startswith("  precision "))


def test_a_resumed_run_measures_nothing_and_ends_with_the_bits_of_one_that_was_not_stopped(start, capsys, monkeypatch):
    usual = cpu_libraries()
    folder = start("name=straight")
    start("training.max_steps=2")
    first = json.loads((folder / "run/products.json").read_text())
    assert (first["cpu"], first["precision"], first["gflops"]["bf16"]) == ("a CPU", "bf16", [200.0, 200.0])
    capsys.readouterr()
    start(speed=1.0, resume=True)
    assert precision(capsys.readouterr()) == "bf16"
    assert json.loads((folder / "run/products.json").read_text()) == first
    assert losses(folder / "run") == losses(folder / "straight")
    assert cpu_libraries() == usual


def test_a_run_from_before_there_was_a_choice_goes_on_in_its_precision(start, capsys):
    folder = start("training.max_steps=2", bf16="")
    (folder / "run/products.json").unlink()
    capsys.readouterr()
    start(resume=True)
    assert precision(capsys.readouterr()) == "fp32"
    assert not (folder / "run/products.json").exists()


def test_on_another_cpu_products_are_measured_anew_in_the_same_precision_with_a_warning(start, capsys):
    for bf16, began_in in (("avx512_bf16", "bf16"), ("", "fp32")):
        name = f"name={began_in}"
        folder = start(name, "training.max_steps=2", bf16=bf16)
        capsys.readouterr()
        start(name, "training.max_steps=3", cpu="another", resume=True)
        captured = capsys.readouterr()
        assert precision(captured) == began_in
        assert "this run began on a CPU, and this machine has another: products are measured anew" in captured.err
        assert json.loads((folder / began_in / "products.json").read_text())["cpu"] == "another"
        start(name, cpu="another", resume=True)
        assert "began on" not in capsys.readouterr().err


def test_a_run_that_goes_on_from_another_ones_checkpoint_takes_its_precision(start, capsys):
    folder = start("training.max_steps=2", bf16="")
    capsys.readouterr()
    start("name=second", f"load.path={folder / 'run'}")
    assert precision(capsys.readouterr()) == "fp32"
    start("name=weights", f"load.path={folder / 'run'}", "load.what=weights")
    assert precision(capsys.readouterr()) == "bf16"
    with pytest.raises(ValueError, match="was trained in fp32, this run has bf16"):
        start("name=third", f"load.path={folder / 'run'}", "training.precision=bf16")


def test_a_record_that_is_not_as_it_was_written_is_refused(start):
    folder = start("training.max_steps=2")
    (folder / "run/products.json").write_text('{"cpu": 3}')
    with pytest.raises(ValueError, match=r"products.json cannot be read .*; remove it"):
        start(resume=True)
