"""Small videos, written by PyAV."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np


def frames(count: int = 24, size: tuple[int, int] = (64, 48), seed: int = 0) -> np.ndarray:
    """A picture that moves to the right, uint8 ``(count, height, width, 3)``."""
    rng = np.random.default_rng(seed)
    still = rng.integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    still = still.repeat(8, axis=0).repeat(8, axis=1)
    return np.stack([np.roll(still, 2 * place, axis=1) for place in range(count)])


def mp4(path: Path, pixels: np.ndarray | None = None, rate: int = 12, seed: int = 0) -> Path:
    """Two seconds as an MP4 file, unless other frames are given."""
    pixels = frames(seed=seed) if pixels is None else pixels
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def sound(path: Path) -> Path:
    """A file that holds no frames: a second of silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        silence = np.zeros((1, 8000), dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
