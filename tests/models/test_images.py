"""Pictures by their content."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.makers import photos
from vlm_prune_ext.errors import InputError
from vlm_prune_ext.models.images import digest_of, open_image


def test_digests_tell_pictures_apart(tmp_path: Path) -> None:
    one, other = photos(2)
    path, copy = tmp_path / "one.png", tmp_path / "copy.png"
    one.save(path)
    one.save(copy)
    assert digest_of(path) == digest_of(str(copy)) == digest_of(path.read_bytes())
    assert digest_of(one) == digest_of(one.copy()) == digest_of(open_image(path))
    assert len({digest_of(picture) for picture in (one, other, path)}) == 3
    assert digest_of(one) != digest_of(one.resize(one.size[::-1]))
    grey = one.convert("L")
    assert digest_of(grey) == digest_of(open_image(grey))  # what a model sees
    with pytest.raises(InputError, match="does not exist"):
        digest_of(tmp_path / "nowhere.png")
