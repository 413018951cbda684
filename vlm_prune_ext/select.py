"""Pure tensor maths that the rules share. Nothing here knows what a model is.

Two promises hold throughout: ties go to the lower place (``torch.topk`` promises nothing, so ranks
come from stable sorts), and every row of a batch is treated as if it were alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from vlm_prune_ext.lazy import torch


def top_k_ascending(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Places of the ``k`` highest scores of each row, in ascending order of place.

    Ties go to the lower place, on every device and back end.

    Args:
        scores: ``(batch, n)`` float.
        k: how many, at most ``n``.

    Returns:
        int64 ``(batch, k)``.
    """
    return falling(scores)[..., :k].sort(dim=-1).values


def falling(scores: torch.Tensor) -> torch.Tensor:
    """Places of each row in order of falling score, ties to the lower place."""
    return scores.sort(dim=-1, descending=True, stable=True).indices


def take_rows(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """``(batch, n, d)`` and int64 ``(batch, k)`` -> ``(batch, k, d)``."""
    return tensor.gather(1, places[..., None].expand(-1, -1, tensor.shape[-1]))


# -- text -----------------------------------------------------------------------------------
def text_raters(image: torch.Tensor, tail: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Which tokens of the text have to do with the image, by their embeddings.

    Every image row spreads a weight of one over the text, by a softmax over plain products; a token
    is a rater if its mean weight is above the mean of all. Where none is (a text of one token), the
    one with the largest weight is.

    Args:
        image: ``(batch, n, d)``; tail: ``(batch, t, d)``, any float dtype (computed in float32).
        real: bool ``(batch, t)``, False at fillers.

    Returns:
        float32 ``(batch, t)``: one over the number of raters at raters, 0 elsewhere.
    """
    products = image.float() @ tail.float().transpose(1, 2)
    weights = products.masked_fill(~real[:, None], float("-inf")).softmax(dim=-1).mean(dim=1)
    mean = weights.sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)
    raters = (weights > mean) & real
    first = torch.zeros_like(raters).scatter_(1, weights.argmax(dim=1, keepdim=True), True)
    raters = torch.where(raters.any(dim=1, keepdim=True), raters, first)
    return raters / raters.sum(dim=1, keepdim=True)


# -- similarity ------------------------------------------------------------------------------
def mean_over_heads(keys: torch.Tensor) -> torch.Tensor:
    """Keys ``(batch, heads, n, head_dim)`` -> metric ``(batch, n, head_dim)``, float32.

    The mean is taken in float32 whatever the model computes in: a threshold on cosines is too
    sharp for half precision.
    """
    return keys.float().mean(dim=1)


def unit_rows(metric: torch.Tensor) -> torch.Tensor:
    """Scale the last dimension to unit length, float32; a zero vector stays zero (never NaN)."""
    return torch.nn.functional.normalize(metric.float(), dim=-1)


def redundancy(metric: torch.Tensor, alive: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of each token's cosines with all tokens (itself included), ``(batch, n)`` float32.

    Cosines of unit vectors are linear, so the sum is one product with the sum of all of them:
    linear in ``n``, and no ``n x n`` graph in memory.

    Args:
        metric: ``(batch, n, d)``.
        alive: ``(batch, n)`` bool, the tokens that count in the sums; ``None`` is all.
    """
    unit = unit_rows(metric)
    return sum_of_cosines(unit, alive)


def sum_of_cosines(unit: torch.Tensor, alive: torch.Tensor | None) -> torch.Tensor:
    """As :func:`redundancy`, of rows that have unit length already."""
    counted = unit if alive is None else unit * alive.unsqueeze(-1)
    # Not a matrix product: each row is reduced alike, so equal keys get equal scores to the bit.
    return (unit * counted.sum(dim=1, keepdim=True)).sum(dim=-1)


# -- merging ----------------------------------------------------------------------------------
class Merged(NamedTuple):
    """What merging answers; rows with fewer centres than others are filled up.

    Attributes:
        centres: int64 ``(images, most)``, patches in the order of their tokens, -1 in the filling.
        counts: centres of each image, int64 ``(images,)``.
        tokens: ``(images, most + 1, C)``; token ``counts[i]`` of image i is the extra one, what
            follows it is filling.
    """

    centres: torch.Tensor
    counts: torch.Tensor
    tokens: torch.Tensor


def single_head_attention(
    keys: torch.Tensor, queries: torch.Tensor, cls: bool = True
) -> torch.Tensor:
    """Attention to the patches with all heads taken as one, ``(images, N)`` float32.

    Softmax over all rows of ``keys . query * C^-0.5``, mean over the query rows; the entry of CLS
    is left out afterwards, without renormalising. This map exists nowhere in the tower's own pass.

    Args:
        keys: ``(images, rows, C)``, row 0 is CLS if ``cls``; queries: ``(images, q, C)``.
        cls: whether row 0 is CLS.
    """
    scale = keys.shape[-1] ** -0.5
    logits = queries.float() @ keys.float().transpose(1, 2) * scale
    return logits.softmax(dim=-1).mean(dim=1)[:, int(cls) :]


def outlier_counts(attention: torch.Tensor) -> torch.Tensor:
    """Patches above Q3 + 1.5 (Q3 - Q1) of each image, int64 ``(images,)``, at least 1.

    Args:
        attention: ``(images, N)``. Quartiles are interpolated linearly.
    """
    low, high = (attention.float().quantile(q, dim=1, keepdim=True) for q in (0.25, 0.75))
    return (attention > high + 1.5 * (high - low)).sum(dim=1).clamp(min=1)


def per_image(
    attention: torch.Tensor, ratio: float | None, number: Callable[[float], int]
) -> torch.Tensor:
    """A number that follows from each image's ratio, int64 ``(images,)``.

    Args:
        attention: ``(images, N)``.
        ratio: the same for all; ``None``: each image's share of outliers.
        number: ratio -> number, in Python's own floating point, as published.
    """
    images, n = attention.shape
    if ratio is not None:
        return torch.full((images,), number(ratio), device=attention.device)
    table = [number(max(1, outliers) / n) for outliers in range(n + 1)]
    return torch.tensor(table, device=attention.device)[outlier_counts(attention)]


def centre_counts(attention: torch.Tensor, ratio: float | None) -> torch.Tensor:
    """How many patches become centres, ``int(N * ratio)`` and at least 1, int64 ``(images,)``.

    The product is a float: with 49 patches some numbers of outliers lose one to rounding.
    """
    n = attention.shape[1]
    return per_image(attention, ratio, lambda share: max(1, int(n * share)))


def first_of_each(order: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The first ``counts`` of each row, -1 behind them. The one transfer: the largest count."""
    most = int(counts.max())
    column = torch.arange(most, device=order.device)
    return order[:, :most].masked_fill(column >= counts[:, None], -1)


def merge_around(
    features: torch.Tensor,
    keys: torch.Tensor,
    attention: torch.Tensor,
    centres: torch.Tensor,
    counts: torch.Tensor,
    neighbours: int,
) -> torch.Tensor:
    """Tokens of the centres, and one more for what is no centre.

    A centre's token is its row plus the attention-weighted sum, **not normalised**, of the
    ``neighbours`` other patches (centres or not) with the largest cosine to its key. The extra
    token is the attention-weighted sum of all patches that are no centres.

    Args:
        features: ``(images, N, C)``; keys: ``(images, N, d)``; attention: ``(images, N)``.
        centres, counts: as in :class:`Merged`.
        neighbours: how many; all others if there are fewer.

    Returns:
        tokens as in :class:`Merged`.
    """
    n, most = attention.shape[1], centres.shape[1]
    places = centres.clamp(min=0)
    unit, rows = unit_rows(keys), features.float()
    cosines = take_rows(unit, places) @ unit.transpose(1, 2)
    cosines = cosines.scatter(2, places[..., None], -torch.inf)  # never its own neighbour
    near = falling(cosines)[..., : min(neighbours, n - 1)]
    weights = torch.zeros_like(cosines).scatter(2, near, 1.0) * attention[:, None]
    tokens = take_rows(rows, places) + weights @ rows
    is_centre = torch.zeros_like(attention).scatter_reduce(
        1, places, (centres >= 0).float(), "amax"
    )
    extra = (attention * (1 - is_centre))[:, None] @ rows
    column = torch.arange(most + 1, device=centres.device)
    last = (column == counts[:, None])[..., None]
    return torch.where(last, extra, torch.nn.functional.pad(tokens, (0, 0, 0, 1))).to(
        features.dtype
    )


# -- draws and grids -------------------------------------------------------------------------
def gumbel_noise(n: int, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """``(n,)`` float32 standard Gumbel noise, the same on every device for a seed."""
    generator = torch.Generator().manual_seed(seed)
    exponential = torch.empty(n, dtype=torch.float64).exponential_(generator=generator)
    return -exponential.log().to(device=device, dtype=torch.float32)


def sample_ascending(
    scores: torch.Tensor, k: int, temperature: float = 1.0, seed: int = 0
) -> torch.Tensor:
    """Draw ``k`` places of each row without replacement.

    Probabilities are softmax(score / temperature), drawn by the Gumbel top-k trick. Every row
    sees the same noise, so a row's draw depends on its own scores, their number and the seed
    alone, wherever in a batch it stands.

    Args:
        scores: ``(batch, n)`` float.
        k: how many, at most ``n``.
        temperature: above 0; high is close to uniform, low is close to top-k.
        seed: of the noise.

    Returns:
        int64 ``(batch, k)`` ascending.
    """
    scores = scores.float()
    # A softmax does not see a common shift; without it a low temperature would overflow.
    logits = (scores - scores.amax(dim=-1, keepdim=True)) / temperature
    return top_k_ascending(logits + gumbel_noise(scores.shape[-1], seed, scores.device), k)


def random_places(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """``k`` of ``n`` places drawn uniformly without replacement: int64 ``(k,)`` ascending, CPU.

    For one seed and ``n`` the draws are nested: a smaller ``k`` gives a subset.
    """
    return top_k_ascending(gumbel_noise(n, seed), k)


@lru_cache(maxsize=128)
def uniform_places(n: int, k: int) -> tuple[int, ...]:
    """``k`` of ``n`` places, evenly spread, ascending.

    Where ``n`` is a square (a grid of patches, row by row) they are spread over both directions:
    about ``sqrt(k)`` rows, each with an even share of the columns. Otherwise along the line.
    """
    side = math.isqrt(n)
    if side * side != n:
        return tuple(_centres(n, k))
    rows = round(math.sqrt(k))
    ends = [index * k // rows for index in range(rows + 1)]
    return tuple(
        side * row + column
        for index, row in enumerate(_centres(side, rows))
        for column in _centres(side, ends[index + 1] - ends[index])
    )


def _centres(n: int, k: int) -> list[int]:
    """Middles of ``k`` equal parts of ``0 ... n-1``."""
    return [(2 * index + 1) * n // (2 * k) for index in range(k)]


# -- grids of features -----------------------------------------------------------------------
def shrink_grid(grid: torch.Tensor, side: int) -> torch.Tensor:
    """Average-pool feature grids ``(images, h, w, hidden)`` to ``(images, side, side, hidden)``.

    Each output cell is the mean of the input cells its area touches (adaptive average pooling),
    computed in float32 and returned in the input's dtype.
    """
    pooled = torch.nn.functional.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2).float(), side)
    return pooled.permute(0, 2, 3, 1).to(grid.dtype)
