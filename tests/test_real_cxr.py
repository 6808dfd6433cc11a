"""Training on real chest X-rays as they lie: JPEG and PNG in L, RGB and RGBA, and DICOM."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "data.resize_px=72",
    "data.crop_px=64",
    "batch.global_pairs=8",
    "train.checkpoint_steps=2",
    "train.log_steps=1",
    "model.vision.options={embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1], "
    "layer_type: basic}",
    "model.text.options={hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 32}",
    "model.embed_dim=32",
    "loss.category.prototypes=16",
    "evaluate.bootstrap=20",
    "evaluate.max_studies=16",
]
DICOM = [
    "dicom/original/RG1_J2KI.dcm",
    "dicom/derived/chest_jpegls_lossless_mono1_15bit.dcm",
    "dicom/derived/chest_rle_mono2_12bit.dcm",
]
# 9 of 10 of the data set's PNG files have other modes than the JPEG files
MODES = ("jpg", "png")


@pytest.fixture
def manifest(tmp_path: Path, shared_data: Path) -> Path:
    """Twelve real training images with text, three DICOM files, four validation images."""
    with (shared_data / "manifest.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["text"].strip()]
    chosen = []
    for mode in MODES:
        of_mode = [r for r in rows if r["split"] == "train" and r["path"].endswith(mode)]
        chosen += of_mode[:6]
    validation = [r for r in rows if r["split"] == "val"][:4]
    path = tmp_path / "manifest.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "text", "patient_id", "image_id", "split", "view", "sha256"])
        for row in chosen + validation:
            writer.writerow(
                [
                    row["path"],
                    row["text"],
                    row["patient_id"],
                    row["image_id"],
                    row["split"],
                    "",
                    row["sha256"],
                ]
            )
        for index, name in enumerate(DICOM):
            text = f"Test radiograph number {index}. No pleural effusion."
            digest = hashlib.sha256((shared_data / name).read_bytes()).hexdigest()
            writer.writerow([name, text, f"dicom-{index}", f"dicom-{index}", "train", "", digest])
    return path


def _train(
    manifest: Path, root: Path, folder: Path, *overrides: str
) -> subprocess.CompletedProcess:
    command = [sys.executable, "train.py", "--config", "configs/real_cxr.yaml", *SMALL]
    command += [f"data.manifest={manifest}", f"data.root={root}", f"run.dir={folder}"]
    command += ["data.columns.labels=null", *overrides]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


def test_real_images_of_every_kind_train_and_end_with_a_report(
    manifest: Path, shared_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    first = _train(manifest, shared_data, folder, "train.max_steps=4")
    assert first.returncode == 0, first.stderr
    ledger = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
    epochs = ledger["epochs"].values()
    assert ledger["quarantined_rows"] == {}
    assert sum(epoch["trained"] for epoch in epochs) == 4 * 8
    accounted = sum(ledger["excluded"].values()) + len(MODES) * 6 + len(DICOM)
    assert accounted == ledger["rows"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html") and "clinical" in page
    # text of patients is shown only where evaluate.show_text asks for it
    with manifest.open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    for output in [first.stdout, first.stderr, page, *_logs(folder)]:
        assert not any(text[:60] in output for text in texts)


def _logs(folder: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in folder.glob("*.jsonl")]
