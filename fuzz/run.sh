#!/usr/bin/env bash
# Fuzzes each target for SECONDS_EACH seconds (default 300). Needs a nightly toolchain and cargo-fuzz ("cargo install cargo-fuzz").
# Leaks are not looked for: thread pools live as long as the process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
corpus=$(mktemp -d)
trap 'rm -rf "$corpus"' EXIT
mkdir "$corpus/xml" "$corpus/metadata"
for dump in testdata/kernel/{empty-2m,seq-1thin,snap-mix-b,discard-passdown}/meta.dump-*.zst; do
    cargo run --quiet --release -- dump "${dump%.dump-*}.img.zst" > "$corpus/xml/$(basename "$(dirname "$dump")").xml"
done
for target in xml metadata; do
    cargo +nightly fuzz run "$target" "$corpus/$target" -- -len_control=0 -max_len=16384 -max_total_time="${SECONDS_EACH:-300}" -detect_leaks=0 -rss_limit_mb=2048 -timeout=10
done
