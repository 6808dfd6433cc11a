"""Rows over small image files of four kinds, the plan of a build over them, and what it leaves.

Shared by the tests of the shards.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet

from mlip.dataloading.datasets.rows import Row
from mlip.dataloading.dicom.radiograph import write_radiograph
from mlip.dataloading.prepare.shard_build import Plan
from mlip.dataloading.prepare.shard_worker import ImageSettings

BuiltShards = tuple[Path, list[Row], dict[str, bytes]]  # folder, rows, contents
SPLITS = ("train", "train", "val", "train", "test")


def picture(seed: int, height: int = 90, width: int = 70, kind: type = np.uint8) -> np.ndarray:
    rng = np.random.default_rng(seed)
    smooth = cv2.resize(rng.random((6, 6)), (width, height), interpolation=cv2.INTER_CUBIC)
    return (smooth.clip(0, 1) * np.iinfo(kind).max).astype(kind)


def source(root: Path, count: int = 20, **changes: object) -> list[Row]:
    """Rows over JPEG, 8-bit and 16-bit PNG and DICOM files below root."""
    root.mkdir(exist_ok=True)
    rows = []
    for i in range(count):
        name = f"{i:03d}.{('jpg', 'png', 'png', 'dcm')[i % 4]}"
        image = picture(i, 90 + i, 70, np.uint16 if i % 4 == 2 else np.uint8)
        if name.endswith("dcm"):
            wide = picture(i, 64, 80, np.uint16)
            write_radiograph(root / name, wide, patient_id=f"MRN{i}", study_id=str(i), view="AP")
        else:
            cv2.imwrite(str(root / name), image)
        rows.append(
            Row(
                image=name,
                patient_id=f"MRN{i}",
                study_id=f"ACC{i}",
                image_id=f"IMG{i}",
                split=SPLITS[i % 5],
                report=f"Report {i}.",
            )
        )
    return rows


def plan_for(tmp_path: Path, out: str = "out", **changes: Any) -> Plan:
    plan = Plan(
        root=tmp_path / "raw",
        out=tmp_path / out,
        settings=ImageSettings(side_px=64, codec="png"),
        salt="s",
        keep_ids=True,
        shard_images=4,
        workers=1,
    )
    return replace(plan, **changes)


def contents(out: Path) -> dict[str, bytes]:
    """Everything a finished run leaves, Parquet by its table (its file may hold a version)."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.suffix == ".parquet":
            table = pyarrow.parquet.read_table(path)
            found[str(path.relative_to(out))] = repr(table.to_pylist()).encode()
        elif path.is_file():
            found[str(path.relative_to(out))] = path.read_bytes()
    return found
