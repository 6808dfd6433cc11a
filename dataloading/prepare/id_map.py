"""The secret table of `mlip prepare --id-map`: from hashed ids back to the originals."""

from __future__ import annotations

import csv
from pathlib import Path

from mlip.dataloading.datasets.rows import Collected
from mlip.dataloading.prepare.shard_build import Plan, member_keys
from mlip.dataloading.prepare.tables import hashed
from mlip.system.output_file import begins_with, require_replaceable, whole_file

COLUMNS = "key image image_id patient_hash patient_id study_hash study_id left_out".split()


def require_own_map(id_map: Path) -> None:
    """Raises:  ConfigError for a folder, or a file that --id-map did not write"""
    # earlier tables told of no file that was left out
    is_map = begins_with(id_map, ",".join(COLUMNS[:-1]))
    require_replaceable(id_map, "--id-map", "table of mlip prepare", is_ours=is_map)


def write_id_map(collected: Collected, plan: Plan, path: Path) -> None:
    """Readable by its owner alone.

    Behind the images, which refused.csv names by their key, stand the files that a rule left out.

    Raises:  KeptBesideError where another's file has come to lie there; OSError
    """
    rows = collected.rows
    table = [COLUMNS]
    for row, key in zip(rows, member_keys(rows, plan.salt), strict=True):
        patient, study = (
            hashed(getattr(row, f"{level}_id"), level, plan.salt) for level in ("patient", "study")
        )
        ids = [row.image_id, patient, row.patient_id, study, row.study_id]
        table.append([key, row.image, *ids, ""])
    for image, rule in collected.left_out:
        # bytes that are no UTF-8 stand as \udc..
        named = image.encode("utf-8", "backslashreplace").decode()
        table.append(["", named, *[""] * 5, rule])
    # asked again: a large tree is read for minutes
    with whole_file(path, is_private=True, require_own=require_own_map) as partial:
        with partial.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(table)
