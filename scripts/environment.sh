# Sourced by the other scripts: goes to the root of the repository, makes .venv there if need be, installs the package
# into it with the extras in EXTRAS, and puts its programs first. PYTHON names the interpreter to build .venv with: 3.9
# or later; a script that trains sets trains=yes first, and needs 3.9 to 3.12.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

is_python() { # PROGRAM LATEST: whether PROGRAM is Python 3.9 to 3.LATEST
  "$1" -c "import sys; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, $2))" 2>/dev/null
}

# BasicSR, which trains, does not install on Python 3.13 and later: an earlier one is taken where there is one.
find_python() {
  local candidate latest limits=(12)
  [ -n "${trains:-}" ] || limits+=(99)
  for latest in "${limits[@]}"; do
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.10 python3.9}; do
      if is_python "$candidate" "$latest"; then
        echo "$candidate"
        return
      fi
    done
  done
  if [ -n "${trains:-}" ]; then
    echo "error: training needs BasicSR, and that Python 3.9 to 3.12; name one with PYTHON=/path/to/python" >&2
  else
    echo "error: lora_sr needs Python 3.9 or later; name one with PYTHON=/path/to/python" >&2
  fi
  return 2
}

if [ ! -x .venv/bin/python ]; then
  python=$(find_python)
  echo "making .venv with $("$python" --version)"
  "$python" -m venv .venv
elif [ -n "${trains:-}" ] && ! is_python .venv/bin/python 12; then
  echo "error: training needs BasicSR, and that Python 3.9 to 3.12; .venv has $(.venv/bin/python --version)." \
    "Remove .venv to have it made anew." >&2
  exit 2
fi
echo "installing lora_sr and what it needs into .venv (PyTorch is large: the first time takes minutes)"
# As a path, not as an import hook: beside a clone called lora_sr, Python would otherwise take that folder for the package.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat \
  --editable ".[${EXTRAS:-test}]"
export PATH="$PWD/.venv/bin:$PATH"
