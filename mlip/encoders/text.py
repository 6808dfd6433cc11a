"""Text tower: report tokens -> one global vector and a vector per token."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor
from transformers import BertConfig, BertModel

from mlip.encoders.attention import require_usable, round_once
from mlip.encoders.checkpointing import checkpoint_layers
from mlip.encoders.options import build_tower, tower_config
from mlip.encoders.packing import Packing
from mlip.encoders.pool import AttentionPool
from mlip.encoders.pretrained_tower import load_tower
from mlip.encoders.residual import round_residual
from mlip.settings.config import Text


class TextEncoder(nn.Module):
    """BERT of any size: (token_ids, token_mask) -> (global [B, d], tokens [B, T, d], attention).

    Shapes:  token_ids [B, T] int64, token_mask [B, T] bool; attention [B, T] float32, the last
             layer's [CLS] -> token weights (head mean, detached), or None unless kept
    Units:   real counts the real tokens of all texts, where the host knows them: packing then waits
             for no GPU
    Raises:  ValueError for a source that is not there, or more words or tokens than the model's
    Source:  MLIP section 3 (a clinical BERT).
    """

    def __init__(
        self,
        settings: Text,
        *,
        vocab_size: int,
        max_tokens: int,
        attention: str = "sdpa",
        residual: str = "fp32",
        keeps_attention: bool = False,
        offline: bool = True,
    ) -> None:
        super().__init__()
        require_usable(attention)
        name = f"mlip_{attention}"
        if settings.source is None:
            options = {"max_position_embeddings": max_tokens, **settings.options}
            config = tower_config(BertConfig, "model.text.options", options, vocab_size=vocab_size)
            config._attn_implementation = name
            self.backbone = build_tower(
                lambda: BertModel(config, add_pooling_layer=False), "model.text.options"
            )
        else:
            self.backbone = load_tower(
                BertModel,
                "model.text.source",
                settings.source,
                offline=offline,
                add_pooling_layer=False,
                attn_implementation=name,
            )
            config = self.backbone.config
        if vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {vocab_size} entries, model.text.source={settings.source} has "
                f"{config.vocab_size}; give the tokenizer of that model (model.text.tokenizer)"
            )
        if max_tokens > config.max_position_embeddings:
            raise ValueError(
                f"data.max_tokens={max_tokens} is more than the text tower's "
                f"{config.max_position_embeddings} positions"
            )
        if settings.checkpointing:
            checkpoint_layers(self.backbone)
        for layer in self.backbone.encoder.layer:
            round_once(layer.attention.self)
        if residual == "bf16":
            round_residual(self.backbone)
        self.dim = int(config.hidden_size)
        self.pool = AttentionPool(self.dim) if settings.pool == "attention" else None
        self._last_attention.keeps_cls_attention = keeps_attention
        self.keeps_attention = keeps_attention
        self.is_packed = settings.packed

    @property
    def _last_attention(self) -> Any:
        # a property, not an attribute: a module under two names is saved twice
        return self.backbone.encoder.layer[-1].attention.self

    def forward(
        self, token_ids: Tensor, token_mask: Tensor, real: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.is_packed:
            states = self._packed_states(token_ids, Packing.of(token_mask, real))
        else:
            # [B, 1, 1, T]: of a mask without heads transformers reads on the host if all is real
            mask = token_mask[:, None, None, :]
            states = self.backbone(input_ids=token_ids, attention_mask=mask).last_hidden_state
        kept = self._last_attention.cls_attention if self.keeps_attention else None
        pooled = states[:, 0] if self.pool is None else self.pool(states, token_mask)
        return pooled, states, kept

    def _packed_states(self, token_ids: Tensor, packing: Packing) -> Tensor:
        """The last states [B, T, d], zero where padded: all texts are one row of real tokens."""
        packed = self.backbone(
            input_ids=packing.pack(token_ids),
            position_ids=packing.positions(),
            packing=packing,
        ).last_hidden_state
        return packing.unpack(packed)


def token_states(encoder: nn.Module, token_ids: Tensor, token_mask: Tensor) -> Tensor:
    """The mean of the text tower's token vectors over real tokens, [B, d]: for definitions."""
    _, states, _ = encoder(token_ids, token_mask)
    weights = token_mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1.0)
