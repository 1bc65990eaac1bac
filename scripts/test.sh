#!/bin/sh
# Makes .venv, installs the package with its test tools, and runs ruff, mypy and pytest. Arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
. scripts/venv.sh
install_into_venv '.[test]'
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# mypy does not see through the folder mapping of the editable install, so it gets the packages under their real names.
mkdir -p .venv/mypy/xformer_train
for room in launcher recipes kernels; do ln -sfn "$PWD/$room" ".venv/mypy/xformer_train/$room"; done
MYPYPATH=.venv/mypy .venv/bin/mypy
if [ $# -gt 0 ]; then exec .venv/bin/pytest "$@"; fi
# Two files at a time, for two cores. OpenMP's threads of several processes would keep each other from them.
export OMP_NUM_THREADS=1
two_at_a_time='-n 2 --dist loadfile'
# Triton interprets or compiles for the life of a process, so what runs in its interpreter has processes of its own.
TRITON_INTERPRET=1 .venv/bin/pytest $two_at_a_time tests/kernels/interpreted
.venv/bin/pytest $two_at_a_time --ignore=tests/kernels/interpreted
# What meets transformers' own code runs with the oldest version too, which is laid over that of the environment.
oldest=$(sed -n 's/^hf = \["transformers>=\([0-9.]*\).*/\1/p' pyproject.toml)
if [ ! -d ".venv/transformers-$oldest" ]; then
    numpy=$(.venv/bin/python -m pip list --format=freeze | grep '^numpy==')
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts --target ".venv/transformers-$oldest" \
        "transformers==$oldest.*" "$numpy"
fi
PYTHONPATH=.venv/transformers-$oldest exec .venv/bin/pytest $two_at_a_time tests/recipes/policies tests/recipes/transformers_format \
    tests/launcher/trained_models/test_export.py tests/launcher/trained_models/test_init_from.py \
    tests/distributed/test_parallelize.py tests/distributed/test_shard.py tests/distributed/test_shard_swap.py
