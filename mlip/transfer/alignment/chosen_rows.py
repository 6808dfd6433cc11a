"""Which rows of a manifest an evaluation without training takes."""

from __future__ import annotations

from mlip.dataloading.manifest import Manifest, ManifestError
from mlip.settings.config import Config
from mlip.transfer.array import Array
from mlip.transfer.draws import some_of
from mlip.transfer.truth.annotations import Annotations


def choose_rows(config: Config, manifest: Manifest) -> Array:
    """Rows of the split to evaluate: all, or a keyed random evaluate.max_studies of them.

    Raises:  as rows_in_split
    """
    return some_of(rows_in_split(config, manifest), config.evaluate.max_studies, config.run.seed)


def rows_in_split(config: Config, manifest: Manifest) -> Array:
    """All rows of evaluate.split, of evaluate.subset alone where one is set.

    Raises:  ManifestError or ValueError where there are none, or nothing tells of subsets
    """
    rows = manifest.rows(config.evaluate.split, with_report=False)
    if (subset := config.evaluate.subset) is not None:
        whole, rows = len(rows), _of_subset(config, manifest, rows, subset)
        if whole > 0 and len(rows) == 0:
            raise ManifestError(
                f"{manifest.path}: none of the {whole} rows of split {config.evaluate.split!r} "
                f"(evaluate.split) is of evaluate.subset={subset!r} in column "
                f"{config.transfer.columns.subset!r}; choose another subset or split"
            )
    if len(rows) == 0:
        raise ValueError(
            f"{manifest.path}: split {config.evaluate.split!r} (evaluate.split) has no rows to "
            "evaluate; choose another split"
        )
    return rows


def _of_subset(config: Config, manifest: Manifest, rows: Array, subset: str) -> Array:
    if config.transfer.columns.subset is None:
        raise ValueError(
            f"evaluate.subset={subset!r}: set transfer.columns.subset to the "
            "manifest's column of subsets"
        )
    return Annotations(config, manifest).in_subset(rows, subset)
