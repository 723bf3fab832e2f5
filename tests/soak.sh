#!/usr/bin/env bash
# Random histories of the pool engine, far more of them than in the normal tests: 20 000 unless another number is given, from a
# random seed on unless one is given, too. About ten minutes on 2 cores. A history that fails is cut down and printed with the command
# that runs it again.
#
# Usage: tests/soak.sh [HISTORIES [FIRST_SEED]]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

histories=${1:-20000}
first=${2:-$((RANDOM * 32768 * 1000 + RANDOM))}
cores=$(nproc)
each=$(((histories + cores - 1) / cores))
cargo test --locked --test tests --no-run
pids=()
for ((i = 0; i < cores; i++)); do
    SIMULATION_FIRST=$((first + i * each)) SIMULATION_SEEDS=$each \
        cargo test --quiet --locked --test tests pool::simulation -- --nocapture &
    pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
    wait "$pid" || status=1
done
exit $status
