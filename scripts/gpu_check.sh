#!/bin/sh
# Everything that needs a GPU, in one call: the tests marked gpu, then the layer benchmark. JSON goes to $1 (default: gpu_check).
# The package and its test tools must be installed in the python that is first on PATH.
set -eu
cd "$(dirname "$0")/.."
out=${1:-gpu_check}
mkdir -p "$out"
python -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name(), torch.__version__)'
pytest -m gpu -q 2>&1 | tee "$out/tests.txt"
python scripts/bench_layer.py --dtype bfloat16 --shapes bert-large-128 bert-large-512 --out "$out/layer.json"
