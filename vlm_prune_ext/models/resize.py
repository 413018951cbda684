"""Pictures resized on any device, to the bit as a CPU does it.

Pillow and torch's kernels for bytes (``aten/src/ATen/native/cpu/UpSampleKernel.cpp``, which
torchvision takes on a CPU) resize in whole numbers: each row and then each column is a weighted sum
of neighbours, weights rounded to a fixed number of binary places, the sum rounded half up and cut
to 0..255. Both passes are matrix products here. Float64 holds every sum exactly, whatever the order
in which a device adds, so the pixels are equal bit for bit; float32 on a GPU, as torchvision has it
there, differs by one in some of them. Nothing here knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate
from torch.overrides import TorchFunctionMode

_AT_ONCE = 1 << 24  # numbers of a pass that are in memory together (128 MiB)
_TABLES = 32  # matrices that are kept, the newest


def _bicubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _bilinear(x: np.ndarray) -> np.ndarray:
    return np.clip(1 - np.abs(x), 0, None)


_FILTERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "bicubic": (_bicubic, 2.0),
    "bilinear": (_bilinear, 1.0),
}


def _places_torch(most: float) -> int:
    """Binary places of torch's weights, which are 16 bits wide: as many as the largest allows."""
    return next((n for n in range(22) if int(0.5 + most * 2 ** (n + 1)) >= 1 << 15), 22)


_PLACES: dict[str, Callable[[float], int]] = {
    "torch": _places_torch,
    "pillow": lambda most: 32 - 8 - 2,
}


def weights(source: int, target: int, mode: str, like: str) -> np.ndarray:
    """What each pixel of a resized row takes of the row's pixels.

    Args:
        source, target: pixels of the row before and after.
        mode: ``bicubic`` or ``bilinear``.
        like: ``torch`` or ``pillow``, which round differently.

    Returns:
        float64 ``(target, source)``, each a whole multiple of one power of two.
    """
    function, reach = _FILTERS[mode]
    scale = source / target
    stretch = max(scale, 1.0)
    support = reach * stretch
    centres = scale * (np.arange(target) + 0.5)
    first = np.maximum((centres - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + support + 0.5).astype(np.int64), source)
    places = first[:, None] + np.arange(math.ceil(support) * 2 + 1)
    found = function((places - centres[:, None] + 0.5) * (1 / stretch))
    found[places >= last[:, None]] = 0.0
    found /= found.sum(axis=1, keepdims=True)
    unit = 2.0 ** _PLACES[like](found.max())
    found = np.trunc(found * unit + np.copysign(0.5, found)) / unit
    table = np.zeros((target, source))
    rows, columns = np.nonzero(found)
    table[rows, places[rows, columns]] = found[rows, columns]
    return table


@lru_cache(_TABLES)
def _table(source: int, target: int, mode: str, like: str, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(weights(source, target, mode, like)).to(device)


def resize(
    pictures: torch.Tensor, size: tuple[int, int], mode: str = "bicubic", like: str = "torch"
) -> torch.Tensor:
    """Pictures of one size in another, rows first, as both libraries do it.

    Args:
        pictures: ``(..., height, width)``, whole numbers from 0 to 255 of any dtype.
        size: (height, width).
        mode, like: as of :func:`weights`.

    Returns:
        ``(..., *size)``, of the same dtype.
    """
    *outer, height, width = pictures.shape
    flat = pictures.reshape(-1, height, width)
    at_once = max(1, _AT_ONCE // (height * max(width, size[1])))
    parts = [_both(part, size, mode, like) for part in flat.split(at_once)]
    return torch.cat(parts).view(*outer, *size)


def _both(flat: torch.Tensor, size: tuple[int, int], mode: str, like: str) -> torch.Tensor:
    device, (height, width) = flat.device, flat.shape[1:]
    values = flat.double()
    if width != size[1]:
        across = _table(width, size[1], mode, like, device)
        values = _rounded(values @ across.T)
    if height != size[0]:
        down = _table(height, size[0], mode, like, device)
        values = _rounded(down @ values)
    return values.to(flat.dtype)


def _rounded(values: torch.Tensor) -> torch.Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)


def place(picture: torch.Tensor, size: tuple[int, int], color: tuple[int, ...]) -> torch.Tensor:
    """A picture in the middle of a larger area; an odd rest goes right or below.

    Args:
        picture: uint8 ``(3, height, width)``.
        size: (height, width) of the area.
        color: its colour elsewhere.
    """
    height, width = picture.shape[1:]
    if (height, width) == size:
        return picture
    area = _color(color, picture.device).expand(3, *size).contiguous()
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    area[:, top : top + height, left : left + width] = picture
    return area


@lru_cache(_TABLES)
def _color(color: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(color, dtype=torch.uint8, device=device).view(3, 1, 1)


class AsOnCpu(TorchFunctionMode):
    """While this is open, pictures that this thread has torch interpolate (torchvision's ``resize``
    does) become what a CPU makes of their bytes, on whatever device they are.

    For image processors of transformers, which resize before anything else: the values that they
    resize are taken for whole numbers, though torchvision hands them on as float32 on a GPU.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is interpolate and given.get("antialias") and given.get("mode") in _FILTERS:
            return resize(args[0], tuple(given["size"]), given["mode"])
        return func(*args, **given)
