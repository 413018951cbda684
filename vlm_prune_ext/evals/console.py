"""Tables on the console, and what their cells say of a record."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_prune_ext.evals.record import Record


def console() -> Any:
    """Where tables go: as wide as the terminal, wide enough without one."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120)


def tokens(record: Record) -> str:
    """Visual tokens of a sample on their way through the layers: ``576 → 100``."""
    steps = [f"{record.visual_tokens[0].before:.0f}"] if record.visual_tokens else []
    steps += [f"{group.after:.0f}" for group in record.visual_tokens]
    different = [step for i, step in enumerate(steps) if i == 0 or step != steps[i - 1]]
    if len(different) > 4:
        different = [different[0], "…", different[-1]]
    return " → ".join(different) or "-"
