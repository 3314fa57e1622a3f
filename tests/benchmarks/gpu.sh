#!/usr/bin/env bash
# Everything that one CUDA GPU can show of this trainer, in three parts of under five minutes each.
#
#   tests/benchmarks/gpu.sh [PART ...]             measures; without a part, all three
#   tests/benchmarks/gpu.sh --dry-run [PART ...]   the same at a tiny size on the CPU: does everything run here?
#
#   parity   losses and gradients against a float64 reference, waits of the host, memory estimates, determinism
#   step     the step: the earlier trainer's beside ours, batch sizes, bf16 beside float32, where the time goes
#   run      the whole trainer with Ray: clips/s, data wait, checkpoints, SIGKILL and resume, --feed-test
#
# Results go to build/bench-gpu (OUT=DIR for another folder): parity.json, step.json, run.json, each with date, chip,
# driver and versions, *.log with what was printed, and profile.txt. Exit code 1: a part failed, or a bound was not kept.
#
# On your own RTX 4090 (WSL2 as well): stop what else uses the GPU (nvidia-smi shows it), then in the repository
#
#   make .venv/ready && tests/benchmarks/gpu.sh
#
# `parity` and `step` need neither Ray nor the project's environment, only a Python from 3.11 on with torch >= 2.11 and
# transformers >= 5.17: PYTHON=python3 tests/benchmarks/gpu.sh parity step. PRESET=smollm2_360m measures another preset.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
dry=
if [ "${1:-}" = --dry-run ]; then
    dry=1
    shift
fi
wanted=("$@")
[ $# -eq 0 ] && wanted=(parity step run)
for part in "${wanted[@]}"; do
    case "$part" in
        parity | step | run) ;;
        *) echo "error: no part $part; there are parity, step and run" >&2; exit 2 ;;
    esac
done
out=${OUT:-$root/build/bench-gpu}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$root/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
# Empty at the start, so that the first compilation is a cold one, and the start after it a warm one.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$out/compile-cache}
rm -rf "$TORCHINDUCTOR_CACHE_DIR"

cd "$root" || exit 2
preset=${PRESET:-joint_multifine}
if [ -z "$dry" ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: $PYTHON has no torch that sees a CUDA GPU. Give another with PYTHON=..., or try --dry-run." >&2
    exit 2
fi
failed=0

# log NAME COMMAND...: run it, keep what it prints in a file and show it but for the line of JSON.
log() {
    local name=$1 code
    shift
    "$@" >"$out/$name.log" 2>&1
    code=$?
    grep -v '^{"' "$out/$name.log"
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
        echo "== $name: cut; what was finished by then counts" | tee -a "$out/$name.log"
    elif [ "$code" -ne 0 ]; then
        echo "== $name: exit code $code" | tee -a "$out/$name.log"
        failed=1
    fi
}

parity() {
    local options=(--preset "$preset")
    [ -n "$dry" ] && options=(--device cpu --preset demo --layers 1 --size 28 --frames 3)
    log parity timeout --kill-after=5 290 "$PYTHON" "$here/gpu/parity.py" "${options[@]}" --json "$out/parity.json"
}

run() {
    local options=(--preset "$preset" --budget 285)
    [ -n "$dry" ] && options=(--dry-run)
    log run "$PYTHON" "$here/gpu/whole_run.py" "${options[@]}" --json "$out/run.json"
}

# piece NAME SECONDS OPTIONS...: one process; SECONDS is its share of the time, less when the whole runs late.
piece() {
    local name=$1 share=$2 left=$((began + all - SECONDS))
    shift 2
    pieces+=("$out/$name.json")
    rm -f "$out/$name.json"
    [ -n "$dry" ] && share=$all
    [ "$share" -gt "$left" ] && share=$left
    if [ "$share" -lt 20 ]; then
        echo "== $name: not measured, the time is over" | tee "$out/$name.log"
        return
    fi
    echo "== $name (at most $share s)"
    # The program itself stops between two measurements; what hangs in one is ended a little later.
    log "$name" timeout --kill-after=5 "$share" "$PYTHON" "$here/step.py" "${common[@]}" "$@" \
        --budget $((share * 3 / 4)) --json "$out/$name.json"
}

step() {
    began=$SECONDS pieces=()
    if [ -n "$dry" ]; then
        common=(--device cpu --preset demo --layers 1 --batch 2 --frames 2 --size 28 --caption 24 --threads 1)
        common+=(--repeats 2 --warmup 1)
        all=900 steps=12 curve=24 sizes=2,4 ours=eager main=present,eager,compiled single=eager
    else
        common=(--device cuda --preset "$preset")
        all=285 steps=100 curve=200 sizes=16,48,96 ours=graphs main=present,eager,compiled,graphs
        single=convolution,channels-first,one-query-program,graphs
    fi
    piece main 110 --precision bf16 --variants "$main" --compare --captions "$steps" --readings --repeats 5 \
        --present-repeats 2 --warmup 2 --profile "$out/profile.txt"
    piece sweep 90 --precision bf16 --variants "$ours" --repeats 3 --warmup 1 --sweep "$sizes"
    piece choices 70 --precision bf16 --variants "$single" --repeats 3 --warmup 1
    piece deterministic 40 --precision bf16 --variants "$ours" --repeats 3 --warmup 1 --deterministic
    piece fp32 30 --precision fp32 --variants "present,eager" --repeats 3 --present-repeats 1 --warmup 1
    piece curve 40 --variants eager --loss-curve "$curve"
    "$PYTHON" "$here/step.py" --merge "${pieces[@]}" --json "$out/step.json" || failed=1
}

for part in "${wanted[@]}"; do
    begin=$SECONDS
    echo "=== $part"
    "$part"  # one of the functions above
    echo "=== $part: $((SECONDS - begin)) s; $out/$part.json"
done
exit $failed
