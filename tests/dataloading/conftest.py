"""A small corpus on disk, and a linker with known answers, for the tests of the data path."""

from __future__ import annotations

import csv
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mlip.batch import Batch
from mlip.dataloading.loader import Loader, build_loader
from mlip.dataloading.manifest import load_manifest
from mlip.dataloading.prepare.shard_build import build_shards
from mlip.dataloading.reports.tokenizer import ReportTokenizer, train_tokenizer
from mlip.settings import config
from mlip.settings.config import Config
from tests.dataloading.shard_sources import BuiltShards, contents, plan_for, source

SENTENCES = (
    "There is a small left pleural effusion.",
    "No pneumothorax is seen.",
    "The heart is enlarged.",
    "Possible nodule of 1.5 cm in the right upper lobe.",
    "The lungs are clear.",
    "A left chest tube is in place.",
)


@dataclass(frozen=True)
class Link:
    concept_id: str
    start: int
    end: int
    state: str


class WordTable:
    index = {"effusion": 0, "pneumothorax": 1, "nodule": 2, "tube": 3}


class WordLinker:
    """Finds four words; "no" before one in its sentence negates it, "possible" makes it unsure."""

    def link(self, text: str) -> list[Link]:
        found = []
        for match in re.finditer("|".join(WordTable.index), text.lower()):
            before = re.split(r"[.] ", text[: match.start()].lower())[-1]
            state = "absent" if "no " in before else "present"
            state = "uncertain" if "possible" in before else state
            found.append(Link(match.group(), match.start(), match.end(), state))
        return found


def encode_image(rng: np.random.Generator, index: int, side_px: int) -> tuple[str, bytes]:
    """One of six kinds of file, by index: 16-bit and 8-bit PNG, JPEG, RGB, RGBA, odd shape."""
    smooth = cv2.resize(rng.random((9, 9)), (side_px, side_px), interpolation=cv2.INTER_CUBIC)
    grey = (np.clip(smooth, 0, 1) * 255).astype(np.uint8)
    kind = index % 6
    if kind == 0:
        wide = (np.clip(smooth, 0, 1) * 65535).astype(np.uint16)
        return ".png", cv2.imencode(".png", wide)[1].tobytes()
    if kind == 1:
        return ".png", cv2.imencode(".png", grey)[1].tobytes()
    if kind == 2:
        return ".jpg", cv2.imencode(".jpg", grey)[1].tobytes()
    if kind == 3:
        return ".jpg", cv2.imencode(".jpg", np.dstack([grey] * 3))[1].tobytes()
    if kind == 4:
        opaque = np.full_like(grey, 255)
        return ".png", cv2.imencode(".png", np.dstack([grey, grey, grey, opaque]))[1].tobytes()
    return ".png", cv2.imencode(".png", np.ascontiguousarray(grey[: side_px // 2]))[1].tobytes()


def write_corpus(folder: Path, rows: int = 24, side_px: int = 48) -> None:
    """Images and manifest.csv with 2/3 train, 1/6 val, 1/6 test."""
    rng = np.random.default_rng(7)
    (folder / "images").mkdir(parents=True)
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "report", "patient_id", "study_id", "split", "sha256", "labels"])
        for i in range(rows):
            suffix, content = encode_image(rng, i, side_px)
            name = f"images/{i:04d}{suffix}"
            (folder / name).write_bytes(content)
            chosen = rng.choice(len(SENTENCES), size=3, replace=False)
            report = " ".join(SENTENCES[j] for j in chosen) + f" Film {i}."
            split = ("train", "train", "train", "train", "val", "test")[i // 4 % 6]
            writer.writerow(
                [
                    name,
                    report,
                    f"patient-{i // 2}",
                    f"study-{i}",
                    split,
                    hashlib.sha256(content).hexdigest(),
                    "effusion|nodule" if i % 2 else "",
                ]
            )


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[..., config.Config]:
    """make(*overrides, rows=24) -> Config of a corpus written below tmp_path, once."""

    def make(*overrides: str, rows: int = 24) -> config.Config:
        folder = tmp_path / f"corpus{rows}"
        if not folder.exists():
            write_corpus(folder, rows)
        return config.load([], [*_settings(folder), *overrides])

    return make


def _settings(folder: Path) -> list[str]:
    return [
        f"data.manifest={folder / 'manifest.csv'}",
        "data.columns.sha256=sha256",
        "data.columns.labels=labels",
        "data.pipeline=torch",
        "data.resize_px=40",
        "data.crop_px=32",
        "data.channels=1",
        "data.max_tokens=40",
        "batch.global_pairs=6",
    ]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ReportTokenizer:
    texts = [f"{sentence} Film {i}." for i in range(40) for sentence in SENTENCES]
    return train_tokenizer(texts, 150, tmp_path_factory.mktemp("vocabulary") / "tokenizer")


@pytest.fixture(scope="session")
def linker() -> WordLinker:
    return WordLinker()


@pytest.fixture(scope="session")
def concepts() -> type[WordTable]:
    return WordTable


@pytest.fixture
def build(tokenizer: ReportTokenizer, linker: Any, concepts: Any) -> Iterator[Any]:
    """build(config, split="train", train=True, ...) -> Loader, closed at the end of the test."""
    made: list[Loader] = []

    def make(config: Config, split: str = "train", train: bool = True, **kw: Any) -> Loader:
        manifest = load_manifest(config.data)
        parts = {"tokenizer": tokenizer, "linker": linker, "table": concepts}
        made.append(build_loader(config, manifest, split=split, train=train, **parts, **kw))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


@pytest.fixture(scope="session")
def built_shards(tmp_path_factory: pytest.TempPathFactory) -> BuiltShards:
    """(folder, rows, contents) of one uninterrupted run; never changed by a test."""
    folder = tmp_path_factory.mktemp("built")
    rows = source(folder / "raw")
    result = build_shards(rows, plan_for(folder))
    assert result.complete and result.images == 20 and not result.refused
    return folder, rows, contents(folder / "out")


@pytest.fixture
def copied_shards(built_shards: BuiltShards, tmp_path: Path) -> BuiltShards:
    """A copy of the finished run that a test may damage; times are kept, so it counts as done."""
    folder, rows, expected = built_shards
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, copy_function=shutil.copy2)
    return tmp_path, rows, expected


def take(loader: Loader, count: int) -> list[Batch]:
    """The loader's next batches."""
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]
