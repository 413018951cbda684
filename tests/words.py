"""Command lines as their commands read them."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_prune_ext import cli
from vlm_prune_ext.experiment.settings import Settings


def settings_of(words: Sequence[str]) -> tuple[Settings, frozenset[str]]:
    """Settings of ``vlm-prune eval`` with these arguments, and which of them are given."""
    module, parser = cli.command("eval")
    return module.settings_of(vars(parser.parse(words)))
