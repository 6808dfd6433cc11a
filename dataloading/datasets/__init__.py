"""The plain table of data sets that `mlip prepare` knows; one file each."""

from mlip.dataloading.datasets import (
    chexpert,
    chexpert_plus,
    covidx,
    folder,
    manifest,
    mimic_cxr,
    nih_cxr14,
    object_cxr,
    open_i,
    padchest,
    padchest_gr,
    rexgradient,
    rsna_pneumonia,
    siim_pneumothorax,
    vindr_cxr,
)
from mlip.dataloading.datasets.rows import Dataset

DATASETS: dict[str, Dataset] = {
    "chexpert": chexpert.DATASET,
    "chexpert_plus": chexpert_plus.DATASET,
    "covidx": covidx.DATASET,
    "folder": folder.DATASET,
    "manifest": manifest.DATASET,
    "mimic_cxr": mimic_cxr.DATASET,
    "nih_cxr14": nih_cxr14.DATASET,
    "object_cxr": object_cxr.DATASET,
    "open_i": open_i.DATASET,
    "padchest": padchest.DATASET,
    "padchest_gr": padchest_gr.DATASET,
    "rexgradient": rexgradient.DATASET,
    "rsna_pneumonia": rsna_pneumonia.DATASET,
    "siim_pneumothorax": siim_pneumothorax.DATASET,
    "vindr_cxr": vindr_cxr.DATASET,
}
