"""`mlip prepare` against the cores' own decode limit, and its memory over many images.

python benchmarks/bench_prepare.py [--images 2000] [--workers 2] [--kind jpeg|dicom] [--height 2500]
    [--write]

Both run on the same files with the same number of processes, one after the other, `--repeats` times
in turn: the limit decodes, scales and encodes in processes that share nothing and write nothing,
and keep freed memory as the workers of `prepare` do (without, they fault a picture in anew each).
The share is given by wall clock and by processor seconds; on a machine with other work only the
second one means something. Starts of processes are counted for `prepare` alone.
Resident memory is the parent's and its children's, sampled every 0.2 s.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil

from mlip.dataloading.datasets.rows import Row
from mlip.dataloading.dicom.radiograph import write_radiograph
from mlip.dataloading.prepare.shard_build import Plan, build_shards
from mlip.dataloading.prepare.shard_worker import ImageSettings, make_member
from mlip.training.allocator import keep_freed_memory


def make_sources(root: Path, count: int, kind: str, height: int, width: int) -> list[Row]:
    """`count` rows over 8 different files, each linked by a hard link: disk space stays small."""
    rng = np.random.default_rng(0)
    originals = []
    for i in range(8):
        smooth = cv2.resize(rng.random((40, 40)), (width, height), interpolation=cv2.INTER_CUBIC)
        noisy = smooth + rng.normal(0, 0.01, smooth.shape)
        image = (noisy.clip(0, 1) * 65535).astype(np.uint16)
        path = root / f"original{i}.{'dcm' if kind == 'dicom' else 'jpg'}"
        if kind == "dicom":
            write_radiograph(path, image, patient_id="p", study_id="s", syntax="jpegls")
        else:
            cv2.imwrite(str(path), (image >> 8).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])
        originals.append(path)
    rows = []
    for i in range(count):
        path = root / f"{i:06d}{originals[i % 8].suffix}"
        os.link(originals[i % 8], path)
        rows.append(Row(path.name, f"p{i}", "", f"i{i}", "train"))
    return rows


def decode_share(job: tuple[str, list[str], ImageSettings]) -> tuple[int, float]:
    """Images made, and this process' seconds of processor for them."""
    cv2.setNumThreads(0)
    root, names, settings = job
    start = time.process_time()
    made = sum(not make_member(root, {"image": name}, settings)[0]["reason"] for name in names)
    return made, time.process_time() - start


def limit(
    root: Path, rows: list[Row], settings: ImageSettings, workers: int
) -> tuple[float, float]:
    """Images a second, and a processor second, of processes that only decode, scale and encode."""
    names = [row.image for row in rows]
    with multiprocessing.get_context("spawn").Pool(workers, keep_freed_memory) as pool:
        pool.map(decode_share, [(str(root), names[:8], settings)] * workers)  # imports, compiling
        start = time.monotonic()
        jobs = [(str(root), names[i::workers], settings) for i in range(workers)]
        made, spent = zip(*pool.map(decode_share, jobs), strict=True)
        assert sum(made) == len(rows)
        return len(rows) / (time.monotonic() - start), len(rows) / sum(spent)


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


class Memory:
    """Resident MiB of this process and its children, sampled until stopped."""

    def __init__(self) -> None:
        self.samples: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.2):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.samples.append(total / 2**20)

    def stop(self) -> tuple[float, float]:
        """Largest of the first and of the last third."""
        self._stop.set()
        self._thread.join()
        third = max(1, len(self.samples) // 3)
        return max(self.samples[:third]), max(self.samples[-third:])


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rates of both, their shares, and the memory of `prepare`."""
    (folder / "raw").mkdir()
    size = (arguments.height, arguments.width)
    rows = make_sources(folder / "raw", arguments.images, arguments.kind, *size)
    settings = ImageSettings()
    rates: dict[str, list[float]] = {"limit": [], "prepare": []}
    cpu: dict[str, list[float]] = {"limit": [], "prepare": []}
    memory = []
    for repeat in range(arguments.repeats):
        wall_rate, cpu_rate = limit(folder / "raw", rows, settings, arguments.workers)
        rates["limit"].append(wall_rate)
        cpu["limit"].append(cpu_rate)
        plan = Plan(
            root=folder / "raw",
            out=folder / f"out{repeat}",
            settings=settings,
            salt="bench",
            keep_ids=True,
            workers=arguments.workers,
        )
        sampler, start, spent = Memory(), time.monotonic(), cpu_seconds()
        result = build_shards(rows, plan)
        rates["prepare"].append(len(rows) / (time.monotonic() - start))
        memory.append(sampler.stop())
        cpu["prepare"].append(len(rows) / (cpu_seconds() - spent))
        assert result.images == len(rows)
    best = {name: max(values) for name, values in rates.items()}
    best_cpu = {name: max(values) for name, values in cpu.items()}
    return {
        "images": len(rows),
        "kind": arguments.kind,
        "source_px": list(size),
        "workers": arguments.workers,
        "images_per_s": {k: [round(v, 1) for v in vs] for k, vs in rates.items()},
        "images_per_cpu_s": {k: [round(v, 1) for v in vs] for k, vs in cpu.items()},
        "share_of_limit": round(best["prepare"] / best["limit"], 3),
        "share_of_limit_cpu": round(best_cpu["prepare"] / best_cpu["limit"], 3),
        "rss_mib_first_and_last_third": [[round(v) for v in pair] for pair in memory],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--kind", choices=("jpeg", "dicom"), default="jpeg")
    parser.add_argument("--height", type=int, default=2500)
    parser.add_argument("--width", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where sources and shards go")
    parser.add_argument("--write", action="store_true", help="keep the row below results/")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        row = measure(arguments, folder)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(row, indent=1))
    if arguments.write:
        # here alone: it imports torch, which the limit's processes need not wait for
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        from benchmarks.harness import environment, write_rows

        print(write_rows("dataloading_prepare", [row | environment("cpu")]))


if __name__ == "__main__":
    main()
