"""boxes.csv beside a manifest: the boxes that somebody drew, for data without a column of them."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlip.dataloading.tables.table import ManifestError

COLUMNS = ("path", "label", "x", "y", "w", "h")


@dataclass(frozen=True)
class DrawnBox:
    """A line of the file."""

    label: str
    side: str  # "" where none is stated
    xywh: tuple[float, float, float, float]  # px of the image file
    phrase: str = ""  # words of the report that the box answers; "" where none are stated


def box_file(manifest_path: str) -> Path:
    """Where the boxes of a manifest would lie."""
    return Path(manifest_path).with_name("boxes.csv")


def read_box_file(manifest_path: str) -> dict[str, list[DrawnBox]] | None:
    """Image path (as in the manifest) -> its boxes; None where there is no boxes.csv.

    Raises:  ManifestError naming the file, and the line of a box that is none.
    """
    path = box_file(manifest_path)
    if not path.is_file():
        return None
    found: dict[str, list[DrawnBox]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = set(COLUMNS) - set(reader.fieldnames or ())
            if missing:
                raise ManifestError(
                    f"{path}: missing columns {', '.join(sorted(missing))}: expected "
                    f"{', '.join(COLUMNS)}, with x, y, w and h in px of the image file"
                )
            for entry in reader:
                box = _drawn_box(entry, f"{path}: line {reader.line_num}")
                found.setdefault(entry["path"], []).append(box)
    except UnicodeDecodeError:
        raise ManifestError(f"{path}: not UTF-8: save it as UTF-8 text") from None
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "no CSV"
        raise ManifestError(f"{path}: cannot be read: {reason}") from None
    return found


def _drawn_box(entry: Mapping[str, str | None], where: str) -> DrawnBox:
    try:
        x, y, w, h = (float(entry[key] or "") for key in COLUMNS[2:])
    except ValueError:
        x = y = w = h = math.nan
    if not all(map(math.isfinite, (x, y, w, h))) or w <= 0 or h <= 0:
        raise ManifestError(
            f"{where}: expected numbers for x, y, w and h, width and height above 0"
        )
    if entry["path"] is None or entry["label"] is None:
        raise ManifestError(f"{where}: cut off before its end")
    side = (entry.get("side") or "").strip().lower()
    phrase = " ".join((entry.get("phrase") or "").split())
    return DrawnBox(entry["label"], side, (x, y, w, h), phrase)
