#!/usr/bin/env python3
"""Score a pruned LLaVA with VLMEvalKit; without arguments, compare settings on the demo model.

python run_vlmeval.py --model-path liuhaotian/llava-v1.5-7b --use-fast-v \
    --fast-v-attention-rank 100 --data MMBench_DEV_EN_V11 COCO_VAL --work-dir outputs_fastv
"""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """``vlm-prune eval`` with these arguments; ``None`` takes those of the process."""
    try:
        from vlm_prune_ext import cli
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return cli.main(["eval", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
