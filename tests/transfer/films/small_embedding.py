"""`mlip embed` over the test split of the small manifest, in three parts of four rows."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlip.cli import main
from mlip.transfer.films.embed import write_embeddings
from tests.small_run import small_export
from tests.transfer.small_manifest import pictures, write

TEST_ROWS = [i for i in range(30) if i % 5 >= 3]  # 12 rows: three parts of four
PART_ROWS = 4


def in_small_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images of one test alone, embedded in small parts: the root of a fixture."""
    defaults = {**write_embeddings.__kwdefaults__, "part_rows": PART_ROWS}
    monkeypatch.setattr(write_embeddings, "__kwdefaults__", defaults)
    return Path(shutil.copytree(pictures(), tmp_path / "images"))


def embed(folder: Path, root: Path, *more: str, out: str = "out", **columns: Any) -> int:
    settings = [*write(folder, **columns), f"data.root={root}", *more]
    where = [f"checkpoint={small_export()}", "--split", "test", "--out", str(folder / out)]
    return main(["embed", *settings, *where])


def made(said: str) -> list[int]:
    return [int(n) for n in re.findall(r"part (\d) of 3", said)]
