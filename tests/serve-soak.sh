#!/usr/bin/env bash
# Random requests to two exports of thin_serve, with snapshots taken, written and deleted meanwhile, for an hour unless another number
# of minutes is given, from a random seed on unless one is given, too. The server is stopped or killed after each few thousand requests.
# What goes wrong is printed with its seed.
#
# Usage: tests/serve-soak.sh [MINUTES [FIRST_SEED]]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

export SERVE_SOAK_MINUTES=${1:-60} SERVE_SOAK_SEED=${2:-$((RANDOM * 32768 + RANDOM))}
echo "from seed $SERVE_SOAK_SEED on"
exec cargo test --quiet --locked --release --test tests serve::soak -- --nocapture
