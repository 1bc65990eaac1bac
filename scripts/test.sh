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
# Triton interprets or compiles for the life of a process, so what runs in its interpreter has a process of its own.
TRITON_INTERPRET=1 .venv/bin/pytest tests/kernels/interpreted
exec .venv/bin/pytest --ignore=tests/kernels/interpreted
