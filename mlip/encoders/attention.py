"""The one attention function of both towers: torch SDPA, xformers where usable, plain eager, or
SDPA over texts of any length one behind another.

Registered with transformers under "mlip_<impl>", so that BERT and ViT run through it, and able to
keep the last layer's [CLS] row for token weights without materialising the other rows.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mlip.encoders.packing import Packing

IMPLS = ("sdpa", "xformers", "eager", "varlen")
_BIAS_ALIGNMENT = 8  # elements; xformers refuses other strides of attn_bias


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    impl: str,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention; a row whose mask hides everything gives zeros.

    Shapes:  query [B, heads, S, d], key and value [B, heads, T, d], mask broadcastable to
             [B, heads, S, T], True = attend -> [B, heads, S, d]
    """
    if impl == "xformers":
        return _xformers(query, key, value, mask, scale=scale, dropout=dropout)
    if impl == "eager":
        scores = (query @ key.transpose(-2, -1)).float() * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = torch.softmax(scores, dim=-1).nan_to_num(0.0).to(query.dtype)
        return F.dropout(weights, dropout) @ value
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale
    )


def variable_length_attention(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, *, scale: float, dropout: float
) -> Tensor:
    """Attention of every text's tokens to its own, without a padded copy; no mask is needed.

    Shapes:  query, key, value [1, heads, n, d] -> [1, n, heads, d]; n real tokens of all texts
    Source:  torch's SDPA of jagged nested tensors: flash or memory-efficient kernels on a GPU
    """
    offsets, longest = packing.offsets, packing.mask.shape[1]

    def jagged(rows: Tensor) -> Tensor:
        values = rows[0].transpose(0, 1).contiguous()
        # both lengths are given, or torch reads them from the device; every text has a [CLS]
        nested = torch.nested.nested_tensor_from_jagged(
            values, offsets, min_seqlen=1, max_seqlen=longest
        )
        return nested.transpose(1, 2)

    out = F.scaled_dot_product_attention(
        jagged(query), jagged(key), jagged(value), dropout_p=dropout, scale=scale
    )
    return out.transpose(1, 2).values().unsqueeze(0)


def require_usable(impl: str) -> None:
    """Raise ValueError where the asked-for implementation cannot run here."""
    if impl == "xformers":
        if importlib.util.find_spec("xformers") is None:
            raise ValueError(
                "model.attention=xformers, but xformers is not installed; install the extra "
                "`gpu`, which has it for x86_64 alone, or set model.attention=sdpa"
            )
        if not torch.cuda.is_available():
            raise ValueError(
                "model.attention=xformers, but its memory-efficient attention needs a CUDA device "
                "and none is visible; set model.attention=sdpa"
            )
        obstacle = _xformers_obstacle()
        if obstacle is not None:
            raise ValueError(
                f"model.attention=xformers, but no kernel of it runs here: {obstacle}; install "
                "the build for this torch and CUDA, or set model.attention=sdpa"
            )


@functools.cache
def _xformers_obstacle() -> str | None:
    """Why a small masked call fails, forward or backward; None where it runs.

    A build for another CUDA is imported with a warning and has no kernels at the first step.
    """
    # float16: every card with kernels has it, bfloat16 only newer ones
    made = [torch.ones(1, 1, 8, 8, dtype=torch.float16, device="cuda") for _ in range(3)]
    query = made[0].requires_grad_()
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool, device="cuda")
    try:
        _xformers(query, made[1], made[2], mask, scale=1.0, dropout=0.0).sum().backward()
    except (ImportError, NotImplementedError, RuntimeError) as error:
        return str(error).strip().split("\n")[0]
    return None


def _xformers(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float, dropout: float
) -> Tensor:
    from xformers.ops import memory_efficient_attention

    bias = None
    if mask is not None:
        keys = key.shape[2]
        # its kernels want rows of the bias to start at multiples of 8 elements
        width = -(-keys // _BIAS_ALIGNMENT) * _BIAS_ALIGNMENT
        bias = query.new_zeros((*mask.shape[:-1], width))[..., :keys]
        bias = bias.masked_fill_(~mask, torch.finfo(query.dtype).min)
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], keys)
    out = memory_efficient_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_bias=bias,
        p=dropout,
        scale=scale,
    ).transpose(1, 2)
    # the largest negative number everywhere is an even average, not nothing
    return out if mask is None else out.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)


def _for_transformers(impl: str) -> Any:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        packing: Packing | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        keeps_cls = getattr(module, "keeps_cls_attention", False)
        # on a CPU nested tensors are a loop over texts, slower than padding
        is_jagged = impl == "varlen" and packing is not None and query.is_cuda
        rows = query, key, value
        if packing is not None:
            attention_mask = packing.attention_mask()
            if not is_jagged or keeps_cls:
                query, key, value = (packing.unpack_heads(x) for x in rows)
        if keeps_cls:
            # the [CLS] query alone: O(T) instead of the O(T^2) map that eager would keep
            with torch.no_grad():
                scores = (query[:, :, :1] @ key.transpose(-2, -1)).float() * scale
                if attention_mask is not None:
                    scores = scores.masked_fill(~attention_mask[:, :, :1], -torch.inf)
                module.cls_attention = torch.softmax(scores, dim=-1)[:, :, 0].mean(dim=1)
        if is_jagged:
            assert packing is not None
            return variable_length_attention(*rows, packing, scale=scale, dropout=dropout), None
        out = attention(query, key, value, attention_mask, impl=impl, scale=scale, dropout=dropout)
        out = out.transpose(1, 2)
        return out.contiguous() if packing is None else packing.pack(out), None

    return forward


def round_once(self_attention: nn.Module) -> None:
    """Have the states that a layer attends over rounded to autocast's type once, on a GPU.

    Query, key and value would each round and keep a copy of their own, and widen a gradient of
    their own: a tenth of what a ViT-B/16 layer moves. The products see the same numbers. A CPU
    gains a hundredth by it: there nothing changes.
    """
    self_attention.register_forward_pre_hook(_round_states)


def _round_states(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    states, *rest = given
    if not (states.is_cuda and torch.is_autocast_enabled("cuda")):
        return None
    return states.to(torch.get_autocast_dtype("cuda")), *rest


for _impl in IMPLS:
    ALL_ATTENTION_FUNCTIONS.register(f"mlip_{_impl}", _for_transformers(_impl))
    # boolean masks, True = attend, for all of them
    ALL_MASK_ATTENTION_FUNCTIONS.register(f"mlip_{_impl}", sdpa_mask)
