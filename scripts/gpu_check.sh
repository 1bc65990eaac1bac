#!/bin/sh
# What is to be measured on a GPU, in two calls for a machine that is lent for fifteen minutes; the most valuable comes first.
#
#   scripts/gpu_check.sh [--dry-run] first     every kernel against fp64; attention and the layer against the best of torch
#   scripts/gpu_check.sh [--dry-run] second    the tests marked gpu, training steps, peaks of memory
#   scripts/gpu_check.sh plan                  the steps of both, with their estimates and limits in seconds
#   --dry-run   the same commands on a CPU at small sizes, which shows that they run and nothing else
#   OUT=DIR     where the results go (gpu_check_results): JSON of each benchmark, summary.txt with the tables, log.txt
#   WHEELS=DIR  wheels of packages that are missing here; they are unpacked into a temporary folder, nothing is installed
#
# Needs torch with CUDA and triton in the python3 on PATH, for `second` also the packages that docs/performance.md names; no
# network. A step that fails or takes too long does not stop the others, and the exit status is then 1. What a step leaves of
# its limit, later ones may use.
set -eu
cd "$(dirname "$0")/.."

# `step` takes a name, the seconds it is estimated to take, the seconds it may take, and the command.
first() {
    sizes=--rounds=10 bert_128=bert-large-128 bert_512=bert-large-512 te=te-quickstart
    if [ -n "$dry" ]; then sizes=--rounds=1 bert_128=bert-tiny bert_512=bert-tiny te=te-quickstart-small; fi
    set -- $sizes --rows ours "ours, CUDA graph" "ours, FP8" "torch.compile of it" "torch.compile, CUDA graph"
    step smoke     30 40 "$python" scripts/bench/smoke.py --out "$out/smoke.jsonl"
    step attention 45 60 $interpreted "$python" scripts/bench/bench_attention.py --out "$out/attention.jsonl"
    step layer-128 35 50 "$python" scripts/bench/bench_layer.py --out "$out/layer_128.jsonl" --shapes $bert_128 "$@"
    step layer-512 30 45 "$python" scripts/bench/bench_layer.py --out "$out/layer_512.jsonl" --shapes $bert_512 "$@"
    step layer-te  35 45 "$python" scripts/bench/bench_layer.py --out "$out/layer_te.jsonl" --shapes $te "$@"
}

second() {
    # Eight processes, because compiling takes most of the time of the tests, one core for each process.
    tests='-m gpu -n 8 tests/kernels/interpreted tests/gpu tests/kernels'
    train= memory='--tables peaks layers'
    if [ -n "$dry" ]; then
        tests='-n 2 tests/kernels/ops/test_mlp.py'
        train='--engines --config configs/bert_tiny.yaml --layers 1 --micro-batch-size 2 --steps 3 --turns 1'
        memory='--tables peaks --lengths 128 --layers 1 --micro-batch-size 1'
    fi
    step tests     115 190 "$python" -m pytest -q --no-header --tb=short -rfE -p no:cacheprovider \
        --continue-on-collection-errors $tests
    step train      75 100 "$python" scripts/bench/bench_train.py --out "$out/train.json" $train
    step memory     75  90 "$python" scripts/bench/bench_memory.py --out "$out/memory.jsonl" $memory
}

dry='' interpreted='' out=${OUT:-gpu_check_results}
if [ "${1-}" = --dry-run ]; then dry=yes && shift; fi
python=$(command -v python3 || command -v python) || {
    echo "no python3 on PATH" >&2
    exit 1
}
case $#:${1-} in
    1:plan)
        step() {
            printf '%-12s about %4s s, at most %4s s\n' "$1" "$2" "$3"
            abouts=$((abouts + $2)) limits=$((limits + $3))
        }
        for call in first second; do
            abouts=0 limits=0
            echo "$call:"
            $call
            printf '%-12s about %4s s, at most %4s s\n' sum "$abouts" "$limits"
        done
        exit
        ;;
    1:first | 1:second) ;;
    *) echo "usage: scripts/gpu_check.sh [--dry-run] first|second, or scripts/gpu_check.sh plan" >&2 && exit 2 ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The packages under their real names, so that the code of this folder runs, installed or not.
mkdir -p "$work/path/xformer_train"
for room in launcher recipes kernels; do ln -s "$PWD/$room" "$work/path/xformer_train/$room"; done
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$work/path" "$WHEELS"/*.whl
fi
export PYTHONPATH="$work/path${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
machine=$("$python" scripts/bench/bench_device.py)
if [ -n "$dry" ]; then
    export CUDA_VISIBLE_DEVICES= TORCHDYNAMO_DISABLE=1 # torch.compile takes half a minute for each row on a CPU
    interpreted='env TRITON_INTERPRET=1'
else
    case $machine in CPU*)
        echo "gpu_check.sh needs a CUDA device, and $python sees none" >&2
        exit 1
        ;;
    esac
fi
mkdir -p "$out"
: >"$out/log.txt"
echo "$1${dry:+, dry run}: $machine" | tee "$out/summary.txt"

spare=0 failed=''
# Output goes to the terminal and to the summary as it comes, stderr to the log. An interrupt, unlike SIGTERM, leaves tracebacks.
step() {
    name=$1 limit=$(($3 + spare)) started_s=$(date +%s)
    echo "== $name: about $2 s, at most $limit s" | tee -a "$out/summary.txt"
    shift 3
    {
        status=0
        timeout -s INT -k 15 "$limit" "$@" 2>"$work/$name.log" || status=$?
        echo "$status" >"$work/$name.status"
    } | tee -a "$out/summary.txt" "$work/$name.out"
    took=$(($(date +%s) - started_s))
    spare=$((limit > took ? limit - took : 0))
    status=$(cat "$work/$name.status")
    case $status in
        0) verdict=passed ;;
        124 | 137) verdict="FAILED: ran out of its time" ;;
        *) verdict="FAILED: exit status $status" ;;
    esac
    if [ "$name:$status" = tests:0 ] && ! tail -n 1 "$work/$name.out" | grep -q '[0-9] passed'; then
        verdict="FAILED: no test ran, all were skipped"
    fi
    {
        if [ "$verdict" != passed ]; then tail -n 20 "$work/$name.log"; fi
        echo "== $name: $verdict, $took s"
    } | tee -a "$out/summary.txt"
    sed "s/^/$name: /" "$work/$name.log" >>"$out/log.txt"
    if [ "$verdict" != passed ]; then failed="$failed $name"; fi
}
$1
if [ -n "$failed" ]; then
    echo "failed:$failed" | tee -a "$out/summary.txt"
    exit 1
fi
