"""`mlip prepare --check-phi PATH`: what may identify a patient in a file or folder, counted.

Printed are attributes, reasons and numbers of files, never a value or the name of a file.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from mlip.dataloading.datasets.rows import DatasetError
from mlip.dataloading.dicom.radiograph import SUFFIXES, DicomError, check_phi
from mlip.dataloading.progress import Progress
from mlip.settings.config import ConfigError

_FILE, _FOLDER = "file cannot be checked", "folder cannot be read"


def report_phi(path: Path) -> int:
    """Attribute, reason and number of files; status 1 where anything was found.

    Raises:  ConfigError where nothing is there; DatasetError where no DICOM file could be checked,
             which says nothing about what the files hold.
    """
    if not os.path.lexists(path):
        raise ConfigError(f"--check-phi {path}: no such file or folder")
    counts: Counter[tuple[str, str]] = Counter()
    files, others = _files(path, counts)
    checked = 0
    told = Progress("files checked")
    for place, file in enumerate(files):
        told(place, len(files))
        try:
            leftovers = check_phi(file)
        except DicomError as error:
            if error.code in ("not_dicom", "empty") and file != path and not _claims_dicom(file):
                others += 1
            else:
                counts[_FILE, error.code] += 1
            continue
        checked += 1
        counts.update((leftover.attribute, leftover.reason) for leftover in leftovers)
    print(f"{checked} DICOM files checked; text burned into the pixels is not looked for")
    if others:
        print(f"{others} other files were not checked: no DICOM by name or content")
    for (attribute, reason), count in sorted(counts.items()):
        what = "folders" if attribute == _FOLDER else "files"
        print(f"{attribute:40s} {reason:20s} {count} {what}")
    if not checked:
        raise DatasetError(
            f"{path}: no DICOM file could be checked, so nothing is known of what lies there: "
            "expected files with a preamble, archives unpacked"
        )
    return 1 if counts else 0


def _files(path: Path, counts: Counter[tuple[str, str]]) -> tuple[list[Path], int]:
    """Regular files at or below path in order, and how many other things lie there."""
    if not path.is_dir():
        return [path], 0

    def count_folder(error: OSError) -> None:
        counts[_FOLDER, "unreadable_folder"] += 1

    found, others = [], 0
    for folder, names, files in os.walk(path, onerror=count_folder):
        # os.walk does not follow a link to a folder, and does not say so
        others += sum(Path(folder, name).is_symlink() for name in names)
        names.sort()
        there = [Path(folder, name) for name in sorted(files)]
        found += [file for file in there if file.is_file()]
        others += sum(not file.is_file() for file in there)
    return found, others


def _claims_dicom(path: Path) -> bool:
    """Whether a file that cannot be read as DICOM is named or marked as one."""
    if path.suffix.lower() in SUFFIXES:
        return True
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"
