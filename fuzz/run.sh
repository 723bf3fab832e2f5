#!/usr/bin/env bash
# Fuzzes targets, one after the other: run.sh [TARGET ...]; all of them if none is named. Needs a nightly toolchain and cargo-fuzz
# ("cargo install cargo-fuzz").
#
# SECONDS_EACH  how long each is fuzzed (default 300)
# CORPUS        folder that keeps the inputs found, for another run to go on with (default: a temporary one)
#
# No input may take more than 5 s or have the process grow past 1 GiB. Leaks are not looked for: thread pools live as long as
# the process. The library has no unsafe code, so only the parser of XML, which other packages take part in, is fuzzed with the
# address sanitizer; the others are many times as fast without it. Traces are read from a file, and NBD is spoken over a socket, which
# TMPDIR says the place of.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

targets=("$@")
if ((${#targets[@]} == 0)); then
    targets=(superblock node space_map xml image transaction trace nbd)
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
corpus=${CORPUS:-$work/corpus}

cargo run --quiet --manifest-path fuzz/Cargo.toml --example seeds -- "$work/seeds"
for target in "${targets[@]}"; do
    build=(--sanitizer none --no-trace-compares)
    if [[ $target == xml ]]; then
        build=()
    fi
    # One seed of the images is whole blocks.
    max_len=16384
    if [[ $target == image ]]; then
        max_len=49152
    fi
    mkdir -p "$corpus/$target"
    cargo +nightly fuzz run "${build[@]}" "$target" "$corpus/$target" "$work/seeds/$target" -- -len_control=0 -max_len="$max_len" \
        -max_total_time="${SECONDS_EACH:-300}" -detect_leaks=0 -rss_limit_mb=1024 -timeout=5 -print_final_stats=1
done
