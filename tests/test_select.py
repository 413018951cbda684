"""Pure selections: exact on cases small enough to work out by hand, and their promises."""

from __future__ import annotations

import math

import pytest
import torch

from vlm_prune_ext import select
from vlm_prune_ext.methods import saint


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- top-k -----------------------------------------------------------------------------------
def test_top_k_is_ascending_and_right() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.8], [4.0, 3.0, 2.0, 1.0]])
    assert select.top_k_ascending(scores, 2).tolist() == [[1, 3], [0, 1]]
    assert select.top_k_ascending(scores, 4).tolist() == [[0, 1, 2, 3]] * 2


def test_top_k_ties_go_to_the_lower_place() -> None:
    scores = torch.zeros(3, 2000)
    assert select.top_k_ascending(scores, 700).tolist() == [list(range(700))] * 3
    scores[:, 5::7] = 1.0
    want = sorted([*range(5, 2000, 7), *[i for i in range(2000) if i % 7 != 5][:10]])
    k = len(range(5, 2000, 7)) + 10
    assert select.top_k_ascending(scores, k)[1].tolist() == want


# -- similarity ------------------------------------------------------------------------------
def test_redundancy_is_the_sum_of_a_full_cosine_graph() -> None:
    metric, alive = noise(2, 30, 8), noise(2, 30, seed=1) > 0
    unit = metric / metric.norm(dim=-1, keepdim=True)
    graph = unit @ unit.transpose(1, 2)
    torch.testing.assert_close(select.redundancy(metric), graph.sum(-1))
    got = select.redundancy(metric, alive)
    torch.testing.assert_close(got, (graph * alive[:, None]).sum(-1))


def test_unit_rows_of_zero_is_zero() -> None:
    rows = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]])
    torch.testing.assert_close(
        select.unit_rows(rows), torch.tensor([[[0.0, 0.0], [0.6, 0.8]]]), rtol=0, atol=1e-7
    )


def drop_by_loops(metric: torch.Tensor, threshold: float, k: int, gamma: float) -> list[int]:
    """SAINT's selection for one sample as the golden README words it, pair by pair."""
    n = len(metric)
    unit = [[x / max(math.hypot(*row), 1e-12) for x in row] for row in metric.tolist()]
    odd, score, count = range(1, n, 2), {}, 0
    for i in range(0, n, 2):
        cosines = [sum(a * b for a, b in zip(unit[i], unit[j], strict=True)) for j in odd]
        near = [c for c in cosines if c >= threshold]
        count += len(near) >= k
        mean = sum(cosines) / max(len(cosines), 1)
        if near:
            mean = len(near) * math.exp(gamma * (sum(near) / len(near) - threshold))
        score[i] = mean
    order = sorted(score, key=lambda i: (-score[i], i))
    return sorted(set(range(n)) - set(order[:count]))


@pytest.mark.parametrize("n", [2, 3, 9, 40])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.3, 0.9])
def test_saint_drop_equals_loops(n: int, threshold: float) -> None:
    metric = noise(3, n, 4, seed=n)
    mask = saint.saint_drop(metric, threshold, 2, 5.0)
    for row in range(3):
        want = drop_by_loops(metric[row].double(), threshold, 2, 5.0)
        assert mask[row].nonzero()[:, 0].tolist() == want


def test_saint_drop_counts_each_row_by_itself() -> None:
    """Alike and unlike keys in one batch: the published code would average their counts."""
    alike = torch.ones(12, 6) + 0.01 * noise(12, 6)
    unlike = torch.eye(12)[:, :6] + torch.eye(12).roll(6, 1)[:, :6] * -1
    metric = torch.stack([alike, unlike])
    mask = saint.saint_drop(metric, 0.8, 3, 10.0)
    assert mask[0].tolist() == [False, True] * 6
    assert mask[1].all()
    for row in range(2):
        alone = saint.saint_drop(metric[row : row + 1], 0.8, 3, 10.0)
        assert torch.equal(mask[row], alone[0])


def test_saint_drop_never_drops_odd_places() -> None:
    mask = saint.saint_drop(noise(4, 31, 3), -1.0, 1, 10.0)
    assert mask[:, 1::2].all()
    assert not mask[:, 0::2].any()


@pytest.mark.parametrize("n", [0, 1])
def test_saint_drop_without_an_odd_token(n: int) -> None:
    assert saint.saint_drop(noise(2, n, 4), -1.0, 1, 10.0).tolist() == [[True] * n] * 2


def test_saint_drop_ties_go_to_the_lower_place() -> None:
    metric = torch.ones(1, 8, 4)
    metric[0, 4:, 0] = -1.0  # places 4 and 6: fewer neighbours at 0.9, but as many as min_neighbors
    mask = saint.saint_drop(metric, 0.9, 2, 10.0)
    assert mask[0].tolist() == [False, True] * 4
    order = saint.saint_ranking(metric, 0.9, 2, 10.0).order
    assert order.tolist() == [[0, 2, 4, 6]]


def test_zero_keys_give_no_nan() -> None:
    metric = torch.zeros(1, 10, 4)
    assert saint.saint_drop(metric, 0.5, 1, 10.0).all()
    metric[0, :5] = noise(5, 4)
    ranking = saint.saint_ranking(metric, 0.1, 1, 10.0)
    assert sorted(ranking.order[0].tolist()) == [0, 2, 4, 6, 8]
    kept, _ = saint.iterative_keep(torch.zeros(2, 9, 4), 5, 2)
    assert kept.tolist() == [[5, 6, 7, 8]] * 2  # all alike: the lowest go first
    assert torch.isfinite(select.redundancy(torch.zeros(1, 3, 4))).all()


def test_metric_is_float32_for_half_keys() -> None:
    keys = noise(1, 2, 6, 4).bfloat16()
    metric = select.mean_over_heads(keys)
    assert metric.dtype == torch.float32
    torch.testing.assert_close(metric, keys.float().mean(1))


# -- the iterative drop ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("patches", "keep", "r", "rounds"),
    [
        (576, 375, 16, [36, 15, 35, 14, 34, 13, 33, 12, 9]),
        (16, 8, 4, [4, 3, 1]),
        (10, 10, 3, []),
        (5, 2, 16, [1, 2]),  # 5 // 16 is 0: the published code divides by zero next
        (7, 3, 1, [4]),
    ],
)
def test_drop_schedule(patches: int, keep: int, r: int, rounds: list[int]) -> None:
    assert saint.drop_schedule(patches, keep, r) == rounds


def test_drop_schedule_always_ends() -> None:
    for patches in range(1, 40):
        for keep in range(1, patches + 1):
            for r in (1, 2, 3, 7, 50):
                rounds = saint.drop_schedule(patches, keep, r)
                assert all(drop > 0 for drop in rounds)
                assert patches - sum(rounds) == keep


def keep_by_loops(metric: torch.Tensor, keep: int, r: int) -> list[int]:
    unit = metric.double() / metric.double().norm(dim=-1, keepdim=True)
    graph, left = unit @ unit.T, list(range(len(metric)))
    while len(left) > keep:
        r = min(len(left) - keep, max(len(left) // r, 1))
        score = {i: float(graph[i, left].sum()) for i in left}
        worst = sorted(left, key=lambda i: (-score[i], i))[:r]
        left = [i for i in left if i not in worst]
    return left


@pytest.mark.parametrize(("keep_num", "r"), [(20, 16), (2, 3), (31, 4), (41, 2)])
def test_iterative_keep_equals_loops_row_by_row(keep_num: int, r: int) -> None:
    metric = noise(3, 40, 6, seed=7)
    kept, _ = saint.iterative_keep(metric, keep_num, r)
    assert kept.shape == (3, keep_num - 1)
    for row in range(3):
        assert kept[row].tolist() == keep_by_loops(metric[row], keep_num - 1, r)


# -- draws and grids -------------------------------------------------------------------------
def test_sampling_repeats_and_does_not_depend_on_the_batch() -> None:
    scores = noise(5, 60).softmax(-1)
    drawn = select.sample_ascending(scores, 20, 0.01, seed=4)
    assert torch.equal(drawn, select.sample_ascending(scores, 20, 0.01, seed=4))
    assert not torch.equal(drawn, select.sample_ascending(scores, 20, 0.01, seed=5))
    for row in range(5):
        alone = select.sample_ascending(scores[row : row + 1], 20, 0.01, seed=4)
        assert torch.equal(alone[0], drawn[row])
        assert drawn[row].tolist() == sorted(set(drawn[row].tolist()))


def test_sampling_follows_softmax_of_score_over_temperature() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0]])
    for temperature in (0.5, 1.0, 4.0):
        drawn = [int(select.sample_ascending(scores, 1, temperature, seed)) for seed in range(3000)]
        want = (scores[0] / temperature).softmax(-1)
        got = torch.bincount(torch.tensor(drawn), minlength=3) / len(drawn)
        torch.testing.assert_close(got, want, atol=0.04, rtol=0)  # over 4 standard errors


def test_sampling_at_low_temperature_is_top_k() -> None:
    scores = noise(4, 50).softmax(-1)
    drawn = select.sample_ascending(scores, 9, 1e-6, seed=1)
    assert torch.equal(drawn, select.top_k_ascending(scores, 9))


def test_random_places_are_fair_nested_and_seeded() -> None:
    assert torch.equal(select.random_places(64, 16, 3), select.random_places(64, 16, 3))
    assert not torch.equal(select.random_places(64, 16, 3), select.random_places(64, 16, 4))
    small, large = select.random_places(64, 5, 3), select.random_places(64, 16, 3)
    assert set(small.tolist()) < set(large.tolist())
    hits = torch.stack(
        [torch.bincount(select.random_places(8, 2, s), minlength=8) for s in range(2000)]
    )
    torch.testing.assert_close(hits.float().mean(0), torch.full((8,), 0.25), atol=0.04, rtol=0)


def test_uniform_places_of_a_square_are_a_lattice() -> None:
    assert select.uniform_places(16, 4) == (5, 7, 13, 15)
    places = torch.tensor(select.uniform_places(576, 64))
    rows, columns = places // 24, places % 24
    assert rows.unique().tolist() == columns.unique().tolist() == [1, 4, 7, 10, 13, 16, 19, 22]


@pytest.mark.parametrize("n", [1, 2, 7, 9, 30, 36, 576, 2144])
def test_uniform_places_are_as_many_as_asked(n: int) -> None:
    for keep in range(1, n + 1) if n < 600 else (1, 100, 1000, n):
        places = select.uniform_places(n, keep)
        assert len(places) == keep
        assert list(places) == sorted(set(places))
        assert places[0] >= 0 and places[-1] < n


def test_uniform_places_of_a_line_are_even() -> None:
    gaps = torch.tensor(select.uniform_places(2144, 100)).diff()
    assert gaps.min() >= 21 and gaps.max() <= 22


def test_shrink_grid_averages_areas() -> None:
    grid = torch.arange(16.0).view(1, 4, 4, 1).expand(2, 4, 4, 3)
    small = select.shrink_grid(grid, 2)
    assert small.shape == (2, 2, 2, 3)
    assert small[0, :, :, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert select.shrink_grid(grid.bfloat16(), 3).dtype == torch.bfloat16
