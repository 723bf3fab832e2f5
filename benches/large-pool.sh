#!/usr/bin/env bash
# Starts thin_serve on a pool of 16 million mappings, and reads at random from all of it: what the start reads, and what memory it takes.
#
#   benches/large-pool.sh THINTOOLS
#
# The pool (8 devices, 2 million mappings each, no two of which follow on each other; 253 MiB of metadata, data that is a hole of 1 TiB) is
# made in a temporary directory (TMPDIR is respected; 0.6 GiB must be free, on a file system that takes files of 1 TiB), which goes away at
# the end. A Markdown table goes to standard output, everything else to standard error. The exit status is 1 if the start read more than
# the bitmaps of the space maps (4 KiB for 16320 blocks of data) and 256 KiB beside what a pool of 2000 mappings takes, or the server had
# more memory than its cache and 32 MiB.
#
# CACHES   sizes of the metadata cache, in MiB (default "16 64")
# READS    random reads of 4 KiB of each device (default 50000)
#
# Needs cargo, python3, and the Debian package fio.
set -euo pipefail

(($# == 1)) || { echo "usage: [CACHES='16 64'] [READS=50000] ${0##*/} THINTOOLS" >&2; exit 2; }
[[ -x $1 && ! -d $1 ]] || { echo "${0##*/}: $1 is no program" >&2; exit 2; }
ours=$(realpath -- "$1")
here=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")
command -v fio >/dev/null || { echo "${0##*/}: this Debian package is missing: fio" >&2; exit 2; }

manifest=$here/../Cargo.toml
cargo build --manifest-path "$manifest" --release --quiet --example generate-metadata >&2
target=$(cargo metadata --manifest-path "$manifest" --format-version 1 --no-deps |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')

work=$(mktemp -d "${TMPDIR:-/tmp}/large-pool.XXXXXX")
server=
cleanup() {
    if [[ -n $server ]]; then
        kill -- "$server" 2>/dev/null && wait "$server" || true
    fi
    rm -rf -- "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

for shape in small fragmented; do
    "$target/release/examples/generate-metadata" "$shape" "$work/$shape" >&2
done
truncate -s 256M "$work/small.data"
truncate -s 1T "$work/fragmented.data"

# serve SHAPE CACHE: starts it; what it read and how long it took until clients could connect are in $read and $took (ms).
serve() {
    local before
    before=$(date +%s%N)
    exec {ready}< <(exec "$ours" thin_serve --metadata "$work/$1" --data "$work/$1.data" --metadata-cache "$2m" --nbd "unix:$work/nbd" \
        --ready-fd 1 --quiet)
    server=$!
    read -r -u "$ready" _
    took=$((($(date +%s%N) - before) / 1000000))
    read=$(awk '$1 == "rchar:" { print $2 }' "/proc/$server/io")
}

memory() {
    awk -v what="$1:" '$1 == what { print $2 }' "/proc/$server/status"
}

stop() {
    kill -- "$server"
    while [[ -d /proc/$server ]] && ! grep -qs '^State:.Z' "/proc/$server/status"; do sleep 0.05; done
    server=
    exec {ready}<&-
}

bitmaps=$(((1 << 40) / 65536 / 16320 * 4096))
serve small 64
little=$read
stop
echo "| metadata cache | mappings | KiB read at the start | ready after | resident then | peak after random reads of all of it | reads | holds |"
echo "|--:|--:|--:|--:|--:|--:|--:|---|"
status=0
for cache in ${CACHES:-16 64}; do
    serve fragmented "$cache"
    at_start=$(memory VmRSS)
    jobs=()
    for id in {1..8}; do
        jobs+=(--name="$id" "--uri=nbd+unix:///$id?socket=$work/nbd" --size=122g)
    done
    done_reads=$(fio --ioengine=nbd --rw=randread --bs=4k --iodepth=8 --norandommap=1 --randrepeat=0 "--number_ios=${READS:-50000}" --group_reporting \
        --output-format=json "${jobs[@]}" |
        python3 -c 'import json, sys; t = sys.stdin.read(); print(sum(j["read"]["total_ios"] for j in json.loads(t[t.index("{"):])["jobs"]))')
    peak=$(memory VmHWM)
    stop
    holds=yes
    if ((read > little + bitmaps + 262144 || peak > (cache + 32) * 1024)); then
        holds='**no**' status=1
    fi
    echo "| $cache MiB | 16 000 000 | $((read / 1024)) | $took ms | $((at_start / 1024)) MiB | $((peak / 1024)) MiB | $done_reads | $holds |"
done
echo
echo "A pool of 2000 mappings has $((little / 1024)) KiB read when it starts."
exit "$status"
