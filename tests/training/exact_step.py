"""The whole objective at a few thousand parameters, and one step's loss and gradients of it.

Real towers (ViT, BERT), real heads, all five losses with the queue filled, divergence noise on,
dropout off. Used by the proof that ranks, micro-batches and ZeRO stages change nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mlip.batch import Batch
from mlip.dataloading.pipelines.sampler import rank_slice
from mlip.model import MLIPModel
from mlip.objective import Objective
from mlip.ranks import distributed
from mlip.settings.config import Config, load
from mlip.training import randomness
from mlip.training.engine import build_engine
from mlip.training.step import Engine

VOCABULARY, CONCEPTS, TOKENS, ENTITIES, PIXELS = 40, 12, 9, 3, 16
SETTINGS = (
    "data.channels=1",
    f"data.crop_px={PIXELS}",
    f"data.max_tokens={TOKENS}",
    "model.embed_dim=12",
    "model.heads.hidden=16",
    "model.vision.kind=vit",
    "model.vision.options={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 16, patch_size: 8, hidden_dropout_prob: 0.0, "
    "attention_probs_dropout_prob: 0.0}",
    "model.text.options={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 16, hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}",
    "loss.category.prototypes=8",
    "loss.matching.layers=1",
    "loss.matching.heads=2",
    "run.exact=true",
    "run.threads=1",
    "train.weight_decay=0.1",
    "train.lr_reference_pairs=0",
)
MEMORY_SAVERS = {
    "offload": ("train.offload=true",),
    "checkpointing": ("model.vision.checkpointing=true", "model.text.checkpointing=true"),
}
PROGRESS = 1.5  # the prototypes learn from the second epoch on


def exact_config(*overrides: str) -> Config:
    return load([], [*SETTINGS, *overrides])


def make_objective(config: Config) -> Objective:
    """Keyed by run.seed, and shaken: behind zero initial values gradients would be zero."""
    randomness.seed_everything(config.run.seed)
    vectors = torch.randn(CONCEPTS, 10)
    model = MLIPModel(config, vocab_size=VOCABULARY, concept_vectors=vectors)
    objective = Objective(config, model)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.scales.clamp_()
    return objective


def make_batch(step: int, pairs: int, rows: slice | None = None) -> Batch:
    """This rank's share of a global batch of awkward pairs.

    One report in five is empty, one pair in six shares its pair_id with another, lengths differ.
    """
    if rows is None:
        first, last = rank_slice(pairs, distributed.rank(), distributed.world_size())
        rows = slice(first, last)
    generator = torch.Generator().manual_seed(100 + step)
    number = torch.arange(pairs)
    length = torch.randint(2, TOKENS - 1, (pairs,), generator=generator)
    length = torch.where(number % 5 == 4, 0, length)
    position = torch.arange(TOKENS)
    content = (position >= 1) & (position <= length[:, None])
    entities = torch.randint(0, CONCEPTS, (pairs, ENTITIES), generator=generator)
    counts = torch.where(length > 0, number % (ENTITIES + 1), 0)
    tensors = (
        torch.randn(pairs, 1, PIXELS, PIXELS, generator=generator),
        torch.randint(5, VOCABULARY, (pairs, TOKENS), generator=generator),
        position <= length[:, None] + 1,
        content,
        entities,
        torch.randint(0, 3, (pairs, ENTITIES), generator=generator),
        torch.arange(ENTITIES) < counts[:, None],
        torch.where(number % 6 == 5, number - 3, number) + 1000 * step,
        number + step * pairs,
        number,
    )
    return Batch(*(tensor[rows] for tensor in tensors))


def exact_engine(
    pairs: int, *, engine: str = "plain", stage: int = 0, passes: int = 1, more: tuple = ()
) -> Engine:
    """An engine whose ranks cut their share into this many micro-batches (texts: one size more).

    engine  "plain", "deepspeed", or "plain64": plain in float64; behind it, each with a plus,
            what of MEMORY_SAVERS is on
    """
    engine, *savers = engine.split("+")
    largest = -(-pairs // distributed.world_size())
    micro = -(-largest // passes) if passes > 1 else 0
    config = exact_config(
        f"train.engine={engine.removesuffix('64')}",
        f"train.zero_stage={stage}",
        f"batch.global_pairs={pairs}",
        f"batch.micro_images={micro}",
        # another size than the images': nothing may tie the two together
        f"batch.micro_texts={micro + (1 if micro > 1 else 0)}",
        *(setting for saver in savers for setting in MEMORY_SAVERS[saver]),
        *more,
    )
    objective = make_objective(config).to(distributed.device())
    return build_engine(objective.double() if engine == "plain64" else objective, config)


def loss_and_gradients(engine: Engine, pairs: int) -> dict[str, Any]:
    """Of the second step, when the category queue is full: total, terms, gradients by name.

    The gradients are what the optimiser is about to get: averaged over ranks, before clipping.
    """

    def share(step: int) -> Batch:
        batch = make_batch(step, pairs)
        dtype = next(iter(engine.parameters.values())).dtype
        return replace(batch, image=batch.image.to(dtype)).to(engine.device)

    engine.start_step(share(0), step=0, progress=PROGRESS, lr=0.0).result()
    engine.objective.train()
    batch = share(1)
    total, terms = engine._forward(batch, 1, PROGRESS)
    with counted_reductions() as reductions:
        engine._backward(total)
    return {
        "total": float(total.detach()),
        "terms": {name: float(value) for name, value in terms.items()},
        "gradients": {n: g.detach().cpu().clone() for n, g in gradients_of(engine).items()},
        "reductions": len(reductions),
    }


@contextlib.contextmanager
def counted_reductions() -> Iterator[list[str]]:
    """Names of the reducing collectives that are called meanwhile, DeepSpeed's and our own."""
    called: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            called.append(name)
            return function(*args, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor"):
            patch.setattr(dist, name, noted(name, getattr(dist, name)))
        yield called


def gradients_of(engine: Engine) -> dict[str, Tensor]:
    """Whole gradients averaged over ranks, between backward and update; a collective call."""
    if engine.name == "plain":
        grads = {n: torch.zeros_like(p) for n, p in engine.parameters.items()}
        for name, parameter in engine.parameters.items():
            if parameter.grad is not None:
                grads[name].copy_(parameter.grad)
        distributed.average_(list(grads.values()))
        return grads
    from deepspeed.utils import safe_get_full_grad

    found = {}
    for name, parameter in engine.parameters.items():
        grad = safe_get_full_grad(parameter)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        found[name] = torch.zeros(shape) if grad is None else grad.view(shape)
    return found


def whole_batch(pairs: int, *, double: bool = False) -> dict[str, Any]:
    """The oracle: one process, one pass, plain torch; in float64 where asked."""
    config = exact_config(f"batch.global_pairs={pairs}")
    objective = make_objective(config)
    if double:
        objective = objective.double()
    for step in range(2):
        batch = make_batch(step, pairs, slice(None))
        if double:
            batch = replace(batch, image=batch.image.double())
        total, terms = objective(batch, step=step, progress=PROGRESS)
    total.backward()
    return {
        "total": float(total.detach()),
        "terms": {name: float(value) for name, value in terms.items()},
        "gradients": {
            n: torch.zeros_like(p) if p.grad is None else p.grad
            for n, p in objective.named_parameters()
            if p.requires_grad
        },
    }
