#!/usr/bin/env bash
# Train with several processes, one for each GPU (or on CPUs with dist_params: {backend: gloo}).
# Usage: scripts/dist_train.sh PROCESSES OPTION_FILE [ARGUMENTS, e.g. --auto_resume]
# On several machines: NODES=2 HOST=node1 scripts/dist_train.sh 8 OPTION_FILE, the same on each of them; PROCESSES is that
# of one machine, HOST the name of any of them, and PORT=29501 another port there than 29500. When a process is lost,
# all are started again and go on from the last state; RESTARTS says how often (3 times; not at all on one machine).
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n '2,6s/^# //p' "$0" >&2
    exit 2
fi
processes=$1
options=$2
shift 2
nodes=${NODES:-1}
if [ "$nodes" = 1 ]; then
    meeting=(--standalone --max-restarts "${RESTARTS:-0}")
elif [ -n "${HOST:-}" ]; then
    meeting=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$HOST:${PORT:-29500}")
    meeting+=(--rdzv-id "$(basename "$options")" --max-restarts "${RESTARTS:-3}")
else
    echo "error: HOST must be the name of a machine where NODES=$nodes of them meet, got nothing" >&2
    exit 2
fi

# Processes that are started again must not find in torchrun's store what the lost ones left there (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun "${meeting[@]}" --nproc-per-node "$processes" \
    -m lora_sr.train -opt "$options" --launcher pytorch "$@"
