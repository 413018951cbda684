"""The demo: synthetic scenes, questions about them, and a small model that really sees.

`CHECKPOINT` is the folder of the model (LLaVA-1.5, original format); `scenes` makes data of any
amount; `train` makes the model from nothing; `report` measures it.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
