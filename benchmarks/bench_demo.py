"""The demo over seeds, MLIP beside runs without its parts: runs what is missing, prints tables.

    .venv/bin/python benchmarks/bench_demo.py --variants mlip clip no_knowledge --seeds 1 2 3 \
        --rows benchmarks/results/demo.json --write docs/results.md

Each run goes to runs/bench/<variant>_<seed> through the deepspeed launcher, as `make demo` does,
with test patients of its own stream (data.phantom.test_seed). A folder that holds results.json is
not run again, nor a run whose row is in the file of --rows: each run leaves its measures there.
Variants of one seed share training and test patients, so what a part brings is a difference paired
by seed: the second table gives its mean and Student's 95 % interval over the seeds. With --write
the tables replace what stands between the two marks of the file (--mark: their name).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

# as a script, sys.path begins with this folder
sys.path.append(str(Path(__file__).resolve().parent.parent))
from benchmarks.harness import ROOT, read_json, replace_between
from mlip.system.output_file import whole_file

VARIANTS = {
    "mlip": ["configs/demo.yaml"],
    "clip": ["configs/demo.yaml", "configs/demo_clip.yaml"],
    "mgca": ["configs/demo.yaml", "configs/transfer/baseline_mgca.yaml"],
    "no_knowledge": ["configs/demo.yaml", "configs/demo_no_knowledge.yaml"],
}


def run(name: str, seed: int, test_seed: int) -> dict[str, Any]:
    """One run's row: what it was, its commit and its measures."""
    folder = ROOT / "runs" / "bench" / f"{name}_{seed}"
    results = folder / "results.json"
    if not results.is_file():
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "train.py"]
        command += ["--config", *VARIANTS[name], f"run.dir={folder}", f"run.seed={seed}"]
        command += [f"data.manifest={folder}/data/manifest.csv", f"data.phantom.seed={seed}"]
        command += [f"data.phantom.test_seed={test_seed}"]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        with (folder / "output.log").open("a") as output:
            subprocess.run(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, check=True
            )
        (folder / "seconds.json").write_text(json.dumps(time.monotonic() - begin))
    result = read_json(results)
    try:
        made = result["config"]["data"]["phantom"]["test_seed"]
        row = {"commit": result["run"]["commit"], "measures": measures(result)}
    except (KeyError, TypeError) as error:
        raise SystemExit(
            f"{results}: is not of a demo's evaluation ({error!r}): delete {folder} to run it again"
        ) from None
    if made != test_seed:
        raise SystemExit(
            f"{results}: is of the test patients of seed {made}, asked for {test_seed}: delete "
            f"{folder} to run it again"
        )
    return {"variant": name, "seed": seed, "test_seed": test_seed, **row}


def measures(result: dict[str, Any]) -> dict[str, float]:
    """What the table shows of one run."""
    zero_shot, grounding = result["zero_shot"], result["grounding"]
    recall = result["retrieval"]["scores"]
    rows = {
        "zero-shot macro-AUROC, global head": zero_shot["macro"]["global"]["value"],
        "zero-shot macro-AUROC, local score": zero_shot["macro"]["local"]["value"],
        "zero-shot macro-AUROC, combined": zero_shot["macro"]["combined"]["value"],
        "worst finding, global head": zero_shot["worst"]["global"]["value"],
        "worst finding, local score": zero_shot["worst"]["local"]["value"],
    }
    for head in ("global", "local", "combined"):
        for way in ("image_to_text", "text_to_image"):
            label = f"recall@10 of 256, {way.replace('_', ' ')}, {head}"
            rows[label] = recall[head][way]["recall@10"]["value"]
    for phrase in ("keyword", "sentence"):
        part = grounding[phrase]
        rows[f"pointing, {phrase}: hit rate"] = part["all"]["hit"]["value"]
        rows[f"pointing, {phrase}: over swapped image"] = part["all"]["over_swapped"]["value"]
        rows[f"pointing, {phrase}: area chance"] = part["all"]["area"]
        rows[f"pointing, {phrase}: fixed pixel with side"] = part["all"]["prior_with_side"]
        rows[f"pointing, {phrase}: findings at twice their area"] = part["findings_at_twice_area"]
    rows["pairs seen"] = result["run"]["pairs_seen"]
    return rows


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    columns = {name: [row["measures"] for row in runs] for name, runs in rows.items() if runs}
    head = ["measure"]
    for name, runs in columns.items():
        seeds = ", ".join(str(row["seed"]) for row in rows[name])
        head.append(f"{name}, mean of seed{'s' if len(runs) > 1 else ''} {seeds} (least to most)")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for measure in next(iter(columns.values()))[0]:
        cells = [measure]
        for runs in columns.values():
            values = [run[measure] for run in runs if run[measure] is not None]
            if not values:
                cells.append("n/a")
                continue
            mean = sum(values) / len(values)
            digits = 0 if mean >= 100 else 3
            spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
            cells.append(f"{mean:.{digits}f}" + (spread if len(values) > 1 else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(rows: dict[str, list[dict[str, Any]]]) -> str:
    return "\n\n".join(filter(None, [table(rows), differences(rows)]))


def differences(rows: dict[str, list[dict[str, Any]]]) -> str:
    """The first variant minus each other, paired by seed; empty with fewer than two of both."""
    (first, runs), *others = rows.items()
    of_seed = {row["seed"]: row["measures"] for row in runs}
    columns: dict[str, dict[str, str]] = {}
    for name, other in others:
        pairs = [(of_seed[row["seed"]], row["measures"]) for row in other if row["seed"] in of_seed]
        if len(pairs) < 2:
            continue
        cells = columns.setdefault(f"{first} minus {name}, {len(pairs)} seeds", {})
        for measure in pairs[0][0]:
            if any(side[measure] is None for pair in pairs for side in pair):
                continue
            gaps = np.array([one[measure] - two[measure] for one, two in pairs])
            half = float(stats.t.ppf(0.975, len(gaps) - 1) * stats.sem(gaps))
            if half > 0:  # counts that are equal in every run say nothing
                mean = gaps.mean()
                cells[measure] = f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"
    if not columns:
        return ""
    lines = ["| " + " | ".join(["measure", *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
    for measure in runs[0]["measures"]:
        cells_of = [cells.get(measure, "") for cells in columns.values()]
        if any(cells_of):
            lines.append("| " + " | ".join([measure, *cells_of]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["mlip"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--test-seed", type=int, default=3_000_000, help="run s tests on this + s")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="JSON of runs, kept and used")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--mark", default="demo table")
    options = parser.parse_args()
    kept: list[dict[str, Any]] = []
    if options.rows and options.rows.is_file():
        kept = read_json(options.rows, list)
    try:
        found = {(row["variant"], row["seed"], row["test_seed"]): row for row in kept}
    except (KeyError, TypeError) as error:
        raise SystemExit(
            f"{options.rows}: is no file of --rows ({error!r}): name another"
        ) from None
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in options.variants}
    for name in options.variants:
        for seed in options.seeds:
            key = (name, seed, options.test_seed + seed)
            if key not in found:
                found[key] = run(*key)
                if options.rows:  # after each: a run takes ten minutes
                    kept = [found[known] for known in sorted(found)]
                    with whole_file(options.rows) as partial:
                        partial.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            rows[name].append(found[key])
    text = tables(rows)
    print(text)
    if options.write:
        page = replace_between(options.write.read_text(encoding="utf-8"), options.mark, text)
        options.write.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
