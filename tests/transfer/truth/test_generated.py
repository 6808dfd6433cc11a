"""Files of generated studies: told from real data, and named where damaged."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mlip.dataloading.phantom.dataset import MARK, read_truth
from mlip.dataloading.tables.table import ManifestError
from mlip.transfer.truth import generated
from mlip.transfer.truth.generated import phantom_size, truth_of
from tests.transfer.truth.one_box import write_manifest


def test_real_data_is_told_from_generated_studies_which_tell_their_size(tmp_path: Path) -> None:
    _, manifest = write_manifest(tmp_path, "50,90,80,60")
    assert phantom_size(manifest) is None
    (tmp_path / "meta.json").write_text('{"kind": "something else"}')
    assert phantom_size(manifest) is None
    assert phantom_size(dataclasses.replace(manifest, path="nowhere/m.csv")) is None
    (tmp_path / "meta.json").write_text(f'{{"kind": "{MARK}", "settings": {{"image_px": 48}}}}')
    assert phantom_size(manifest) == (48, 48)


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "[" * 100_000, '{"kind": "mlip phantom studies", "settings": []}']
)
def test_generated_studies_with_a_damaged_meta_are_not_scored_as_real_ones(
    tmp_path: Path, content: str
) -> None:
    _, manifest = write_manifest(tmp_path, "50,90,80,60")
    (tmp_path / "truth.jsonl").write_text("{}\n")
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(ManifestError, match=r"meta\.json: is damaged or not that of the"):
        phantom_size(manifest)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", "{", "[" * 100_000, "\xff", None])
def test_a_truth_that_is_damaged_is_named(tmp_path: Path, content: str | None) -> None:
    _, manifest = write_manifest(tmp_path, "50,90,80,60")
    if content is not None:
        (tmp_path / "truth.jsonl").write_text(content + "\n" * bool(content), encoding="latin-1")
    with pytest.raises(ManifestError, match=r"truth\.jsonl: (is damaged|cannot be read)"):
        generated.oracle(manifest, np.arange(1))
    if content != "":  # a folder without a finding has no line
        with pytest.raises(ManifestError, match=r"truth\.jsonl: "), truth_of(manifest) as folder:
            read_truth(folder)
