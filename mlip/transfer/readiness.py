"""What evaluate_run would refuse in its data, found before hours of training instead of after."""

from __future__ import annotations

import dataclasses

from mlip.config import Config
from mlip.dataloading.manifest import Manifest
from mlip.transfer.annotations import Annotations
from mlip.transfer.evaluation import choose_rows
from mlip.transfer.truth import load_boxes

# rows whose boxes are laid on their images: each opens a file
_SIZED_ROWS = 512


def check_evaluation(config: Config, manifest: Manifest) -> None:
    """Reads what evaluation reads beside images and reports: columns, the subset, boxes.csv.

    Raises:  ManifestError or ValueError as evaluate_run, which does all of it again.
    """
    # as there: rows without a usable report count
    manifest = dataclasses.replace(manifest, keep_without_report=True)
    Annotations(config, manifest)
    load_boxes(config, manifest, choose_rows(config, manifest)[:_SIZED_ROWS].tolist())
