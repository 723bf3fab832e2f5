#!/usr/bin/env bash
# Measures thin_replay against fio and blkparse on the same traces, and its memory against what it may take.
#
#   benches/replay-compare.sh THINTOOLS            rates, of blktraces of four shapes and of a CSV
#   benches/replay-compare.sh THINTOOLS --memory   peak memory, of a long trace that comes through a pipe
#
# THINTOOLS is the binary with all commands. Traces are made in a temporary directory (TMPDIR is respected; 1 GiB must be free for each
# million of EVENTS), which goes away at the end. A Markdown report goes to standard output, everything else to standard error.
#
# RUNS    runs of each command, in turn; medians are reported (default 3)
# EVENTS  requests of each trace (default 4000000), or of the long one (default 100000000)
#
# Needs cargo, python3 (3.8 or later), and the Debian packages time, and for the rates blktrace (for blkparse) and fio.
set -euo pipefail

usage() {
    echo "usage: [RUNS=3] [EVENTS=N] ${0##*/} THINTOOLS [--memory]" >&2
    exit 2
}

(($# == 1)) || { (($# == 2)) && [[ $2 == --memory ]]; } || usage
[[ -x $1 && ! -d $1 ]] || { echo "${0##*/}: $1 is no program" >&2; exit 2; }
ours=$(realpath -- "$1")
mode=${2:-}
here=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")

needed=(/usr/bin/time:time)
[[ $mode == --memory ]] || needed+=(blkparse:blktrace fio:fio)
missing=()
for need in "${needed[@]}"; do
    command -v "${need%%:*}" >/dev/null || missing+=("${need##*:}")
done
if ((${#missing[@]} > 0)); then
    echo "${0##*/}: these Debian packages are missing: ${missing[*]}" >&2
    exit 2
fi

manifest=$here/../Cargo.toml
cargo build --manifest-path "$manifest" --release --quiet --example generate-trace >&2
target=$(cargo metadata --manifest-path "$manifest" --format-version 1 --no-deps |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')

work=$(mktemp -d "${TMPDIR:-/tmp}/replay-compare.XXXXXX")
child=
cleanup() {
    if [[ -n $child ]]; then
        kill -- "$child" 2>/dev/null && wait "$child" || true
    fi
    rm -rf -- "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# As a background job, so that a signal is dealt with at once.
python3 "$here/measure_replay.py" --folder "$work" --runs "${RUNS:-3}" ${EVENTS:+--events "$EVENTS"} $mode \
    --ours "$ours" --generator "$target/release/examples/generate-trace" &
child=$!
status=0
wait "$child" || status=$?
child=
exit "$status"
