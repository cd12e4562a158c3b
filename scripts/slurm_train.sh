#!/usr/bin/env bash
# Train under slurm, with one task for each GPU, in a job that queues itself again before its time is over.
# Usage: scripts/slurm_train.sh PARTITION JOB_NAME GPUS OPTION_FILE [ARGUMENTS, e.g. --auto_resume]
# GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SBATCH_ARGS (more arguments of sbatch, e.g. --time=4:00:00) can be set in the
# environment. Two minutes before the end of its time the run saves its state, and goes on from it when the job starts
# again; scancel ends it for good. Within an allocation of salloc it runs there.
set -euo pipefail

if [ $# -lt 4 ]; then
    sed -n '2,6s/^# //p' "$0" >&2
    exit 2
fi
partition=$1
job=$2
gpus=$3
options=$4
per_node=${GPUS_PER_NODE:-8}
if [ "$gpus" -lt "$per_node" ]; then
    per_node=$gpus
fi

if [ -z "${SLURM_JOB_ID:-}" ]; then
    # shellcheck disable=SC2086  # SBATCH_ARGS is a list of words
    exec sbatch --partition "$partition" --job-name "$job" --gres "gpu:$per_node" --ntasks "$gpus" \
        --ntasks-per-node "$per_node" --cpus-per-task "${CPUS_PER_TASK:-5}" \
        --requeue --open-mode append --signal B:USR1@120 ${SBATCH_ARGS:-} "$0" "$@"
fi

shift 4
srun --ntasks "$gpus" --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
    python -u -m lora_sr.train -opt "$options" --launcher slurm "$@" &
step=$!
is_over=
trap 'is_over=yes; kill -USR1 "$step" 2>/dev/null || true' USR1 # srun hands it on to the tasks
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # the signal has ended the wait, not the tasks
    status=0
    wait "$step" || status=$?
done

# Whatever the tasks have made of the signal: a run that was finished just then finds nothing left to train.
if [ -n "$is_over" ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
