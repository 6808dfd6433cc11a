"""Oracles in float64: the formulas of the kernels as loops over pairs, and awkward inputs."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip.kernels.info_nce import info_nce_loss
from mlip.kernels.token_knowledge_patch import (
    contrastive_loss_from_scores,
    token_knowledge_patch_loss,
    token_knowledge_patch_scores,
)

SCALES = ("attention_scale", "knowledge_scale", "knowledge_gain", "aggregation_scale")


def scores(inputs: dict[str, Any], **options: Any) -> Tensor:
    """S of token_knowledge_patch_scores, one pair at a time, through autograd."""
    patches, tokens, knowledge = inputs["patches"], inputs["tokens"], inputs.get("knowledge")
    settings = {
        "attention_scale": 10.0,
        "knowledge_scale": 10.0,
        "knowledge_gain": 0.5,
        "knowledge_share": 0.25,
        "aggregation_scale": 5.0,
        "pooling": "attention",
        "aggregation": "mean",
    }
    settings |= {k: v for k, v in inputs.items() if k in SCALES} | options
    out = [
        torch.stack([_pair(inputs, settings, knowledge, m, n) for n in range(len(tokens))])
        for m in range(len(patches))
    ]
    return torch.stack(out)


def _pair(inputs: dict[str, Any], settings: dict[str, Any], knowledge, m: int, n: int) -> Tensor:
    patches, tokens = inputs["patches"], inputs["tokens"]
    u = inputs.get("token_weights")
    u = torch.ones_like(tokens[n, :, 0]) if u is None else u[n]
    keep = u > 0
    w = F.normalize(tokens[n][keep], dim=-1, eps=1e-6)
    rows, weights = w, u[keep]
    if len(weights):
        weights = weights / weights.sum()
    if knowledge is not None and knowledge.shape[1]:
        mask = inputs.get("knowledge_mask")
        mask = torch.ones(knowledge.shape[1], dtype=torch.bool) if mask is None else mask[n]
        s = inputs.get("knowledge_weights")
        s = torch.ones_like(knowledge[n, :, 0]) if s is None else s[n]
        e = F.normalize(knowledge[n][mask], dim=-1, eps=1e-6)
        if len(e) and len(w):
            share = torch.softmax(settings["knowledge_scale"] * w @ e.T, -1)
            rows = F.normalize(w + settings["knowledge_gain"] * share @ e, dim=-1, eps=1e-6)
        on = s[mask] > 0
        e, s = e[on], s[mask][on]
        if len(s):
            k = settings["knowledge_share"] if len(weights) else 1.0
            rows = torch.cat([rows, e])
            weights = torch.cat([(1 - k) * weights, k * s / s.sum()])
    real = inputs.get("patch_mask")
    v = patches[m] if real is None else patches[m][real[m]]
    if not len(v) or not len(weights):
        return patches.new_zeros(()) + 0.0
    v = F.normalize(v, dim=-1, eps=1e-6)
    x = rows @ v.T
    a = torch.softmax(settings["attention_scale"] * x, -1)
    if settings["pooling"] == "attention":
        r = (a * x).sum(-1)
    elif settings["pooling"] == "context":
        context = a @ v
        r = (rows * context).sum(-1) / context.norm(dim=-1).clamp(min=1e-6)
    else:
        r = x.max(-1).values
    if settings["aggregation"] == "mean":
        return (weights * r).sum()
    gamma = settings["aggregation_scale"]
    on = weights > 0  # knowledge_share 0 or 1 leaves rows of weight 0
    return torch.log((weights[on] * torch.exp(gamma * r[on])).sum()) / gamma


def contrastive(
    z: Tensor,
    pair_ids: Tensor | None = None,
    image_valid: Tensor | None = None,
    text_valid: Tensor | None = None,
) -> Tensor:
    """Symmetric cross-entropy of square logits over the anchors, by torch's own log_softmax."""
    count = len(z)
    yes = torch.ones(count, dtype=torch.bool)
    image_valid = yes if image_valid is None else image_valid
    text_valid = yes if text_valid is None else text_valid
    same = torch.eye(count, dtype=torch.bool)
    drop = ~same & (pair_ids[:, None] == pair_ids if pair_ids is not None else ~yes)
    z = z.masked_fill(drop | ~image_valid[:, None] | ~text_valid, -math.inf)
    anchors = (image_valid & text_valid).nonzero()[:, 0].tolist()
    if not anchors:
        return z.new_zeros(())
    terms = [
        (-z[i].log_softmax(0)[i] - z[:, i].log_softmax(0)[i]) / (2 * len(anchors)) for i in anchors
    ]
    return torch.stack(terms).sum()


def make_inputs(
    images: int = 3,
    texts: int = 4,
    patches: int = 5,
    tokens: int = 6,
    entities: int = 3,
    dim: int = 8,
    *,
    seed: int = 0,
    masks: bool = True,
) -> dict[str, Any]:
    """Random float64 inputs; with masks: an empty text, one without entities, an empty image."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    made: dict[str, Any] = {
        "patches": normal(images, patches, dim),
        "tokens": normal(texts, tokens, dim),
    }
    if entities:
        made["knowledge"] = normal(texts, entities, dim)
    if masks:
        u = torch.rand(texts, tokens, generator=g, dtype=torch.float64) + 0.1
        u[torch.rand(texts, tokens, generator=g) < 0.3] = 0.0
        u[-1] = 0.0  # no token: its entities carry the text, where it has any
        made["token_weights"] = u
        made["patch_mask"] = torch.rand(images, patches, generator=g) > 0.3
        made["patch_mask"][:, 0] = True
        made["patch_mask"][-1] = False
        if entities:
            s = torch.rand(texts, entities, generator=g, dtype=torch.float64) + 0.1
            s[0, 0] = 0.0  # enriches, but is no row
            mask = torch.rand(texts, entities, generator=g) > 0.2
            mask[0] = True
            mask[1] = False
            if texts > 2:
                s[2] = 0.0
            made["knowledge_weights"], made["knowledge_mask"] = s, mask
    return made


def poisoned(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with NaN and Inf wherever a mask or a zero weight hides a row."""
    out = dict(inputs)
    hidden = {
        "patches": ~inputs["patch_mask"],
        "tokens": inputs["token_weights"] == 0,
        "knowledge": ~inputs["knowledge_mask"],
    }
    for name, where in hidden.items():
        value = inputs[name].clone()
        value[where] = math.nan
        value[..., 0][where] = math.inf
        out[name] = value
    return out


def leaves(inputs: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Copies whose floating tensors are leaves that require grad."""
    return {
        name: value.detach().to(dtype).clone().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def leaves_as_they_are(inputs: dict[str, Any]) -> dict[str, Any]:
    """`leaves` in the dtypes that are there."""
    return {
        k: v.detach().clone().requires_grad_() if v.is_floating_point() else v
        for k, v in inputs.items()
    }


def gradients(value: Tensor, inputs: dict[str, Any], seed: int = 1) -> dict[str, Tensor]:
    """Gradients of a fixed random contraction of `value` in every leaf; zeros where none."""
    g = torch.Generator().manual_seed(seed)
    direction = torch.randn(value.shape, generator=g, dtype=torch.float64).to(value)
    wanted = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}
    grads = torch.autograd.grad(
        (value * direction).sum(), list(wanted.values()), allow_unused=True, retain_graph=True
    )
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(wanted.items(), grads, strict=True)
    }


# orders in memory of [batch, places, D]: feature maps, a sequence first, features first
LAYOUTS = [(0, 2, 1), (1, 0, 2), (2, 0, 1)]


def laid_out(x: Tensor, order: tuple[int, int, int]) -> Tensor:
    """The same numbers with the dimensions in this order in memory."""
    back = [order.index(dim) for dim in range(3)]
    return x.permute(order).contiguous().permute(back)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth (absolute where it is 0)."""
    value, truth = value.detach().double(), truth.detach().double()
    size = truth.norm().item()
    return ((value - truth).norm() / (size if size > 0 else 1.0)).item()


def scaled_half_gradients(impl: str, scale: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of projections whose float16 outputs go into the loss: by GradScaler, in float64.

    scale: GradScaler's; unscale_ has divided the gradients by it again
    """
    inputs = make_inputs(3, 3, 20, 5, 2, 16, seed=61)
    names = ("patches", "tokens", "knowledge")
    results = []
    for dtype in (torch.float16, torch.float64):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        made = {k: v.to(wide) if v.is_floating_point() else v for k, v in inputs.items()}
        towers = {name: torch.eye(16, dtype=wide).requires_grad_() for name in names}
        made |= {name: (made[name].half().to(wide) @ towers[name]).to(dtype) for name in names}
        is_half = dtype == torch.float16
        loss = token_knowledge_patch_loss(
            **made, logit_scale=10.0, impl=impl if is_half else "torch"
        )
        if is_half:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            optimizer = torch.optim.SGD(towers.values(), lr=0.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
        else:
            loss.backward()
        results.append({name: tower.grad for name, tower in towers.items()})
    return results[0], results[1]


def nearly_collapsed() -> list[Tensor]:
    """Float32 unit rows of images and of texts [32, 64] whose cosines are all within 3 % of 1."""
    g = torch.Generator().manual_seed(0)
    base = F.normalize(torch.randn(1, 64, generator=g), dim=-1)
    return [F.normalize(base + torch.randn(32, 64, generator=g) / 80, dim=-1) for _ in "xy"]


def assert_inference_mode_serves(impl: str) -> None:
    """Losses and gradients with everything but one side made in inference mode, of which autograd
    saves nothing, are those of ordinary tensors: as of a frozen tower."""
    g = torch.Generator().manual_seed(3)
    tower = torch.randn(16, 16, generator=g)
    plain: dict[str, Any] = {
        k: v.float() if v.is_floating_point() else v for k, v in make_inputs(4, 4, dim=16).items()
    }
    plain |= {name: torch.tensor(3.0) for name in (*SCALES, "logit_scale")}
    plain["pair_ids"] = torch.tensor([0, 1, 0, 2])
    unit = F.normalize(torch.randn(4, 16, generator=g), dim=-1)
    results = []
    for is_frozen in (True, False):
        with torch.inference_mode(is_frozen):
            made = {name: x.clone() for name, x in plain.items()}
            image, valid = unit.clone(), torch.tensor([True, True, False, True])
        more: dict[str, Any] = {"aggregation": "lse", "impl": impl}
        for pooling in ("attention", "context", "max"):
            for own in ("tokens", "patches"):
                x = plain[own].clone().requires_grad_()
                loss = token_knowledge_patch_loss(**made | {own: x}, pooling=pooling, **more)
                results.append([loss, *torch.autograd.grad(loss, [x])])
        rest = {name: made[name] for name in ("logit_scale", "pair_ids")}
        x = (unit @ tower).requires_grad_()
        loss = info_nce_loss(image, F.normalize(x, dim=-1), made["logit_scale"],
                             pair_ids=made["pair_ids"], impl=impl)  # fmt: skip
        results.append([loss, *torch.autograd.grad(loss, [x])])
        loss = contrastive_loss_from_scores(x @ unit.T, image_valid=valid, text_valid=valid, **rest)
        results.append([loss, *torch.autograd.grad(loss, [x])])
        # and what no gradient is asked of, in the mode itself
        with torch.inference_mode(is_frozen):
            results.append([token_knowledge_patch_loss(**made, **more)])
    half = len(results) // 2
    for got, want in zip(results[:half], results[half:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def assert_broken_inputs_show(impl: str, device: str, pooling: str, aggregation: str) -> None:
    """NaN or Inf in one real row makes NaN of the scores that need it, and of no other.

    A trainer skips a step whose loss is not finite: a finite one would train on the rest.
    """
    inputs = make_inputs(2, 2, 20, 5, 2, 16, seed=17)
    inputs["patch_mask"][:, 7:9] = False
    inputs["patch_mask"][:, 3] = True
    inputs["token_weights"][:, 0] = 1.0
    inputs["knowledge_mask"][1] = True
    # of the larger scale a row's maximum is subtracted
    alpha = 80.0 if aggregation == "mean" else 10.0
    options: dict[str, Any] = {"pooling": pooling, "aggregation": aggregation}
    options["attention_scale"] = alpha
    for name in ("patches", "tokens", "knowledge"):
        for bad in (math.nan, -math.inf):
            made = {
                k: v.float().to(device) if v.is_floating_point() else v.to(device)
                for k, v in inputs.items()
            }
            made[name][1, {"patches": 3, "tokens": 0, "knowledge": 1}[name], 2] = bad
            value = token_knowledge_patch_scores(**made, impl=impl, **options)
            broken = torch.zeros(2, 2, dtype=torch.bool)
            broken[(1, ...) if name == "patches" else (..., 1)] = True
            assert torch.equal(value.isnan().cpu(), broken), (name, bad, value)
            made = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in made.items()}
            loss = token_knowledge_patch_loss(**made, logit_scale=10.0, impl=impl, **options)
            assert loss.isnan() and gradients(loss, made)[name].isnan().any(), (name, bad)


def assert_broken_weights_show(impl: str, device: str, aggregation: str, bad: float) -> None:
    """A weight of NaN or Inf makes NaN of its text's scores, and of the loss."""
    inputs = make_inputs(2, 3, 20, 5, 2, 16, seed=17)
    inputs["patch_mask"][-1, 0] = True
    inputs = {
        k: v.float().to(device) if v.is_floating_point() else v.to(device)
        for k, v in inputs.items()
    }
    options: dict[str, Any] = {"impl": impl, "aggregation": aggregation}
    for name in ("token_weights", "knowledge_weights"):
        broken = inputs | {name: inputs[name].clone()}
        broken[name][0, 1] = bad
        value = token_knowledge_patch_scores(**broken, **options)
        assert value[:, 0].isnan().all() and not value[:, 1:].isnan().any(), (name, value)
        square = {k: v if k in ("patches", "patch_mask") else v[:2] for k, v in broken.items()}
        assert token_knowledge_patch_loss(**square, logit_scale=10.0, **options).isnan(), name


# below, at, between, and above the bounds where a kernel takes another way
LEARNED_SCALES = (0.5, 1.0, 10.0, 40.0, 41.0, 75.0, 76.0, 200.0)


def learned_scale_errors(
    alpha: float,
    features: torch.dtype,
    device: str,
    dim: int,
    patches: int,
    pooling: str = "attention",
) -> dict[str, float]:
    """Relative errors of the loss and all gradients with a learned attention scale, by Triton.

    Tokens are like patches of their image, so that no gradient is a sum that nearly cancels.
    """
    g = torch.Generator().manual_seed(71)
    made = torch.randn(6, patches, dim, generator=g)
    tokens = torch.randn(6, 16, dim, generator=g) + 2.0 * made[:, :16]
    knowledge = torch.randn(6, 3, dim, generator=g)
    weights = (torch.rand(6, 16, generator=g) < 0.7).float()
    weights[:, 0] = 1.0
    narrow = {"patches": made, "tokens": tokens, "knowledge": knowledge}
    results = []
    for impl, dtype in (("triton", features), ("torch", torch.float64)):
        wide = torch.float64 if impl == "torch" else torch.float32
        inputs: dict[str, Any] = {
            name: x.to(features).to(device, dtype).requires_grad_() for name, x in narrow.items()
        }
        scale = torch.tensor(alpha, dtype=wide, device=device, requires_grad=True)
        loss = token_knowledge_patch_loss(
            **inputs, token_weights=weights.to(device, wide), attention_scale=scale,
            logit_scale=20.0, pooling=pooling, impl=impl,
        )  # fmt: skip
        inputs["attention_scale"] = scale
        results.append({"loss": loss.detach(), **gradients(loss, inputs)})
    return {name: relative_error(results[0][name], want) for name, want in results[1].items()}
