"""The demo: synthetic scenes, questions about them, and a small model that really sees.

`CHECKPOINT` is the folder of the model (LLaVA-1.5, original format); `scenes` makes data of any
amount; `report` measures it. `recipes/demo_model.py` trains such a model from nothing.
"""

from vlm_prune_ext.models.catalogue import DEMO as CHECKPOINT

__all__ = ["CHECKPOINT"]
