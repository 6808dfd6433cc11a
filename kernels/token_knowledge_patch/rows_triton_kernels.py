"""Triton kernels that make unit rows: patches normalised, tokens enriched by their entities.

One launch each way in place of some thirty; nothing between inputs and rows is kept, the backward
kernels make it again. Formulas: derivation 4 of the README.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip.kernels.token_knowledge_patch.forward_triton_kernels import BROKEN, MASKED
from mlip.kernels.token_knowledge_patch.tiling import block_dim, padded_patches

NORM_FLOOR = tl.constexpr(1e-6)


@triton.jit
def _unit(x):
    """(x / |x|, 1 / |x|) of float32 rows [R, D]; zeros where |x| is at most the floor."""
    # scaled by the largest entry first: a finite row, however long, must not overflow its square
    largest = tl.max(tl.abs(x), 1)
    safe = tl.where(largest > 0, largest, 1.0)
    scaled = x / safe[:, None]
    length = tl.sqrt(tl.sum(scaled * scaled, 1))
    keep = length * largest > NORM_FLOOR
    inverse = tl.where(keep, 1.0 / tl.where(keep, length, 1.0), 0.0)
    return scaled * inverse[:, None], inverse / safe


@triton.jit
def _unit_bwd(grad, unit, inverse):
    return (grad - unit * tl.sum(grad * unit, 1)[:, None]) * inverse[:, None]


@triton.jit
def _similarity(rows, entities, PRECISION: tl.constexpr):
    """rows entities^T [R, K] of float32 rows [R, D] and entities [K, D], D a power of two."""
    R: tl.constexpr = rows.shape[0]
    K: tl.constexpr = entities.shape[0]
    PARTS: tl.constexpr = min(8, rows.shape[1] // 32)
    if K == 16 and PARTS > 1:
        # [R, 16] is two tensor-core tiles for eight warps: one product keeps all of `rows` in every
        # warp's registers, at D = 256 128 of a thread's 255 and 64 for entities (160 bytes went to
        # the stack). Eighths of D, one a warp, need 16 and 16 and are added in a fixed order.
        left = tl.permute(tl.reshape(rows, (R, PARTS, rows.shape[1] // PARTS)), (1, 0, 2))
        right = tl.permute(tl.reshape(entities, (K, PARTS, rows.shape[1] // PARTS)), (1, 2, 0))
        out = tl.sum(tl.dot(left, right, input_precision=PRECISION), 0)
    else:  # more entities give every warp tiles of its own: there the parts spilled more
        out = tl.dot(rows, tl.trans(entities), input_precision=PRECISION)
    return out


@triton.jit
def _place(ptr, rows, columns, stride_r, stride_c):
    # 64 bits before the product: with D outermost even one column can lie 2^31 elements away
    return ptr + rows.to(tl.int64)[:, None] * stride_r + columns.to(tl.int64)[None, :] * stride_c


@triton.jit
def _patches_fwd_kernel(
    x_ptr, mask_ptr, v_ptr, bias_ptr, patches, stride_xm, stride_xp, stride_xd,
    P_PAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_d = tl.arange(0, BLOCK_D)
    real = offs_p < patches
    if HAS_MASK:
        real = real & (tl.load(mask_ptr + m * patches + offs_p, mask=real, other=0) != 0)
    in_d = offs_d < DIM
    x = _load_strided(x_ptr, m, offs_p, real, stride_xm, stride_xp, stride_xd, DIM, BLOCK_D)
    unit, _ = _unit(x)
    total = tl.sum(unit, 1)
    is_whole = total == total  # no NaN
    unit = tl.where(is_whole[:, None], unit, 0.0)
    inside = offs_p < P_PAD
    out = v_ptr + m * (P_PAD * DIM) + offs_p[:, None] * DIM + offs_d[None, :]
    tl.store(out, unit.to(v_ptr.dtype.element_ty), mask=inside[:, None] & in_d[None, :])
    bias = tl.where(is_whole, tl.where(real, 0.0, MASKED), BROKEN)
    tl.store(bias_ptr + m * P_PAD + offs_p, bias, mask=inside)


@triton.jit
def _patches_bwd_kernel(
    x_ptr, mask_ptr, grad_ptr, x_grad_ptr, patches, stride_xm, stride_xp, stride_xd,
    P_PAD: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_d = tl.arange(0, BLOCK_D)
    inside = offs_p < patches
    real = inside
    if HAS_MASK:
        real = real & (tl.load(mask_ptr + m * patches + offs_p, mask=real, other=0) != 0)
    in_d = offs_d < DIM
    mask = real[:, None] & in_d[None, :]
    x = tl.load(
        _place(x_ptr + m * stride_xm, offs_p, offs_d, stride_xp, stride_xd),
        mask=mask,
        other=0.0,
    ).to(tl.float32)
    at = grad_ptr + m * (P_PAD * DIM) + offs_p[:, None] * DIM + offs_d[None, :]
    grad = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    unit, inverse = _unit(x)
    out = x_grad_ptr + (m * patches + offs_p[:, None]) * DIM + offs_d[None, :]
    tl.store(
        out,
        _unit_bwd(grad, unit, inverse).to(x_grad_ptr.dtype.element_ty),
        mask=inside[:, None] & in_d[None, :],
    )


@triton.jit
def _load_strided(x_ptr, n, rows, real, stride_n, stride_r, stride_d, DIM, BLOCK_D: tl.constexpr):
    offs_d = tl.arange(0, BLOCK_D)
    return tl.load(
        _place(x_ptr + n * stride_n, rows, offs_d, stride_r, stride_d),
        mask=real[:, None] & (offs_d < DIM)[None, :],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def _rows_fwd_kernel(
    token_ptr, entity_ptr, weight_ptr, mask_ptr, scale_ptr, gain_ptr, rows_ptr,
    tokens, entities, stride_tn, stride_tt, stride_td, stride_en, stride_ek, stride_ed,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ENTITY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of BLOCK_T tokens of one text; the first program of a text adds its entities."""
    n = tl.program_id(0).to(tl.int64)
    offs_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    in_d = offs_d < DIM
    real_t = offs_t < tokens
    if HAS_WEIGHT:
        real_t = real_t & (tl.load(weight_ptr + n * tokens + offs_t, mask=real_t, other=0.0) > 0)
    x = _load_strided(token_ptr, n, offs_t, real_t, stride_tn, stride_tt, stride_td, DIM, BLOCK_D)
    row, _ = _unit(x)
    out = rows_ptr + n * (tokens + entities) * DIM + offs_d[None, :]
    if HAS_ENTITY:
        offs_k = tl.arange(0, BLOCK_K)
        real_k = offs_k < entities
        if HAS_MASK:
            seen = tl.load(mask_ptr + n * entities + offs_k, mask=real_k, other=0)
            real_k = real_k & (seen != 0)
        e = _load_strided(
            entity_ptr, n, offs_k, real_k, stride_en, stride_ek, stride_ed, DIM, BLOCK_D
        )
        entity, _ = _unit(e)
        raw = _similarity(row, entity, PRECISION)
        logit = tl.where(real_k[None, :], raw * tl.load(scale_ptr), MASKED)
        a = tl.exp(logit - tl.max(logit, 1)[:, None])
        # a text without entities has zero entity rows: its uniform softmax adds exactly nothing
        a = a / tl.sum(a, 1)[:, None]
        added = tl.dot(a, entity, input_precision=PRECISION)
        row, _ = _unit(tl.where(real_t[:, None], row + tl.load(gain_ptr) * added, 0.0))
        if tl.program_id(1) == 0:
            tl.store(
                out + (tokens + offs_k[:, None]) * DIM,
                entity.to(rows_ptr.dtype.element_ty),
                mask=(offs_k < entities)[:, None] & in_d[None, :],
            )
    tl.store(
        out + offs_t[:, None] * DIM,
        row.to(rows_ptr.dtype.element_ty),
        mask=(offs_t < tokens)[:, None] & in_d[None, :],
    )


@triton.jit(do_not_specialize=["first_text"])
def _rows_bwd_kernel(
    token_ptr, entity_ptr, weight_ptr, mask_ptr, scale_ptr, gain_ptr, grad_ptr,
    token_grad_ptr, entity_grad_ptr, scale_part_ptr, gain_part_ptr,
    first_text, tokens, entities, stride_tn, stride_tt, stride_td, stride_en, stride_ek, stride_ed,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ENTITY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one text's tokens, entities and both scalars; one program owns the text."""
    chunk_text = tl.program_id(0).to(tl.int64)  # grad begins at the chunk's first text
    n = first_text + chunk_text
    offs_d = tl.arange(0, BLOCK_D)
    in_d = offs_d < DIM
    grad_base = grad_ptr + chunk_text * (tokens + entities) * DIM + offs_d[None, :]
    if HAS_ENTITY:
        offs_k = tl.arange(0, BLOCK_K)
        real_k = offs_k < entities
        if HAS_MASK:
            seen = tl.load(mask_ptr + n * entities + offs_k, mask=real_k, other=0)
            real_k = real_k & (seen != 0)
        e = _load_strided(
            entity_ptr, n, offs_k, real_k, stride_en, stride_ek, stride_ed, DIM, BLOCK_D
        )
        entity, inverse_k = _unit(e)
        scale = tl.load(scale_ptr)
        gain = tl.load(gain_ptr)
        mask_k = real_k[:, None] & in_d[None, :]
        at = grad_base + (tokens + offs_k[:, None]) * DIM
        entity_grad = tl.load(at, mask=mask_k, other=0.0).to(tl.float32)
        scale_sum = tl.zeros([BLOCK_T], tl.float32)
        gain_sum = tl.zeros([BLOCK_T], tl.float32)
    for first in range(0, tokens, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        real_t = offs_t < tokens
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + n * tokens + offs_t, mask=real_t, other=0.0)
            real_t = real_t & (weight > 0)
        x = _load_strided(
            token_ptr, n, offs_t, real_t, stride_tn, stride_tt, stride_td, DIM, BLOCK_D
        )
        token, inverse_t = _unit(x)
        grad = tl.load(
            grad_base + offs_t[:, None] * DIM,
            mask=real_t[:, None] & in_d[None, :],
            other=0.0,
        ).to(tl.float32)
        if HAS_ENTITY:
            raw = _similarity(token, entity, PRECISION)
            logit = tl.where(real_k[None, :], raw * scale, MASKED)
            a = tl.exp(logit - tl.max(logit, 1)[:, None])
            a = a / tl.sum(a, 1)[:, None]
            added = tl.dot(a, entity, input_precision=PRECISION)
            row, inverse_r = _unit(tl.where(real_t[:, None], token + gain * added, 0.0))
            grad = _unit_bwd(grad, row, inverse_r)
            gain_sum += tl.sum(grad * added, 1)
            a_grad = gain * _similarity(grad, entity, PRECISION)
            logit_grad = a * (a_grad - tl.sum(a * a_grad, 1)[:, None])
            scale_sum += tl.sum(logit_grad * raw, 1)
            logit_grad = logit_grad * scale
            entity_grad += tl.dot(tl.trans(logit_grad), token, input_precision=PRECISION)
            entity_grad += gain * tl.dot(tl.trans(a), grad, input_precision=PRECISION)
            grad += tl.dot(logit_grad, entity, input_precision=PRECISION)
        tl.store(
            token_grad_ptr + (n * tokens + offs_t[:, None]) * DIM + offs_d[None, :],
            _unit_bwd(grad, token, inverse_t).to(token_grad_ptr.dtype.element_ty),
            mask=(offs_t < tokens)[:, None] & in_d[None, :],
        )
    if HAS_ENTITY:
        tl.store(
            entity_grad_ptr + (n * entities + offs_k[:, None]) * DIM + offs_d[None, :],
            _unit_bwd(entity_grad, entity, inverse_k).to(entity_grad_ptr.dtype.element_ty),
            mask=(offs_k < entities)[:, None] & in_d[None, :],
        )
        tl.store(scale_part_ptr + n, tl.sum(scale_sum, 0))
        tl.store(gain_part_ptr + n, tl.sum(gain_sum, 0))


def _patch_keywords(dim: int, mask: Tensor | None) -> dict[str, object]:
    return {
        "DIM": dim,
        "BLOCK_D": block_dim(dim),
        "BLOCK_P": 16,
        "HAS_MASK": mask is not None,
        "num_warps": 4,
    }


def patches_fwd(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(v [M, P_PAD, D] in dtype, unit or zero; bias [M, P_PAD]) of patches [M, P, D].

    mask [M, P] bool or None; any strides of x; a patch's bias is 0, MASKED, or BROKEN by NaN
    """
    images, patches, dim = x.shape
    padded = padded_patches(patches)
    v = torch.empty((images, padded, dim), dtype=dtype, device=x.device)
    bias = torch.empty((images, padded), dtype=torch.float32, device=x.device)
    seen = bias if mask is None else mask.contiguous().view(torch.uint8)
    _patches_fwd_kernel[(images, padded // 16)](
        x, seen, v, bias, patches, *x.stride(), P_PAD=padded, **_patch_keywords(dim, mask)
    )
    return v, bias


def patches_bwd(x: Tensor, mask: Tensor | None, grad: Tensor) -> Tensor:
    """d x [M, P, D] in the dtype of x from d v [M, P_PAD, D]."""
    images, patches, dim = x.shape
    padded = grad.shape[1]
    out = torch.empty((images, patches, dim), dtype=x.dtype, device=x.device)
    seen = grad if mask is None else mask.contiguous().view(torch.uint8)
    _patches_bwd_kernel[(images, padded // 16)](
        x, seen, grad, out, patches, *x.stride(), P_PAD=padded, **_patch_keywords(dim, mask)
    )
    return out


def _row_arguments(tokens, knowledge, weights, mask, scale, gain) -> list[object]:
    spare = scale  # a pointer that is never read
    return [
        tokens,
        spare if knowledge is None else knowledge,
        spare if weights is None else weights.contiguous(),
        spare if mask is None else mask.contiguous().view(torch.uint8),
        scale,
        gain,
    ]


def _row_sizes(tokens: Tensor, knowledge: Tensor | None) -> list[int]:
    entities = 0 if knowledge is None else knowledge.shape[1]
    strides = (0, 0, 0) if knowledge is None else knowledge.stride()
    return [tokens.shape[1], entities, *tokens.stride(), *strides]


def _row_keywords(tokens, knowledge, weights, mask, is_narrow: bool) -> dict[str, object]:
    dim = tokens.shape[2]
    entities = 1 if knowledge is None else knowledge.shape[1]
    return {
        "DIM": dim,
        "BLOCK_D": block_dim(dim),
        "BLOCK_T": 16,
        "BLOCK_K": block_dim(entities),
        "HAS_WEIGHT": weights is not None,
        "HAS_MASK": mask is not None,
        "HAS_ENTITY": knowledge is not None,
        # bfloat16 rows keep 8 bits: one tf32 product of 11 is enough for what they are made of
        "PRECISION": "tf32" if is_narrow else "tf32x3",
        "num_warps": 8,
        "num_stages": 1,
    }


def rows_fwd(
    tokens: Tensor,
    knowledge: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    scale: Tensor,
    gain: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Rows [N, T + K, D] in dtype of tokens [N, T, D] and knowledge [N, K, D].

    weights [N, T] float32 (0 = masked) or None; mask [N, K] bool or None; scale, gain
    float32 []; any strides of tokens and knowledge
    """
    texts, length, dim = tokens.shape
    entities = 0 if knowledge is None else knowledge.shape[1]
    rows = torch.empty((texts, length + entities, dim), dtype=dtype, device=tokens.device)
    keywords = _row_keywords(tokens, knowledge, weights, mask, dtype == torch.bfloat16)
    _rows_fwd_kernel[(texts, triton.cdiv(length, keywords["BLOCK_T"]))](
        *_row_arguments(tokens, knowledge, weights, mask, scale, gain),
        rows,
        *_row_sizes(tokens, knowledge),
        **keywords,
    )
    return rows


class RowsBackward:
    """Gradients of tokens, entities and both scalars from those of the rows, chunk by chunk.

    Every text has one program and its own outputs: chunks of any size give the same bits.
    """

    def __init__(
        self,
        tokens: Tensor,
        knowledge: Tensor | None,
        weights: Tensor | None,
        mask: Tensor | None,
        scale: Tensor,
        gain: Tensor,
    ) -> None:
        device = tokens.device
        self._knowledge = knowledge
        self._token_grad = torch.empty(tokens.shape, dtype=tokens.dtype, device=device)
        shape = (0,) if knowledge is None else knowledge.shape
        dtype = tokens.dtype if knowledge is None else knowledge.dtype
        self._entity_grad = torch.empty(shape, dtype=dtype, device=device)
        self._parts = torch.zeros((2, tokens.shape[0]), dtype=torch.float32, device=device)
        self._arguments = _row_arguments(tokens, knowledge, weights, mask, scale, gain)
        self._sizes = _row_sizes(tokens, knowledge)
        is_narrow = tokens.dtype != torch.float32
        self._keywords = _row_keywords(tokens, knowledge, weights, mask, is_narrow)

    def take(self, grad: Tensor, first: int, last: int) -> None:
        """Project grad [(last - first) (T + K), D] float32 of texts from first to before last."""
        _rows_bwd_kernel[(last - first,)](
            *self._arguments,
            grad,
            self._token_grad,
            self._entity_grad if self._knowledge is not None else self._token_grad,
            self._parts[0],
            self._parts[1],
            first,
            *self._sizes,
            **self._keywords,
        )

    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(d tokens, d knowledge, d scale [], d gain []); an empty d knowledge where is none."""
        return self._token_grad, self._entity_grad, self._parts[0].sum(), self._parts[1].sum()
