#!/usr/bin/env bash
# Run the tests. Arguments go to pytest, e.g.: bash scripts/test.sh tests/adapters -k merge
set -euo pipefail
source "$(dirname "$0")/environment.sh"
python -m pytest "$@"
