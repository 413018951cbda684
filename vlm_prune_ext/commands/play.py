"""Try methods on a picture in a local web page.

    vlm-prune play --model llava-hf/llava-1.5-7b-hf

Pick a picture, ask, choose a method, drag the budget: answers with and without pruning side by
side, and the patches that each layer still sees. The page is served on this machine alone unless
--host says otherwise; it needs no network, and pictures are kept in memory only.
"""

from __future__ import annotations

import argparse

from vlm_prune_ext.commands.common import add_model_arguments, load_model, model_name
from vlm_prune_ext.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_arguments(parser)
    parser.add_argument(
        "--method", default="fastv", metavar="NAME", help="chosen at first (default: fastv)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve on (default: 127.0.0.1, this machine)"
    )
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="default: 7860")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: 64")


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    from vlm_prune_ext.methods.registry import method_class
    from vlm_prune_ext.pages import play

    if method_class(args.method) is None:
        raise InputError(f"--method {args.method} drops nothing: name one that does.")
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {args.max_new_tokens} is not valid: at least 1.")
    play.check_port(args.host, args.port)
    play.gradio()
    player = play.Player(model_name(args), load_model(args), args.max_new_tokens)
    blocks, url = play.serve(player, args.method, args.host, args.port)
    print(f"Open {url} in a browser. Ctrl-C ends it.", flush=True)
    blocks.block_thread()
    return 0
