#!/bin/sh
# Everything that needs a GPU, in one call of at most ten minutes: the tests marked gpu, then the benchmarks.
#
#   scripts/gpu_check.sh [tests] [layer] [memory] [train] [swap]     those steps, all but swap by default
#   OUT=DIR     where the results go (gpu_check_results): each benchmark's JSON, summary.txt with the tables, log.txt
#   WHEELS=DIR  wheels of packages that are missing here; they are unpacked into a temporary folder, nothing is installed
#
# Needs torch with CUDA and triton in the python3 on PATH, and for its steps pytest, transformers, deepspeed and pydantic; no
# network. A step that fails or takes too long does not stop the others; the exit status is 1 if there was one.
set -eu
cd "$(dirname "$0")/.."
steps=${*:-tests layer memory train}
for step in $steps; do
    case $step in
        tests | layer | memory | train | swap) ;;
        *) echo "unknown step $step; give tests, layer, memory, train or swap" >&2 && exit 1 ;;
    esac
done
python=$(command -v python3 || command -v python) || {
    echo "no python3 on PATH" >&2
    exit 1
}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu_check.sh needs a CUDA device, and $python sees none" >&2
    exit 1
}

out=${OUT:-gpu_check_results}
mkdir -p "$out"
: >"$out/summary.txt" >"$out/log.txt"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The packages under their real names, so that the code of this folder runs, installed or not.
mkdir -p "$work/path/xformer_train"
for room in launcher recipes kernels; do ln -s "$PWD/$room" "$work/path/xformer_train/$room"; done
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$work/path" "$WHEELS"/*.whl
fi
export PYTHONPATH="$work/path${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

wanted() { case " $steps " in *" $1 "*) ;; *) return 1 ;; esac }

# run NAME SECONDS COMMAND...: output, log and exit status go to files of that name.
run() {
    name=$1 seconds=$2
    shift 2
    echo "$name: at most $seconds s" >&2
    status=0
    timeout -k 10 "$seconds" "$@" >"$work/$name.out" 2>"$work/$name.log" || status=$?
    echo "$status" >"$work/$name.status"
}

failed=
# report NAME LINES: what `run` left, its verdict first; the summary gets that many lines of the output.
report() {
    status=$(cat "$work/$1.status")
    case $status in
        0) verdict=passed ;;
        124 | 137) verdict="FAILED: ran out of its time" ;;
        *) verdict="FAILED: exit status $status" ;;
    esac
    {
        echo "== $1: $verdict"
        tail -n "$2" "$work/$1.out"
        if [ "$status" -ne 0 ]; then tail -n 20 "$work/$1.log"; fi
    } | tee -a "$out/summary.txt"
    for kind in out log; do sed "s/^/$1 $kind: /" "$work/$1.$kind" >>"$out/log.txt"; done
    if [ "$status" -ne 0 ]; then failed="$failed $1"; fi
}

options="-m gpu -v --no-header --tb=short -p no:cacheprovider --continue-on-collection-errors"
if wanted tests; then
    # Side by side, because compiling the kernels' variants takes most of the time, and takes one core for each process.
    workers=
    if "$python" -c 'import xdist' 2>/dev/null; then workers="-n 4"; fi
    folder=tests/kernels/interpreted conformance=tests/kernels/deepspeed/test_conformance.py
    run attention-tests 190 "$python" -m pytest $options $workers $folder/test_attention.py &
    run kernel-tests 190 "$python" -m pytest $options $folder --ignore=$folder/test_attention.py &
    run conformance-tests 190 "$python" -m pytest $options $conformance &
    run other-tests 190 "$python" -m pytest $options tests/kernels --ignore=$folder --ignore=$conformance &
    run layer-tests 190 "$python" -m pytest $options tests/gpu &
fi
if wanted layer && command -v nvcc >/dev/null && "$python" -c 'import deepspeed' 2>/dev/null; then
    # Beside the tests, because it too is compiled, at its first use. Where this fails the layer benchmark says why.
    run deepspeed-kernel 190 "$python" -c 'from deepspeed.ops.op_builder import TransformerBuilder as B; B().load()' &
fi
wait
if wanted tests; then
    for name in attention-tests kernel-tests conformance-tests other-tests layer-tests; do report $name 40; done
fi
if wanted layer; then
    # The first shape is te-quickstart, so that layer.jsonl has it even if the time runs out.
    run layer 240 "$python" scripts/bench/bench_layer.py --rounds 10 --out "$out/layer.jsonl"
    report layer 150
fi
if wanted memory; then
    run memory 60 "$python" scripts/bench/bench_memory.py --out "$out/memory.json"
    report memory 150
fi
if wanted train; then
    run train 100 "$python" scripts/bench/bench_train.py --out "$out/train.json"
    report train 150
fi
if wanted swap; then
    run swap 200 "$python" scripts/bench/bench_swap.py --out "$out/swap.json"
    report swap 150
fi
if [ -n "$failed" ]; then
    echo "failed:$failed" | tee -a "$out/summary.txt"
    exit 1
fi
