#!/usr/bin/env bash
# Makes up a fleet, plays it in one process and by the recipes that can be run here, and compares what was counted:
#
#   recipes/try.sh [THINTOOLS]
#
# GNU parallel is needed. Spark is tried if $PYTHON, python3 unless told otherwise, can import pyspark.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
thintools=$(realpath "${1:-target/release/thintools}")
python=${PYTHON:-python3}
export THIN_REPLAY="$thintools replay"
place=$(mktemp --directory)
trap 'rm -rf "$place"' EXIT

"$python" - >"$place/trace.csv" <<'PYTHON'
import random
dice, time = random.Random(1), 1577808000000046
for _ in range(60000):
    time += dice.randrange(2000)
    volume = int(dice.paretovariate(0.5)) % 200
    print(f"{volume},{dice.choice('RWW')},{dice.randrange(1 << 16) * 4096},{dice.randrange(1, 33) * 4096},{time}", end="\n")
PYTHON
options=(--data-size 8g --metadata-size 2m)
$THIN_REPLAY split --quiet --output "$place/fleet" "$place/trace.csv"
manifest=$place/fleet/manifest.jsonl

# Merges reports and leaves what was counted in a file of their name.
count() {
    $THIN_REPLAY merge-reports --json "$place/$1.json" "${@:2}" >/dev/null
    "$python" - "$place/$1.json" >"$place/$1.counts" <<'PYTHON'
import json, sys
[report] = json.load(open(sys.argv[1]))
# How a histogram is packed depends on the order of merging, what it says does not.
for latency in report["latency"].values():
    latency.pop("hdr_base64", None)
parts = ["is_complete", "setup", "input", "map", "locks", "work", "space", "latency"]
print(json.dumps({part: report[part] for part in parts}, indent=1, sort_keys=True))
PYTHON
}

same() {
    if ! cmp "$place/one.counts" "$place/$1.counts"; then
        diff "$place/one.counts" "$place/$1.counts" >&2 | head -20
        echo "error: $1 counted something else than one process" >&2
        exit 1
    fi
    echo "$1: the same counts as one process"
}

$THIN_REPLAY --quiet --manifest "$manifest" --reports "$place/one" "${options[@]}"
count one "$place"/one/*.json

recipes/parallel.sh "$manifest" "$place/parallel" 5 "${options[@]}"
count parallel "$place"/parallel/*.json
same parallel
# Again, after some reports were lost.
find "$place/parallel" -name '*7*.json' -delete
recipes/parallel.sh "$manifest" "$place/parallel" 3 "${options[@]}" >/dev/null
count resumed "$place"/parallel/*.json
same resumed

if "$python" -c 'import pyspark' 2>/dev/null; then
    PYSPARK_PYTHON=$python "$python" recipes/spark.py "$manifest" "$place/spark" 4 "${options[@]}" 2>"$place/spark.log" || {
        tail -20 "$place/spark.log" >&2
        exit 1
    }
    count spark "$place"/spark/part-*
    same spark
else
    echo "spark: skipped, $python has no pyspark"
fi
