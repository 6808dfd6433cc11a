"""Retrieval among a million reports: seconds of processor time and peak memory, one row.

  python benchmarks/bench_retrieval.py                        # 2,000 images x 1,000,000 texts
  python benchmarks/bench_retrieval.py --images 200 --texts 20000 --no-write

Embeddings are random unit vectors, each image's own report among them and near it. Peak memory is
what the process adds above the embeddings, read from the kernel. Writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
from benchmarks import harness
from mlip.transfer.alignment.large_retrieval import ranks_both_ways, top_candidates

NEAR = 3.0  # of noise to signal in an image's embedding: its report is found, but not always first
MOST = 100  # answers kept for class precision


class PeakMemory:
    """Most resident bytes of this process inside the block, above what was there before."""

    def __enter__(self) -> PeakMemory:
        self.before = self.most = _resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, _resident_bytes())

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    @property
    def added_mib(self) -> float:
        return (self.most - self.before) / 2**20


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(options.seed)
    texts = torch.randn(options.texts, options.dim, generator=generator)
    texts = torch.nn.functional.normalize(texts, dim=1)
    own = torch.randperm(options.texts, generator=generator)[: options.images]
    noise = torch.randn(options.images, options.dim, generator=generator) / options.dim**0.5
    images = torch.nn.functional.normalize(texts[own] + NEAR * noise, dim=1)
    pairs = np.arange(options.texts)
    rows = []
    for name, run in {
        "ranks of right reports and images": lambda: (
            ranks_both_ways(images, texts, pairs[own], pairs)[0].rank
        ),
        f"{MOST} best reports": lambda: top_candidates(images, texts, MOST),
    }.items():
        began, wall = time.process_time(), time.perf_counter()
        with PeakMemory() as memory:
            found = run()
        rows.append(
            {
                "op": name,
                "images": options.images,
                "texts": options.texts,
                "dim": options.dim,
                "processor_s": round(time.process_time() - began, 2),
                "wall_s": round(time.perf_counter() - wall, 2),
                "added_mib": round(memory.added_mib, 1),
                "all_scores_mib": round(4 * options.images * options.texts / 2**20, 1),
                "recall@10": float(
                    ((found <= 10) if found.ndim == 1 else _hits(found, own)).mean()
                ),
                **harness.environment("cpu"),
            }
        )
    columns = ["op", "images", "texts", "dim", "processor_s", "added_mib", "all_scores_mib"]
    print(harness.table(rows, [*columns, "recall@10"]))
    if options.write:
        print(harness.write_rows("retrieval", rows))
    return 0


def _hits(found: np.ndarray, own: torch.Tensor) -> np.ndarray:
    return (found[:, :10] == own.numpy()[:, None]).any(axis=1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--texts", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-write", dest="write", action="store_false")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
