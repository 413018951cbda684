"""FLOPs as papers count them, beside this package's own count.

One prefill has as many FLOPs as there are conventions: papers count a multiply-add once or twice,
two MLP matrices or three, one layer or all, with the text or without. A ratio hides some of it, a
number none. Each convention here gives its paper's published number to its digits, which a test
does; :mod:`vlm_prune_ext.experiment.flops` says what this package counts.

- ``ours``: two per multiply-add, all matrices and layers, text included, and the output head.
- ``fastv``: one per multiply-add, two matrices in the MLP, the mean of a layer, text included:
  ``4 n d^2 + 2 n^2 d + 2 n d m``. FastV (arXiv 2403.06764), section 4.2; abstract: 45 % less for
  LLaVA-1.5-13B, which its K=2, R=50 % gives with the 35 tokens of LLaVA's prompt.
- ``sparsevlm``: one per multiply-add, all matrices and layers, text included. SparseVLM (arXiv
  2410.04417v4), abstract: 54 % less on LLaVA, which 192 tokens give; the length of the text is not
  stated there: 110 to 122 tokens give it, as questions with a list of read words have.
- ``macs``: one per multiply-add, all matrices and layers, visual tokens alone. PyramidDrop (arXiv
  2410.17247v2), ablation of stages: 3.82 T for LLaVA-1.5-7B, 1.78 T in four, 2.13 T in three.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from vlm_prune_ext.errors import unknown_name
from vlm_prune_ext.experiment.flops import DecoderShape, decoder_flops
from vlm_prune_ext.experiment.settings import CONVENTIONS


class Counted(NamedTuple):
    """A prefill in one convention.

    Attributes:
        flops: with pruning.
        baseline: without.
    """

    flops: float
    baseline: float

    @property
    def ratio(self) -> float:
        """One over the other."""
        return self.flops / self.baseline


def count(
    convention: str, shape: DecoderShape, visual: Sequence[float], text: float, whole: float
) -> Counted:
    """FLOPs of a prefill.

    Args:
        convention: one of :data:`vlm_prune_ext.experiment.settings.CONVENTIONS`.
        shape: of the decoder.
        visual: visual tokens that enter each layer (means are fine).
        text: text tokens.
        whole: visual tokens without pruning.

    Raises:
        InputError: an unknown convention, or not one length per layer.
    """
    if convention not in CONVENTIONS:
        raise unknown_name("FLOPs convention", convention, CONVENTIONS)
    return Counted(
        _flops(convention, shape, visual, text),
        _flops(convention, shape, [whole] * shape.layers, text),
    )


def _flops(convention: str, shape: DecoderShape, visual: Sequence[float], text: float) -> float:
    own = 0 if convention == "macs" else text
    lengths = [tokens + own for tokens in visual]
    if convention == "ours":
        return decoder_flops(shape, lengths)  # type: ignore[arg-type]
    if convention == "fastv":
        return fmean(_layer(shape, n, matrices=2) for n in lengths)
    return sum(_layer(shape, n, matrices=shape.mlp_matrices) for n in lengths)


def _layer(shape: DecoderShape, n: float, matrices: int) -> float:
    """One per multiply-add: of a layer's projections, its attention and its MLP."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    projections = 2 * shape.hidden * (queries + keys) * n
    return projections + 2 * queries * n * n + matrices * shape.hidden * shape.intermediate * n
