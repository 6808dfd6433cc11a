"""The shape that the folder of a tower (model.vision.source) gives, without its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from transformers import BertModel, PreTrainedModel, ResNetModel, ViTModel

from mlip.encoders.options import DECIDED, tower_config, tower_shape
from mlip.encoders.pretrained_tower import check_kind
from mlip.settings.config import Text, Vision

# what no number of a trained tower follows from: the size that its positions are resampled to is
# data.crop_px, the others are of generation, heads, poolers and weights that are drawn
_UNSEEN = frozenset(
    {
        *("image_size", "use_cache", "bos_token_id", "eos_token_id", "tie_word_embeddings"),
        *("classifier_dropout", "encoder_stride", "pooler_act", "pooler_output_size"),
        *("initializer_range", "out_features", "out_indices", "stage_names"),
    }
)


def changed_options(
    settings: Vision | Text, kept: dict[str, Any], sizes: dict[str, int]
) -> dict[str, tuple[Any, Any]]:
    """Option -> (kept, now) where a source differs from the shape that a run has kept of it.

    sizes    num_channels and vocab_size of the run's tower, as far as it has them
    Returns: nothing where the source is no local folder with a config.json (any more)
    Raises:  ValueError for a folder of another kind of model, or options that are none
    """
    source, (key, kind) = settings.source, _kind_of(settings)
    # not Path.is_file: it raises where another user's folder is closed
    if source is None or not os.path.isfile(os.path.join(source, "config.json")):
        return {}
    check_kind(kind, f"{key}.source", source, offline=True)
    config_class: Any = kind.config_class
    there = config_class.from_pretrained(source, local_files_only=True)
    # through the class: a later version of transformers may know more options, at their defaults
    known = tower_shape(tower_config(config_class, f"{key}.options", kept))
    now = tower_shape(there) | {k: v for k in DECIDED if (v := getattr(there, k, None)) is not None}
    saved = known | sizes
    return {
        name: (saved.get(name), now.get(name))
        for name in sorted(saved.keys() | now.keys())
        if name not in _UNSEEN and saved.get(name) != now.get(name)
    }


def told(changed: Mapping[str, tuple[Any, Any]], before: str) -> str:
    """changed_options in words: "hidden_size 32 (saved 16)", where `before` is "saved"."""
    return ", ".join(f"{name} {now!r} ({before} {was!r})" for name, (was, now) in changed.items())


def _kind_of(settings: Vision | Text) -> tuple[str, type[PreTrainedModel]]:
    if isinstance(settings, Text):
        return "model.text", BertModel
    return "model.vision", ResNetModel if settings.kind == "resnet" else ViTModel
