"""Which attention kernels may be used while a model is run by this package.

PyTorch may hand scaled-dot-product attention to cuDNN, which plans anew for every new shape. A
growing KV cache has a new shape at every token: 65 to 96 ms each on an H200, where the other
kernels need 21 (LLaVA-1.5-7B, bf16, batch 1). So cuDNN is left out, and let in again afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
