"""Look up what a GPU can compute in a second."""

import re

# Dense peaks in TFLOP/s, from NVIDIA's data sheets of V100, A100, L4, L40S, H100, H200 and HGX B200; where a sheet gives
# the figure with sparsity, half of it. fp32 is the rate without TF32. The first pattern found in the device name counts.
_PEAK_TFLOPS: list[tuple[str, dict[str, float]]] = [
    (r"V100S", {"fp32": 16.4, "fp16": 130}),
    (r"V100.*PCIE", {"fp32": 14, "fp16": 112}),
    (r"V100", {"fp32": 15.7, "fp16": 125}),
    (r"A100", {"fp32": 19.5, "fp16": 312, "bf16": 312}),
    (r"L40S", {"fp32": 91.6, "fp16": 362, "bf16": 362, "fp8": 733}),
    (r"L4", {"fp32": 30.3, "fp16": 121, "bf16": 121, "fp8": 242.5}),
    (r"H100.*PCIE", {"fp32": 51, "fp16": 756, "bf16": 756, "fp8": 1513}),
    (r"H[12]00.*NVL", {"fp32": 60, "fp16": 835.5, "bf16": 835.5, "fp8": 1670.5}),
    (r"H[12]00", {"fp32": 67, "fp16": 989, "bf16": 989, "fp8": 1979}),
    (r"B200", {"fp32": 75, "fp16": 2250, "bf16": 2250, "fp8": 4500}),
]


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Return the dense matrix-multiply peak of a device in FLOP/s; None if it is not in the table or a slice of a GPU (MIG).

    device_name: as torch.cuda.get_device_name() gives it. dtype: fp32, fp16, bf16 or fp8.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    for pattern, tflops in _PEAK_TFLOPS:
        if re.search(rf"\b{pattern}\b", device_name, re.IGNORECASE):
            return tflops[dtype] * 1e12 if dtype in tflops else None
    return None
