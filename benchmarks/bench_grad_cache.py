"""What the gradient cache costs in a loop of one's own: time and memory with and without it.

    python benchmarks/bench_grad_cache.py [--pairs 32] [--write]

Towers of transformers with random weights, dropout on: ViT-Ti/16 at 224 px, and a BERT of six such
layers at 64 tokens. One step is forward and backward of `mlip.kernels.info_nce` on their features;
ways take turns, so that other work on the machine slows all of them. Processor time, and memory
beside weights as torch's profiler counts it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.harness import RESULTS, environment, peak_bytes, table, write_rows
from mlip.kernels.info_nce import info_nce_loss
from mlip.training.grad_cache import cached_forward

ROWS = RESULTS / "grad_cache.json"
WIDTH, TURNS, TOKENS = 192, 3, 64
SIZES = (0, 8, 4)  # rows of a micro-batch; 0: no cache


def make_step(pairs: int) -> Any:
    """step(micro_size) of fixed towers and a fixed batch."""
    shape: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH}
    shape["num_attention_heads"] = 3
    dropout: dict[str, Any] = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    vit = ViTModel(ViTConfig(**shape, **dropout), add_pooling_layer=False).train()
    bert = BertModel(BertConfig(**shape, num_hidden_layers=6), add_pooling_layer=False).train()
    images, texts = torch.randn(pairs, 3, 224, 224), torch.randint(5, 999, (pairs, TOKENS))

    def features(tower: Any) -> Any:
        return lambda rows: F.normalize(tower(rows).last_hidden_state[:, 0], dim=-1)

    def step(micro_size: int) -> Tensor:
        image = cached_forward(features(vit), (images,), micro_size)
        text = cached_forward(features(bert), (texts,), micro_size)
        loss = info_nce_loss(image, text, 14.3)
        loss.backward()
        return loss

    return step


def page_table(rows: list[dict[str, Any]]) -> str:
    """For docs/losses.md: ratios to the step without a cache."""
    (plain,) = (row for row in rows if row["micro_size"] == 0)
    lines = ["| rows of a micro-batch | time | memory beside weights |", "|---|---|---|"]
    for row in rows:
        name = row["micro_size"] or f"all {row['pairs']} (no cache)"
        slower, less = row["seconds"] / plain["seconds"], plain["mib"] / row["mib"]
        is_plain = row is plain
        lines.append(
            f"| {name} | {'1' if is_plain else f'{slower:.2f}x'} | {row['mib']:.0f} MiB"
            f"{'' if is_plain else f', {less:.1f}x less'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--write", action="store_true", help="leave the rows in benchmarks/results")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    step = make_step(options.pairs)
    step(4)  # gradients are there, and caches of the processor are filled
    seconds: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(TURNS):
        for size in SIZES:
            begin = time.process_time()
            step(size)
            seconds[size].append(time.process_time() - begin)
    facts = environment("cpu")
    rows = [
        {
            "micro_size": size,
            "pairs": options.pairs,
            "seconds": statistics.median(seconds[size]),
            "least": min(seconds[size]),
            "most": max(seconds[size]),
            "mib": peak_bytes(partial(step, size), "cpu") / 2**20,
            **facts,
        }
        for size in SIZES
    ]
    print(table(rows, ["micro_size", "seconds", "least", "most", "mib"]))
    print(page_table(rows))
    if options.write:
        print(write_rows("grad_cache", rows, ROWS))


if __name__ == "__main__":
    main()
