#!/usr/bin/env bash
# Run the tests, in a process for each core. Arguments go to pytest, e.g.:
#   bash scripts/test.sh -m "not slow"                 the quick ones, in two minutes
#   bash scripts/test.sh tests/adapters -k merge -n 0   some of them, in one process, as a debugger wants it
set -euo pipefail
source "$(dirname "$0")/environment.sh"
# One thread for each process: more would fight for the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
python -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
