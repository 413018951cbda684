#!/usr/bin/env bash
# Every figure of docs/speed.md and the GPU figures of the README, again:
#   scripts/gpu_figures.sh OUT tests bench hooks families ttft ablation profile gpus
# One H200 needs about 150, 220, 230, 45, 600, 110 (20 GB of disk) and 320 s; the last wants two, and 180 s.
# SHAPES and VISUAL (visual tokens of the picture) say what ttft measures.
set -uo pipefail  # a stage that fails does not end the others
cd "$(dirname "$0")/.."
out=$1
shift
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi

prune() { "$PYTHON" -c 'import sys; from vlm_prune_ext.cli import main; sys.exit(main())' "$@"; }

tests() {
    VLM_PRUNE_FAST_SAMPLES=500 "$PYTHON" -m pytest tests/fast -q -n 12 \
        >"$out/fast.log" 2>&1
    tail -n 3 "$out/fast.log"
    "$PYTHON" -m pytest tests -m gpu -q --ignore tests/ablation/test_ablation_gpu.py >"$out/gpu.log" 2>&1
    tail -n 3 "$out/gpu.log"
}

methods=(none fastv:100 fastv:288,agg_layer=2 himap fastv:1.0 himap:1.0,attn_img_rank=1.0)

bench() {
    prune bench --shape llava-1.5-7b --batch-size 1 8 16 --backend transformers transformers-attentions graphs --repeat 9 \
        --method "${methods[@]}" --out "$out/bench" >"$out/bench.log" 2>&1
    cat "$out/bench/bench.md"
}

hooks() {
    prune bench --shape llava-1.5-7b --batch-size 1 8 16 --backend hooks --repeat 9 \
        --method "${methods[@]}" saint --out "$out/hooks" >"$out/hooks.log" 2>&1
    cat "$out/hooks/bench.md"
}

families() {
    local shape
    for shape in qwen2.5-vl-3b gemma-3-4b; do
        prune bench --shape $shape --batch-size 8 --backend transformers hooks --repeat 9 \
            --method none fastv:0.5,agg_layer=2 fastv:0.25,agg_layer=2 \
            --out "$out/$shape" >"$out/$shape.log" 2>&1
        cat "$out/$shape/bench.md"
    done
}

ttft() {
    local shape keep methods=(none)
    for keep in 0.5 0.25 0.1; do methods+=("fastv:$keep,agg_layer=2" "divprune:$keep"); done
    for shape in ${SHAPES:-qwen2.5-vl-7b qwen3-vl-8b}; do
        prune bench --shape "$shape" --visual "${VISUAL:-1296}" --batch-size 1 8 --repeat 9 --new-tokens 8 \
            --backend transformers hooks graphs --method "${methods[@]}" \
            --out "$out/ttft-$shape" >"$out/ttft-$shape.log" 2>&1
        cat "$out/ttft-$shape/bench.md"
    done
}

ablation() {
    "$PYTHON" -m pytest -s tests/ablation/test_ablation_gpu.py >"$out/ablation.log" 2>&1
    grep -E "per sample|GPU memory|passed|failed" "$out/ablation.log"
}

profile() {
    local common again budgets=(none fastv:288 fastv:100 fastv:32)
    common=(--src-folder "$out/demo" --model-name random:llava-1.5-7b --device cuda --max-new-tokens 4)
    prune profile-data --from demo:vqa --samples 2 --out "$out/demo" >/dev/null
    for again in 1 2 3; do  # how steady the figures are
        prune profile "${common[@]}" --energy-seconds 2 --repeat 25 --optimization bf16+fast \
            --method "${budgets[@]}" --out "$out/profile$again" 2>&1 | tail -n 1
    done
    common+=(--energy-seconds 5 --repeat 10 --out "$out/profile")
    prune profile "${common[@]}" --optimization bf16+fast bf16 --method "${budgets[@]}" 2>&1 | tail -n 1
    prune profile "${common[@]}" --optimization fp16 int8 int4 --method none fastv:100 2>&1 | tail -n 1
}

gpus() {
    local fast count
    export OMP_NUM_THREADS=8  # torchrun says 1 for several processes only
    for fast in "--fast --samples 512" "--no-fast --samples 256"; do
        for count in 1 2; do
            # shellcheck disable=SC2086
            "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node $count \
                scripts/gpus.py share $fast --batch-size 8 --method fastv:100 \
                --max-new-tokens 16 2>>"$out/gpus.err" | tee -a "$out/gpus.jsonl"
        done
    done
    "$PYTHON" scripts/gpus.py split 2>>"$out/gpus.err" | tee -a "$out/gpus.jsonl"
}

failed=0
for stage in "$@"; do
    date +"%T $stage"
    "$stage" || { echo "$stage failed: see $out" >&2; failed=1; }
done
date +%T
exit $failed
