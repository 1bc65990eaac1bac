#!/bin/sh
# Runs the tests of the kernels and of the policies with the oldest and with the newest torch, triton and transformers that
# pyproject.toml allows, each in an environment of its own (build/versions); scripts/test.sh needs none of this.
#
#   scripts/test_versions.sh                  both
#   scripts/test_versions.sh oldest|newest    one of them
#
# An environment takes up to 8 GB, as torch without further words is its CUDA build, and minutes to install; a later call finds
# it there. Environment variables of pip, such as PIP_EXTRA_INDEX_URL for a CPU build of torch, are heeded.
set -eu
cd "$(dirname "$0")/.."
for wanted in "$@"; do
    case $wanted in oldest | newest) ;; *) echo "unknown $wanted; give oldest or newest" >&2 && exit 2 ;; esac
done
python=$(command -v python3 || command -v python) || {
    echo "no python3 on PATH" >&2
    exit 1
}

# The requirements that make one end of the ranges in pyproject.toml, a line each.
requirements() {
    "$python" - "$1" <<'EOF'
import re
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
ranges = {re.match(r"[\w-]+", line)[0]: line.split(";")[0] for line in [*extras["test"], *project["dependencies"]]}
for name in ("torch", "triton", "transformers"):
    oldest = re.search(r">=([\d.]+)", ranges[name])[1]
    print(f"{name}=={oldest}.*" if sys.argv[1] == "oldest" else ranges[name])
if sys.argv[1] == "oldest":  # what the oldest triton asks of numpy stands in the test extra
    print(next(line for line in extras["test"] if line.startswith("numpy")).split(";")[0])
EOF
}

failed=
for end in ${*:-oldest newest}; do
    folder=build/versions/$end
    [ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
    requirements "$end" >"$folder/requirements.txt"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -e . -r "$folder/requirements.txt" pytest pytest-xdist
    packages='torch|triton|transformers|numpy'
    echo "== $end: $("$folder/bin/python" -m pip list --format=freeze | grep -E "^($packages)==" | paste -sd ' ')"
    export OMP_NUM_THREADS=1
    options='-q -n 2 --dist loadfile -p no:cacheprovider'
    TRITON_INTERPRET=1 "$folder/bin/python" -m pytest $options tests/kernels/interpreted || failed="$failed $end"
    "$folder/bin/python" -m pytest $options --ignore=tests/kernels/interpreted \
        tests/kernels tests/recipes/policies tests/recipes/transformers_format || failed="$failed $end"
done
if [ -n "$failed" ]; then
    echo "failed with:$failed" >&2
    exit 1
fi
