"""A load test of a server: questions arrive when they arrive, whether earlier ones are done or not.

Arrivals are a Poisson process of a fixed seed, so every method meets the same ones. A server that
is slower than its arrivals has a queue that grows, which shows in the time to first token; asking
the next question only after an answer would hide it.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm_prune_ext.demo.drawing import make_scene, render
from vlm_prune_ext.errors import InputError, make_folder
from vlm_prune_ext.experiment import host
from vlm_prune_ext.experiment.log import write_json
from vlm_prune_ext.experiment.report import Figure, Table, write_table

KEY = "vlm_prune"
START = 900.0  # seconds that a server may take until it answers


@dataclass(frozen=True)
class Request:
    """One question's times, in seconds.

    Attributes:
        planned: arrival, from the start of the test.
        first: from arrival to the first token; ``None``: it failed.
        last: from arrival to the end of the answer; ``None`` likewise.
        tokens: of the answer.
        prompt: tokens of the prompt.
    """

    planned: float
    first: float | None
    last: float | None
    tokens: int
    prompt: int


def arrivals(rate: float, count: int, seed: int = 0) -> list[float]:
    """Times of a Poisson process.

    Args:
        rate: arrivals per second, on average.
        count: how many.
        seed: of the draw; another rate stretches the same one.
    """
    gaps = np.random.default_rng(seed).exponential(1.0, count)
    return [float(time) for time in (np.cumsum(gaps) - gaps[0]) / rate]


def summary(method: str, rate: float, requests: Sequence[Request]) -> dict[str, Any]:
    """Figures of one server at one rate."""
    done = [one for one in requests if one.last is not None]
    result: dict[str, Any] = {"method": method, "rate": rate, "requests": len(requests)}
    result["failed"] = len(requests) - len(done)
    if not done:
        return result
    firsts = [one.first for one in done if one.first is not None]
    lasts = [one.last for one in done if one.last is not None]
    end = max(one.planned + last for one, last in zip(done, lasts, strict=True))
    seconds = max(end - done[0].planned, 1e-9)
    result |= {
        "prompt_tokens": float(np.mean([one.prompt for one in done])),
        "ttft_p50": float(np.percentile(firsts, 50)),
        "ttft_p95": float(np.percentile(firsts, 95)),
        "answer_p50": float(np.percentile(lasts, 50)),
        "tokens_per_second": sum(one.tokens for one in done) / seconds,
        "answers_per_second": len(done) / seconds,
    }
    return result


COLUMNS = (
    Figure("method", left=True, path="method"),
    Figure("arrivals/s", 2, path="rate", key="rate"),
    Figure("requests", 0, path="requests"),
    Figure("failed", 0, path="failed"),
    Figure("prompt tokens", 0, path="prompt_tokens"),
    Figure("TTFT p50 ms", 0, path="ttft_p50", scale=1000),
    Figure("TTFT p95 ms", 0, path="ttft_p95", scale=1000),
    Figure("answer p50 ms", 0, path="answer_p50", scale=1000),
    Figure("tokens/s", 1, path="tokens_per_second"),
    Figure("answers/s", 2, path="answers_per_second"),
)


def table(results: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The results as people read them."""
    notes = [
        "TTFT: time to first token, from the planned arrival; tokens/s: of answers. Below what a "
        "server can take, tokens/s follow from the arrivals; above it, TTFT grows with the test.",
        break_even(results),
    ]
    return Table.of(COLUMNS, results, title=title, notes=notes)


def break_even(results: Sequence[Mapping[str, Any]]) -> str:
    """From which rate on each method answers sooner than the unpruned server, in a sentence."""
    before = {one["rate"]: one for one in results if one["method"] == "none"}
    said = []
    for method in dict.fromkeys(str(one["method"]) for one in results):
        rates = [one for one in results if one["method"] == method and one["rate"] in before]
        pairs = [(one, before[one["rate"]]) for one in rates if "ttft_p50" in one]
        better = [
            one["rate"] for one, other in pairs if one["ttft_p50"] < other.get("ttft_p50", 1e9)
        ]
        if method == "none" or not pairs:
            continue
        where = "every rate measured"
        if better and len(better) < len(pairs):
            where = f"{', '.join(map(str, better))} a second"
        than = "lower" if better else "higher"
        said.append(f"{method} has the {than} TTFT p50 at {where}")
    return "; ".join(said) + "." if said else ""


# -- the server ----------------------------------------------------------------------------------
@contextmanager
def server(model: str, method: str, log: Path, options: Sequence[str] = ()) -> Iterator[str]:
    """vLLM's server on loopback, until the block is left.

    Args:
        model: folder or hub name.
        method: short form; ``"none"``: unpruned.
        log: what it says.
        options: further words of its command line.

    Yields:
        its address.

    Raises:
        InputError: it did not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` does; builds of vLLM under another name have no working `vllm`.
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    if method != "none":
        words += ["--hf-overrides", json.dumps({KEY: method})]
    with log.open("w") as said:
        process = subprocess.Popen([*words, *options], stdout=said, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(process, address, log, method)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], address: str, log: Path, method: str) -> None:
    from urllib.error import URLError
    from urllib.request import urlopen

    end = time.monotonic() + START
    while time.monotonic() < end and process.poll() is None:
        try:
            with urlopen(f"{address}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    raise InputError(f"The server of {method} did not start: see {log}.")


# -- the questions -------------------------------------------------------------------------------
def measure(
    address: str, model: str, rate: float, count: int, new_tokens: int, seed: int
) -> list[Request]:
    """Ask a server ``count`` questions about as many pictures, at their times."""
    return asyncio.run(_ask_all(address, model, arrivals(rate, count, seed), new_tokens, seed))


async def _ask_all(
    address: str, model: str, times: Sequence[float], new_tokens: int, seed: int
) -> list[Request]:
    import aiohttp

    # Pictures of another seed for each rate: none is in a cache.
    bodies = [_body(model, seed + index, new_tokens) for index in range(len(times))]
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        start = time.perf_counter()

        async def ask(planned: float, body: dict[str, Any]) -> Request:
            await asyncio.sleep(max(0.0, start + planned - time.perf_counter()))
            return await _ask(session, address, body, start + planned, planned)

        pairs = zip(times, bodies, strict=True)
        return list(await asyncio.gather(*(ask(*pair) for pair in pairs)))


def _body(model: str, seed: int, new_tokens: int) -> dict[str, Any]:
    made = io.BytesIO()
    render(make_scene(seed)).save(made, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(made.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "Describe this picture."},
    ]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": new_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _ask(
    session: Any, address: str, body: dict[str, Any], due: float, planned: float
) -> Request:
    first, usage = None, {"completion_tokens": 0, "prompt_tokens": 0}
    async with session.post(f"{address}/v1/chat/completions", json=body) as reply:
        if reply.status != 200:
            return Request(planned, None, None, 0, 0)
        async for line in reply.content:
            text = line.decode().strip().removeprefix("data:").strip()
            if not text or text == "[DONE]":
                continue
            part = json.loads(text)
            usage = part.get("usage") or usage
            delta = part["choices"][0].get("delta", {}) if part.get("choices") else {}
            if first is None and delta.get("content"):
                first = time.perf_counter() - due
    last = time.perf_counter() - due
    counts = usage["completion_tokens"], usage["prompt_tokens"]
    return Request(planned, last if first is None else first, last, *counts)


# -- the test ------------------------------------------------------------------------------------
def run(
    model: str,
    methods: Sequence[str],
    rates: Sequence[float],
    *,
    device: torch.device,
    dtype: str | None,
    requests: int,
    new_tokens: int,
    folder: Path,
) -> int:
    """Servers one after the other, each at all rates; everything is written after each.

    Args:
        model: folder or hub name.
        methods: short forms.
        rates: arrivals per second.
        device, dtype: of the server.
        requests: questions at each rate.
        new_tokens: of each answer.
        folder: for ``serve.json``, ``serve.md``, ``serve.csv`` and what servers say.

    Returns:
        1 where a question was not answered, else 0.
    """
    make_folder(folder, "--out ")
    options = ["--dtype", dtype or "auto", "--max-model-len", "1024"]
    if device.type == "cpu":
        options.append("--enforce-eager")  # compiling takes minutes there
    origin, title = host.origin(device), host.title(f"{model}, vLLM", device)
    engine = {name: version(name) for name in packages_distributions().get("vllm", [])}
    origin["versions"] |= engine
    # What decides how fast a server is, beside its command line.
    names = ("OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    results: list[dict[str, Any]] = []
    times: list[list[dict[str, Any]]] = []
    for method in methods:
        log = folder / f"server_{len(times)}.log"
        with server(model, method, log, options) as address:
            measure(address, model, 2.0, 3, new_tokens, 900)  # warms up
            for place, rate in enumerate(rates):
                print(f"{method}, {rate:g} arrivals a second", file=sys.stderr, flush=True)
                found = measure(address, model, rate, requests, new_tokens, 1000 * (place + 1))
                times.append([asdict(one) for one in found])
                results.append(summary(method, rate, found))
                made = table(results, title)
                write_table(folder, "serve", made, ("md", "csv"))
                each = [{**one, "times": own} for one, own in zip(results, times, strict=True)]
                record = {"title": title, **origin, "environment": environment, "results": each}
                write_json(folder / "serve.json", record)
    made.show()
    print(f"Written to {folder}: serve.json, serve.md, serve.csv")
    return 1 if any(one["failed"] for one in results) else 0
