"""Videos: a file or a list of frames, and the frames of it that a model is shown.

Files are decoded by PyAV, frame by frame, and only what was chosen is kept. Which frames are chosen
is the business of the checkpoint's own video processor (``sample_frames``), so that a model gets
what ``AutoProcessor(videos=...)`` would give it.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from vlm_prune_ext.errors import InputError, first_line
from vlm_prune_ext.models.images import MAX_PIXELS, ImageLike, Video, digest_of, open_image

MOST_BYTES = 4 << 30
"""Bytes of the chosen frames of one video at most, as they are decoded."""

Choose = Callable[[int, "float | None"], Sequence[int]]
"""``choose(count, rate)``: indices of the frames to show, ascending, of ``count`` frames with
``rate`` a second (``None``: not known)."""


@dataclass(frozen=True, eq=False)
class Clip(Video):
    """A video.

    Args:
        source: path or bytes of a file, or frames in order: PIL images, paths or bytes of pictures,
            one uint8 array or tensor ``(frames, height, width, 3)`` (or channels first), or an
            open ``decord.VideoReader``.
        frames: how many to show, spread evenly; a shorter video shows all it has.
        fps: how many to show of each second. Neither: as the checkpoint's own processor does where
            it chooses by itself, else :data:`DEFAULT_FRAMES`; of frames that were given, all.
        start, end: seconds of the file to show; ``None``: from its beginning, to its end.
        rate: frames a second of a ``source`` that is no file; ``None``: not known.

    Raises:
        InputError: a number that is not accepted, or both ``frames`` and ``fps``.
    """

    source: str | os.PathLike[str] | bytes | Sequence[ImageLike] | np.ndarray | Any
    frames: int | None = None
    fps: float | None = None
    start: float | None = None
    end: float | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        check_sampling(self.frames, self.fps)
        start, end = self.start or 0.0, math.inf if self.end is None else self.end
        if not 0 <= start < end:
            raise InputError(
                f"start={self.start!r}, end={self.end!r} is not valid: seconds, 0 <= start < end."
            )

    @property
    def is_file(self) -> bool:
        """Whether it is to be decoded."""
        return isinstance(self.source, str | os.PathLike | bytes)

    def digest(self) -> str:
        """It by content, and by what is to be shown of it; see :func:`digest_of`.

        Raises:
            InputError: no such file, or frames that are no pictures.
        """
        found = hashlib.blake2b(digest_size=16)
        found.update(repr((self.frames, self.fps, self.start, self.end, self.rate)).encode())
        if isinstance(self.source, bytes):
            found.update(self.source)
        elif self.is_file:
            with _existing(self.source).open("rb") as file:
                while block := file.read(1 << 20):
                    found.update(block)
        else:
            for frame in _frames(self.source)[0]:
                content = frame.tobytes() if isinstance(frame, np.ndarray) else digest_of(frame)
                found.update(content if isinstance(content, bytes) else content.encode())
        return found.hexdigest()


DEFAULT_FRAMES = 32
"""Shown of a video where neither anybody nor the checkpoint says how many, as lmms-eval's models
have it."""


@dataclass(frozen=True, eq=False)
class ReadyClip(Video):
    """The frames of a video that a model is shown.

    Attributes:
        pixels: uint8 ``(frames, height, width, 3)``, RGB.
        indices: of each in its video.
        total: frames of the video, or of the part of it that was asked for.
        rate: frames a second of the video; ``None``: not known.
        name: of the file, for messages.
    """

    pixels: np.ndarray
    indices: list[int]
    total: int
    rate: float | None = None
    name: str = field(default="video")

    @property
    def width(self) -> int:
        """Of a frame."""
        return int(self.pixels.shape[2])

    @property
    def height(self) -> int:
        """Of a frame."""
        return int(self.pixels.shape[1])

    def metadata(self) -> dict[str, Any]:
        """As transformers' ``VideoMetadata`` wants it."""
        return {
            "total_num_frames": self.total,
            "fps": self.rate,
            "duration": self.total / self.rate if self.rate else None,
            "frames_indices": list(self.indices),
            "height": self.height,
            "width": self.width,
        }

    def digest(self) -> str:
        """See :func:`digest_of`."""
        found = hashlib.blake2b(digest_size=16)
        found.update(repr((self.pixels.shape, self.indices, self.total, self.rate)).encode())
        found.update(self.pixels.tobytes())
        return found.hexdigest()


def check_sampling(frames: Any, fps: Any) -> None:
    """Raise InputError where frames of a video cannot be chosen so."""
    whole = isinstance(frames, int) and not isinstance(frames, bool) and frames >= 1
    if frames is not None and not whole:
        raise InputError(f"frames={frames!r} is not valid: frames of a video, 1 or more.")
    if fps is not None and not (_is_number(fps) and 0 < fps < math.inf):
        raise InputError(f"fps={fps!r} is not valid: frames of each second, above 0.")
    if frames is not None and fps is not None:
        raise InputError(f"frames={frames} and fps={fps} are given: one of them may be.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_video(image: object) -> bool:
    """Whether it is a video, opened or not."""
    return isinstance(image, Video)


def read_clip(clip: Clip | ReadyClip, choose: Choose) -> ReadyClip:
    """The frames of a video that are to be shown.

    Args:
        clip: it; one that is ready stays as it is.
        choose: which of its frames.

    Raises:
        InputError: one sentence about a file that is missing or does not decode, a video without
            frames, frames that are no pictures or differ in size, or more than
            :data:`MOST_BYTES` of them.
    """
    if isinstance(clip, ReadyClip):
        return clip
    return _of_file(clip, choose) if clip.is_file else _of_frames(clip, choose)


# -- files -------------------------------------------------------------------------------------
def _existing(source: Any) -> Path:
    path = Path(source)
    try:
        there = path.is_file()
    except (OSError, ValueError):  # a name that no file system takes
        there = False
    if not there:
        raise InputError(f"video {str(source)[:200]!r} does not exist: give the path of a file.")
    return path


def _of_file(clip: Clip, choose: Choose) -> ReadyClip:
    source: Any = io.BytesIO(clip.source) if isinstance(clip.source, bytes) else None
    name = "video"
    if source is None:
        source = str(_existing(clip.source))
        name = f"video {source!r}"
    try:
        import av
    except ImportError as error:
        raise InputError(f"{name} needs PyAV to be read: pip install av brings it.") from error
    try:
        with av.open(source) as container:
            if not container.streams.video:
                raise InputError(f"{name} has no frames: it holds no video stream.")
            return _of_container(clip, container, choose, name)
    except InputError:
        raise
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise InputError(
            f"{name} does not decode ({type(error).__name__}): a complete file that PyAV reads is "
            "needed."
        ) from error


def _of_container(clip: Clip, container: Any, choose: Choose, name: str) -> ReadyClip:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    rate = float(stream.average_rate) if stream.average_rate else None
    total = stream.frames or _counted(container)
    first, count = _part(clip, total, rate, name)
    indices = [first + index for index in choose(count, rate)]
    _check_size(len(indices), stream.height, stream.width, name)
    wanted, found = set(indices), dict[int, np.ndarray]()
    for index, frame in enumerate(container.decode(video=0)):
        if index in wanted:
            found[index] = frame.to_ndarray(format="rgb24")
        if len(found) == len(wanted):
            break
    if missing := wanted - found.keys():
        raise InputError(
            f"{name} does not decode to its end: frame {min(missing)} of {total} is missing."
        )
    pixels = _stacked([found[index] for index in indices], name)
    return ReadyClip(pixels, indices, count, rate, name)


def _counted(container: Any) -> int:
    """Frames of a file whose header does not say."""
    count = sum(1 for _ in container.decode(video=0))
    container.seek(0)
    return count


def _part(clip: Clip, total: int, rate: float | None, name: str) -> tuple[int, int]:
    """First frame and number of frames of what is to be shown of a file."""
    first, behind = 0, total
    if clip.start is not None or clip.end is not None:
        if rate is None:
            raise InputError(f"{name} does not say how many frames a second has: start and end.")
        exact = Fraction(rate)
        first = math.ceil(Fraction(clip.start or 0) * exact)
        if clip.end is not None:
            behind = min(total, math.floor(Fraction(clip.end) * exact) + 1)
    if behind - first < 1:
        shown = f" between start={clip.start} and end={clip.end}" if total else ""
        raise InputError(f"{name} has no frames{shown}.")
    return first, behind - first


# -- frames that were given ------------------------------------------------------------------------
def _of_frames(clip: Clip, choose: Choose) -> ReadyClip:
    source, rate = _frames(clip.source)
    rate = rate or clip.rate
    total = len(source)
    if not total:
        raise InputError("video has no frames: one at least is needed.")
    stated = clip.frames is not None or clip.fps is not None
    indices = list(choose(total, rate)) if stated else list(range(total))
    shown = [_pixels(source[index]) for index in indices]
    height, width = shown[0].shape[:2]
    _check_size(len(shown), height, width, "video")
    return ReadyClip(_stacked(shown, "video"), indices, total, rate)


def _frames(source: Any) -> tuple[Sequence[Any], float | None]:
    """Frames as something that can be indexed, and how many a second has, where it is said."""
    if hasattr(source, "get_avg_fps"):  # decord's reader, which decodes a frame when it is asked
        return source, float(source.get_avg_fps())
    if hasattr(source, "detach"):  # a tensor
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        if source.ndim == 4 and source.shape[-1] != 3 and source.shape[1] == 3:
            source = source.transpose(0, 2, 3, 1)
        if source.ndim != 4 or source.shape[-1] != 3 or source.dtype != np.uint8:
            raise InputError(
                f"video of shape {source.shape}, {source.dtype}, is not valid: an array of frames "
                "is uint8 (frames, height, width, 3)."
            )
        return source, None
    if not isinstance(source, Sequence):
        raise InputError(
            f"video of type {type(source).__name__} is not valid: give a path, a list of pictures, "
            "or an array (frames, height, width, 3)."
        )
    return source, None


def _pixels(frame: Any) -> np.ndarray:
    if hasattr(frame, "asnumpy"):
        return frame.asnumpy()
    return frame if isinstance(frame, np.ndarray) else np.asarray(open_image(frame))


def _check_size(count: int, height: int, width: int, name: str) -> None:
    if not height * width:
        raise InputError(f"{name} has no pixels: its frames are {width} x {height}.")
    if height * width > MAX_PIXELS or count * height * width * 3 > MOST_BYTES:
        raise InputError(
            f"{name} is too large ({count} frames of {width} x {height}): {MOST_BYTES >> 30} GiB "
            "of frames are accepted at most; a smaller frames or fps takes fewer."
        )


def _stacked(frames: Sequence[np.ndarray], name: str) -> np.ndarray:
    sizes = {frame.shape for frame in frames}
    if len(sizes) > 1:
        said = ", ".join(sorted(f"{shape[1]} x {shape[0]}" for shape in sizes))
        raise InputError(f"{name} has frames of several sizes ({said}): one is accepted.")
    return np.stack(frames)


# -- which frames ----------------------------------------------------------------------------------
def chooser(processor: Any, clip: Clip) -> Choose:
    """How a checkpoint's video processor chooses frames of a video.

    Args:
        processor: transformers' video processor.
        clip: says how many.
    """
    from transformers.video_utils import VideoMetadata

    step = int(getattr(processor, "temporal_patch_size", None) or 1)
    counts = "num_frames" in inspect.signature(processor.sample_frames).parameters

    def choose(count: int, rate: float | None) -> Sequence[int]:
        frames, fps = clip.frames, clip.fps
        if fps is not None and rate is None:
            raise InputError(
                f"fps={fps} is not possible: how many frames a second this video has is not known; "
                "frames says how many to show."
            )
        if fps is not None and rate is not None and int(count / rate * fps) < step:
            frames, fps = step, None  # less than a second of it
        if frames is None and fps is None and not processor.do_sample_frames:
            frames = DEFAULT_FRAMES
        if count <= step or (frames is not None and frames >= count):
            return range(count)
        if frames is not None:  # no more than it has once they are rounded
            frames = min(max(frames, step), count // step * step)
            if not counts:
                return [index * count // frames for index in range(frames)]
        given = {"num_frames": frames} if counts else {}
        known = VideoMetadata(total_num_frames=count, fps=rate, duration=count / (rate or 24))
        try:
            found = processor.sample_frames(metadata=known, fps=fps, **given)
        except (ValueError, ZeroDivisionError) as error:
            raise InputError(
                f"{type(processor).__name__} does not choose frames of a video of {count} with "
                f"frames={clip.frames} and fps={clip.fps}: {first_line(error)}"
            ) from error
        return [min(int(index), count - 1) for index in found]

    return choose
