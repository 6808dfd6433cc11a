"""JSON of a data set and the sections in it: what is read, and what an error says of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlip.dataloading.datasets.json_file import read_json, read_json_lines
from mlip.dataloading.datasets.rows import DatasetError
from mlip.dataloading.datasets.sections import section_text


def test_a_section_keeps_its_lines_and_what_says_nothing_is_none() -> None:
    assert section_text("  Heart  is\t normal. \n\n\n2. No\\nedema ") == (
        "Heart is normal.\n2. No\nedema"
    )
    for nothing in (None, float("nan"), "", "None", " - \n___ .", "\\n"):
        assert section_text(nothing) == ""


def test_json_that_is_too_deep_or_too_large_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" * 200_000)
    with pytest.raises(DatasetError, match="a.json: is no JSON: expected a list"):
        read_json(path, "a list", "a set")
    with pytest.raises(DatasetError, match="a.json: line 1: expected a JSON object with key"):
        list(read_json_lines(path, "key", "a set"))
    with pytest.raises(DatasetError, match="gone.json: cannot be read: No such file"):
        read_json(tmp_path / "gone.json", "a list", "a set")
    monkeypatch.setattr("mlip.dataloading.datasets.json_file.MAX_TABLE_BYTES", 10)
    with pytest.raises(DatasetError, match="a.json: has more than 10 bytes"):
        read_json(path, "a list", "a set")
    with pytest.raises(DatasetError, match="cannot be read: Is a directory"):
        list(read_json_lines(tmp_path, "key", "a set"))


@pytest.mark.parametrize("half", [b"\\ud800", b"\\uDFff x", b"\xed\xa0\x80"])
def test_half_a_character_is_found_before_any_image_is_read(half: bytes, tmp_path: Path) -> None:
    """The manifest could not be written, after all images, by an error that named no file."""
    path = tmp_path / "a.json"
    for content in (b'[{"Findings": "Doe %s."}]' % half, b'{"%s": 1}' % half):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match="a.json: a text holds half a surrogate") as caught:
            read_json(path, "a list", "a set")
        assert "Doe" not in str(caught.value)
    for whole in (b'["\\ud83d\\ude00"]', '["\U0001f600"]'.encode("utf-16")):
        path.write_bytes(whole)
        assert read_json(path, "a list", "a set") == ["\U0001f600"]
