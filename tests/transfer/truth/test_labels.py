"""What labels say, and what a blank cell does not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa

from mlip.dataloading.manifest import load_manifest
from mlip.settings.config import load
from mlip.transfer.truth import labels
from mlip.transfer.truth.annotations import Annotations, shared_names
from tests.transfer.truth.one_box import write_manifest


def test_a_blank_label_cell_says_nothing_unless_everything_was_looked_for(tmp_path: Path) -> None:
    said = Annotations(*write_manifest(tmp_path, "50,90,80,60", labels=""))
    rows = np.array([0])
    assert labels.label_matrix(said, rows, ["a"], blank_is_negative=False).tolist() == [[-1]]
    assert labels.label_matrix(said, rows, ["a"], blank_is_negative=True).tolist() == [[0]]


def test_denied_and_uncertain_labels_are_what_their_columns_say(tmp_path: Path) -> None:
    """As RSNA's and NIH's normal images, denied in full, and CheXpert's -1."""
    lines = [
        "image,patient_id,split,labels,uncertain,negative",
        "a.png,p1,test,Edema,Pneumonia,",
        "b.png,p2,test,,,Edema|Pneumonia",
        "c.png,p3,test,,Edema,",
        "d.png,p4,test,Pneumonia,,Edema",
        "e.png,p5,test,Pneumonia,,",
    ]
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    settings = [f"data.manifest={tmp_path / 'm.csv'}", "data.columns.study_id=null"]
    settings += ["data.columns.report=null", "data.columns.labels=labels"]
    settings += ["transfer.columns.uncertain=uncertain", "transfer.columns.negative=negative"]
    config = load([], settings)
    said = Annotations(config, load_manifest(config.data))
    findings = ["Edema", "Pneumonia"]
    matrix = labels.label_matrix(said, np.arange(5), findings, blank_is_negative=False)
    assert matrix.tolist() == [[1, -1], [0, 0], [-1, -1], [0, 1], [0, 1]]
    # where a report's labels are what it mentions, what it does not mention nobody knows
    unsure = Annotations(load([], [*settings, "transfer.blank=ignore"]), said.manifest)
    matrix = labels.label_matrix(unsure, np.arange(5), findings, blank_is_negative=False)
    assert matrix.tolist() == [[1, -1], [0, 0], [-1, -1], [0, 1], [-1, 1]]


def test_labels_that_no_manifest_has_are_nobodys(tmp_path: Path) -> None:
    """Generated studies, no column of labels, another lexicon: the evaluation broke at its end."""
    _, manifest = write_manifest(tmp_path, "50,90,80,60")
    column = pa.chunked_array([["a", "a|b", "c"]])
    named = dataclasses.replace(manifest, label_column=column, patient_key=np.array([1, 2, 3]))
    assert shared_names(named) == ["a"]
    assert shared_names(dataclasses.replace(manifest, label_column=None)) == []
