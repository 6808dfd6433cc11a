"""An export's folder as transformers' AutoModel and AutoProcessor open it.

import mlip.transformers_auto  # registers the model type "mlip" with transformers
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("model")  # the folder of any `mlip export`, as it is
processor = AutoProcessor.from_pretrained("model")
out = model(**processor(images=["film.dcm"], text=["pleural effusion"], return_tensors="pt"))
out.logits_per_image, out.image_embeds, out.text_embeds

Weights, settings and numbers are those of mlip.pretrained.from_pretrained, which reads the folder:
`model.opened` is what it gives, for all that this interface has no word for.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from mlip.batch import ImageFeatures, TextFeatures
from mlip.kernels.info_nce import info_nce_loss
from mlip.kernels.token_knowledge_patch import contrastive_loss_from_scores
from mlip.pretrained import save_pretrained
from mlip.ranks.distributed import world_group
from mlip.saved.export_folder import SETTINGS, put_into
from mlip.saved.pretrained_model import Pretrained
from mlip.saved.trained_model import from_pretrained, read_settings
from mlip.saved.transformers_inputs import (
    MLIPProcessor,
    MLIPTokenizer,
    require_folder,
    require_none,
)
from mlip.saved.weights import model_with
from mlip.transfer.alignment.prompts import TextBatch
from mlip.transfer.features import TextBank, encode_text_batch
from mlip.transfer.films.own_inputs import encode_pixels
from mlip.transfer.fingerprint import hash_of_weights

_OWN = "mlip."  # what torch puts before the names of the one module inside


class MLIPConfig(PreTrainedConfig):
    """config.json of an export, every entry an attribute of the same name."""

    model_type = "mlip"


@dataclass
class MLIPOutput(ModelOutput):
    """CLIP's names. Embeddings have unit length; B images, M texts."""

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None  # [B, M] logit_scale * cosine: the global head
    logits_per_text: Tensor | None = None  # [M, B]
    text_embeds: Tensor | None = None  # [M, D]
    image_embeds: Tensor | None = None  # [B, D]
    text_model_output: BaseModelOutputWithPooling | None = None  # of get_text_features
    vision_model_output: BaseModelOutputWithPooling | None = None  # of get_image_features
    logit_scale: Tensor | None = None  # already exponentiated

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


class MLIPForTransformers(PreTrainedModel):
    """The model of an export; built by from_pretrained alone.

    opened  mlip.saved.pretrained_model.Pretrained around the same weights
    """

    config_class = MLIPConfig
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]

    def __init__(self, config: MLIPConfig, opened: Pretrained | None = None) -> None:
        if opened is None:
            raise ValueError(
                "an mlip model is made by from_pretrained of an export's folder: vocabulary and "
                "concepts belong to it; new ones are trained by train.py"
            )
        super().__init__(config)
        self.mlip, self.opened = opened.model, opened
        self.post_init()
        # names of weights are those of model.safetensors, also for Trainer's checkpoints
        self.register_state_dict_post_hook(_without_own_name)
        self.register_load_state_dict_pre_hook(_with_own_name)

    def init_weights(self) -> None:
        """None are drawn: the folder has them."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | os.PathLike[str],
        *,
        config: MLIPConfig | None = None,
        lexicon: str | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: str | int | torch.device | None = None,
        **options: Any,
    ) -> MLIPForTransformers:
        """mlip.pretrained.from_pretrained of the folder, in eval mode.

        dtype       of the weights; None or "auto" is float32, as they lie in the folder
        device_map  one device for all of it
        Raises:  PretrainedError and LexiconError as there; ValueError for options, several devices
                 and types that hold no fractions
        """
        require_none((k for k, v in options.items() if v is not None), "AutoModel of this model")
        place, device, wanted = require_folder(folder), _one_device(device_map), _floating(dtype)
        config = config or MLIPConfig(**read_settings(place))
        if config._attn_implementation or config.output_attentions or config.output_hidden_states:
            raise ValueError(
                "an mlip model has the attention of its training (model.attention) and gives none "
                "away, nor hidden states: leave attn_implementation and output_* out"
            )
        opened = from_pretrained(place, device=device, lexicon=lexicon)
        model = cls(config, opened)
        model.name_or_path = str(place)
        if wanted is not None:
            torch.nn.Module.to(model, wanted)  # transformers wraps its own, whose type is lost
        return model.eval()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        entity_ids: Tensor | None = None,
        entity_state: Tensor | None = None,
        entity_mask: Tensor | None = None,
        return_loss: bool | None = None,
        pair_id: Tensor | None = None,
    ) -> MLIPOutput:
        """What the processor gives -> MLIPOutput; with return_loss image i and text i are a pair.

        Shapes:  as in mlip.batch.Batch; padding on the right
        pair_id  [B] int64 of the loss: equal = same study or text, never each other's negatives
        Returns: loss over the pairs of all ranks (torch.distributed): InfoNCE of the global head
                 and of the local score (of kind=mgca the first alone), with the run's weights
        Raises:  ValueError where one side or, for a loss, the mentions are missing
        """
        if pixel_values is None or input_ids is None:
            raise ValueError(
                "expected pixel_values and input_ids; one side alone is for get_image_features "
                "and get_text_features"
            )
        scales = self.mlip.scales
        if return_loss and self.training:
            scales.clamp_()  # after the last step; train.py does it there
        image = self._encode_image(pixel_values)
        mentions = (entity_ids, entity_state, entity_mask)
        texts = self._text_batch(bool(return_loss), input_ids, attention_mask, *mentions)
        text = self._encode_text(texts)
        loss = self._loss(image, text, texts, pair_id) if return_loss else None
        scale = scales.logit_scale()
        logits = scale * image.embedding.to(scale.dtype) @ text.embedding.to(scale.dtype).T
        return MLIPOutput(
            loss=loss,
            logits_per_image=logits,
            logits_per_text=logits.T,
            text_embeds=text.embedding,
            image_embeds=image.embedding,
            text_model_output=_output(text.tokens, text.embedding),
            vision_model_output=_output(image.patches, image.embedding),
            logit_scale=scale,
        )

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """pooler_output [B, D] unit length; last_hidden_state [B, P, D]: patches, local head."""
        image = self._encode_image(pixel_values)
        return _output(image.patches, image.embedding)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **entities: Tensor
    ) -> BaseModelOutputWithPooling:
        """pooler_output [M, D] unit length; last_hidden_state [M, T, D]: tokens, local head."""
        text = self._encode_text(self._text_batch(False, input_ids, attention_mask, **entities))
        return _output(text.tokens, text.embedding)

    def get_local_scores(self, *, pixel_values: Tensor, **texts: Tensor) -> Tensor:
        """The token-knowledge-patch score of every image with every text, [B, M] float64, CPU.

        Source:  Pretrained.similarity of head "local", which sees no gradient
        """
        found = self.opened.similarity(*self._features(pixel_values, texts), head="local")
        return torch.from_numpy(found)

    def get_heat_maps(self, *, pixel_values: Tensor, **texts: Tensor) -> Tensor:
        """Pretrained.heat_maps: [B, M, rows, columns] float32 over the model's input, CPU."""
        return torch.from_numpy(self.opened.heat_maps(*self._features(pixel_values, texts)))

    def _features(
        self, pixel_values: Tensor, texts: Mapping[str, Tensor]
    ) -> tuple[ImageFeatures, TextBank]:
        images = encode_pixels(self.opened, pixel_values)
        return images, encode_text_batch(self.mlip, self._text_batch(True, **texts))

    def _encode_image(self, pixel_values: Tensor) -> ImageFeatures:
        return self.mlip.encode_image(pixel_values.to(self.device, self.dtype))

    def _encode_text(self, texts: TextBatch) -> TextFeatures:
        return self.mlip.encode_text(texts.token_ids, texts.token_mask, texts.content_mask)

    def _text_batch(
        self,
        needs_mentions: bool,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        entity_ids: Tensor | None = None,
        entity_state: Tensor | None = None,
        entity_mask: Tensor | None = None,
    ) -> TextBatch:
        ids = input_ids.to(self.device)
        given = ids != self.opened.tokenizer.pad_id if attention_mask is None else attention_mask
        mask = given.to(self.device).bool()
        place, last = torch.arange(ids.shape[1], device=ids.device), mask.sum(1, keepdim=True) - 1
        content = mask & (place > 0) & (place < last)  # without [CLS] and [SEP]
        if entity_ids is None or entity_state is None or entity_mask is None:
            if needs_mentions:
                raise ValueError(
                    "expected entity_ids, entity_state and entity_mask, as the processor gives "
                    "them: the mentions of a text are part of the local score"
                )
            none = ids.new_zeros(ids.shape[0], 1)
            return TextBatch(ids, mask, content, none, none, none.bool())
        entities = (entity_ids, entity_state, entity_mask)
        return TextBatch(ids, mask, content, *(values.to(ids.device) for values in entities))

    def _loss(
        self, image: ImageFeatures, text: TextFeatures, texts: TextBatch, pair_id: Tensor | None
    ) -> Tensor:
        settings, scales, group = self.opened.config.loss, self.mlip.scales, world_group()
        pair_id = None if pair_id is None else pair_id.to(self.device)
        loss = settings.global_contrastive.weight * info_nce_loss(
            image.embedding, text.embedding, scales.logit_scale(), pair_ids=pair_id, group=group
        )
        local = settings.local_alignment
        if local.weight == 0 or local.kind != "token_knowledge_patch":
            return loss
        knowledge = self.mlip.encode_knowledge(
            texts.entity_ids, texts.entity_state, texts.entity_mask
        )
        scores = self.mlip.local_scores(
            image.patches, text.tokens, texts.content_mask, text.attention, knowledge, group=group
        )
        return loss + local.weight * contrastive_loss_from_scores(
            scores,
            logit_scale=scales.logit_scale_local(),
            pair_ids=pair_id,
            text_valid=texts.content_mask.any(dim=1) | (knowledge.row_weights > 0).any(dim=1),
            group=group,
        )

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Write a folder as `mlip export` does, vocabulary and concepts included, in float32.

        Other files in the folder stay. Scores and steps of the export that it began with are told
        again where the weights are the same; else the card names that export as their start.
        Raises:  PretrainedError for a folder of another kind of model; ValueError for options
        """
        require_none((k for k, v in options.items() if v), "save_pretrained of an mlip model")
        if not is_main_process:
            return
        folder, opened = Path(save_directory).resolve(), self.opened
        if (folder / SETTINGS).is_file():
            read_settings(folder)
        state_dict = self.state_dict() if state_dict is None else state_dict
        state = {name: values.detach().cpu() for name, values in state_dict.items()}
        words = int(self.mlip.text.backbone.config.vocab_size)
        model = model_with(opened.config, words, state, "the model")
        # the first exports tell of neither
        results, knowledge = (getattr(self.config, n, None) for n in ("evaluation", "knowledge"))
        facts, origin = opened.facts, opened.origin
        if hash_of_weights(model) != self.config.fingerprints.get("weights"):
            start = {"kind": "folder", "name": Path(str(self.name_or_path)).name}
            facts, results = {"further": "transformers"}, None
            origin = {"start": dict.fromkeys(("image", "text"), start)}
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
            written = save_pretrained(
                Path(place) / "model",
                *(model, opened.config, opened.tokenizer, opened.table),
                facts=facts,
                origin=origin,
                results=results,
                include_concepts=(knowledge or {}).get("is_included", False),
            )
            put_into(written, folder)


def _one_device(given: Any) -> torch.device:
    try:
        return torch.device("cpu" if given is None else given)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_map: expected one device such as 'cuda:0', got {given!r}: all of the model "
            "lies on one"
        ) from error


def _floating(dtype: Any) -> torch.dtype | None:
    """None: as the weights lie in the folder."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype: expected a type such as 'bfloat16' or 'auto', got {dtype!r}")
    return found


def _output(states: Tensor, pooled: Tensor) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)  # type: ignore[arg-type]


def _without_own_name(_: Any, state: dict[str, Tensor], prefix: str, __: Any) -> None:
    for name in [name for name in state if name.startswith(prefix + _OWN)]:
        state[prefix + name.removeprefix(prefix + _OWN)] = state.pop(name)


def _with_own_name(_: Any, state: dict[str, Tensor], prefix: str, *__: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[prefix + _OWN + name.removeprefix(prefix)] = state.pop(name)


AutoConfig.register(MLIPConfig.model_type, MLIPConfig, exist_ok=True)
AutoProcessor.register(MLIPConfig, MLIPProcessor, exist_ok=True)
AutoTokenizer.register(MLIPConfig, fast_tokenizer_class=MLIPTokenizer, exist_ok=True)
# the pipeline asks for the second
for auto in (AutoModel, AutoModelForZeroShotImageClassification):
    auto.register(MLIPConfig, MLIPForTransformers, exist_ok=True)
