"""Tables in another encoding than plain UTF-8: read where it is a byte-order mark, else refused.

Oracles: the same table without the mark; Python's own decoder, a line at a time, for which line is
the first that is not UTF-8. No message holds a word of a report.
"""

from __future__ import annotations

import codecs
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from mlip.cli import main
from mlip.dataloading.manifest import Manifest, ManifestError, load_manifest
from mlip.dataloading.tables import text_encoding
from mlip.dataloading.tables.table import column_names
from mlip.dataloading.tables.text_encoding import BOM, first_line_not_utf8
from mlip.settings import config

ROWS = 250  # more than the 100 of which column names are taken
SECRET = "Zelda has a canary nodule"


def table(ids: str = "p{}") -> list[dict[str, object]]:
    return [
        {
            "image": f"{i}.png",
            "report": f"{SECRET}, n\xfamero {i}.",
            "patient_id": int(ids.format(i)) if ids == "{}" else ids.format(i),
            "study_id": f"s{i}",
            "split": "train",
        }
        for i in range(ROWS)
    ]


def as_jsonl(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(",".join(f'"{cell}"' for cell in line) + "\n" for line in lines)


def load(path: Path) -> Manifest:
    return load_manifest(config.load([], [f"data.manifest={path}"]).data)


@pytest.mark.parametrize("ids", ["p{}", "{}"], ids=["texts", "numbers"])
def test_a_jsonl_with_a_byte_order_mark_is_the_one_without(tmp_path: Path, ids: str) -> None:
    """Windows tools write the mark, which Python's JSON refuses as "not JSON"."""
    plain, marked = tmp_path / "plain.jsonl", tmp_path / "marked.jsonl"
    plain.write_text(as_jsonl(table(ids)), encoding="utf-8")
    marked.write_bytes(BOM + plain.read_bytes())
    assert column_names(marked) == column_names(plain) == list(table()[0])
    one, other = load(plain), load(marked)
    assert other.image.equals(one.image) and other.patient.equals(one.patient)
    assert list(other.report) == list(one.report) and other.text(3).endswith("n\xfamero 3.")
    assert (other.pair_id == one.pair_id).all()


def test_the_first_line_that_is_not_utf8_is_that_of_a_decoder_whatever_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, path, bad = random.Random(0), tmp_path / "t", 0
    for _ in range(400):
        monkeypatch.setattr(text_encoding, "_BLOCK_BYTES", draw.choice([1, 2, 3, 5, 4096]))
        end = draw.choice([b"\n", b"\r\n", b"\r"])
        lines = [
            "".join(draw.choices("ab\xe4\u20ac\U0001f600", k=draw.randint(0, 5))).encode()
            for _ in range(6)
        ]
        if draw.random() < 0.7:
            place = draw.randrange(6)
            lines[place] = (lines[place] + b"\xf6")[: draw.randint(1, 9)]
        path.write_bytes(end.join(lines))
        expected = None
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                expected = number
                break
        bad += expected is not None
        assert first_line_not_utf8(path) == expected
    assert 150 < bad < 350


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
@pytest.mark.parametrize("row", [0, 5, ROWS - 1])
def test_bytes_of_another_encoding_are_refused_with_their_line(
    tmp_path: Path, name: str, row: int
) -> None:
    """Behind the first rows of a JSONL they passed for text, and broke the run that met them."""
    path = tmp_path / name
    text = as_csv(table()) if name == "m.csv" else as_jsonl(table())
    path.write_bytes(text.encode().replace(f"\xfamero {row}.".encode(), b"\xfamero"))
    line = row + 1 + (name == "m.csv")
    with pytest.raises(ManifestError, match=f"{name}: .*line {line} is not UTF-8") as caught:
        load(path)
    assert SECRET not in str(caught.value)


def test_a_header_of_another_encoding_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(as_csv(table()).replace("report", "informe m\xe9dico", 1).encode("latin-1"))
    for read in (column_names, load):
        with pytest.raises(ManifestError, match="line 1 is not UTF-8"):
            read(path)


def test_a_parquet_whose_texts_are_not_utf8_is_refused(tmp_path: Path) -> None:
    columns = pa.Table.from_pylist(table())
    cells = [text.encode("latin-1") for text in columns["report"].to_pylist()]
    broken = pa.array(cells, pa.binary()).view(pa.string())
    path = tmp_path / "m.parquet"
    pa.parquet.write_table(columns.set_column(1, "report", broken), path)
    with pytest.raises(ManifestError, match="cannot be read as parquet: .*not UTF-8") as caught:
        load(path)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("mark", [codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b""])
def test_a_utf16_jsonl_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mark: bytes
) -> None:
    path = tmp_path / "manifest.jsonl"
    kind = "utf-16-be" if mark == codecs.BOM_UTF16_BE else "utf-16-le"
    path.write_bytes(mark + as_jsonl(table()).encode(kind))
    with pytest.raises(ManifestError, match="not UTF-8 but UTF-16"):
        load(path)
    assert main(["prepare", "manifest", "--root", str(tmp_path), "--out", f"{tmp_path}.out"]) == 3
    error = capsys.readouterr().err
    assert f"{path}: not UTF-8 but UTF-16: save it as UTF-8 text" in error
    assert error.count("\n") == 1 and SECRET not in error


def test_what_is_no_fault_of_the_encoding_is_not_called_one(tmp_path: Path) -> None:
    rows = table()
    rows[ROWS - 1]["patient_id"] = 7.5
    path = tmp_path / "m.jsonl"
    path.write_text(as_jsonl(rows), encoding="utf-8")
    with pytest.raises(ManifestError, match="got a number with a point") as caught:
        load(path)
    assert "UTF-8" not in str(caught.value)
