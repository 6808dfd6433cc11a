"""Both towers as folders that transformers opens, each held against the model:
`mlip export --transformers`.

image_tower/   a ViTModel or ResNetModel of grey or three-channel images, prepared as
               preprocessing.json says
text_tower/    a BertModel with its vocabulary

Towers alone, before neck, attention pooling, knowledge and heads: what a probe, a decoder or
another project's model starts from. Both scores need the heads, which are mlip.pretrained's.
A `pooler_output` that transformers adds to them is no part of the training.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.utils import logging as hub_logging

from mlip.dataloading.reports.tokenizer import ReportTokenizer
from mlip.model import MLIPModel
from mlip.saved.other_runtimes import difference, plain_model, require_alike
from mlip.saved.weights import PretrainedError
from mlip.settings.config import Config

IMAGES, TEXTS = "image_tower", "text_tower"


def write_towers(
    folder: Path, model: MLIPModel, config: Config, tokenizer: ReportTokenizer
) -> dict[str, Any]:
    """Write both folders into one that exists.

    config   the settings of `model`, its towers described by size (no source)
    Returns: what config.json says of them: transformers' version, and the largest difference
             between its model and the tower, as a part of the output's largest number
    Raises:  PretrainedError where transformers has no such tower, or computes other numbers
    """
    _require_known(config)
    plain = plain_model(model, config)
    image, text = _as_known(plain.vision.tower.backbone), plain.text.backbone
    tokenizer.save(folder / TEXTS, config.data.max_tokens)  # longer texts it has not seen
    for backbone, name in ((image, IMAGES), (text, TEXTS)):
        with _quiet():
            backbone.save_pretrained(folder / name)
        for path in (folder / name).glob("*.safetensors"):
            with contextlib.suppress(OSError):  # FAT, exFAT, some servers: all files have one mode
                path.chmod(0o600)  # weights, as those of model.safetensors: for their owner
    found = {
        IMAGES: _off_images(folder / IMAGES, plain, config),
        TEXTS: _off_texts(folder / TEXTS, plain, config),
    }
    for name, largest in found.items():
        told = f"{name}: transformers {transformers.__version__} differs from the tower"
        require_alike(told, largest, "--transformers")
    return {"version": transformers.__version__, "largest_difference": found}


def _require_known(config: Config) -> None:
    vision = config.model.vision
    if vision.kind == "resnet" and (vision.stem == "deep" or vision.norm == "group"):
        named = "stem=deep" if vision.stem == "deep" else "norm=group"
        raise PretrainedError(
            f"model.vision.{named}: transformers' ResNet has no such tower; export without "
            "--transformers, or with --onnx"
        )


def _as_known(backbone: Any) -> Any:
    """The backbone with a configuration of the stages that it still has.

    With attention pooling a ResNet ends at the stage of its patches.
    """
    stages = getattr(getattr(backbone, "encoder", None), "stages", None)
    if stages is not None and len(stages) < len(backbone.config.depths):
        count, old = len(stages), backbone.config
        kept = {
            key: value
            for key, value in old.to_dict().items()
            if key not in ("out_features", "out_indices", "stage_names")
        }
        kept |= {"hidden_sizes": old.hidden_sizes[:count], "depths": old.depths[:count]}
        backbone = copy.copy(backbone)
        backbone.config = type(old)(**kept)
    return backbone


def _opened(folder: Path) -> Any:
    with _quiet():
        opened = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    return opened.eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers tells at length of a pooler that no tower has, and draws a bar for a second."""
    level, has_bars = hub_logging.get_verbosity(), hub_logging.is_progress_bar_enabled()
    hub_logging.set_verbosity_error()
    hub_logging.disable_progress_bar()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
        if has_bars:
            hub_logging.enable_progress_bar()


@torch.no_grad()
def _off_images(folder: Path, model: MLIPModel, config: Config) -> float:
    generator = torch.Generator().manual_seed(0)
    side = config.data.crop_px
    image = torch.randn(3, config.data.channels, side, side, generator=generator)
    states = _opened(folder)(image).last_hidden_state
    pooled, patches, _ = model.vision.tower(image)
    if states.ndim == 4:  # a ResNet's last stage
        return _off(states.mean(dim=(2, 3)), pooled)
    return _off(states, torch.cat([pooled[:, None], patches], dim=1))


@torch.no_grad()
def _off_texts(folder: Path, model: MLIPModel, config: Config) -> float:
    generator = torch.Generator().manual_seed(0)
    words, longest = int(model.text.backbone.config.vocab_size), config.data.max_tokens
    ids = torch.randint(0, words, (3, longest), generator=generator)
    lengths = torch.randint(3, longest + 1, (3, 1), generator=generator)
    mask = torch.arange(longest) < lengths
    states = _opened(folder)(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    return _off(states[mask], model.text(ids, mask)[1][mask])


def _off(found: Tensor, own: Tensor) -> float:
    return difference(found, own) if found.shape == own.shape else float("inf")
