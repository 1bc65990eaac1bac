import pytest

from xformer_train.launcher.reporting.peak_flops import peak_flops


@pytest.mark.parametrize(
    ("device_name", "dtype", "tflops"),
    [
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA A100-SXM4-40GB", "fp8", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16", None),
        ("NVIDIA L4", "fp8", 242.5),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA B200", "fp8", 4500),
        ("NVIDIA GeForce RTX 3060", "bf16", None),
        ("cpu", "fp32", None),
    ],
)
def test_peak_is_the_dense_figure_of_the_data_sheet_or_none(device_name, dtype, tflops):
    assert peak_flops(device_name, dtype) == (None if tflops is None else tflops * 1e12)
