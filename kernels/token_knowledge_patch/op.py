"""Public token-knowledge-patch scores: argument checks, gathering, choice of implementation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlip.kernels._autograd import autocast_off, autocast_on, no_second_derivative, savable
from mlip.kernels._chip import chip_facts
from mlip.kernels._dispatch import resolve
from mlip.kernels._distributed import Group, gather, gather_rows, reduce_rows, row_counts
from mlip.kernels._scalars import scalar_tensor
from mlip.kernels.token_knowledge_patch.checks import check_inputs, check_options
from mlip.kernels.token_knowledge_patch.operators import (
    pack_rows,
    pair_scores_and_rows_bwd,
    pair_scores_bwd_op,
    pair_scores_op,
    query_rows,
    query_rows_bwd,
    unit_patches,
    unit_patches_bwd,
)
from mlip.kernels.token_knowledge_patch.reference import (
    pair_scores,
    prepare_rows_in_budget,
)
from mlip.kernels.token_knowledge_patch.rows_reference import row_weights, unit_rows
from mlip.kernels.token_knowledge_patch.tiling import (
    MAX_DIM,
    MAX_PATCHES,
    block_dim,
    most_entities,
)

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _TritonOptions:
    pooling: str
    aggregation: str
    narrow: bool  # unit rows in bfloat16
    group: Group


def _refusal(patches: Tensor, tokens: Tensor, knowledge: Tensor | None) -> str | None:
    """Why the Triton kernels cannot take these inputs, or None."""
    features = [x for x in (patches, tokens, knowledge) if x is not None]
    for x in features:
        if x.dtype not in KERNEL_DTYPES:
            kind = str(x.dtype).removeprefix("torch.")
            return f"the inputs are {kind}, and the kernels work in float32"
    if patches.shape[2] > MAX_DIM:
        return f"D={patches.shape[2]} is above {MAX_DIM}, the largest that fits on chip"
    if patches.shape[1] > MAX_PATCHES:
        return f"P={patches.shape[1]} patches are above {MAX_PATCHES}, the most that kernels number"
    if knowledge is not None:
        limit = chip_facts(patches.device).shared
        most = most_entities(block_dim(patches.shape[2]), tokens.element_size(), limit)
        if knowledge.shape[1] > most:
            return f"K={knowledge.shape[1]} entities are above {most}, the most that fit on chip"
    return None


class _TritonScores(torch.autograd.Function):
    """S [M, N] from raw patches, tokens and entities, and the weight of every row.

    One node from inputs to scores: rounding the gradient of a unit row to bfloat16 before its
    radial part is taken out would cost a digit.
    """

    @staticmethod
    def forward(
        ctx: Any, patches, tokens, knowledge, weight, knowledge_scale, knowledge_gain,
        attention_scale, aggregation_scale, patch_mask, token_weights, knowledge_mask,
        options: _TritonOptions, keep: bool,
    ):  # fmt: skip
        rows = query_rows(
            tokens, knowledge, token_weights, knowledge_mask, knowledge_scale, knowledge_gain,
            options.narrow,
        )  # fmt: skip
        counts = row_counts(rows, options.group)
        rows, weight = (gather(x, options.group, counts) for x in (rows, weight))
        v, bias = unit_patches(patches, patch_mask, options.narrow)
        valid = None if patch_mask is None else patch_mask.any(1).to(torch.int8)
        problem = (patches.shape[1], options.pooling, options.aggregation)
        inputs = (*pack_rows(rows, weight), weight, v, bias)
        inputs = (*inputs, attention_scale, aggregation_scale, valid)
        made = pair_scores_op(*inputs, *problem, keep)
        ctx.save_for_backward(
            patches, tokens, knowledge, knowledge_scale, knowledge_gain, patch_mask,
            token_weights, knowledge_mask, *inputs, *made,
        )  # fmt: skip
        ctx.problem, ctx.counts, ctx.group = problem, counts, options.group
        return made[0]

    @staticmethod
    @no_second_derivative
    def backward(ctx: Any, grad: Tensor):
        patches, tokens, knowledge, scale, gain, patch_mask, seen, entity_mask, *pair = (
            ctx.saved_tensors
        )
        want_alpha = ctx.needs_input_grad[6]
        inputs = (tokens, knowledge, seen, entity_mask, scale, gain)
        if len(ctx.counts) == 1:
            made = pair_scores_and_rows_bwd(*inputs, grad, *pair, *ctx.problem, want_alpha)
            d_tokens, d_knowledge, d_scale, d_gain, d_weight, d_v, d_alpha, d_gamma = made
        else:
            # a row's gradient is the sum over ranks: it is whole only after the exchange
            d_rows, d_weight, d_v, d_alpha, d_gamma = pair_scores_bwd_op(
                grad, *pair, *ctx.problem, want_alpha
            )
            d_rows = reduce_rows(d_rows, ctx.group, ctx.counts)
            d_weight = reduce_rows(d_weight, ctx.group, ctx.counts)
            d_tokens, d_knowledge, d_scale, d_gain = query_rows_bwd(*inputs, d_rows)
        d_patches = unit_patches_bwd(patches, patch_mask, d_v)
        return (
            d_patches, d_tokens, None if knowledge is None else d_knowledge, d_weight, d_scale,
            d_gain, d_alpha, d_gamma, None, None, None, None, None,
        )  # fmt: skip


def _real(weights: Tensor) -> Tensor:
    """Float32 weights, greater than 0 where the given ones are."""
    return (weights > 0).float() if weights.dtype == torch.float64 else weights.float()


def _scores_by_triton(inputs: dict[str, Any], options: dict[str, Any], group: Group):
    patches, tokens, knowledge = inputs["patches"], inputs["tokens"], inputs["knowledge"]
    device = patches.device
    both_wide = patches.dtype == torch.float32 and tokens.dtype == torch.float32
    scalars = [
        scalar_tensor(name, options[name], torch.float32, device)
        for name in ("knowledge_scale", "knowledge_gain", "attention_scale", "aggregation_scale")
    ]
    token_weights, patch_mask = inputs["token_weights"], inputs["patch_mask"]
    fixed = _TritonOptions(
        options["pooling"],
        options["aggregation"],
        # float16 becomes bfloat16 as well: gradients of 1 / (B T P) would underflow it
        not both_wide or autocast_on(device.type),
        group,
    )
    with autocast_off(device.type):
        weight = row_weights(
            tokens,
            knowledge,
            token_weights,
            inputs["knowledge_weights"],
            inputs["knowledge_mask"],
            options["knowledge_share"],
            torch.float32,
        )
        made = [patches, tokens, knowledge, weight, *scalars]
        keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in made)
        scores = _TritonScores.apply(
            *made,
            patch_mask,
            None if token_weights is None else _real(token_weights.detach()),
            inputs["knowledge_mask"],
            fixed,
            keep,
        )
    return scores, weight, None if patch_mask is None else patch_mask.any(1)


def scores_by_torch(inputs: dict[str, Any], options: dict[str, Any], group: Group):
    patches, tokens, knowledge = inputs["patches"], inputs["tokens"], inputs["knowledge"]
    features = [x for x in (patches, tokens, knowledge) if x is not None]
    is_wide = any(x.dtype == torch.float64 for x in features)
    dtype = torch.float64 if is_wide else torch.float32
    scalars = {
        name: scalar_tensor(name, options[name], dtype, patches.device)
        for name in ("knowledge_scale", "knowledge_gain", "attention_scale", "aggregation_scale")
    }
    mask = inputs["patch_mask"]
    # without entities nothing depends on these: a gradient of zero, which data-parallel training
    # waits for, as the kernels give it
    idle = [] if knowledge is not None else [scalars["knowledge_scale"], scalars["knowledge_gain"]]
    with autocast_off(patches.device.type):
        rows, weight = prepare_rows_in_budget(
            tokens,
            knowledge,
            inputs["token_weights"],
            inputs["knowledge_weights"],
            inputs["knowledge_mask"],
            scalars["knowledge_scale"],
            scalars["knowledge_gain"],
            options["knowledge_share"],
            dtype,
        )
        counts = row_counts(rows, group)
        scores = pair_scores(
            gather_rows(rows, group, counts),
            gather_rows(weight, group, counts),
            unit_rows(patches, mask, dtype),
            mask,
            scalars["attention_scale"],
            scalars["aggregation_scale"],
            pooling=options["pooling"],
            aggregation=options["aggregation"],
        )
        for scalar in idle:
            if scalar.requires_grad:
                scores = scores + 0.0 * scalar
    return scores, weight, None if mask is None else mask.any(1)


def scores_and_validity(
    patches: Tensor,
    tokens: Tensor,
    knowledge: Tensor | None,
    *,
    token_weights: Tensor | None,
    knowledge_weights: Tensor | None,
    knowledge_mask: Tensor | None,
    patch_mask: Tensor | None,
    attention_scale: float | Tensor,
    knowledge_scale: float | Tensor,
    knowledge_gain: float | Tensor,
    knowledge_share: float,
    pooling: str,
    aggregation: str,
    aggregation_scale: float | Tensor,
    group: Group,
    impl: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The scores, and which images [M] and texts of this rank take part (None = all)."""
    token_weights, knowledge_weights = (
        x.float() if isinstance(x, Tensor) and x.dtype == torch.bool else x
        for x in (token_weights, knowledge_weights)
    )
    check_inputs(
        patches,
        tokens,
        knowledge,
        token_weights,
        knowledge_weights,
        knowledge_mask,
        patch_mask,
    )
    scales = {
        "attention_scale": attention_scale,
        "knowledge_scale": knowledge_scale,
        "knowledge_gain": knowledge_gain,
        "aggregation_scale": aggregation_scale,
    }
    check_options(pooling, aggregation, scales, knowledge_share)
    nothing: list[Tensor] = []
    if knowledge is not None and knowledge.shape[1] == 0:
        nothing = [x for x in (knowledge, knowledge_weights) if x is not None and x.requires_grad]
        knowledge = knowledge_weights = knowledge_mask = None
    inputs = {
        "patches": patches,
        "tokens": tokens,
        "knowledge": knowledge,
        "token_weights": token_weights,
        "knowledge_weights": knowledge_weights,
        "knowledge_mask": knowledge_mask,
        "patch_mask": patch_mask,
    }
    inputs = {name: savable(x) for name, x in inputs.items()}
    options = {
        **scales,
        "knowledge_share": float(knowledge_share),
        "pooling": pooling,
        "aggregation": aggregation,
    }
    chosen = resolve(impl, patches.device, _refusal(patches, tokens, knowledge))
    run = _scores_by_triton if chosen == "triton" else scores_by_torch
    # not is_exporting(): to the compilers of torch before 2.13 it is true of every graph they make
    is_exported = getattr(torch.compiler, "_is_exporting_flag", False)
    is_graph = torch.compiler.is_compiling() and not is_exported
    if chosen == "torch" and is_graph and patches.device.type == "cpu":
        from mlip.kernels.token_knowledge_patch.uncompiled import scores_by_torch_uncompiled

        run = scores_by_torch_uncompiled
    scores, weight, image_valid = run(inputs, options, group)
    for x in nothing:  # a gradient of no entry, which data-parallel training waits for
        scores = scores + 0.0 * x.sum()
    # without them every text has its tokens. A weight of NaN, found on a CPU alone, leaves its text
    # in the loss, which then shows it
    text_valid = None if token_weights is None else ~(weight.detach().sum(1) <= 0)
    return scores, image_valid, text_valid


def token_knowledge_patch_scores(
    patches: Tensor,
    tokens: Tensor,
    knowledge: Tensor | None = None,
    *,
    token_weights: Tensor | None = None,
    knowledge_weights: Tensor | None = None,
    knowledge_mask: Tensor | None = None,
    patch_mask: Tensor | None = None,
    attention_scale: float | Tensor = 10.0,
    knowledge_scale: float | Tensor = 10.0,
    knowledge_gain: float | Tensor = 0.5,
    knowledge_share: float = 0.25,
    pooling: str = "attention",
    aggregation: str = "mean",
    aggregation_scale: float | Tensor = 5.0,
    group: Group = None,
    impl: str = "auto",
) -> Tensor:
    """S[m, n]: how well text n, its tokens enriched by its entities, aligns with image m.

    Shapes:  patches [M, P, D], tokens [N, T, D], knowledge [N, K, D], any length; token_weights
             [N, T] >= 0 or bool, 0 = masked; knowledge_weights [N, K] >= 0 or bool, 0 = enriches
             tokens but is no row; knowledge_mask [N, K] and patch_mask [M, P] bool, True = real
    Returns: [M, N] float32 (float64 for float64 inputs); with `group` N counts the texts of all
             ranks in rank order, and no rank may be without. A text without weight or an image
             without a patch has S = 0
    Units:   scales dimensionless, numbers or 0-dim tensors that may require grad;
             aggregation_scale of "lse" from 0.02 on (asked of numbers alone)
    Raises:  ValueError for shapes, dtypes, devices, an option or an impl that cannot serve;
             weights that are negative or not finite are found on CPU tensors only (a check on a GPU
             would synchronise): there negative ones count as 0, others make NaN of a text's scores
    Source:  method section 4 (ours, after Huang et al. 2021, GLoRIA, for "context" and "lse", and
             Khattab and Zaharia 2020, arXiv 2004.12832, for "max")
    """
    scores, _, _ = scores_and_validity(
        patches,
        tokens,
        knowledge,
        token_weights=token_weights,
        knowledge_weights=knowledge_weights,
        knowledge_mask=knowledge_mask,
        patch_mask=patch_mask,
        attention_scale=attention_scale,
        knowledge_scale=knowledge_scale,
        knowledge_gain=knowledge_gain,
        knowledge_share=knowledge_share,
        pooling=pooling,
        aggregation=aggregation,
        aggregation_scale=aggregation_scale,
        group=group,
        impl=impl,
    )
    return scores
