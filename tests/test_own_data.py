"""From a folder of one's own to embeddings by the commands that the README prints."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet
import pytest

import train
from mlip.cli import main
from tests.own_process import leave_the_process_as_it_was  # noqa: F401
from tests.small_run import small_run

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = [str(ROOT / "configs" / name) for name in ("real_cxr.yaml", "prepared.yaml")]


def test_what_prepare_wrote_is_trained_on_and_embedded_under_any_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, run = tmp_path / "own-256", tmp_path / "run"
    root = small_run().folder / "data"
    assert main(["prepare", "manifest", "--root", str(root), "--out", str(out)]) == 0
    manifest = f"data.manifest={out / 'manifest.parquet'}"
    # a first look: one step of a small batch, scored on the split that these studies have
    small = ["train.max_steps=1", "batch.global_pairs=8", "evaluate.split=test",
             "evaluate.bootstrap=4", "data.pipeline=torch"]  # fmt: skip
    with monkeypatch.context() as place:
        place.chdir(tmp_path)
        assert train.main(["--config", *CONFIGS, manifest, f"run.dir={run}", *small]) == 0
        assert (run / "report.html").is_file()
        command = ["embed", str(run / "config.yaml"), "--split", "test"]
        assert main([*command, "--out", str(tmp_path / "e"), "--format", "parquet"]) == 0
        assert main(["export", f"checkpoint={run}", "--out", str(tmp_path / "model")]) == 0
        assert main(["evaluate", str(run / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    first, again = ((f / "results.json").read_text() for f in (run, tmp_path / "again"))
    assert json.loads(first)["zero_shot"] == json.loads(again)["zero_shot"]
    parts = sorted((tmp_path / "e").rglob("*.parquet"))
    rows = sum(pyarrow.parquet.read_metadata(part).num_rows for part in parts)
    prepared = pyarrow.parquet.read_table(out / "manifest.parquet")["split"].to_pylist()
    assert rows == prepared.count("test") > 0
