"""Pictures of data sets as files, by content: a folder of our own holds each once, whole.

VLMEvalKit unpacks pictures to names made of an index or of what the table says, and takes a file of
that name for the picture ever after. Here a picture's name is the digest of its bytes, so an edited
table is looked at with its new pictures, rows that share a name do not share a picture, and no name
leads anywhere else.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import uuid
from pathlib import Path

from vlm_prune_ext.errors import InputError
from vlm_prune_ext.evals.cache import cache_folder

_OTHER_ALPHABET = str.maketrans("-_", "+/")
_KINDS = ((b"\xff\xd8", ".jpg"), (b"GIF8", ".gif"), (b"RIFF", ".webp"), (b"BM", ".bmp"))


def unpack(encoded: str) -> str:
    """A file with a picture's bytes, as they are.

    Args:
        encoded: base64, with either alphabet; blanks and line ends in it do not count.

    Raises:
        InputError: it is not base64.
        OSError: the folder cannot be written.
    """
    if encoded.startswith("data:"):
        encoded = encoded.partition(",")[2]
    try:
        plain = "".join(encoded.split()).translate(_OTHER_ALPHABET)
        return str(keep(base64.b64decode(plain, validate=True)))
    except (binascii.Error, ValueError) as error:
        raise InputError("the image is not base64 data") from error


def keep(data: bytes) -> Path:
    """A file with these bytes in the cache folder; one that holds others is written again."""
    ending = next((ending for start, ending in _KINDS if data.startswith(start)), ".png")
    digest = hashlib.sha256(data).hexdigest()[:40]
    path = cache_folder() / "pictures" / digest[:2] / f"{digest}{ending}"
    if path.is_file() and path.read_bytes() == data:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid.uuid4().hex}")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
