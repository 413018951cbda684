#!/usr/bin/env python3
"""Score a pruned LLaVA with VLMEvalKit; without arguments, compare settings on the demo model.

python run_vlmeval.py --model-path liuhaotian/llava-v1.5-7b --use-fast-v \
    --fast-v-attention-rank 100 --data MMBench_DEV_EN_V11 COCO_VAL --work-dir outputs_fastv
"""

import sys

from vlm_prune_ext.evals.vlmeval_cli import main

if __name__ == "__main__":
    sys.exit(main())
