#!/usr/bin/env bash
# Every measurement of the training step on one CUDA GPU, in under eight minutes. No network, no Ray, no dataset.
#
#   tests/benchmarks/gpu.sh [OUT]             measures; OUT is a folder, build/bench-gpu if not given
#   tests/benchmarks/gpu.sh --dry-run [OUT]   the same parts at a tiny size on the CPU: does everything run here?
#
# On your own RTX 4090 (WSL2 as well): stop what else uses the GPU (nvidia-smi shows it), then in the repository
#
#   make .venv/ready && tests/benchmarks/gpu.sh
#
# It needs about 12 GB of free GPU memory for the comparison, and takes what there is for the larger batches. Without
# the project's environment, any Python from 3.11 on does that has torch >= 2.11 and transformers >= 5.17:
#
#   PYTHON=python3 tests/benchmarks/gpu.sh
#
# OUT/step-gpu.json has everything, with date, chip, driver and versions; OUT/*.log what was printed, OUT/profile.txt
# where the time of the compiled step goes. A part that is slower than its share of the time is cut and said so, and the
# others run. Exit code 1: a part failed, and its last lines are shown. PRESET=smollm2_360m measures another preset.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
dry=
if [ "${1:-}" = --dry-run ]; then
    dry=1
    shift
fi
out=${1:-$root/build/bench-gpu}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$root/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi

export PYTHONPATH=$root HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Empty at the start, so that the first compilation is a cold one, and the start after it a warm one.
export TORCHINDUCTOR_CACHE_DIR=$out/compile-cache
rm -rf "$TORCHINDUCTOR_CACHE_DIR"
rm -f "$out"/*.json "$out"/*.log

cd "$root" || exit 2
if [ -n "$dry" ]; then
    common=(--device cpu --preset demo --layers 1 --batch 2 --frames 2 --size 28 --caption 24 --threads 1 --repeats 2 --warmup 1)
    steps=12 curve=24 sizes=2,4 ours=eager main=present,stacked,eager,compiled all=900
else
    common=(--device cuda --preset "${PRESET:-joint_multifine}")
    steps=200 curve=300 sizes=16,32,64,96,128 ours=compiled main=present,stacked,eager,graphs,compiled all=470
    if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "error: $PYTHON has no torch that sees a CUDA GPU. Give another with PYTHON=..., or try --dry-run." >&2
        exit 2
    fi
fi

parts=()
failed=0

# part NAME SECONDS OPTIONS...: one process; SECONDS is its share of the time, less when the whole runs late.
part() {
    local name=$1 share=$2 left=$((all - SECONDS)) code
    shift 2
    parts+=("$out/$name.json")
    [ -n "$dry" ] && share=$all
    [ "$share" -gt "$left" ] && share=$left
    if [ "$share" -lt 20 ]; then
        echo "== $name: not measured, the time is over" | tee "$out/$name.log"
        return
    fi
    echo "== $name (at most $share s)"
    # The program itself stops between two measurements; what hangs in one is ended a little later.
    timeout --kill-after=5 "$share" "$PYTHON" "$here/step.py" "${common[@]}" "$@" \
        --budget $((share * 3 / 4)) --json "$out/$name.json" >"$out/$name.log" 2>&1
    code=$?
    grep -v '^{"machine"' "$out/$name.log"
    if [ $code -eq 124 ] || [ $code -eq 137 ]; then
        echo "== $name: cut after $share s; what was finished by then counts" | tee -a "$out/$name.log"
    elif [ $code -ne 0 ]; then
        echo "== $name: failed with exit code $code" | tee -a "$out/$name.log"
        failed=1
    fi
}

part main 170 --precision bf16 --variants $main --compare --captions $steps --readings --profile "$out/profile.txt"
part restart 40 --precision bf16 --variants compiled --repeats 3 --warmup 1
part fp32 60 --precision fp32 --variants "present,$ours" --repeats 3
part sweep 80 --precision bf16 --variants $ours --repeats 5 --warmup 2 --sweep $sizes
part curve 50 --variants $ours --loss-curve $curve
part table 70 --precision bf16 --variants $ours --repeats 3 --warmup 2 --table

"$PYTHON" "$here/step.py" --merge "${parts[@]}" --json "$out/step-gpu.json" || exit 1
echo "== $SECONDS s in all; everything is in $out/step-gpu.json"
exit $failed
