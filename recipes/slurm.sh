#!/usr/bin/env bash
# Plays a fleet as an array of SLURM, a shard in each task; the folder is one that all nodes see:
#
#   sbatch --array=1-100 recipes/slurm.sh /shared/fleet/manifest.jsonl /shared/reports [OPTIONS OF thin_replay]
#
# A task that was requeued, and an array that is submitted again, go on where they ended. All tasks of one run must be of one array:
# SLURM_ARRAY_TASK_COUNT is the number of shards. To do only some again, keep the count: --array=7,9 with SHARDS=100 exported.
#SBATCH --job-name=thin_replay
#SBATCH --cpus-per-task=8
#SBATCH --mem-per-cpu=512M
#SBATCH --requeue
#SBATCH --signal=INT@30
set -euo pipefail

manifest=$1 reports=$2
shift 2
exec srun thin_replay --quiet --resume --jobs "$SLURM_CPUS_PER_TASK" \
    --shard "$SLURM_ARRAY_TASK_ID/${SHARDS:-$SLURM_ARRAY_TASK_COUNT}" \
    --manifest "$manifest" --reports "$reports" "$@"
