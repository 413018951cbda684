"""Which kernels may be used while a model is run by this package.

PyTorch may hand scaled-dot-product attention to cuDNN, which plans anew for every new shape. A
growing KV cache has a new shape at every token: 65 to 96 ms each on an H200, where the other
kernels need 21 (LLaVA-1.5-7B, bf16, batch 1). So cuDNN is left out, and let in again afterwards.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch

from vlm_prune_ext.errors import first_line

logger = logging.getLogger("vlm_prune_ext")

_LOCK = threading.Lock()
_holders = 0
_restore = False


def leave_out_cudnn() -> None:
    """Keep cuDNN out of attention until :func:`let_in_cudnn` was called as often as this."""
    global _holders, _restore
    with _LOCK:
        _holders += 1
        if _holders == 1 and torch.backends.cuda.cudnn_sdp_enabled():
            torch.backends.cuda.enable_cudnn_sdp(False)
            _restore = True


def let_in_cudnn() -> None:
    """Undo one :func:`leave_out_cudnn`; the last one puts the setting back as it was."""
    global _holders, _restore
    with _LOCK:
        _holders -= 1
        if _holders == 0 and _restore:
            torch.backends.cuda.enable_cudnn_sdp(True)
            _restore = False


@contextmanager
def steady_attention() -> Iterator[None]:
    """Both of the above around a block."""
    leave_out_cudnn()
    try:
        yield
    finally:
        let_in_cudnn()


@cache
def triton_kernels(device: torch.device) -> ModuleType | None:
    """:mod:`vlm_prune_ext.engine.triton_kernels`; ``None`` off a GPU, and where Triton is missing
    or cannot compile."""
    if device.type != "cuda":
        return None
    try:
        from vlm_prune_ext.engine import triton_kernels

        rows, keys = torch.ones(1, 2, 3, 32, device=device), torch.ones(1, 1, 7, 32, device=device)
        last = torch.full((1, 3), 6, device=device)
        received = triton_kernels.received(rows, keys, last, None, 1.0)
        if not torch.allclose(received, torch.full_like(received, 3 / 7)):
            raise ValueError("a kernel gives wrong numbers")
    except Exception as error:  # Triton's own errors, a missing C compiler, ...
        said = first_line(error)
        logger.warning("No kernel of this package is used: Triton does not work (%s).", said)
        return None
    return triton_kernels
