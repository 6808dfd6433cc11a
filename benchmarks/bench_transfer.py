"""Fair baselines in one table: what pre-training is worth, on generated studies with known truth.

Every method has the same towers, data, steps, batch and seeds; only its losses differ. Random
weights have the same tower; ImageNet weights are a folder of the user's (--imagenet DIR).

  python benchmarks/bench_transfer.py                       # 2,000 studies, 1,000 steps, 3 seeds
  python benchmarks/bench_transfer.py --steps 100 --studies 500 --tasks classification
Reruns go on: a finished pre-training or task is not done again. Writes table.md and results.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mlip.transfer.table import headline_of, interval_text, rows_of  # noqa: E402

CONFIGS = ROOT / "configs"
# name -> (what it is, overlays of configs/demo.yaml; None = no pre-training)
METHODS: dict[str, tuple[str, list[str] | None]] = {
    "mlip": ("full MLIP", []),
    "mgca": ("MGCA family: in-pair tokens, plain prototypes", ["transfer/baseline_mgca.yaml"]),
    "clip": ("global contrast only (CLIP, ConVIRT)", ["transfer/baseline_convirt.yaml"]),
    "imagenet": ("ImageNet weights", None),
    "random": ("random weights", None),
}
TASKS = ("classification", "segmentation", "detection")


def main() -> int:
    options = parse()
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for method in options.methods.split(","):
        for seed in range(1, options.pretrain_seeds + 1):
            run = pretrain(method, seed, options, out)
            for task in options.tasks.split(","):
                results = evaluate(method, seed, task, run, options, out)
                if results is not None:
                    found.setdefault(task, {}).setdefault(method, []).append(results)
    text = table(found, options)
    (out / "table.md").write_text(text, encoding="utf-8")
    (out / "results.json").write_text(json.dumps(summary(found, options), indent=1) + "\n")
    print(text)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--out", default="runs/bench_transfer", help="folder of runs, table.md and results.json")
    add("--methods", default="mlip,mgca,clip,imagenet,random")
    add("--tasks", default=",".join(TASKS))
    add("--steps", type=int, default=1000, help="of each pre-training")
    add("--studies", type=int, default=2000, help="generated for training")
    add("--test-studies", type=int, default=1000)
    add("--val-studies", type=int, default=256)
    add("--pretrain-seeds", type=int, default=1, help="pre-trainings of each method")
    add("--seeds", default="[1,2,3]", help="of the label draws and new weights")
    add("--fractions", default="[1,10]", help="%% of the training patients")
    add("--imagenet", help="folder of ImageNet weights in transformers' format")
    add("--set", action="append", default=[], metavar="key=value", help="setting of every run")
    return parser.parse_args()


def data_settings(options: argparse.Namespace, out: Path) -> list[str]:
    return [
        f"data.manifest={out / 'data' / 'manifest.csv'}",
        f"data.phantom.studies={options.studies}",
        f"data.phantom.val_studies={options.val_studies}",
        f"data.phantom.test_studies={options.test_studies}",
        *options.set,
    ]


def pretrain(method: str, seed: int, options: argparse.Namespace, out: Path) -> Path | None:
    """The run folder of a pre-training; None for a method without one."""
    overlays = METHODS[method][1]
    if overlays is None:
        return None
    run = out / f"{method}-{seed}"
    if not (run / "results.json").is_file():
        command = [sys.executable, "train.py", "--config", str(CONFIGS / "demo.yaml")]
        command += [str(CONFIGS / name) for name in overlays]
        command += [f"run.dir={run}", f"run.seed={seed}", *data_settings(options, out)]
        command += [f"train.max_steps={options.steps}", f"train.checkpoint_steps={options.steps}"]
        command += ["evaluate.examples=0", "train.engine=plain"]
        call(command, out / f"{method}-{seed}.log")
    return run


def evaluate(
    method: str,
    seed: int,
    task: str,
    run: Path | None,
    options: argparse.Namespace,
    out: Path,
) -> dict[str, Any] | None:
    """The task's results; None where the method has no weights here."""
    folder = out / f"{method}-{seed}-{task}"
    saved = folder / "results.json"
    if not saved.is_file():
        command = [sys.executable, "-m", "mlip.cli", "evaluate"]
        command += [str(CONFIGS / "transfer" / f"phantom_{task}.yaml")]
        command += [*data_settings(options, out), f"transfer.seeds={options.seeds}"]
        command += [f"transfer.fractions={options.fractions}", "--out", str(folder)]
        if run is not None:
            command.append(f"checkpoint={run}")
        elif method == "random":
            command += ["transfer.start=random", f"checkpoint={out / 'mlip-1'}"]
        elif options.imagenet is None:
            return None
        else:
            command += ["transfer.start=imagenet", f"model.vision.source={options.imagenet}"]
            command += ["data.channels=3"]
        call(command, out / f"{method}-{seed}-{task}.log")
    return json.loads(saved.read_text(encoding="utf-8"))


def call(command: list[str], log: Path) -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    print(f"{log.stem}: {spent:.0f} s of processor time", flush=True)
    if done.returncode != 0:
        raise SystemExit(f"{log.stem} ended with {done.returncode}: see {log}")


def summary(found: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Every score of every method, with what it depends on."""
    return {
        "options": {k: v for k, v in vars(options).items() if k not in ("out", "imagenet")},
        "tasks": {
            task: {
                method: [
                    {
                        "fractions": {
                            f"{f['percent']:g}": dict(rows_of(f["scores"])) for f in r["fractions"]
                        },
                        "fingerprints": r["fingerprints"],
                        "versions": r["versions"],
                    }
                    for r in results
                ]
                for method, results in methods.items()
            }
            for task, methods in found.items()
        },
    }


def table(found: dict[str, Any], options: argparse.Namespace) -> str:
    """Markdown: tasks down, methods across rows, one column a fraction."""
    lines = [
        f"{options.studies} generated studies, {options.steps} steps of 64 pairs, "
        f"label draws and new weights of seeds {options.seeds}; 95 % intervals over test patients.",
        "",
    ]
    for task, methods in found.items():
        first = next(iter(methods.values()))[0]
        percents = [f["percent"] for f in first["fractions"]]
        name = headline_of(first["fractions"][0]["scores"])[0]
        lines += [f"**{task}**: {name}", ""]
        lines.append("| method | " + " | ".join(f"{p:g} % of labels" for p in percents) + " |")
        lines.append("|---|" + "---|" * len(percents))
        for method, (title, _) in METHODS.items():
            if method not in options.methods.split(","):
                continue
            for results in methods.get(method, [None]):
                cells = ["not run"] * len(percents)
                if results is not None:
                    cells = [
                        interval_text(headline_of(f["scores"])[1]) for f in results["fractions"]
                    ]
                lines.append(f"| {title} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
