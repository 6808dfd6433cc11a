"""The same training step in other ways: each a context that changes a ready engine and undoes it.

`NotAvailable` says why a way cannot be measured here; that is a row too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.providers import pooled_scores
from mlip.encoders.attention import require_usable
from mlip.encoders.residual import RoundedLayerNorm
from mlip.kernels._dispatch import DISABLE_VARIABLE
from mlip.kernels.token_knowledge_patch.rows_reference import prepare_rows

Change = Callable[[Any], contextlib.AbstractContextManager[None]]


class NotAvailable(Exception):
    """This way of computing the step does not exist on this machine, or at all."""


@contextlib.contextmanager
def as_it_is(engine: Any) -> Iterator[None]:
    yield


@contextlib.contextmanager
def torch_operators(engine: Any) -> Iterator[None]:
    """Our operators in their own plain-torch form: tiled, at most 512 MiB beside the inputs."""
    before = os.environ.get(DISABLE_VARIABLE)
    os.environ[DISABLE_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[DISABLE_VARIABLE]
        else:
            os.environ[DISABLE_VARIABLE] = before


def flat_scores(
    model: Any,
    patches: Tensor,
    tokens: Tensor,
    content_mask: Tensor,
    attention: Tensor | None,
    knowledge: Any,
    *,
    group: Any = None,
) -> Tensor:
    """model.local_scores by one flat product of all rows with all patches: what one writes first.

    The rows are made as the operator's reference makes them, then rounded to the towers' type.
    """
    local, scales = model.config.loss.local_alignment, model.scales
    rows, weight = prepare_rows(
        tokens,
        knowledge.entities,
        model.token_weights(content_mask, attention),
        knowledge.row_weights,
        knowledge.mask,
        scales.knowledge_scale,
        scales.knowledge_gain,
        local.knowledge_share,
        torch.float32,
    )
    case = {"pooling": local.pooling, "alpha": scales.attention_scale}
    with torch.autocast(patches.device.type, enabled=False):
        return pooled_scores(patches, rows.to(patches.dtype), weight, case, wide=True)


@contextlib.contextmanager
def eager_operators(engine: Any) -> Iterator[None]:
    """The local score by one flat product, everything else of ours in plain torch."""
    model = engine.objective.model

    def scores(*features: Any, **more: Any) -> Tensor:
        return flat_scores(model, *features, **more)

    model.local_scores = scores
    try:
        with torch_operators(engine):
            yield
    finally:
        del model.local_scores


def attention_by(impl: str) -> Change:
    @contextlib.contextmanager
    def change(engine: Any) -> Iterator[None]:
        try:
            require_usable(impl)
        except ValueError as error:
            kind = "not installed" if "not installed" in str(error) else "not available"
            raise NotAvailable(f"{kind}: {str(error).partition(';')[0]}") from error
        model = engine.objective.model
        configs = [backbone.config for backbone in backbones(model)]
        before = [config._attn_implementation for config in configs]
        for config in configs:
            config._attn_implementation = f"mlip_{impl}"
        try:
            yield
        finally:
            for config, name in zip(configs, before, strict=True):
                config._attn_implementation = name

    return change


@contextlib.contextmanager
def padded_reports(engine: Any) -> Iterator[None]:
    """Without model.text.packed: the text tower's layers see padding too."""
    text = engine.objective.model.text
    before, text.is_packed = text.is_packed, False
    try:
        yield
    finally:
        text.is_packed = before


@contextlib.contextmanager
def float32_residual(engine: Any) -> Iterator[None]:
    """train.residual=fp32."""
    model = engine.objective.model
    embeddings = [t.get_submodule("embeddings") for t in backbones(model)]
    hooks = [dict(module._forward_hooks) for module in embeddings]  # of round_residual alone
    norms = [module for module in model.modules() if isinstance(module, RoundedLayerNorm)]
    for module in embeddings:
        module._forward_hooks.clear()
    for module in norms:
        module.__class__ = torch.nn.LayerNorm
    model.round_weights_together()  # without those of the norms
    try:
        yield
    finally:
        for module, own in zip(embeddings, hooks, strict=True):
            module._forward_hooks.update(own)
        for module in norms:
            module.__class__ = RoundedLayerNorm
        model.round_weights_together()


def compiled(mode: str | None = None, *, by_layer: bool = False) -> Change:
    """torch.compile of both towers; "reduce-overhead" replays CUDA graphs.

    by_layer: of each transformer layer instead, whose graph all layers of a tower share: compiled
    in a fraction of the time, with nothing fused across layers
    """

    @contextlib.contextmanager
    def change(engine: Any) -> Iterator[None]:
        if mode == "reduce-overhead" and engine.device.type != "cuda":
            raise NotAvailable("not available: CUDA graphs need a GPU")
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = engine.objective.model
        modules = layers(model) if by_layer else model.towers()
        model.round_weights_together(False)
        for module in modules:
            # as train.compile does it; a CUDA graph is of one size
            module.compile(mode=mode, dynamic=None if mode is None else False)
        try:
            yield
        finally:
            for module in modules:
                module._compiled_call_impl = None
            torch._dynamo.reset()
            model.round_weights_together()

    return change


def backbones(model: Any) -> tuple[Any, Any]:
    """transformers' part of each tower."""
    return model.text.backbone, model.vision.tower.backbone


def layers(model: Any) -> list[torch.nn.Module]:
    """Of both towers, each of which has one kind."""
    return [*model.text.backbone.encoder.layer, *model.vision.tower.backbone.layers]


def padded_and_compiled(mode: str | None = None) -> Change:
    """Padding gives every batch the same sizes, which a CUDA graph needs."""

    @contextlib.contextmanager
    def change(engine: Any) -> Iterator[None]:
        with padded_reports(engine), compiled(mode)(engine):
            yield

    return change


def graph_breaks() -> int:
    """Places at which torch.compile has left a graph since it was last reset."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def unavailable(reason: str) -> Change:
    @contextlib.contextmanager
    def change(engine: Any) -> Iterator[None]:
        raise NotAvailable(f"not available: {reason}")
        yield

    return change


OURS = "ours"
VARIANTS: dict[str, Change] = {
    OURS: as_it_is,
    "operators in torch, tiled": torch_operators,
    "operators in torch, one flat product": eager_operators,
    "attention=eager": attention_by("eager"),
    "attention=xformers": attention_by("xformers"),
    "attention=varlen": attention_by("varlen"),
    "residual=fp32": float32_residual,
    "reports padded": padded_reports,
    # minutes of compiling each: those that a run can have first
    "towers compiled": compiled(),
    "layers compiled": compiled(by_layer=True),
    "reports padded, towers compiled": padded_and_compiled(),
    "reports padded, towers compiled, CUDA graphs": padded_and_compiled("reduce-overhead"),
    "whole step as one CUDA graph": unavailable(
        "a step's number keys its draws, and its epoch and rate are numbers of the host"
    ),
}
# ways that need an engine of their own: its settings
ENGINES = {
    "DeepSpeed, ZeRO-1": ("train.engine=deepspeed", "train.zero_stage=1"),
    "DeepSpeed, ZeRO-2": ("train.engine=deepspeed", "train.zero_stage=2"),
}
COMPILES = tuple(name for name in VARIANTS if "compiled" in name)
