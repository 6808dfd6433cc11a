"""The input path against a torch DataLoader with OpenCV, and the start on a million-row manifest.

python benchmarks/bench_dataloading.py rate  [--rounds 5] [--batches 40] [--channels 3] [--write]
python benchmarks/bench_dataloading.py start [--rows 1000000] [--write]

`rate`: every contestant is a process of its own that works only while it is asked to; rounds go
from one to the next in turn, so what else the machine does meets all alike. Rates are images a
second (wall) and images a processor second, children included; ratios are medians over rounds.
The DataLoader's side is the strongest plain one: grey, one channel, no report, 2 workers that keep
running; ours makes the whole Batch. `full` is the same DataLoader on 2500 x 3000 px JPEG. Every
process, DataLoader workers too, keeps freed memory as training does (mlip/training/allocator.py);
only `dataloader_default` leaves the allocator as it comes, as most code does.
`start`: a process reads the manifest, builds the loader, plans its first step, and then trains the
vocabulary, which happens once in a run's life.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import torch
from harness import environment, table, write_rows
from numpy.typing import NDArray

from mlip import config
from mlip.assembly import open_tokenizer
from mlip.dataloading.loader import Loader, build_loader
from mlip.dataloading.manifest import load_manifest
from mlip.dataloading.reports import train_tokenizer
from mlip.dataloading.shard_worker import ImageSettings, convert, encode
from mlip.dataloading.shards import ShardWriter
from mlip.training.allocator import keep_freed_memory

IMAGES = 2048  # different 256-px images; all stay in the page cache, as shards on fast disks do
FULL_IMAGES = 12  # different full-size files
BATCH = 64
FULL_BATCH = 4
CONTESTANTS = ("dali", "torch", "dataloader", "dataloader_default", "dataloader_rgb", "full")
SENTENCES = (
    "There is a small left pleural effusion.",
    "No pneumothorax is seen.",
    "The heart size is normal.",
    "The lungs are clear.",
    "A left chest tube is in place.",
)


def radiograph(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint16]:
    """Smooth shapes and detector noise: JPEG spends about as many bytes on it as on a chest."""
    smooth = cv2.resize(rng.random((14, 14)), (width, height), interpolation=cv2.INTER_CUBIC)
    noise = cv2.GaussianBlur(rng.normal(0, 1, smooth.shape), (0, 0), 0.8)
    return ((smooth + 0.01 * noise).clip(0, 1) * 65535).astype(np.uint16)


def make_files(folder: Path) -> dict[str, float]:
    """One shard of prepared images, the same images as files, and full-size JPEG files."""
    rng = np.random.default_rng(0)
    settings = ImageSettings()
    for name in ("shards", "files", "full"):
        (folder / name).mkdir()
    writer = ShardWriter(folder / "shards" / "train-00000.tar")
    lines = ["image,report,patient_id,study_id,split"]
    sizes = []
    for i in range(IMAGES):
        member = encode(convert(radiograph(rng, 256, 256), settings), settings)
        (folder / "files" / f"{i}.jpg").write_bytes(member)
        place = writer.add(f"{i}.jpg", member)
        sizes.append(place.size)
        report = " ".join(SENTENCES[j] for j in rng.choice(5, 3, replace=False)) + f" Film {i}."
        reference = f"shards/train-00000.tar#{place.offset}+{place.size}"
        lines.append(f"{reference},{report},p{i},s{i},train")
    writer.finish()
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    full = []
    for i in range(FULL_IMAGES):
        image = (radiograph(rng, 2500, 3000) >> 8).astype(np.uint8)
        path = folder / "full" / f"{i}.jpg"
        cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 90])
        full.append(path.stat().st_size)
    return {"member_kb": statistics.mean(sizes) / 1e3, "full_mb": statistics.mean(full) / 1e6}


class Files(torch.utils.data.Dataset[torch.Tensor]):
    """What people write: read, letterbox, crop, contrast and brightness, normalise."""

    def __init__(self, folder: Path, channels: int, side_px: int = 256) -> None:
        self.paths = sorted(str(path) for path in folder.glob("*.jpg"))
        self.channels, self.side_px = channels, side_px

    def __len__(self) -> int:
        return 1 << 24  # endless for our purpose: no epoch ends inside a measurement

    def __getitem__(self, index: int) -> torch.Tensor:
        image = cv2.imread(self.paths[index % len(self.paths)], cv2.IMREAD_GRAYSCALE)
        if max(image.shape) > self.side_px:
            scale = self.side_px / max(image.shape)
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        if image.shape != (self.side_px, self.side_px):
            below, right = self.side_px - image.shape[0], self.side_px - image.shape[1]
            image = cv2.copyMakeBorder(
                image, below // 2, below - below // 2, right // 2, right - right // 2, 0
            )
        top, left = np.random.randint(0, self.side_px - 224 + 1, 2)
        bright, contrast = 1.0 + 0.1 * (2.0 * np.random.rand(2) - 1.0)
        crop = image[top : top + 224, left : left + 224].astype(np.float32)
        crop *= np.float32(bright * contrast / 0.25 / 255.0)
        crop += np.float32((bright * 0.5 * (1.0 - contrast) - 0.5) / 0.25)
        return torch.from_numpy(crop)[None].expand(self.channels, -1, -1)


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)


def dataloader(folder: Path, channels: int, workers: int, batch_size: int = BATCH) -> Iterator[int]:
    """Sizes of the batches of a torch DataLoader as its documentation recommends it."""
    batches = torch.utils.data.DataLoader(
        Files(folder, channels),
        batch_size=batch_size,
        shuffle=False,
        num_workers=workers,
        worker_init_fn=_one_thread,
        persistent_workers=True,
    )
    for batch in batches:
        yield len(batch)


def ours(folder: Path, kind: str, channels: int, workers: int) -> Iterator[int]:
    """Sizes of our loader's batches: images, tokens and all."""
    loader = loader_of(folder / "manifest.csv", kind, channels, workers)
    for batch in loader:
        yield len(batch)


class NoLinks:
    """Linking happens once a report and is cached: a rate does not see it."""

    index: dict[str, int] = {}

    def link(self, text: str) -> list[Any]:
        return []


def loader_of(manifest_path: Path, kind: str, channels: int, workers: int) -> Loader:
    settings = config.load(
        [],
        [
            f"data.manifest={manifest_path}",
            f"data.pipeline={kind}",
            f"data.channels={channels}",
            f"data.workers={workers}",
            f"batch.global_pairs={BATCH}",
        ],
    )
    manifest = load_manifest(settings.data)
    vocabulary = Path(tempfile.mkdtemp(dir=manifest_path.parent)) / "tokenizer"
    tokenizer = train_tokenizer([" ".join(SENTENCES)] * 5, 200, vocabulary)
    nothing = NoLinks()
    return build_loader(
        settings,
        manifest,
        split="train",
        train=True,
        tokenizer=tokenizer,
        linker=nothing,
        table=nothing,
    )


def contestant(name: str, folder: Path, channels: int, workers: int) -> Iterator[int]:
    if name in ("dali", "torch"):
        return ours(folder, name, channels, workers)
    if name == "full":
        return dataloader(folder / "full", 1, workers, FULL_BATCH)
    return dataloader(folder / "files", 3 if name == "dataloader_rgb" else 1, workers)


def cpu_seconds() -> float:
    """Of this process and of every child, ended or alive."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    for child in psutil.Process().children(recursive=True):
        try:
            spent = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += spent.user + spent.system
    return total


def serve(name: str, folder: Path, channels: int, workers: int) -> None:
    """A number of batches on stdin -> one JSON line: seconds, processor seconds, images."""
    torch.set_num_threads(1)
    if name != "dataloader_default":
        keep_freed_memory()  # a DataLoader's workers are forked: they keep theirs too
    batches = contestant(name, folder, channels, workers)
    # what was made ahead between two rounds is not of this round
    ahead = 6
    next(batches)
    print("ready", flush=True)
    for line in sys.stdin:
        for _ in range(ahead):
            next(batches)
        spent, start = cpu_seconds(), time.perf_counter()
        images = sum(next(batches) for _ in range(int(line)))
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, cpu_seconds() - spent, images]), flush=True)


class Child:
    """One contestant's process, stopped in its tracks while others are measured."""

    def __init__(self, name: str, folder: Path, arguments: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "serve", "--name", name, "--folder", str(folder)]
        command += ["--channels", str(arguments.channels), "--workers", str(arguments.workers)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contestant ended with status {self.process.wait()}")
        return line

    def ask(self, batches: int) -> tuple[float, float, int]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{batches}\n")
        seconds, cpu, images = json.loads(self._line())
        return seconds, cpu, images

    def peak_mib(self) -> float:
        process = psutil.Process(self.process.pid)
        family = [process, *process.children(recursive=True)]
        return sum(member.memory_info().rss for member in family) / 2**20

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def rate(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = make_files(folder)
        children = {one: Child(one, folder, arguments) for one in CONTESTANTS}
        rounds: dict[str, list[tuple[float, float]]] = {one: [] for one in CONTESTANTS}
        for _ in range(arguments.rounds):
            for one, child in children.items():
                batches = max(1, arguments.batches // 4) if one == "full" else arguments.batches
                seconds, cpu, images = child.ask(batches)
                rounds[one].append((images / seconds, images / cpu))
        memory = {one: child.peak_mib() for one, child in children.items()}
        for child in children.values():
            child.close()
    facts = environment("cpu") | sizes
    facts |= {"workers": arguments.workers, "channels": arguments.channels, "batch": BATCH}
    rows = []
    for one in CONTESTANTS:
        row: dict[str, Any] = {"name": one, "rss_mib": round(memory[one])}
        for place, kind in enumerate(("wall", "cpu")):
            rates = [entry[place] for entry in rounds[one]]
            row[f"images_per_{kind}_s"] = round(statistics.median(rates))
            row[f"best_per_{kind}_s"] = round(max(rates))
            ratios = [a[place] / b[place] for a, b in zip(rounds["dali"], rounds[one], strict=True)]
            row[f"dali_is_x_{kind}"] = round(statistics.median(ratios), 2)
            row[f"rounds_{kind}"] = " ".join(f"{ratio:.2f}" for ratio in ratios)
        rows.append(row | facts)
    columns = ["name", "images_per_wall_s", "best_per_wall_s", "images_per_cpu_s"]
    columns += ["best_per_cpu_s", "dali_is_x_wall", "dali_is_x_cpu", "rss_mib", "rounds_cpu"]
    print(table(rows, columns))
    return rows


def write_million(path: Path, rows: int) -> None:
    """A CSV of `rows` images of rows / 2 patients with reports of about 300 characters."""
    rng = np.random.default_rng(0)
    stock = [" ".join(SENTENCES[j] for j in rng.permutation(5)) for _ in range(200)]
    with open(path, "w", encoding="utf-8") as file:
        file.write("image,report,patient_id,study_id,split\n")
        for i in range(rows):
            text = f"{stock[i % 200]} Film {i}. Compared with film {i * 7919 % rows} no change. "
            split = "val" if i // 2 % 50 == 0 else "train"
            place = f"shards/train-{i // 4096:05d}.tar#{i % 4096 * 16384 + 512}+13000"
            file.write(f"{place},{text * 2},p{i // 2:07d},s{i:07d},{split}\n")


def serve_start(manifest_path: Path) -> None:
    """Seconds and resident memory of each step from the manifest to the first plan of rows."""
    steps: dict[str, Any] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        spent, start = time.process_time(), time.perf_counter()
        result = work()
        steps[f"{name}_s"] = round(time.perf_counter() - start, 2)
        steps[f"{name}_cpu_s"] = round(time.process_time() - spent, 2)
        return result

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    loader = timed("manifest_and_loader", lambda: loader_of(manifest_path, "torch", 1, 2))
    timed("first_plan", lambda: loader.order.plan(0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    steps |= {"imports_mib": round(resident), "peak_mib": round(peak)}
    settings = config.load([], [f"run.dir={tempfile.mkdtemp(dir=manifest_path.parent)}"])
    timed("vocabulary", lambda: open_tokenizer(settings, loader.manifest))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(steps | {"peak_with_vocabulary_mib": round(peak)}))


def start(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "manifest.csv"
        write_million(path, arguments.rows)
        size = path.stat().st_size / 1e6
        command = [sys.executable, __file__, "serve-start", "--folder", str(path)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    row = {"rows": arguments.rows, "csv_mb": round(size), **json.loads(printed)}
    print(json.dumps(row, indent=1))
    return [row | environment("cpu")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("rate", "start", "serve", "serve-start"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="of our batches")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--write", action="store_true", help="keep the rows below results/")
    parser.add_argument("--name", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what == "serve":
        serve(arguments.name, arguments.folder, arguments.channels, arguments.workers)
    elif arguments.what == "serve-start":
        serve_start(arguments.folder)
    else:
        rows = {"rate": rate, "start": start}[arguments.what](arguments)
        if arguments.write:
            print(write_rows(f"dataloading_{arguments.what}", rows))


if __name__ == "__main__":
    main()
