#!/usr/bin/env bash
# Test under slurm, with one task for each GPU.
# Usage: scripts/slurm_test.sh PARTITION JOB_NAME NUM_GPUS OPTION_FILE [ARGUMENTS]
# GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS (more arguments of srun) can be set in the environment.
set -euo pipefail

if [ $# -lt 4 ]; then
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
fi
partition=$1
job=$2
gpus=$3
options=$4
shift 4
per_node=${GPUS_PER_NODE:-8}
if [ "$gpus" -lt "$per_node" ]; then
    per_node=$gpus
fi

# shellcheck disable=SC2086  # SRUN_ARGS is a list of words
exec srun --partition "$partition" --job-name "$job" --gres "gpu:$per_node" --ntasks "$gpus" \
    --ntasks-per-node "$per_node" --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    python -u -m lora_sr.test -opt "$options" --launcher slurm "$@"
