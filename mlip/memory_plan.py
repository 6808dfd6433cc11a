"""The memory that a configuration needs on one rank, before the run: `mlip doctor --plan CONFIG`.

Parameters are counted; activations are measured, by the bytes that autograd keeps of two and three
rows of the real towers; the losses are measured at three batch sizes and extrapolated by their
quadratic growth. The towers run on the CPU, so no GPU and no data are needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlip.batch import Batch, Features
from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.vectors import knowledge_vectors
from mlip.model import MLIPModel
from mlip.objective import Objective
from mlip.ranks import distributed
from mlip.saved.resumed_run import open_resumed
from mlip.saved.run_vocabulary import given_words
from mlip.settings.config import Config, Knowledge
from mlip.system.machine import usable_memory
from mlip.training.grad_cache import num_micro_batches
from mlip.training.muon import matrix_names
from mlip.training.plain_engine import rounds_weights_together
from mlip.training.step import fixed_buffers

GIB = 2**30
_SPARE = 0.10  # of the memory: fragmentation, workspaces, the framework's own
# elements: its default reduce_bucket_size, allocated at stages 1, 2
_DEEPSPEED_BUCKET = 500_000_000
_LOSS_SIZES = (8, 16, 32)


@dataclass(frozen=True)
class Measured:
    """What one model costs; bytes."""

    parameters: int  # elements
    trainable: int
    matrices: int  # those of the trainable that Muon keeps one moment of; 0 with AdamW
    buffers: int  # and once more those that a step changes: a skipped one puts them back
    image_row: float  # kept for the backward pass, of one image
    text_row: float
    image_outputs: float  # embedding and patches of one image, kept whatever the cache
    text_outputs: float
    losses: tuple[float, float, float]  # a + b N + c N^2


@dataclass(frozen=True)
class Plan:
    """Bytes on one rank by what they are for, and the memory there is."""

    parts: dict[str, float]
    host_parts: dict[str, float]  # in host memory, where the optimiser is offloaded
    memory: float
    ranks: int

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.memory * (1.0 - _SPARE)


class _Kept:
    """Counts the bytes that autograd saves inside, each storage once and parameters not at all."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._own = {t.untyped_storage().data_ptr() for t in module.parameters()}
        self._own |= {t.untyped_storage().data_ptr() for t in module.buffers()}
        self._seen: dict[int, int] = {}
        self._hold: list[Tensor] = []  # a freed storage's address would be used again

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own and storage.data_ptr() not in self._seen:
            self._seen[storage.data_ptr()] = storage.nbytes()
            self._hold.append(tensor.detach())
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._seen.values())


def _bytes_kept(module: torch.nn.Module, run: Callable[[], Any]) -> float:
    kept = _Kept(module)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        out = run()
    del out
    return float(kept.bytes)


def _batch(config: Config, rows: int, vocab_size: int, concepts: int) -> Batch:
    """Rows of full length: the plan is for the worst batch."""
    data, generator = config.data, torch.Generator().manual_seed(0)
    size, tokens, entities = data.crop_px, data.max_tokens, data.max_entities
    number = torch.arange(rows)
    yes = torch.ones(rows, tokens, dtype=torch.bool)
    return Batch(
        image=torch.randn(rows, data.channels, size, size, generator=generator),
        token_ids=torch.randint(0, vocab_size, (rows, tokens), generator=generator),
        token_mask=yes,
        content_mask=yes,
        entity_ids=torch.randint(0, concepts, (rows, entities), generator=generator),
        entity_state=torch.zeros(rows, entities, dtype=torch.int64),
        entity_mask=torch.ones(rows, entities, dtype=torch.bool),
        pair_id=number,
        global_index=number,
        row_index=number,
    )


def _vectors(settings: Knowledge) -> Tensor:
    """Concept vectors of the run's shape; a user's table has a width of its own."""
    table = load_concepts(settings.lexicon)
    if settings.vectors in ("tfidf", "text_tower"):
        return torch.zeros(len(table), settings.dim)
    return knowledge_vectors(table, settings)


def measure(config: Config) -> Measured:
    """Build the model of `config` on the CPU and run a few rows of it.

    Raises:  ValueError for towers or vectors that cannot be built; CheckpointError where the run of
             run.dir goes on from a checkpoint that is damaged
    """
    if config.model.attention == "xformers":  # for GPUs alone; what it keeps, sdpa keeps
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, attention="sdpa")
        )
    resumed = open_resumed(config)  # its towers may have begun with folders that are gone
    if resumed is not None:
        config, vocab_size = resumed.config, resumed.vocab_size
        vectors = torch.zeros(resumed.concepts)
    else:
        vocab_size = given_words(config) or config.data.vocab_size
        vectors = _vectors(config.knowledge)
    concepts = len(vectors)
    torch.manual_seed(0)
    model = MLIPModel(config, vocab_size=vocab_size, concept_vectors=vectors)
    whole = dataclasses.replace(config, run=dataclasses.replace(config.run, exact=False))
    objective = Objective(whole, model).train()

    def images(rows: int) -> float:
        batch = _batch(config, rows, vocab_size, concepts)
        return _bytes_kept(model, lambda: model.encode_image(batch.image))

    def texts(rows: int) -> float:
        batch = _batch(config, rows, vocab_size, concepts)
        inputs = (batch.token_ids, batch.token_mask, batch.content_mask)
        return _bytes_kept(model, lambda: model.encode_text(*inputs))

    # two rows at least: batch statistics need them; the difference leaves out what is paid once
    image_row, text_row = images(3) - images(2), texts(3) - texts(2)
    with torch.no_grad():
        batch = _batch(config, 2, vocab_size, concepts)
        image = model.encode_image(batch.image)
        text = model.encode_text(batch.token_ids, batch.token_mask, batch.content_mask)
    matrices = matrix_names(objective) if config.train.optimizer == "muon" else set()
    fixed = fixed_buffers(objective)
    return Measured(
        parameters=sum(p.numel() for p in objective.parameters()),
        trainable=sum(p.numel() for p in objective.parameters() if p.requires_grad),
        matrices=sum(p.numel() for n, p in objective.named_parameters() if n in matrices),
        buffers=sum(
            b.numel() * b.element_size() * (1 if name in fixed else 2)
            for name, b in objective.named_buffers()
        ),
        image_row=image_row,
        text_row=text_row,
        image_outputs=4.0 * (image.embedding[0].numel() + image.patches[0].numel()),
        text_outputs=4.0 * (text.embedding[0].numel() + text.tokens[0].numel()),
        losses=_measure_losses(objective, config, (image, text), vocab_size, concepts),
    )


def _measure_losses(
    objective: Objective, config: Config, outputs: Any, vocab_size: int, concepts: int
) -> tuple[float, float, float]:
    """Bytes kept by the losses at three batch sizes, as a + b N + c N^2; towers left out."""
    image, text = outputs

    def of(pairs: int) -> float:
        batch = _batch(config, pairs, vocab_size, concepts)

        def features(tensor: Tensor) -> Tensor:
            made = torch.randn(pairs, *tensor.shape[1:], generator=torch.Generator().manual_seed(1))
            return made.requires_grad_()

        made_image = dataclasses.replace(
            image, embedding=features(image.embedding), patches=features(image.patches)
        )
        made_text = dataclasses.replace(
            text,
            embedding=features(text.embedding),
            tokens=features(text.tokens),
            attention=None if text.attention is None else text.attention[:1].expand(pairs, -1),
        )
        encode = objective.encode
        knowledge = objective.model.encode_knowledge(
            batch.entity_ids, batch.entity_state, batch.entity_mask
        )
        made = Features(image=made_image, text=made_text, knowledge=knowledge)
        objective.encode = lambda batch: made  # type: ignore[method-assign]
        try:
            return _bytes_kept(objective, lambda: objective(batch, step=0, progress=2.0))
        finally:
            objective.encode = encode  # type: ignore[method-assign]

    sizes = np.array(_LOSS_SIZES, dtype=float)
    c, b, a = np.polyfit(sizes, [of(int(n)) for n in sizes], 2)
    return max(0.0, float(a)), max(0.0, float(b)), max(0.0, float(c))


def plan(config: Config, measured: Measured, *, ranks: int, memory: float, is_gpu: bool) -> Plan:
    """Bytes of one rank; parameters and moments are float32 (bf16 is autocast in the model)."""
    train, batch = config.train, config.batch
    is_plain = _is_plain(config, ranks)
    stage = 0 if is_plain else train.zero_stage
    rows = -(-batch.global_pairs // ranks)
    trainable = measured.trainable
    held = {
        "parameters": 4.0 * measured.parameters / (ranks if stage == 3 else 1) + measured.buffers,
        "gradients": 4.0 * trainable / (ranks if stage >= 2 else 1),
    }
    if is_plain and rounds_weights_together(config):
        held["gradients"] += 2.0 * trainable  # until they are widened together
    moments = (8.0 * trainable - 4.0 * measured.matrices) / (ranks if stage >= 1 else 1)
    # from stage 1 on DeepSpeed keeps a master of its part beside the parameters
    masters = 4.0 * trainable / ranks if stage >= 1 else 0.0
    average = 4.0 * trainable / (ranks if stage >= 1 else 1) if train.ema_decay > 0 else 0.0
    optimiser = {"optimiser": moments + masters, "average (EMA)": average}
    held_host = optimiser if train.offload and is_gpu else {}
    if not held_host:
        held |= optimiser
    if stage in (1, 2) and is_gpu:
        held["DeepSpeed's buckets"] = 4.0 * _DEEPSPEED_BUCKET
    if stage == 3:
        # what is gathered at a time: at most the largest layer and what is fetched ahead
        held["gathered parameters"] = 4.0 * min(measured.parameters, 50_000_000)
    held["activations"] = _activations(config, measured, rows)
    a, b, c = measured.losses
    held["losses"] = a + b * batch.global_pairs + c * batch.global_pairs * rows
    pixels = config.data.channels * config.data.crop_px**2
    held["batches ahead"] = 4.0 * pixels * rows * (1 if is_gpu else 1 + config.data.prefetch)
    return Plan({k: v for k, v in held.items() if v > 0}, held_host, memory, ranks)


def _is_plain(config: Config, ranks: int) -> bool:
    """Whether plain torch trains, which shares nothing out whatever train.zero_stage says."""
    engine = config.train.engine
    return engine == "plain" or (engine == "auto" and ranks == 1)


def _activations(config: Config, measured: Measured, rows: int) -> float:
    """Outputs of all rows, and activations of all rows or of one micro-batch at a time."""
    outputs = rows * (measured.image_outputs + measured.text_outputs)
    kept, passing = 0.0, 0.0
    for size, row in (
        (config.batch.micro_images, measured.image_row),
        (config.batch.micro_texts, measured.text_row),
    ):
        if num_micro_batches(rows, size) == 1:
            kept += rows * row
        else:  # dropped after the forward pass: one micro-batch is made again at a time
            passing = max(passing, min(size, rows) * row)
    return outputs + kept + passing


def largest_that_fits(
    config: Config, measured: Measured, *, ranks: int, memory: float, is_gpu: bool
) -> str | None:
    """The largest setting that would fit, as overrides; None where nothing does.

    The batch as it is in the largest micro-batches, else the largest batch in the smallest ones.
    """

    def fits(candidate: Config) -> bool:
        return plan(candidate, measured, ranks=ranks, memory=memory, is_gpu=is_gpu).fits

    def with_batch(**changes: int) -> Config:
        return dataclasses.replace(config, batch=dataclasses.replace(config.batch, **changes))

    rows = -(-config.batch.global_pairs // ranks)
    can_cache = config.model.heads.norm == "layer" and not (
        config.model.vision.kind == "resnet" and config.model.vision.norm == "batch"
    )
    if can_cache:
        micro = _largest(rows - 1, lambda n: fits(with_batch(micro_images=n, micro_texts=n)))
        if micro > 0:
            return f"batch.micro_images={micro} batch.micro_texts={micro}"
    cached = {"micro_images": 1, "micro_texts": 1} if can_cache else {}
    pairs = _largest(rows - 1, lambda n: fits(with_batch(global_pairs=n * ranks, **cached)))
    if pairs * ranks < 2:
        return None
    more = "".join(f" batch.{key}={value}" for key, value in cached.items())
    return f"batch.global_pairs={pairs * ranks}{more}"


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest of 1 to `most` that fits, 0 where none does; what is smaller needs less."""
    least = 0
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def machine_memory() -> tuple[float, bool]:
    """Bytes that are here, a container's share of them, and whether they are a GPU's."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory), True
    return float(usable_memory()), False


def make_plan(
    config: Config, *, ranks: int | None = None, memory_gib: float | None = None
) -> tuple[str, str | None]:
    """The plan as text, and why it cannot fit (naming the largest setting that would), or None.

    ranks       of the run (the GPUs of this machine, or 1)
    memory_gib  of one rank (this machine's: a GPU's, or the host's shared by the ranks)
    """
    wanted = ranks or max(1, torch.cuda.device_count())
    here, is_gpu = machine_memory()
    memory = memory_gib * GIB if memory_gib is not None else here / (1 if is_gpu else wanted)
    measured = measure(config)
    made = plan(config, measured, ranks=wanted, memory=memory, is_gpu=is_gpu)
    text = describe(config, made, measured)
    if made.fits:
        return text, None
    nearest = largest_that_fits(config, measured, ranks=wanted, memory=memory, is_gpu=is_gpu)
    remedy = (
        f"the largest setting that would fit: {nearest}"
        if nearest is not None
        else "no smaller batch fits either: use more ranks with train.zero_stage=3, activation "
        "checkpointing (model.vision.checkpointing, model.text.checkpointing), or a smaller model"
    )
    usable = made.memory * (1 - _SPARE) / GIB
    return text, (
        f"the plan does not fit: {made.total / GIB:.2f} GiB a rank, {usable:.2f} GiB to use of "
        f"{made.memory / GIB:.2f}; {remedy}"
    )


def describe(config: Config, made: Plan, measured: Measured) -> str:
    rows = -(-config.batch.global_pairs // made.ranks)
    shared = f"ZeRO stage {config.train.zero_stage}"
    if _is_plain(config, made.ranks):
        shared = "plain torch"
    lines = [
        f"Memory plan of one rank of {made.ranks}: {config.batch.global_pairs} pairs, {rows} here, "
        f"{measured.trainable / 1e6:.1f} M trainable of {measured.parameters / 1e6:.1f} M "
        f"parameters, {shared}"
    ]
    width = max(map(len, made.parts))
    for name, size in made.parts.items():
        lines.append(f"  {name:<{width}}  {size / GIB:9.3f} GiB")
    lines.append(f"  {'total':<{width}}  {made.total / GIB:9.3f} GiB")
    lines.append(f"  {'there is':<{width}}  {made.memory / GIB:9.3f} GiB, {_SPARE:.0%} kept spare")
    for name, size in made.host_parts.items():
        if size:
            lines.append(f"  in host memory: {name} {size / GIB:.3f} GiB")
    lines.append(
        f"  one image keeps {measured.image_row / 2**20:.2f} MiB, one report "
        f"{measured.text_row / 2**20:.2f} MiB for the backward pass"
    )
    if distributed.device().type == "cuda":
        lines.append("  losses are those of plain torch: the Triton kernels keep less")
    return "\n".join(lines)
