"""Try methods on a picture in a local web page.

    vlm-prune play --model llava-hf/llava-1.5-7b-hf

Pick a picture, ask, choose a method, drag the budget: answers with and without pruning side by
side, and the patches that each layer still sees. The page is served on this machine alone unless
--host says otherwise; it needs no network, and pictures are kept in memory only.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from vlm_prune_ext.commands.common import load_model, model_name
from vlm_prune_ext.experiment.settings import (
    WHOLE,
    ModelSettings,
    add_options,
    named,
    option,
    text,
    whole,
)
from vlm_prune_ext.methods.registry import METHODS
from vlm_prune_ext.pages import play


@dataclass(frozen=True)
class PlaySettings(ModelSettings):
    """What is asked, and where the page is."""

    method: str = option(
        "fastv", named(name for name in METHODS if name != "none"), "chosen at first: fastv"
    )
    host: str = option(
        "127.0.0.1", text("an address", "ADDRESS"), "default: 127.0.0.1, this machine alone"
    )
    port: int = option(play.PORT, whole(1, 65535), f"default: {play.PORT}")
    max_new_tokens: int = option(64, WHOLE, "default: 64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_options(parser, of=PlaySettings)


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    said = PlaySettings.of(vars(args))
    play.check_address(said.host, said.port)
    play.gradio()
    player = play.Player(model_name(said), load_model(said), said.max_new_tokens)
    blocks, url = play.serve(player, said.method, said.host, said.port)
    print(f"Open {url} in a browser. Ctrl-C ends it.", flush=True)
    blocks.block_thread()
    return 0
