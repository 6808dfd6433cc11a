"""What pre-training is worth downstream, against random weights and the baselines, in three tables.

  python benchmarks/bench_transfer.py phantoms     # mlip, random: 1 % and 10 % of 2,000 studies
  python benchmarks/bench_transfer.py ablation     # + no_knowledge, mgca, clip: else all the same
  python benchmarks/bench_transfer.py real         # the same five on lungs, lung boxes, NIH
                                                   # pneumonia and case reports

Checkpoints are the folders <runs>/<method>_<seed> of benchmarks/bench_demo.py; a method without
them is "not run" in the table (--pretrain STEPS makes them here, in one process). Seed s is
pre-training s, label draw s and new weights s. The generated patients are new to every run.

A cell is one method in one task, with all fractions and seeds. A finished cell is not run again, so
a killed run goes on; a cell of other settings or another checkpoint is an error. Writes <table>.md
and <table>.json into --out. Processor time on one core of two, at 3 seeds: about 26 minutes for
phantoms, 10 for each of ablation's other three methods, 12 for real.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))
from benchmarks.harness import ROOT, environment, read_json
from benchmarks.transfer_tables import CASE_REPORTS, WITHOUT_LABELS, as_markdown, summary
from mlip.system.output_file import whole_file

CONFIGS = ROOT / "configs"
SEEDS = (1, 2, 3)
OVERLAYS = {
    "mlip": [],
    "no_knowledge": ["demo_no_knowledge.yaml"],
    "mgca": ["transfer/baseline_mgca.yaml"],
    "clip": ["demo_clip.yaml"],
}
PHANTOM_TASKS = ("phantom_classification", "phantom_segmentation", "phantom_detection")
REAL_TASKS = ("lung_segmentation", "lung_detection", "nih_pneumonia_classification")
# table -> its methods and tasks
ALL_METHODS = (*OVERLAYS, "random")
TABLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "phantoms": (("mlip", "random"), PHANTOM_TASKS),
    "ablation": (ALL_METHODS, PHANTOM_TASKS),
    "real": (ALL_METHODS, (*REAL_TASKS, CASE_REPORTS)),
}
# patients that no pre-training has seen: bench_demo.py generates from seeds 1, 2, ...
PHANTOMS = ("data.phantom.seed=3000001", "data.phantom.test_seed=4000001")
# settings that make a fit cheap and are equal for all methods: a look at val every 25 steps
CHEAP = (
    *("transfer.precision=auto", "transfer.epoch_steps=25", "transfer.epochs=100"),
    *("transfer.max_steps=300", "transfer.patience=4"),
)


@dataclass(frozen=True)
class Cell:
    """One method in one task; its folder holds cell.json, results.json and report.html."""

    method: str
    task: str
    seed: int | None  # None: all seeds in one command

    @property
    def name(self) -> str:
        return "-".join([self.task, self.method, *([str(self.seed)] if self.seed else [])])


def main() -> int:
    options = parse()
    out, runs = Path(options.out).resolve(), Path(options.runs).resolve()
    out.mkdir(parents=True, exist_ok=True)
    methods, tasks = TABLES[options.table]
    if options.imagenet:
        methods = (*methods, "imagenet")
    methods = tuple(options.methods.split(",")) if options.methods else methods
    tasks = tuple(options.tasks.split(",")) if options.tasks else tasks
    seeds = tuple(options.seeds)
    if options.pretrain:
        for method in methods:
            for seed in seeds if method in OVERLAYS else ():
                pretrain(method, seed, runs, options)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for task in tasks:
        for method in methods:
            made = cells(method, task, seeds, runs, out, options)
            if made:
                found.setdefault(task, {})[method] = made
    known = {m: without_labels(m, seeds, runs) for m in methods if options.table == "ablation"}
    text = as_markdown(found, known, methods, seeds)
    (out / f"{options.table}.md").write_text(text, encoding="utf-8")
    tree = json.dumps(summary(found, known, seeds), indent=1) + "\n"
    # a result is passed on: where the checkout lay is nobody's business
    (out / f"{options.table}.json").write_text(tree.replace(f"{ROOT}/", ""), encoding="utf-8")
    print(text)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("table", choices=TABLES)
    add("--out", default="runs/bench_transfer", help="folder of cells and tables")
    add("--runs", default="runs/bench", help="folder of pre-trainings, <method>_<seed>")
    add("--methods", help="some of the table's, joined by commas")
    add("--tasks", help="some of the table's, joined by commas")
    add("--seeds", type=int, nargs="+", default=list(SEEDS))
    add("--fractions", default="[1,10]", help="%% of the generated training patients")
    add("--studies", type=int, default=2000, help="generated for labels")
    add("--val-studies", type=int, default=128)
    add("--test-studies", type=int, default=1000)
    add("--manifest", default="../shared/data/manifest.csv", help="of the real images")
    add("--imagenet", metavar="DIR", help="ImageNet weights in transformers' format: one row more")
    add("--pretrain", type=int, metavar="STEPS", help="make missing pre-trainings of STEPS steps")
    add("--threads", type=int, default=1)
    add("--set", action="append", default=[], metavar="key=value", help="setting of every cell")
    return parser.parse_args()


def pretrain(method: str, seed: int, runs: Path, options: argparse.Namespace) -> None:
    run = runs / f"{method}_{seed}"
    if (run / "results.json").is_file():
        return
    command = [sys.executable, "train.py", "--config", str(CONFIGS / "demo.yaml")]
    command += [str(CONFIGS / name) for name in OVERLAYS[method]]
    command += [f"run.dir={run}", f"run.seed={seed}", f"data.manifest={run}/data/manifest.csv"]
    command += [f"data.phantom.seed={seed}", f"data.phantom.test_seed={2_000_000 + seed}"]
    command += [f"data.phantom.studies={options.studies}", "train.engine=plain"]
    command += [f"data.phantom.{split}_studies=64" for split in ("val", "test")]
    command += [f"train.max_steps={options.pretrain}", f"train.checkpoint_steps={options.pretrain}"]
    call(command, run.with_suffix(".log"), options.threads)


def cells(
    method: str,
    task: str,
    seeds: tuple[int, ...],
    runs: Path,
    out: Path,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """The results of a method in a task, one a command; [] where it has no checkpoint."""
    if method == "imagenet":
        if options.imagenet is None or task == CASE_REPORTS:  # no text tower to retrieve with
            return []
        items = settings(method, task, "", seeds, options)
        return [run_cell(Cell(method, task, None), items, [options.imagenet], out, options)]
    shape = "mlip" if method == "random" else method  # a random tower has MLIP's shape
    if not all(has_checkpoint(runs / f"{shape}_{seed}") for seed in seeds):
        return []
    pattern = str(runs / f"{shape}_{{seed}}")
    origin = [weights_of(runs / f"{shape}_{seed}") for seed in seeds]
    if task != CASE_REPORTS:
        items = settings(method, task, pattern, seeds, options)
        return [run_cell(Cell(method, task, None), items, origin, out, options)]
    found = []
    for seed, own in zip(seeds, origin, strict=True):
        checkpoint = Path(pattern.format(seed=seed))
        if method == "random":
            checkpoint = untrained(checkpoint, seed, out / f"untrained-{seed}")
        command = [str(CONFIGS / "real_cxr.yaml"), f"checkpoint={checkpoint}", f"run.seed={seed}"]
        command += [f"data.manifest={options.manifest}", "data.verify=none"]
        command += ["data.max_tokens=80", "evaluate.split=test", *options.set]
        found.append(run_cell(Cell(method, task, seed), command, [own], out, options))
    return found


def has_checkpoint(run: Path) -> bool:
    """Whether a run folder or an export lies there."""
    return (run / "checkpoints").is_dir() or (run / "model.safetensors").is_file()


def weights_of(run: Path) -> str | None:
    """The hash of a run's or export's weights, as its own results or settings name it."""
    for name in ("results.json", "config.json"):
        if (run / name).is_file():
            found = read_json(run / name).get("fingerprints")
            if isinstance(found, dict) and isinstance(found.get("weights"), str):
                return found["weights"]
            raise SystemExit(
                f"{run / name}: names no fingerprints.weights: evaluate or export it again"
            )
    return None


def settings(
    method: str, task: str, pattern: str, seeds: tuple[int, ...], options: argparse.Namespace
) -> list[str]:
    """What `mlip evaluate` is told, without --out."""
    items = [str(CONFIGS / "transfer" / f"{task}.yaml")]
    if method == "imagenet":
        items += ["transfer.start=imagenet", f"model.vision.source={options.imagenet}"]
        items.append("data.channels=3")
    else:
        items.append(f"checkpoint={pattern}")
    items.append(f"transfer.seeds=[{','.join(map(str, seeds))}]")
    if task in PHANTOM_TASKS:
        items += [f"data.manifest={Path(options.out).resolve() / 'data' / 'manifest.csv'}"]
        items += [f"data.phantom.studies={options.studies}", *PHANTOMS]
        items += [f"data.phantom.val_studies={options.val_studies}"]
        items += [f"data.phantom.test_studies={options.test_studies}"]
        items += [f"transfer.fractions={options.fractions}"]
    else:
        items.append(f"data.manifest={options.manifest}")
    if not task.endswith("classification"):
        items += CHEAP
    if method == "random":
        items.append("transfer.start=random")
    return [*items, *options.set]


def untrained(checkpoint: Path, seed: int, folder: Path) -> Path:
    """An export of the checkpoint's model with new weights in every part."""
    if not (folder / "model.safetensors").is_file():
        import torch

        from mlip.model import MLIPModel
        from mlip.pretrained import open_checkpoint, save_pretrained

        opened = open_checkpoint(checkpoint)
        torch.manual_seed(seed)
        model = MLIPModel(
            opened.config,
            vocab_size=opened.tokenizer.vocab_size,
            concept_vectors=opened.model.concept_vectors.clone(),
        )
        save_pretrained(folder, model.eval(), opened.config, opened.tokenizer, opened.table)
    return folder


def run_cell(
    cell: Cell, items: list[str], origin: list[str | None], out: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """The cell's results; computed where they are missing.

    origin   hashes of the checkpoints' weights
    Raises:  SystemExit where the cell was made with other settings or from other checkpoints: its
             numbers answer another question.
    """
    folder = out / cell.name
    told, saved = folder / "cell.json", folder / "results.json"
    if saved.is_file() and told.is_file():
        before = read_json(told)
        if before.get("settings") != items or before.get("checkpoints") != origin:
            said = before.get("settings")
            known = map(str, said if isinstance(said, list) else ())
            different = sorted(set(known) ^ set(items)) or ["other checkpoints"]
            raise SystemExit(
                f"{folder} was made of something else ({', '.join(different)}): delete it or "
                "name another --out"
            )
        return {**_results(saved), "cell": before, "folder": folder}
    ensure_phantoms(cell.task, items, options)
    folder.mkdir(parents=True, exist_ok=True)
    # data.phantom is of `mlip phantoms`: an evaluation generates nothing, and refuses it
    asked = [item for item in items if not item.startswith("data.phantom.")]
    command = [sys.executable, "-m", "mlip.cli", "evaluate", *asked, "--out", str(folder)]
    spent, wall = call(command, out / f"{cell.name}.log", options.threads)
    facts = {
        "settings": items,
        "checkpoints": origin,
        "processor_s": round(spent, 1),
        "wall_s": round(wall, 1),
        "environment": environment("cpu"),
    }
    with whole_file(told) as partial:  # a killed table goes on with the cells that are there
        partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return {**_results(saved), "cell": facts, "folder": folder}


def _results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(path)
    if not found.keys() >= {"run", "fingerprints"}:
        raise SystemExit(f"{path}: is not of an evaluation: delete it to make it again")
    return found


def ensure_phantoms(task: str, items: list[str], options: argparse.Namespace) -> None:
    if task not in PHANTOM_TASKS:
        return
    data = Path(options.out).resolve() / "data"
    if not (data / "manifest.csv").is_file():
        own = [i for i in items if i.startswith("data.phantom.")]
        command = [sys.executable, "-m", "mlip.cli", "phantoms", "--out", str(data), *own]
        call([*command, "data.phantom.image_px=144", "--workers", "1"], data.with_suffix(".log"), 1)


def call(command: list[str], log: Path, threads: int) -> tuple[float, float]:
    """(processor seconds, wall seconds) of a command that has to succeed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    told = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    before, began = _children_s(), time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | told, stdout=file, stderr=subprocess.STDOUT
        )
    spent, wall = _children_s() - before, time.perf_counter() - began
    print(f"{log.stem}: {spent:.0f} s of processor time, {wall:.0f} s in all", flush=True)
    if done.returncode != 0:
        raise SystemExit(f"{log.stem} ended with {done.returncode}: see {log}")
    return spent, wall


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def without_labels(
    method: str, seeds: tuple[int, ...], runs: Path
) -> dict[str, list[dict[str, Any] | None]]:
    """Scores of a method's own runs that need no label, by seed; {} where it has no runs."""
    files = [runs / f"{method}_{seed}" / "results.json" for seed in seeds]
    if method not in OVERLAYS or not all(f.is_file() for f in files):
        return {}
    results = [read_json(f) for f in files]
    found: dict[str, list[dict[str, Any] | None]] = {}
    for name, path in WITHOUT_LABELS.items():
        found[name] = []
        for result in results:
            at: Any = result
            for key in path:
                at = at.get(key) if isinstance(at, dict) else None
            found[name].append(at)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
