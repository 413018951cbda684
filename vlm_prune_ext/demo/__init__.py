"""The demo: synthetic scenes, questions about them, and a small model that really sees.

`CHECKPOINT` is the folder of the model (LLaVA-1.5, original format); `scenes` makes data of any
amount. `recipes/demo_report.py` measures it, `recipes/demo_model.py` trains one from nothing.
"""

from vlm_prune_ext.models.catalogue import DEMO as CHECKPOINT

__all__ = ["CHECKPOINT"]
