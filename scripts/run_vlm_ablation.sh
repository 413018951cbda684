#!/usr/bin/env bash
# Caption one data set with many models and compare them (vlm-prune ablate).
#
#   scripts/run_vlm_ablation.sh
#   DATA_CSV=data/captions.csv MODELS="demo llava-1.5-7b" scripts/run_vlm_ablation.sh
#   PRESET=quick METHODS="none fastv:0.25" scripts/run_vlm_ablation.sh --lang ko
#
# Variables: DATA_CSV OUTPUT_DIR BATCH_SIZE MAX_NEW_TOKENS MODELS PRESET METHODS
# CUDA_VISIBLE_DEVICES PYTHON; lists have blanks between. What is given behind the script's name
# goes on to vlm-prune ablate (its --help says what there is). The same call continues a study.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -n "${PYTHON:-}" ]]; then
    python="$PYTHON"
elif [[ -x "$here/.venv/bin/python" ]]; then
    python="$here/.venv/bin/python"
else
    python=python3
fi

arguments=(
    --data "${DATA_CSV:-data/quic360/test.csv}"
    --output-dir "${OUTPUT_DIR:-results}"
    --batch-size "${BATCH_SIZE:-2}"
    --max-new-tokens "${MAX_NEW_TOKENS:-64}"
)
if [[ -n "${MODELS:-}" ]]; then
    read -r -a models <<<"$MODELS"
    arguments+=(--models "${models[@]}")
elif [[ -n "${PRESET:-}" ]]; then
    arguments+=(--preset "$PRESET")
fi
if [[ -n "${METHODS:-}" ]]; then
    read -r -a methods <<<"$METHODS"
    arguments+=(--methods "${methods[@]}")
fi
exec "$python" -m vlm_prune_ext.cli ablate "${arguments[@]}" "$@"
