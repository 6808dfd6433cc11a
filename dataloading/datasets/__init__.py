"""The plain table of data sets that `mlip prepare` knows; one file each."""

from mlip.dataloading.datasets import folder, manifest
from mlip.dataloading.datasets.rows import Dataset

DATASETS: dict[str, Dataset] = {
    "folder": folder.DATASET,
    "manifest": manifest.DATASET,
}
