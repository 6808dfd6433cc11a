"""A tiny objective and loader that the training loop takes for real ones; also a script.

    torchrun --nproc_per_node 2 tests/training/toy_run.py run.dir=/tmp/x train.max_steps=12

As a script it is train.py without chests: the same Trainer, stop requests, lock and exit codes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mlip.batch import Batch
from mlip.dataloading.pipelines.sampler import rank_slice
from mlip.keyed_random import keyed_normal
from mlip.ranks import distributed, process_group
from mlip.settings.config import Config, load
from mlip.training import randomness
from mlip.training.grad_cache import cached_forward, equal_passes
from mlip.training.lifecycle import guarded, leave, locked_folder
from mlip.training.loop import Trainer
from mlip.training.runlog import setup_logging
from mlip.training.stop_request import StopRequest
from mlip.training.validation import Validation

PIXELS, VOCABULARY, WIDTH, DIM = 12, 50, 31, 7  # odd: nothing divides by the world size
SETTINGS = (
    "batch.global_pairs=8",
    "train.lr=0.01",
    "train.lr_reference_pairs=0",
    "train.warmup_steps=2",
    "train.weight_decay=0.1",
    "train.log_steps=4",
    "run.threads=1",
    "run.timeout_s=60",
)
ROWS = 40


class Scales(nn.Module):
    """As mlip.model.Scales: one-element parameters, read as scalars, clamped after each step."""

    BOUNDS = {"log_scale": (0.995, 2.0)}  # the data push it below within two steps

    def __init__(self) -> None:
        super().__init__()
        self.stored = nn.ParameterDict({"log_scale": nn.Parameter(torch.ones(1))})

    def logit_scale(self) -> Tensor:
        return self.stored["log_scale"].squeeze(0).exp()

    logit_scale_local = logit_scale

    @torch.no_grad()
    def clamp_(self) -> None:
        for name, (least, most) in self.BOUNDS.items():
            self.stored[name].clamp_(least, most)


class ToyModel(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.scales = Scales()
        self.image = nn.Sequential(
            nn.Flatten(),
            nn.Linear(PIXELS, WIDTH),
            nn.LayerNorm(WIDTH),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(WIDTH, DIM),
        )
        self.patch_head = nn.Linear(DIM, DIM)
        self.text = nn.Embedding(VOCABULARY, DIM)
        self.unused = nn.Linear(3, 3)  # never gets a gradient
        self.frozen = nn.Linear(DIM, DIM).requires_grad_(False)
        # a weight that does not lie row by row, as channels_last convolutions do
        weight = self.patch_head.weight
        weight.data = weight.data.t().contiguous().t()


class ToyObjective(nn.Module):
    """Contrastive over all ranks, with two outputs, dropout, a buffer and frozen parts."""

    def __init__(self, config: Config, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.model = ToyModel(dropout)
        self.register_buffer("queue", torch.zeros(4, DIM))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(
        self, batch: Batch, *, step: int, progress: float, held_out: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        def image_tower(image: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.model.image(image)
            return hidden, F.normalize(self.model.patch_head(hidden.tanh()), dim=-1)

        size = self.config.batch.micro_images
        passes = equal_passes(len(batch), size, batch.image.device)
        image, patch = cached_forward(image_tower, (batch.image,), size, passes)
        (text,) = cached_forward(
            lambda ids: (self.model.text(ids).mean(dim=1),),
            (batch.token_ids,),
            self.config.batch.micro_texts,
        )
        if held_out:
            return self._held_out(image, text)
        noise = keyed_normal(1, "divergence_image", step, batch.global_index, DIM)
        image = F.normalize(image + 0.1 * noise, dim=-1)
        text = F.normalize(self.model.frozen(text), dim=-1)
        image_N, text_N, patch_N = (distributed.gather_rows(x) for x in (image, text, patch))
        logits = self.model.scales.logit_scale() * image_N @ text_N.T
        target = torch.arange(len(logits))
        nce = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        local = (patch_N @ text_N.T).square().mean() + (patch_N * self.queue[0].clone()).sum() / 100
        with torch.no_grad():
            # of the last rank, whose numbers tests of faults spoil
            self.queue.copy_(torch.cat([image_N.detach()[-1:], self.queue[:-1]]))
            self.count.add_(1)
        return nce + 0.5 * local, {"nce": nce.detach(), "local": local.detach()}

    def _held_out(self, image: Tensor, text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As the real objective's: no draw, no buffer, and shares of what is found."""
        image_N = distributed.gather_rows(F.normalize(image, dim=-1))
        text_N = distributed.gather_rows(F.normalize(self.model.frozen(text), dim=-1))
        logits = self.model.scales.logit_scale() * image_N @ text_N.T
        target = torch.arange(len(logits))
        hits = {
            "recall@1 image to text": logits.argmax(dim=1) == target,
            "recall@1 text to image": logits.argmax(dim=0) == target,
        }
        shares = {name: hit.float().mean() for name, hit in hits.items()}
        nce = F.cross_entropy(logits, target)
        return nce, {"nce": nce, **shares}


class ToyLoader:
    """Batches as a pure function of the step; every rank takes its slice of the global one."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.step = 0
        self.wait_seconds = 0.0
        self.num_rows = ROWS

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = make_batch(self.step, self.config.batch.global_pairs)
            self.step += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]


class ToyHeldOut:
    """Held-out batches, the same ones after each rewind."""

    FIRST, PAIRS, BATCHES = 500, 6, 3

    def __init__(self) -> None:
        self.given = self.rewinds = 0
        self.is_closed = False

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.given += 1
            yield make_batch(self.FIRST + self.given - 1, self.PAIRS)

    def rewind(self) -> None:
        self.given, self.rewinds = 0, self.rewinds + 1

    def close(self) -> None:
        self.is_closed = True


def make_validation(config: Config) -> Validation | None:
    if config.train.monitor == "none":
        return None
    kept = ToyHeldOut()
    return Validation(config, kept, batches=kept.BATCHES, pairs=kept.PAIRS)


def make_batch(step: int, pairs: int) -> Batch:
    """This rank's rows of the global batch of a step."""
    first, last = rank_slice(pairs, distributed.rank(), distributed.world_size())
    mine = slice(first, last)
    generator = torch.Generator().manual_seed(1000 + step)
    image = torch.randn(pairs, 1, 3, PIXELS // 3, generator=generator)
    ids = torch.randint(0, VOCABULARY, (pairs, 5), generator=generator)
    index = torch.arange(step * pairs, (step + 1) * pairs)
    yes, zeros = torch.ones(pairs, 5, dtype=torch.bool), torch.zeros(pairs, 1, dtype=torch.int64)
    tensors = (image, ids, yes, yes, zeros, zeros, zeros > 0, index, index, index % ROWS)
    return Batch(*(t[mine] for t in tensors))


def toy_config(*overrides: str) -> Config:
    return load([], [*SETTINGS, *overrides])


def make_trainer(config: Config, *, dropout: float = 0.0, **named: Any) -> Trainer:
    randomness.seed_everything(config.run.seed)
    return Trainer(
        config,
        ToyObjective(config, dropout),
        ToyLoader(config),
        merge_states=lambda states: dict(states[0]),
        validation=make_validation(config),
        **named,
    )


def run_rank(*arguments: str) -> int:
    """The script as a function, for tests/rank_farm.py; its exit code."""
    return guarded(lambda: main(list(arguments)), lambda: folder[0] if folder else None)


def main(arguments: list[str]) -> None:
    config = toy_config(*arguments)
    folder.append(Path(config.run.dir))
    stop = StopRequest()
    process_group.start(config.run.timeout_s)
    setup_logging()
    with locked_folder(Path(config.run.dir)):
        make_trainer(config, dropout=0.2).fit(stop)
        distributed.barrier()
    process_group.stop()


folder: list[Path] = []

if __name__ == "__main__":
    given = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    leave(run_rank(*given))
