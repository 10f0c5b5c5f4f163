#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one and nothing but this checkout: no network is used.
#
#     benchmarks/gpu.sh [OUT [PART ...]]        # default: gpu-results, and all parts
#
# Installs, tests, sanitizes, tunes and benchmarks into OUT. A call takes at most LIMIT seconds (530), each part a limit
# of its own, and leaves OUT/<part>.done when it ends well; a second call with the same OUT runs what is missing, and of
# benchmarks the rows that are. Parts go on after one that failed; the exit status is the number of parts without a
# .done. On an H100 installing took 29 s, tuning 96 s, all tests in eight processes 149 s, and the first 42 of some 330
# rows of benchmarks 304 s.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-gpu-results}" && cd "${1:-gpu-results}" && pwd)
python=${PYTHON:-python3}
limit=${LIMIT:-530}
parts=(environment install tests updates tune edit meta ops sanitize)
chosen=("${@:2}")

environment() { nvidia-smi && nvcc --version && "$python" -m pip list; }
install() { "$python" -m pip install --no-index --no-build-isolation --no-deps -e . && "$python" -m mendfast.cli doctor; }
tests() { "$python" -m pytest -q -p no:cacheprovider tests/gpu -m gpu --ignore tests/gpu/test_gpu_rank1_update.py; }
updates() { "$python" -m pytest -q -p no:cacheprovider tests/gpu/test_gpu_rank1_update.py -m gpu; }
tune() { "$python" -m mendfast.kernels.tune --precision tf32x3 --seconds 9; }
bench() { "$python" -m benchmarks.run --resume --output "$out/results" --only "$1"; }
edit() { bench bench_edit.py; }
meta() { bench bench_meta_step.py; }
ops() { bench "not bench_edit.py and not bench_meta_step.py"; }
sanitize() { bash tests/gpu/sanitize.sh; }

# Seconds that a part may take in one call. Benchmarks that are cut off keep their rows, and go on with the others.
declare -A seconds=(
    [environment]=20 [install]=90 [tests]=300 [updates]=240 [tune]=110 [edit]=240 [meta]=240 [ops]=500 [sanitize]=240
)

export -f "${parts[@]}" bench
export python out
export MENDFAST_KERNEL_TABLE=$out/tuned.json   # written by the tuner, read by every launch
missing=0
for part in "${chosen[@]:-${parts[@]}}"; do
    [[ -e $out/$part.done ]] && { echo "$part: done before"; continue; }
    left=$((limit - SECONDS))
    allowed=$((left < seconds[$part] ? left : seconds[$part]))
    if ((allowed < 10)); then
        echo "$part: no time left; call again to go on"
        missing=$((missing + 1))
        continue
    fi
    started=$SECONDS status=0
    timeout --kill-after=10 "$allowed" bash -c "$part" >>"$out/$part.log" 2>&1 || status=$?
    if ((status == 0)); then
        touch "$out/$part.done"
        echo "$part: done in $((SECONDS - started)) s"
    else
        ((status == 124 || status == 137)) && why="cut off" || why="FAILED with $status"
        echo "$part: $why after $((SECONDS - started)) s; the end of $out/$part.log:"
        tail -n 15 "$out/$part.log" | sed 's/^/    /'
        missing=$((missing + 1))
    fi
done
exit "$missing"
