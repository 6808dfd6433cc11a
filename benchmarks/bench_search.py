"""How often `mlip search` finds what was asked for, and what a million films cost.

    python benchmarks/bench_search.py --run runs/demo [--write]

Quality: the run's test split, embedded. Each finding of the labels is asked for as a finding (what
states it minus what denies it), as a phrase, as a stating sentence, and by each of its own films;
beside each the same reranked by both heads. precision@100 is the share of a hundred answers that
carry the finding, the mean over findings; chance is the findings' share of all films.
Cost: archives of random unit vectors; processor time of one search and the memory it adds to the
process, by queries.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.harness import RESULTS, environment, replace_between, table, write_rows
from mlip.dataloading.manifest import load_manifest
from mlip.pretrained import open_checkpoint
from mlip.settings.config import load, sort_settings
from mlip.transfer.films.archive import Archive, Hits
from mlip.transfer.films.classify import ask_names
from mlip.transfer.films.embed import PART_ROWS, write_embeddings
from mlip.transfer.films.search import Query, ask_findings, ask_phrases, ask_rows
from mlip.transfer.films.search_table import reranked, search

ROWS = RESULTS / "search.json"
PAGE, MARK = Path(__file__).resolve().parents[1] / "docs" / "evaluation.md", "search"
MOST, RERANKED, OWN_FILMS = 100, 300, 20
SIZES, QUERIES, DIM = (10_000, 1_000_000), (1, 10), 128


def precision(hits: Sequence[Hits], right: Sequence[np.ndarray]) -> float:
    """Mean share of each query's answers that are among its right rows."""
    shares = [
        np.isin(own.row_index, rows).mean()
        for own, rows in zip(hits, right, strict=True)
        if len(own)
    ]
    return float(np.mean(shares))


def quality(run: Path, folder: Path) -> list[dict[str, Any]]:
    files, overrides = sort_settings([str(run)])
    config = load(files, overrides)
    opened = dataclasses.replace(open_checkpoint(run), config=config)
    manifest = load_manifest(config.data)
    write_embeddings(opened, manifest, folder, split="test", with_patches=False, images_only=True)
    archive = Archive(folder)
    rows = manifest.rows("test", with_report=False)
    carriers: dict[str, list[int]] = {}
    for row in rows.tolist():
        for name in manifest.labels(row):
            carriers.setdefault(name, []).append(row)
    names = sorted(carriers)
    of = {name: np.array(carriers[name]) for name in names}
    sentence = config.evaluate.positive_prompts[0]
    asked: Mapping[str, list[Query]] = {
        "`--finding NAME`": ask_findings(ask_names(names, opened, config.evaluate), opened),
        "`--phrase NAME`": ask_phrases([name.replace("_", " ") for name in names], opened),
        "`--phrase` and a sentence that states it": ask_phrases(
            [sentence.replace("{}", name.replace("_", " ")) for name in names], opened
        ),
    }
    chance = float(np.mean([len(of[name]) / len(rows) for name in names]))
    found = []
    for kind, queries in asked.items():
        right = [of[name] for name in names]
        plain = precision(search(archive, queries, MOST), right)
        hits = search(archive, queries, RERANKED)
        again, _ = reranked(opened, manifest, queries, hits, MOST)
        found.append({"query": kind, "precision": plain, "reranked": precision(again, right)})
    films = [(name, int(row)) for name in names for row in of[name][:OWN_FILMS]]
    hits = search(archive, ask_rows([row for _, row in films], archive), MOST)
    found.append(
        {
            "query": "`--row`, a film that carries it",
            "precision": precision(hits, [of[name] for name, _ in films]),
            "reranked": None,
        }
    )
    shared = {"films": len(rows), "findings": len(names), "chance": chance, "at": MOST}
    return [{**one, **shared, "reranked_of": RERANKED} for one in found]


def made_archive(folder: Path, rows: int) -> Archive:
    """An archive of random unit vectors as `mlip embed` lays it out."""
    folder.mkdir()
    parts = {}
    for number, at in enumerate(range(0, rows, PART_ROWS)):
        count = min(PART_ROWS, rows - at)
        vectors = torch.randn(count, DIM, generator=torch.Generator().manual_seed(number))
        name = f"part-{number:05d}.safetensors"
        tensors = {
            "row_index": torch.arange(at, at + count),
            "image": torch.nn.functional.normalize(vectors, dim=1),
        }
        save_file(tensors, folder / name)
        parts[name] = {"rows": count, "missing": {}, "sha256": ""}
    index = {"weights": "", "manifest": "", "preprocessing": "", "rows": rows, "embed_dim": DIM}
    (folder / "index.json").write_text(json.dumps({**index, "images_only": True, "parts": parts}))
    return Archive(folder)


def cost(folder: Path) -> list[dict[str, Any]]:
    found = []
    for rows in SIZES:
        archive = made_archive(folder / str(rows), rows)
        for count in QUERIES:
            vectors = archive.images_of(range(count))
            archive.best(vectors, MOST)  # files are in the machine's cache from here on
            before, begun = psutil.Process().memory_info().rss, time.process_time()
            archive.best(vectors, MOST)
            seconds = time.process_time() - begun
            added = (psutil.Process().memory_info().rss - before) / 2**20
            found.append(
                {"rows": rows, "queries": count, "cpu_s": seconds, "added_mib": max(0.0, added)}
            )
    return found


def page_tables(rows: Sequence[Mapping[str, Any]]) -> str:
    asked = [row for row in rows if "query" in row]
    lines = [
        f"| {asked[0]['films']:,} films, {asked[0]['findings']} findings | precision@{MOST} | the "
        f"{RERANKED} best reranked |",
        "|---|---|---|",
    ]
    for row in asked:
        again = "-" if row["reranked"] is None else f"{row['reranked']:.2f}"
        lines.append(f"| {row['query']} | {row['precision']:.2f} | {again} |")
    lines += [
        f"| chance | {asked[0]['chance']:.2f} | |",
        "",
        "| films | queries | processor time |",
        "|---|---|---|",
    ]
    lines += [
        f"| {row['rows']:,} | {row['queries']} | {row['cpu_s']:.2f} s |"
        for row in rows
        if "rows" in row
    ]
    first = rows[0]
    lines += ["", f"{first['cpu']}, torch {first['torch']}, commit {first['commit'][:12]}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished training")
    parser.add_argument("--write", action="store_true", help="keep the rows, and renew the page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        rows = quality(arguments.run, Path(made) / "archive") + cost(Path(made))
    rows = [{**row, **environment("cpu")} for row in rows]
    print(table([r for r in rows if "query" in r], ["query", "precision", "reranked", "chance"]))
    print(table([r for r in rows if "rows" in r], ["rows", "queries", "cpu_s", "added_mib"]))
    print(page_tables(rows))
    if arguments.write:
        print(write_rows("search", rows, ROWS))
        PAGE.write_text(replace_between(PAGE.read_text("utf-8"), MARK, page_tables(rows)), "utf-8")


if __name__ == "__main__":
    main()
