#!/usr/bin/env bash
# lmms-eval with a pruned model: ./run_lmms.sh MODEL TASKS [key=value ...]
#
#   ./run_lmms.sh llava_fastv shapes_mcq,shapes_yn attention_rank=100
#   ./run_lmms.sh llava_saint mme pretrained=liuhaotian/llava-v1.5-7b batch_size=8 limit=100
#   NUM_PROCESSES=2 ./run_lmms.sh llava_baseline shapes_mcq device=cpu
#
# Without arguments it says what may be given. Results go to logs/<configuration>/.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [[ -n "${PYTHON:-}" ]]; then
    python="$PYTHON"
elif [[ -x "$here/.venv/bin/python" ]]; then
    python="$here/.venv/bin/python"
else
    python=python3
fi
exec "$python" -m vlm_prune_ext.evals.lmms_launch "$@"
