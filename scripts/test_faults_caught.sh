#!/usr/bin/env bash
# Every fault of tests/deploy_faults.py on every engine that this machine runs: about a quarter of an hour on two cores. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
exec bash scripts/test.sh -m "variant or not variant" tests/e2e/test_faults_caught.py "$@"
