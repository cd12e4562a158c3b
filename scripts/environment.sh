# Sourced by the other scripts: goes to the root of the repository, makes .venv there if need be, installs the package
# into it with the extras in EXTRAS, and puts its programs first. PYTHON names the interpreter to build .venv with (3.9
# to 3.12: BasicSR does not install on later ones).
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.10 python3.9}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: lora_sr needs Python 3.9 to 3.12; name one with PYTHON=/path/to/python" >&2
  return 2
}

if [ ! -x .venv/bin/python ]; then
  python=$(find_python)
  echo "making .venv with $("$python" --version)"
  "$python" -m venv .venv
fi
echo "installing lora_sr and what it needs into .venv (PyTorch is large: the first time takes minutes)"
# As a path, not as an import hook: beside a clone called lora_sr, Python would otherwise take that folder for the package.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat \
  --editable ".[${EXTRAS:-test}]"
export PATH="$PWD/.venv/bin:$PATH"
