#!/usr/bin/env bash
# Measures thin_check, thin_dump and thin_restore against other binaries and against the physical limit of reading.
#
#   benches/compare.sh OURS [OTHER]
#
# OURS and OTHER are each either one binary with all commands, called thintools* or pdata_tools*, or a directory with
# thin_check, thin_dump and thin_restore in it. The images are made in a temporary directory (TMPDIR is respected, 4 GiB
# must be free), which goes away at the end. A Markdown report goes to standard output, everything else to standard error.
#
# RUNS   runs of each measurement, of which the median is reported (default 5)
# LIMIT  seconds after which no further round of runs begins (default 420); what takes 2 minutes longer is ended
#
# Needs bash, cargo, python3 (3.8 or later), and GNU time for the peak memory.
set -euo pipefail

usage() {
    echo "usage: [RUNS=5] [LIMIT=420] ${0##*/} OURS [OTHER]" >&2
    exit 2
}

(($# == 1 || $# == 2)) || usage
for given in "$@"; do
    [[ -e $given ]] || { echo "${0##*/}: there is no $given" >&2; exit 2; }
done
ours=$(realpath -- "$1")
other=
[[ -z ${2:-} ]] || other=$(realpath -- "$2")
here=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")

work=
child=
cleanup() {
    if [[ -n $child ]]; then
        kill -- "$child" 2>/dev/null && wait "$child" || true
    fi
    [[ -z $work ]] || rm -rf -- "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# Runs a command as a background job: a signal is dealt with at once, not when the command has ended.
run() {
    "$@" &
    child=$!
    local status=0
    wait "$child" || status=$?
    child=
    return "$status"
}

manifest=$here/../Cargo.toml
run cargo build --manifest-path "$manifest" --release --quiet --example generate-metadata --example read-limit >&2
target=$(cargo metadata --manifest-path "$manifest" --format-version 1 --no-deps |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')
examples=$target/release/examples

began=$(date +%s)
work=$(mktemp -d "${TMPDIR:-/tmp}/thin-compare.XXXXXX")
for shape in fragmented snapshots small; do
    run "$examples/generate-metadata" "$shape" "$work/$shape.img" >"$work/$shape.facts"
done

left=$((${LIMIT:-420} - ($(date +%s) - began)))
run python3 "$here/measure.py" --folder "$work" --runs "${RUNS:-5}" --seconds "$left" \
    --read-limit "$examples/read-limit" --ours "$ours" ${other:+--other "$other"}
