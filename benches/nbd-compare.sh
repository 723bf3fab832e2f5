#!/usr/bin/env bash
# Measures thin_serve against qemu-nbd (raw and qcow2) and nbdkit: the same fio jobs in one run, in turn, with the CPU time of the servers.
#
#   benches/nbd-compare.sh THINTOOLS             everything through the page cache
#   benches/nbd-compare.sh THINTOOLS --direct    thin_serve --direct, and qemu-nbd with cache=none and io_uring; nbdkit has no such thing
#
# THINTOOLS is the binary with all commands. Images and sockets are in a temporary directory (TMPDIR is respected: /dev/shm measures the
# servers, a disk measures the disk, too; 6 GiB must be free), which goes away at the end. A Markdown report goes to standard output, everything
# else to standard error. The jobs are those of a script by which the figures were found that this server was made to reach.
#
# RUNS     runs of each job on each server, in turn; medians are reported (default 3)
# SECONDS_EACH  seconds of a job that has no end of its own (default 2)
# JOBS     the jobs to run (default all)
#
# Needs python3 (3.8 or later), and the Debian packages fio, nbdkit and qemu-utils.
set -euo pipefail

usage() {
    echo "usage: [RUNS=3] [SECONDS_EACH=2] [JOBS='read-32 write-32 ...'] ${0##*/} THINTOOLS [--direct]" >&2
    exit 2
}

(($# == 1)) || { (($# == 2)) && [[ $2 == --direct ]]; } || usage
[[ -x $1 && ! -d $1 ]] || { echo "${0##*/}: $1 is no program" >&2; exit 2; }
ours=$(realpath -- "$1")
here=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")

missing=()
for need in fio:fio nbdkit:nbdkit qemu-nbd:qemu-utils qemu-img:qemu-utils; do
    command -v "${need%%:*}" >/dev/null || missing+=("${need##*:}")
done
if ((${#missing[@]} > 0)); then
    echo "${0##*/}: these Debian packages are missing: ${missing[*]}" >&2
    exit 2
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/nbd-compare.XXXXXX")
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
python3 "$here/measure_nbd.py" --folder "$work" --runs "${RUNS:-3}" --seconds "${SECONDS_EACH:-2}" ${JOBS:+--jobs "$JOBS"} ${2:+"$2"} \
    --ours "$ours" &
child=$!
status=0
wait "$child" || status=$?
child=
exit "$status"
