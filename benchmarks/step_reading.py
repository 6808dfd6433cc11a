"""The step fed by the project's own loader: what waiting for data costs it.

Generated studies, prepared into shards by `mlip prepare`, or full-size JPEG files as hospitals keep
them; decoded by DALI or by the torch twin. Compared is a step on batches of the same loader that
are held in memory, so that widths of reports and everything else are equal.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_check import READING, importing_root, is_there
from benchmarks.step_timing import Runner
from benchmarks.step_variants import NotAvailable
from mlip.batch import Batch
from mlip.settings.config import Config, Phantom


class Feed(NamedTuple):
    """pipeline: of data.pipeline; is_full: files of FULL_PX instead of shards of prepared ones."""

    pipeline: str
    is_full: bool


class Sizes(NamedTuple):
    """studies: generated, image_px wide; full_px: height and width of the full-size files."""

    studies: int
    image_px: int
    full_px: tuple[int, int]


FEEDS = {
    "shards, DALI": Feed("dali", False),
    "shards, torch": Feed("torch", False),
    "full-size JPEG, DALI": Feed("dali", True),
    "full-size JPEG, torch": Feed("torch", True),
}
SIZES = {"cuda": Sizes(2048, 256, (2500, 3000)), "cpu": Sizes(16, 96, (110, 132))}
FULL_FILES = 12  # different ones: reading is from the page cache in any case
BATCH_S = 60  # a decoder that hangs costs its own row, not the rest of the minutes
ROW_S, STUDIES_S = 30, 60  # the second of 2,048 studies, generated and prepared
HELD = 4  # batches in memory for the step without a loader


def require(feed: Feed) -> None:
    """Raises:  NotAvailable where a package that reads such data is missing"""
    wanted = [*READING, *(["nvidia.dali"] if feed.pipeline == "dali" else [])]
    missing = [name for name in wanted if not is_there(name)]
    if missing:
        raise NotAvailable(f"not installed: {', '.join(missing)}")


class Data:
    """Manifests below a folder, each made when it is first asked for."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.folder, self.sizes = folder, sizes

    def settings(self, feed: Feed, *, pairs: int, vocab_size: int) -> list[str]:
        """Overrides with which a feed gives batches of `pairs`."""
        manifest = self.full_size() if feed.is_full else self.shards()
        return [
            f"run.dir={self.folder / 'run'}",
            f"data.manifest={manifest}",
            "data.columns.sha256=null",
            f"data.pipeline={feed.pipeline}",
            f"data.vocab_size={vocab_size}",
            f"data.workers={max(1, len(os.sched_getaffinity(0)) - 1)}",  # one steps
            f"batch.global_pairs={pairs}",
            f"run.timeout_s={BATCH_S}",
            "evaluate.after_training=false",  # all studies are of the training split
        ]

    def needs_s(self) -> float:
        """What a row takes: a loader to open, before the first also the studies to be made."""
        return ROW_S if (self.folder / "studies").exists() else ROW_S + STUDIES_S

    def studies(self) -> Path:
        """Generated studies; written once, whatever is asked for after."""
        from mlip.dataloading.phantom.dataset import write_dataset

        sizes = self.sizes
        studies = Phantom(
            studies=sizes.studies, val_studies=0, test_studies=0, image_px=sizes.image_px
        )
        return write_dataset(self.folder / "studies", studies)

    def shards(self) -> Path:
        """The studies as the real command prepares them; finished shards are kept."""
        out = self.folder / "prepared"
        command = [sys.executable, "-m", "mlip.cli", "prepare", "manifest"]
        command += ["--root", str(self.studies().parent), "--out", str(out)]
        environment = importing_root(os.environ)
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            raise RuntimeError(f"mlip prepare: {done.stderr[-250:]}")
        return out / "manifest.parquet"

    def full_size(self) -> Path:
        """The same studies with full-size JPEG files in place of their images."""
        import cv2
        import numpy as np

        from benchmarks.input_contestants import radiograph

        full = self.folder / "full"
        manifest = full / "manifest.csv"
        if manifest.exists():
            return manifest
        full.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        for number in range(FULL_FILES):
            image = (radiograph(rng, *self.sizes.full_px) >> 8).astype(np.uint8)
            cv2.imwrite(str(full / f"{number}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 90])
        with self.studies().open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        with manifest.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for number, row in enumerate(rows):
                if number >= FULL_FILES:  # a path stands in one row only
                    os.link(full / f"{number % FULL_FILES}.jpg", full / f"{number}.jpg")
                writer.writerow(row | {"image": f"{number}.jpg"})
        return manifest


class FedRunner(Runner):
    """Steps on batches as they come, and how long the host waited for each."""

    def __init__(self, engine: Any, loader: Any) -> None:
        super().__init__(engine, [])
        self.loader = loader
        self.waits_ms: list[float] = []

    def next_batch(self) -> Batch:
        batch: Batch = next(self.loader)
        self.waits_ms.append(1e3 * self.loader.wait_seconds)
        return batch


def fed_times(engine: Any, config: Config, *, least: int, budget_s: float) -> dict[str, float]:
    """Mean milliseconds of a step on held batches, of one that is fed, and of the host's wait.

    Means, not medians: a wait that comes every tenth step counts.
    """
    from mlip.assembly import open_corpus, open_loader

    begin = time.perf_counter()
    loader = open_loader(config, open_corpus(config))
    try:
        held = Runner(engine, [next(loader) for _ in range(HELD)])
        opened_s = time.perf_counter() - begin
        alone = held.times_ms(warmup=2, least=least, budget_s=budget_s)
        del held
        fed = FedRunner(engine, loader)
        # what was made ahead while nobody took it is not part of the flow
        times = fed.times_ms(warmup=config.data.prefetch + 2, least=least, budget_s=budget_s)
    finally:
        loader.close()
    return {
        "open_s": opened_s,
        "held_step_ms": _mean(alone),
        "step_ms": _mean(times),
        "wait_ms": _mean(fed.waits_ms[-len(times) :]),
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
