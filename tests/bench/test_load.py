"""The load test's arithmetic; its server is tried where vLLM is."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_prune_ext import cli
from vlm_prune_ext.bench.load import Request, arrivals, break_even, summary, table


def test_arrivals_are_a_poisson_process() -> None:
    times = arrivals(5.0, 4000, seed=3)
    gaps = np.diff(times)
    assert times[0] == 0.0 and (gaps > 0).all()
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # as of an exponential
    assert times == arrivals(5.0, 4000, seed=3)
    assert np.allclose(np.array(times) / 2, arrivals(10.0, 4000, seed=3))


def test_a_summary_counts_from_arrivals() -> None:
    done = [Request(float(i), 0.1 * (i + 1), 0.5 + 0.1 * i, 10, 100) for i in range(4)]
    made = summary("divprune:64", 1.0, [*done, Request(4.0, None, None, 0, 0)])
    assert made["requests"] == 5 and made["failed"] == 1
    assert made["ttft_p50"] == pytest.approx(0.25)
    assert made["ttft_p95"] == pytest.approx(0.385)
    assert made["tokens_per_second"] == pytest.approx(40 / 3.8)
    assert "64" in table([made], "t").markdown()


def test_the_break_even_is_said() -> None:
    def at(method: str, rate: float, ttft: float) -> dict[str, object]:
        return {"method": method, "rate": rate, "ttft_p50": ttft, "failed": 0}

    before = [at("none", 1.0, 0.1), at("none", 4.0, 2.0)]
    some = [at("scope:64", 1.0, 0.2), at("scope:64", 4.0, 0.5)]
    assert break_even([*before, *some]) == "scope:64 has the lower TTFT p50 at 4.0 a second."
    slow = [at("scope:64", 1.0, 0.2), at("scope:64", 4.0, 2.5)]
    assert "higher TTFT p50 at every rate" in break_even([*before, *slow])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rate", "-1"], "--rate -1 is not valid"),
        ([], "--serve needs"),
    ],
)
def test_wrong_input(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", "folder"] if words else []
    assert cli.main(["bench", "--serve", *model, *words]) == 2
    assert said in capsys.readouterr().err
