"""Both evaluation frameworks' models on every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import family_makers, makers

FASTV = {"agg_layer": 2, "attention_rank": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in family_makers.KINDS}
    for name, kind in family_makers.KINDS.items():
        kind.make(made[name])
    return made


@pytest.mark.parametrize("name", family_makers.KINDS)
def test_vlmeval(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("vlmeval")
    from vlm_prune_ext.evals.vlmeval import LLaVABaseline, LLaVAFastV

    makers.photo().save(tmp_path / "a.png")
    message = [
        {"type": "image", "value": str(tmp_path / "a.png")},
        {"type": "text", "value": "What is this?"},
    ]
    folder, options = str(folders[name]), {"max_new_tokens": 4, "device": "cpu"}
    pruned = name != "blip2_t5"
    model: Any = (
        LLaVAFastV(folder, **FASTV, **options) if pruned else LLaVABaseline(folder, **options)
    )
    assert isinstance(model.generate_inner(message), str)
    assert model.last.visual_tokens > 3 and 1 <= model.last.new_tokens <= 4
    if pruned:
        assert model.last.visual_kept[2] == 3


@pytest.mark.parametrize("name", family_makers.KINDS)
def test_lmms(name: str, folders: dict[str, Path]) -> None:
    pytest.importorskip("lmms_eval")
    from lmms_eval.api.instance import Instance

    from vlm_prune_ext.evals import lmms

    docs = [
        {"image": image, "question": text}
        for image, text in zip(makers.photos(3), makers.QUESTIONS, strict=False)
    ]
    kind, settings = lmms.LlavaFastvChat, ",agg_layer=2,attention_rank=3"
    if name == "blip2_t5":
        kind, settings = lmms.LlavaBaselineChat, ""
    model = kind.create_from_arg_string(
        f"pretrained={folders[name]},device=cpu{settings}", {"batch_size": 3, "device": None}
    )
    model.task_dict = {"t": {"test": docs}}

    def messages(doc: dict[str, Any], **_: Any) -> list[dict[str, Any]]:
        content = [
            {"type": "image", "url": doc["image"]},
            {"type": "text", "text": doc["question"]},
        ]
        return [{"role": "user", "content": content}]

    given = {"max_new_tokens": 4, "temperature": 0, "do_sample": False}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=("", messages, dict(given), doc, "t", "test"),
            idx=0,
            metadata={"task": "t", "doc_id": doc, "repeats": 1},
        )
        for doc in range(3)
    ]
    results = model.generate_until(requests)
    assert len(results) == 3 and all(result.token_counts.output_tokens > 0 for result in results)
