#!/usr/bin/env bash
# Faults, many of each kind: about half an hour on two cores. The test command runs a few of each.
#   HETERO_RL_TESTS_FAULTS=50 bash scripts/test_faults.sh -k killed
set -euo pipefail
cd "$(dirname "$0")/.."
export HETERO_RL_TESTS_FAULTS=${HETERO_RL_TESTS_FAULTS:-50}
exec bash scripts/test.sh tests/recovery "$@"
