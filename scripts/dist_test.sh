#!/usr/bin/env bash
# Test with several processes on this machine, one for each GPU (or on the CPU with dist_params: {backend: gloo}).
# Usage: scripts/dist_test.sh NUM_PROCESSES OPTION_FILE [ARGUMENTS]
# PORT=29501 chooses another port, for a second run on the same machine.
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
fi
processes=$1
options=$2
shift 2

exec torchrun --nproc_per_node "$processes" --master_port "${PORT:-29500}" \
    -m lora_sr.test -opt "$options" --launcher pytorch "$@"
