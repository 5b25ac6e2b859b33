#!/usr/bin/env bash
# Every target that runs on this machine: the contract suite, then twenty steps of the demo, export and verification; and the other tests that
# the test command leaves out for their length. About an hour on two cores.
# Arguments go to pytest:  bash scripts/test_targets.sh -k int8-vllm
set -euo pipefail
cd "$(dirname "$0")/.."
export HETERO_RL_TESTS_TARGET_STEPS=${HETERO_RL_TESTS_TARGET_STEPS:-20}
exec bash scripts/test.sh -m "variant or not variant" tests/contract tests/e2e/test_targets.py tests/e2e/test_model_families.py tests/e2e/test_plugin.py tests/e2e/test_ranks.py \
    tests/e2e/test_infeasible.py tests/e2e/test_calibrated.py tests/e2e/test_vllm_server_pool.py tests/e2e/test_train.py \
    tests/unit/test_evidence.py tests/unit/test_benchmarks.py tests/recovery "$@"
