"""The precision that a device gets, and the library of fp32 products, both measured on a CPU."""

import pytest
import torch

from xformer_train.kernels.ops.linear import CpuLibraries, available_cpu_libraries, cpu_libraries
from xformer_train.launcher.config.schema import ParallelConfig, RunConfig
from xformer_train.launcher.processes import products
from xformer_train.launcher.processes.products import Cpu, choose, fastest, measure, products_shape, this_cpu
from xformer_train.recipes.config import DataConfig, ModelConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
LARGE = (4096, 768, 3072)
OWN = available_cpu_libraries()[0]
HAS, HAS_NOT = (Cpu("a CPU", bf16, (OWN, "oneDNN")) for bf16 in ("avx512_bf16", ""))


@pytest.fixture(autouse=True)
def gpu_without_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")


@pytest.fixture
def speeds(monkeypatch):
    """What is measured: a dict to change. Fails where something is measured that was not to be."""
    found = {OWN: (100.0, 100.0), "oneDNN": (100.0, 100.0), "bf16": (200.0, 200.0)}
    monkeypatch.setattr(products, "measure", lambda shape, names: {name: found[name] for name in names})
    return found


@pytest.mark.parametrize(("requested", "device"), [("bf16", CPU), ("fp8", CPU), ("fp32", GPU)])
def test_a_given_precision_is_taken_and_nothing_measured(requested, device, monkeypatch):
    monkeypatch.delattr(products, "measure")
    found = choose(requested, device, [HAS], LARGE)
    assert (found.precision, found.libraries, found.text) == (requested, None, "")
    assert found.why.startswith("as the config says")


@pytest.mark.parametrize(("has_bf16", "chosen"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_a_gpu_is_bf16_where_it_computes_in_it(has_bf16, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    found = choose("auto", GPU, [HAS], LARGE)
    assert (found.precision, found.libraries) == (chosen, None) and found.why.startswith("auto: Some GPU")


@pytest.mark.parametrize(
    ("requested", "device", "message"),
    [
        ("fp16", CPU, r"training\.precision=fp16 needs a GPU"),
        ("bf16", GPU, r"training\.precision=bf16 needs a GPU that computes in bf16 and Some GPU does not"),
        ("fp8", GPU, r"training\.precision=fp8 needs a GPU that computes in bf16"),
    ],
)
def test_a_precision_that_the_device_has_not_is_refused(requested, device, message):
    with pytest.raises(ValueError, match=message):
        choose(requested, device, [HAS], LARGE)


def test_auto_on_a_cpu_is_bf16_where_all_have_it_and_it_is_faster_by_a_margin(speeds):
    found = choose("auto", CPU, [HAS, HAS], LARGE)
    assert (found.precision, found.cpu) == ("bf16", "a CPU")
    assert found.why == "auto: products are 2.00x as fast in bf16 (avx512_bf16) as in fp32"
    assert "200 / 200 bf16" in found.text and "512 x 512" in found.text
    found = choose("auto", CPU, [HAS, HAS_NOT], LARGE)
    assert found.precision == "fp32" and "bf16" not in found.speeds and "no instructions" in found.why
    speeds["bf16"] = (120.0, 120.0)
    found = choose("auto", CPU, [HAS], LARGE)
    assert found.precision == "fp32" and "1.20x as fast in bf16" in found.why and "1.25x" in found.why
    speeds["bf16"] = (160.0, 80.0)  # 2 / 160 + 1 / 80 against 3 / 100: values and input gradients count twice
    assert choose("auto", CPU, [HAS], LARGE).precision == "fp32"


def test_products_that_are_too_small_leave_everything_as_it_is(monkeypatch):
    monkeypatch.delattr(products, "measure")
    found = choose("auto", CPU, [HAS], (64, 64, 256))
    assert (found.precision, found.libraries) == ("fp32", cpu_libraries()) and "too small" in found.why


@pytest.mark.parametrize(
    ("speed", "chosen"),
    [((101, 90), ("A", "A")), ((124, 124), ("A", "A")), ((126, 90), ("B", "A")), ((90, 126), ("A", "B"))],
)
def test_another_library_is_taken_only_where_it_is_faster_by_a_margin(speed, chosen, monkeypatch):
    monkeypatch.setattr(products, "cpu_libraries", lambda: CpuLibraries("A", "A"))
    assert fastest({"A": (100, 100), "B": speed}, ["A", "B"]) == chosen


def test_a_library_that_another_machine_lacks_is_not_taken(speeds):
    speeds["oneDNN"] = (900.0, 900.0)
    assert choose("fp32", CPU, [HAS, HAS], LARGE).libraries == ("oneDNN", "oneDNN")
    assert choose("fp32", CPU, [HAS, Cpu("another", "", (OWN,))], LARGE).libraries == (OWN, OWN)


def test_measuring_leaves_libraries_and_random_numbers_as_they_were_and_knows_every_candidate():
    before, state = cpu_libraries(), torch.get_rng_state()
    found = measure((37, 19, 23), [*available_cpu_libraries(), "bf16"])
    assert list(found) == [*available_cpu_libraries(), "bf16"]
    assert all(speed > 0 for pair in found.values() for speed in pair)
    assert cpu_libraries() == before and torch.equal(torch.get_rng_state(), state)


def test_the_shape_is_that_of_the_first_product_of_a_feed_forward_half_on_one_process():
    config = RunConfig(
        model=ModelConfig(hidden_size=96, intermediate_size=384, num_attention_heads=4),
        data=DataConfig(max_seq_length=50),
        parallel=ParallelConfig(tensor=2),
    )
    assert products_shape(config, 3) == (150, 96, 192)


@pytest.mark.parametrize(
    ("text", "name", "bf16"),
    [
        (
            "processor : 0\nmodel name : Some Xeon\nflags : avx512_bf16 amx_bf16 fma\n\nprocessor : 1\n",
            "Some Xeon",
            "amx_bf16",
        ),
        ("processor : 0\nFeatures : asimd bf16\nCPU implementer : 0x41\nCPU part : 0xd40\n", "0x41 0xd40", "bf16"),
        ("processor : 0\nmodel name : Old\nflags : avx2\n", "Old", ""),
        ("", "unknown CPU", ""),
    ],
)
def test_a_cpu_is_known_by_what_linux_says_of_its_first_core(text, name, bf16, monkeypatch, tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr(products, "_CPUINFO", path)
    assert this_cpu() == Cpu(name, bf16, available_cpu_libraries())
