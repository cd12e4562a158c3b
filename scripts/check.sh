#!/usr/bin/env bash
# Check style and types. `ruff check --fix` and `ruff format` repair most of what the first two find.
set -euo pipefail
EXTRAS=test,dev
source "$(dirname "$0")/environment.sh"
ruff check
ruff format --check
mypy
