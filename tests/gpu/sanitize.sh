#!/usr/bin/env bash
# The GPU tests of the ops' small shapes under compute-sanitizer: no access out of bounds, no race in shared memory.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer isn't on PATH; it comes with the CUDA toolkit" >&2; exit 2; }
# PyTorch's caching allocator hides small overruns: let every tensor be an allocation of its own
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
        python -m pytest -q tests/gpu -m gpu -k "test_editor_mlp and not real_sizes or test_running_stats"
done
