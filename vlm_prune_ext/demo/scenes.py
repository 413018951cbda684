"""Everything about the demo's data in one import: scenes, questions about them, data set files."""

from .drawing import FIRST_TRAINING_SEED, Scene, SceneObject, SceneText, make_scene, render
from .questions import KINDS, samples
from .writers import write_caption_csv, write_lmms_parquet, write_sets, write_vlmeval_tsv

__all__ = [
    "FIRST_TRAINING_SEED",
    "KINDS",
    "Scene",
    "SceneObject",
    "SceneText",
    "make_scene",
    "render",
    "samples",
    "write_caption_csv",
    "write_lmms_parquet",
    "write_sets",
    "write_vlmeval_tsv",
]
