#!/usr/bin/env bash
# Rows a second through VLMEvalKit and lmms-eval on one GPU, on a 7B shape with random weights:
#   scripts/gpu_throughput.sh OUT [alone shared long]
# alone: 512 pictures, a question each, and lmms-eval's own llava_hf; shared: 32 pictures, 16 questions
# each; long: 500 pictures, 18 questions each. Figures go to OUT/<stage>.json and .md. One H200 needs
# about 150, 90 and 200 s after 60 s for the model; 20 GB of disk in WORK (default: a temporary folder).
set -uo pipefail # a stage that fails does not end the others
cd "$(dirname "$0")/.."
out=$1
shift
mkdir -p "$out"
work=${WORK:-$(mktemp -d)}
shape=${SHAPE:-llava-1.5-7b}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
methods=(none fastv:100 divprune:64)

bench() { # stage, further words
    local stage=$1
    shift
    "$PYTHON" -c 'import sys; from vlm_prune_ext.cli import main; sys.exit(main())' \
        bench --end-to-end --out "$work/$stage" "$@" >"$out/$stage.log" 2>&1
    local code=$?
    cp "$work/$stage/runs.json" "$out/$stage.json"
    cp "$work/$stage/end_to_end.md" "$out/$stage.md"
    cat "$out/$stage.md"
    rm -rf "$work/$stage"
    return $code
}

alone() { bench alone --model "$work/$shape" --rows "${ROWS:-512}" --questions 1 --method "${methods[@]}" llava_hf; }
shared() { bench shared --model "$work/$shape" --rows "${ROWS:-512}" --questions 16 --method "${methods[@]}"; }
long() { bench long --model "$work/$shape" --rows "${LONG:-9000}" --questions 18 --method "${methods[@]}"; }

date +"%T model"
"$PYTHON" - "$shape" "$work/$shape" <<'E' 2>"$out/model.log" || { tail -n 3 "$out/model.log"; exit 1; }
import pathlib, sys, torch
from vlm_prune_ext.bench.end_to_end import random_checkpoint

random_checkpoint(sys.argv[1], pathlib.Path(sys.argv[2]), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
E
failed=0
for stage in "${@:-alone shared long}"; do
    for one in $stage; do
        date +"%T $one"
        "$one" || { echo "$one failed: see $out/$one.log" >&2; tail -n 3 "$out/$one.log" >&2; failed=1; }
    done
done
date +%T
exit $failed
