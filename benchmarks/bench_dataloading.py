"""The input path against a torch DataLoader with OpenCV, and the start on a million-row manifest.

python benchmarks/bench_dataloading.py rate  [--rounds 5] [--batches 40] [--channels 3] [--write]
python benchmarks/bench_dataloading.py start [--rows 1000000] [--write]
python benchmarks/bench_dataloading.py report     # the pages' tables, from the newest rows

`rate`: every contestant (input_contestants.py) is a process of its own that works only while it is
asked to, and until what it makes ahead is made; rounds go from one to the next in turn, so what
else the machine does meets all alike. Before the first round each makes WARMS batches that do not
count: DALI's first ones take up to 2.5 times the processor time of later ones, while its buffers
grow.
Rates are images a second (wall) and images a processor second, children included; ratios are
medians over rounds.
The DataLoader's side is the strongest plain one: grey, one channel, no report, 2 workers that keep
running; ours makes the whole Batch. `full` is the same DataLoader on 2500 x 3000 px JPEG. Every
process, DataLoader workers too, keeps freed memory as training does (mlip/training/allocator.py);
only `dataloader_default` leaves the allocator as it comes, as most code does.
Names that end in `_gpu` hand their batches over on the GPU: ours through DALI's `mixed` decoding
(shards, and `dali_full_gpu` full-size JPEG), the others from page-locked memory; where there is no
GPU their rows say so. Ratios compare with DALI on the same device.
`start`: a process reads the manifest, builds the loader, plans its first step, and then trains the
vocabulary, which happens once in a run's life.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import data_report
from benchmarks.harness import environment, table, write_rows
from benchmarks.input_contestants import (
    BATCH,
    CONTESTANTS,
    SENTENCES,
    batches_of,
    loader_of,
    make_files,
)
from mlip.ranks.distributed import synchronise
from mlip.saved.run_vocabulary import open_tokenizer
from mlip.settings import config
from mlip.training.allocator import keep_freed_memory

RESTS_S = 0.2
WARMS = 40  # batches; a training's epoch is thousands
AHEAD = 6  # batches made ahead between two rounds are not of this round; of many workers, two each


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
    batches = batches_of(name, folder, channels, workers)
    next(batches)
    print("ready", flush=True)
    for line in sys.stdin:
        for _ in range(max(AHEAD, 2 * workers + 2)):
            next(batches)
        synchronise()
        spent, start = cpu_seconds(), time.perf_counter()
        images = sum(next(batches) for _ in range(int(line)))
        synchronise()  # the last copies count
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, cpu_seconds() - spent, images]), flush=True)


class Child:
    """One contestant's process; it rests while others are measured."""

    def __init__(self, name: str, folder: Path, arguments: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "serve", "--name", name, "--folder", str(folder)]
        command += ["--channels", str(arguments.channels), "--workers", str(arguments.workers)]
        # what is of the CPU sees no GPU: DALI would decode there
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if CONTESTANTS[name].device == "cpu" else {}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=os.environ | hidden,
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
        self._rest()
        return seconds, cpu, images

    def _rest(self) -> None:
        """Wait until what it makes ahead is made: four full-size batches take both cores 0.3 s,
        which the next contestant's clock would count as its own."""
        spent = self._cpu_seconds()
        while True:
            time.sleep(RESTS_S)
            now = self._cpu_seconds()
            if now - spent < 0.1 * RESTS_S:
                return
            spent = now

    def _family(self) -> list[psutil.Process]:
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def _cpu_seconds(self) -> float:
        return sum(sum(member.cpu_times()[:2]) for member in self._family())

    def peak_mib(self) -> float:
        return sum(member.memory_info().rss for member in self._family()) / 2**20

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def obstacle(name: str) -> str | None:
    """Why a contestant cannot take part on this machine, or None."""
    if CONTESTANTS[name].device == "cuda" and not torch.cuda.is_available():
        return "not run: no NVIDIA GPU here"
    return None


def rate(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    asked = arguments.only or list(CONTESTANTS)
    running = [one for one in CONTESTANTS if one in asked and obstacle(one) is None]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = make_files(folder)
        children = {one: Child(one, folder, arguments) for one in running}
        for one, child in children.items():
            if not CONTESTANTS[one].is_full:  # 40 of these are a minute, and far from any bound
                child.ask(WARMS)
        rounds: dict[str, list[tuple[float, float]]] = {one: [] for one in running}
        for _ in range(arguments.rounds):
            for one, child in children.items():
                is_full = CONTESTANTS[one].is_full
                batches = max(1, arguments.batches // 4) if is_full else arguments.batches
                seconds, cpu, images = child.ask(batches)
                rounds[one].append((images / seconds, images / cpu))
        memory = {one: child.peak_mib() for one, child in children.items()}
        for child in children.values():
            child.close()
    facts = {"workers": arguments.workers, "channels": arguments.channels, "batch": BATCH} | sizes
    rows = []
    for one in CONTESTANTS:
        if one not in asked:
            continue
        device = CONTESTANTS[one].device
        row: dict[str, Any] = {"name": one, "device": device}
        if one in rounds:
            base = rounds.get("dali" if device == "cpu" else "dali_gpu")
            row |= rates_of(rounds[one], base) | {"rss_mib": round(memory[one])}
            rows.append(row | environment(device) | facts)
        else:
            rows.append(row | {"status": obstacle(one)} | environment("cpu") | facts)
    columns = ["name", "device", "images_per_wall_s", "best_per_wall_s", "images_per_cpu_s"]
    columns += ["best_per_cpu_s", "dali_is_x_wall", "dali_is_x_cpu", "rss_mib", "status"]
    print(table(rows, [*columns, "rounds_cpu"]))
    return rows


def rates_of(
    rounds: list[tuple[float, float]], base: list[tuple[float, float]] | None
) -> dict[str, Any]:
    """Median and best rates, and how many times `base` (DALI on the same device) is as fast."""
    row: dict[str, Any] = {}
    for place, kind in enumerate(("wall", "cpu")):
        rates = [entry[place] for entry in rounds]
        row[f"images_per_{kind}_s"] = round(statistics.median(rates))
        row[f"best_per_{kind}_s"] = round(max(rates))
        if base is not None:
            ratios = [a[place] / b[place] for a, b in zip(base, rounds, strict=True)]
            row[f"dali_is_x_{kind}"] = round(statistics.median(ratios), 2)
            row[f"rounds_{kind}"] = " ".join(f"{ratio:.2f}" for ratio in ratios)
    return row


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
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("rate", "start", "report", "serve", "serve-start"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="of our batches")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="of the contestants")
    parser.add_argument("--write", action="store_true", help="keep the rows below results/")
    parser.add_argument("--name", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what == "serve":
        serve(arguments.name, arguments.folder, arguments.channels, arguments.workers)
    elif arguments.what == "serve-start":
        serve_start(arguments.folder)
    elif arguments.what == "report":
        for page in data_report.write_pages():
            print(page)
    else:
        rows = {"rate": rate, "start": start}[arguments.what](arguments)
        if arguments.write:
            print(write_rows(f"dataloading_{arguments.what}", rows))


if __name__ == "__main__":
    main()
