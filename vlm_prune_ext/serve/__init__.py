"""Visual-token pruning inside vLLM, as a plug-in of that engine.

``vllm serve MODEL --hf-overrides '{"vlm_prune": "divprune:64"}'``, or
``LLM(MODEL, hf_overrides={"vlm_prune": "divprune:64"})``. The engine calls :func:`register` in each
of its processes (entry point ``vllm.general_plugins``). Nothing of vLLM is imported by this
package before that, and without the key the engine is what it was. See docs/serve.md.
"""

from __future__ import annotations


def register() -> None:
    """What vLLM calls: make the families known and have its registry ask us about configurations.

    Safe to call several times, as vLLM does.
    """
    from vlm_prune_ext.serve.plugin import install

    install()
