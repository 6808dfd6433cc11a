"""Custom operators around the Triton kernels, with the shapes that torch.compile asks for.

No gradients: op.py binds forward and backward operators in one autograd node, so that gradients of
unit rows stay in float32 until they are projected. Nothing here looks at the values of a tensor.
Triton is imported where a kernel is first launched, and launches on the tensors' own device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlip.kernels.token_knowledge_patch.tiling import (
    ROW_TAIL,
    Problem,
    is_kept,
    padded_patches,
)


@torch.library.custom_op(
    "mlip_kernels::unit_patches",
    mutates_args=(),
    schema="(Tensor x, Tensor? mask, bool narrow) -> (Tensor, Tensor)",
)
def unit_patches(x: Tensor, mask: Tensor | None, narrow: bool) -> tuple[Tensor, Tensor]:
    from mlip.kernels.token_knowledge_patch.rows_triton_kernels import patches_fwd

    with torch.cuda.device_of(x):
        return patches_fwd(x, mask, torch.bfloat16 if narrow else torch.float32)


@unit_patches.register_fake
def _(x: Tensor, mask: Tensor | None, narrow: bool) -> tuple[Tensor, Tensor]:
    images, patches, dim = x.shape
    shape = (images, padded_patches(patches))
    v = x.new_empty((*shape, dim), dtype=torch.bfloat16 if narrow else torch.float32)
    return v, x.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op(
    "mlip_kernels::unit_patches_bwd",
    mutates_args=(),
    schema="(Tensor x, Tensor? mask, Tensor grad) -> Tensor",
)
def unit_patches_bwd(x: Tensor, mask: Tensor | None, grad: Tensor) -> Tensor:
    from mlip.kernels.token_knowledge_patch.rows_triton_kernels import patches_bwd

    with torch.cuda.device_of(x):
        return patches_bwd(x, mask, grad.contiguous())


@unit_patches_bwd.register_fake
def _(x: Tensor, mask: Tensor | None, grad: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_ROW_INPUTS = (
    "Tensor tokens, Tensor? knowledge, Tensor? weights, Tensor? mask, Tensor scale, Tensor gain"
)


@torch.library.custom_op(
    "mlip_kernels::query_rows",
    mutates_args=(),
    schema=f"({_ROW_INPUTS}, bool narrow) -> Tensor",
)
def query_rows(tokens, knowledge, weights, mask, scale, gain, narrow):
    from mlip.kernels.token_knowledge_patch.rows_triton_kernels import rows_fwd

    dtype = torch.bfloat16 if narrow else torch.float32
    with torch.cuda.device_of(tokens):
        return rows_fwd(tokens, knowledge, weights, mask, scale, gain, dtype)


@query_rows.register_fake
def _(tokens, knowledge, weights, mask, scale, gain, narrow):
    texts, length, dim = tokens.shape
    rows = length + (0 if knowledge is None else knowledge.shape[1])
    dtype = torch.bfloat16 if narrow else torch.float32
    return tokens.new_empty((texts, rows, dim), dtype=dtype)


@torch.library.custom_op(
    "mlip_kernels::query_rows_bwd",
    mutates_args=(),
    schema=f"({_ROW_INPUTS}, Tensor grad) -> (Tensor, Tensor, Tensor, Tensor)",
)
def query_rows_bwd(tokens, knowledge, weights, mask, scale, gain, grad):
    from mlip.kernels.token_knowledge_patch.rows_triton_kernels import RowsBackward

    with torch.cuda.device_of(tokens):
        rows = RowsBackward(tokens, knowledge, weights, mask, scale, gain)
        rows.take(grad.contiguous(), 0, tokens.shape[0])
        return rows.gradients()


@query_rows_bwd.register_fake
def _(tokens, knowledge, weights, mask, scale, gain, grad):
    # always contiguous, whatever the strides of knowledge: empty_like would keep those
    like = tokens if knowledge is None else knowledge
    entities = like.new_empty((0,) if knowledge is None else knowledge.shape)
    return tokens.new_empty(tokens.shape), entities, scale.new_empty(()), scale.new_empty(())


@torch.library.custom_op(
    "mlip_kernels::pack_rows",
    mutates_args=(),
    schema="(Tensor rows, Tensor weight) -> (Tensor, Tensor, Tensor, Tensor)",
)
def pack_rows(rows, weight):
    from mlip.kernels.token_knowledge_patch.pack_triton_kernels import pack_rows as pack

    with torch.cuda.device_of(rows):
        return pack(rows, weight)


@pack_rows.register_fake
def _(rows, weight):
    packed = rows.new_empty((weight.numel() + ROW_TAIL, rows.shape[2]))
    index = weight.new_empty((weight.numel(),), dtype=torch.int32)
    bounds = weight.new_empty((weight.shape[0] + 1,), dtype=torch.int32)
    return packed, index, torch.empty_like(index), bounds


_PAIR_INPUTS = (
    "Tensor rows, Tensor index, Tensor text, Tensor bounds, Tensor weight, Tensor v, Tensor bias, "
    "Tensor alpha, Tensor gamma, Tensor? valid"
)
_PAIR_OPTIONS = "int patches, str pooling, str aggregation"
_PAIR_MADE = "Tensor scores, Tensor r, Tensor stat"


def _problem(weight: Tensor, v: Tensor, patches: int, pooling: str, aggregation: str):
    return Problem(
        images=v.shape[0],
        texts=weight.shape[0],
        rows_a_text=weight.shape[1],
        patches=patches,
        dim=v.shape[2],
        size=v.element_size(),
        pooling=pooling,
        aggregation=aggregation,
    )


def _named(rows, index, text, bounds, weight, v, bias, alpha, gamma) -> dict[str, Tensor]:
    return {
        "rows": rows,
        "weight": weight.contiguous(),
        "v": v.contiguous(),
        "bias": bias,
        "alpha": alpha,
        "gamma": gamma.reshape(1),
        "index": index,
        "text": text,
        "bounds": bounds,
    }


@torch.library.custom_op(
    "mlip_kernels::pair_scores",
    mutates_args=(),
    schema=f"({_PAIR_INPUTS}, {_PAIR_OPTIONS}, bool keep) -> (Tensor, Tensor, Tensor)",
)
def pair_scores_op(
    rows, index, text, bounds, weight, v, bias, alpha, gamma, valid, patches, pooling,
    aggregation, keep,
):  # fmt: skip
    from mlip.kernels.token_knowledge_patch.triton_kernels import pair_scores_fwd

    problem = _problem(weight, v, patches, pooling, aggregation)
    tensors = _named(rows, index, text, bounds, weight, v, bias, alpha, gamma)
    with torch.cuda.device_of(v):
        return pair_scores_fwd(problem, tensors, valid, keep)


@pair_scores_op.register_fake
def _(
    rows, index, text, bounds, weight, v, bias, alpha, gamma, valid, patches, pooling,
    aggregation, keep,
):  # fmt: skip
    problem = _problem(weight, v, patches, pooling, aggregation)
    shape = (0,)
    if keep and is_kept(problem):
        shape = (problem.images, problem.stride(problem.texts))
    scores = weight.new_empty((problem.images, problem.texts))
    stat = weight.new_empty(shape, dtype=torch.int32 if pooling == "max" else torch.float32)
    return scores, weight.new_empty(shape), stat


@torch.library.custom_op(
    "mlip_kernels::pair_scores_bwd",
    mutates_args=(),
    schema=(
        f"(Tensor grad, {_PAIR_INPUTS}, {_PAIR_MADE}, {_PAIR_OPTIONS}, bool want_alpha) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def pair_scores_bwd_op(
    grad, rows, index, text, bounds, weight, v, bias, alpha, gamma, valid, scores, r, stat,
    patches, pooling, aggregation, want_alpha,
):  # fmt: skip
    from mlip.kernels.token_knowledge_patch.triton_kernels import pair_scores_bwd

    problem = _problem(weight, v, patches, pooling, aggregation)
    tensors = _named(rows, index, text, bounds, weight, v, bias, alpha, gamma)
    with torch.cuda.device_of(v):
        d_rows, d_weight, d_v, d_alpha, d_gamma = pair_scores_bwd(
            problem, tensors, valid, scores, grad.contiguous(), (r, stat), want_alpha
        )
    assert d_rows is not None  # nothing projects it here
    d_rows = d_rows.view(*weight.shape, v.shape[2])
    return d_rows, d_weight.view(weight.shape), d_v, d_alpha, d_gamma


@pair_scores_bwd_op.register_fake
def _(
    grad, rows, index, text, bounds, weight, v, bias, alpha, gamma, valid, scores, r, stat,
    patches, pooling, aggregation, want_alpha,
):  # fmt: skip
    wide = weight.new_empty
    d_rows = wide((*weight.shape, v.shape[2]))
    return d_rows, wide(weight.shape), wide(v.shape), wide(()), wide(())


@torch.library.custom_op(
    "mlip_kernels::pair_scores_and_rows_bwd",
    mutates_args=(),
    schema=(
        f"({_ROW_INPUTS}, Tensor grad, {_PAIR_INPUTS.replace('weight,', 'row_weight,')}, "
        f"{_PAIR_MADE}, {_PAIR_OPTIONS}, bool want_alpha) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def pair_scores_and_rows_bwd(
    tokens, knowledge, weights, mask, scale, gain, grad, rows, index, text, bounds, row_weight, v,
    bias, alpha, gamma, valid, scores, r, stat, patches, pooling, aggregation, want_alpha,
):  # fmt: skip
    """pair_scores_bwd_op, then query_rows_bwd, without the float32 gradient of all rows between."""
    from mlip.kernels.token_knowledge_patch.rows_triton_kernels import RowsBackward
    from mlip.kernels.token_knowledge_patch.triton_kernels import pair_scores_bwd

    problem = _problem(row_weight, v, patches, pooling, aggregation)
    tensors = _named(rows, index, text, bounds, row_weight, v, bias, alpha, gamma)
    with torch.cuda.device_of(v):
        owner = RowsBackward(tokens, knowledge, weights, mask, scale, gain)
        _, d_weight, d_v, d_alpha, d_gamma = pair_scores_bwd(
            problem, tensors, valid, scores, grad.contiguous(), (r, stat), want_alpha, owner.take
        )
        return *owner.gradients(), d_weight.view(row_weight.shape), d_v, d_alpha, d_gamma


@pair_scores_and_rows_bwd.register_fake
def _(
    tokens, knowledge, weights, mask, scale, gain, grad, rows, index, text, bounds, row_weight, v,
    bias, alpha, gamma, valid, scores, r, stat, patches, pooling, aggregation, want_alpha,
):  # fmt: skip
    like = tokens if knowledge is None else knowledge
    entities = like.new_empty((0,) if knowledge is None else knowledge.shape)
    wide = row_weight.new_empty
    return (
        tokens.new_empty(tokens.shape), entities, scale.new_empty(()), scale.new_empty(()),
        wide(row_weight.shape), wide(v.shape), wide(()), wide(()),
    )  # fmt: skip
