#!/usr/bin/env bash
# Plays a fleet in shards with GNU parallel:
#
#   recipes/parallel.sh MANIFEST REPORTS SHARDS [OPTIONS OF thin_replay]
#
# A shard that fails is tried once more. THIN_REPLAY names the program, as "thintools replay"; PARALLEL_ARGS goes to parallel:
# "--sshlogin node1,node2" makes it a cluster that shares the folder. Run again, it goes on where it ended.
set -euo pipefail

manifest=$1 reports=$2 shards=$3
shift 3
# One job of each process and a process for each processor: a slow shard keeps no processor waiting. The options go through a shell.
# shellcheck disable=SC2086
seq "$shards" | parallel ${PARALLEL_ARGS:-} --halt soon,fail=1 --retries 2 \
    "${THIN_REPLAY:-thin_replay} --quiet --jobs 1 --resume --shard {}/$shards" \
    --manifest "$(printf '%q' "$manifest")" --reports "$(printf '%q' "$reports")" "${@@Q}"
