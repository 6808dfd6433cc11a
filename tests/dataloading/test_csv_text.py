"""CSV exports as hospitals send them: headers, quotation marks, encodings, rounded identifiers.

Oracles: Python's strict csv reader for which files are quoted soundly; planted words for what no
message may hold.
"""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet
import pytest

from mlip.cli import main
from mlip.dataloading.manifest import Manifest, ManifestError, load_manifest
from mlip.dataloading.tables import csv_text
from mlip.dataloading.tables.csv_text import CsvError, check_quotes, read_header, shown
from mlip.settings import config

HEADER = "image,patient_id,study_id,report,split"
SECRET = "Zelda Smith has a canary nodule"


def lines(count: int = 6) -> list[str]:
    return [f'{i}.png,00{i}7,s{i},"{SECRET}, number {i}",train' for i in range(count)]


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "manifest.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def plain() -> str:
    return "\n".join([HEADER, *lines()]) + "\n"


def load(path: Path) -> Manifest:
    return load_manifest(config.load([], [f"data.manifest={path}"]).data)


def test_quotes_are_judged_as_by_a_strict_reader_whatever_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    seen = {True: 0, False: 0}
    for trial in range(700):
        monkeypatch.setattr(csv_text, "_BLOCK_BYTES", draw.choice([1, 2, 3, 7, 4096]))
        if trial % 2:
            cells = [["".join(draw.choices('ab",\n', k=4)) for _ in range(3)] for _ in range(3)]
            buffer = io.StringIO()
            csv.writer(buffer, lineterminator=draw.choice(["\n", "\r\n"])).writerows(cells)
            text = buffer.getvalue()
        else:
            text = "".join(draw.choices('ab"",\n', k=draw.randint(1, 14)))
        path = write(tmp_path, text)
        try:
            list(csv.reader(io.StringIO(text, newline=""), strict=True))
            sound = True
        except csv.Error:
            sound = False
        seen[sound] += 1
        try:
            check_quotes(path, ",")
            assert sound, repr(text)
        except CsvError:
            assert not sound, repr(text)
    assert min(seen.values()) > 100


@pytest.mark.parametrize("mark", ["", '" x'])
def test_a_cell_that_is_never_closed_swallows_no_other_report(tmp_path: Path, mark: str) -> None:
    """Without the check row 3's text carried the ids of row 4, and row 4 was gone."""
    rows = lines()
    rows[2] = rows[2].replace('number 2"', f"number 2{mark}")
    for end in ("\n", "\r", "\r\n"):
        with pytest.raises(ManifestError, match="manifest.csv: line 4: a quoted cell") as caught:
            load(write(tmp_path, end.join([HEADER, *rows, ""])))
        assert SECRET not in str(caught.value)
    with pytest.raises(ManifestError, match="line 7"):
        load(write(tmp_path, plain().rstrip().removesuffix('",train')))
    # a mark inside an unquoted cell is text: a tube of 5"
    rows[2] = '2.png,0027,s2,Tube of 5" in place,train'
    assert load(write(tmp_path, "\n".join([HEADER, *rows]))).text(2) == 'Tube of 5" in place'


def test_headers_over_two_lines_and_lines_that_end_in_cr_are_read(tmp_path: Path) -> None:
    names, delimiter = read_header(write(tmp_path, 'image;"study\nid";report\r\na;b;c\r\n'))
    assert (names, delimiter) == (["image", "study\nid", "report"], ";")
    manifest = load(write(tmp_path, plain().replace("\n", "\r")))
    assert len(manifest) == 6 and manifest.patient[3].as_py() == "0037"


def test_a_column_behind_thousands_of_others_is_found(tmp_path: Path) -> None:
    """Only 64 KiB of a header were read: the report behind radiomics features was missing."""
    features = ",".join(f"wavelet-HHL_glszm_SmallAreaLowGrayLevelEmphasis_{i}" for i in range(3000))
    first, *rest = plain().splitlines()
    header = first.replace("report", f"{features},report")
    rows = [row.replace(',"', "," + "0," * 3000 + '"') for row in rest]
    assert load(write(tmp_path, "\n".join([header, *rows]))).text(5) == f"{SECRET}, number 5"


@pytest.mark.parametrize(
    "content, words",
    [
        (plain().encode("utf-16"), "UTF-16"),
        (b"PK\x03\x04" + b"\0" * 99, "Excel workbook"),
        (b"\0" * 99, "NUL bytes"),
        (b"sep=;\n" + plain().encode(), "remove it, the header comes first"),
        (b"sep=\t\n" + plain().replace(",", "\t").encode(), "remove it, the header comes first"),
        (b'"sep=,"\r\n' + plain().encode(), "remove it, the header comes first"),
        (b"\n\n" + plain().encode(), "first line is blank"),
        (b"", "empty"),
        (HEADER.encode() + b"," * (1 << 20), "its first line is longer than 1 MiB"),
        (b'"' + HEADER.encode() + b"\nx" * 99_999, "line 1: a quoted cell begins there"),
        (plain().replace("canary", "opacité").encode("latin-1"), "not UTF-8"),
        (plain().replace("report", "opacité").encode("latin-1"), "line 1 is not UTF-8"),
        ("\n".join(lines()).encode(), "looks like data and is not shown"),
        ("\n".join(lines()).replace("\n", "\r").encode(), "looks like data and is not shown"),
    ],
)
def test_what_is_no_csv_with_a_header_is_named_and_never_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, words: str
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ManifestError, match=words) as caught:
        load(path)
    assert main(["prepare", "manifest", "--root", str(tmp_path), "--out", f"{tmp_path}.out"]) == 3
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and str(path) in error
    for message in (error, str(caught.value)):
        assert SECRET not in message and "0007" not in message and "\0" not in message


def test_usual_headers_are_shown_and_rows_of_data_are_not() -> None:
    usual = "Image Index,Follow-up #,OriginalImage[Width,PatientOrientationCodeSequence_CodeMeaning"
    assert shown(usual.split(",")) == ", ".join(usual.split(","))
    assert shown(["image", " patient_id"]) == "image, ' patient_id'"
    assert shown(["Accession No.", "sha256", "SHA-256"]) == "Accession No., sha256, SHA-256"
    assert shown([f"finding {i % 10}" for i in range(9999)]).count(", ") == 39
    identifiers = ("PAT00123", "AX-204", "A-12-34", "DOE^JOHN", "0012")
    for cell in ("a/b.dcm", "2024-01-01", "No effusion. Clear.", "No Edema.", "x" * 61):
        assert cell not in shown(["image", cell])
    for cell in identifiers:
        assert cell not in shown(["image", cell])


@pytest.mark.parametrize("column", ["patient_id", "study_id"])
@pytest.mark.parametrize("rounded", ["1.23E+11", "1,23e+11", "4E+05"])
def test_identifiers_that_a_spreadsheet_has_rounded_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str, rounded: str
) -> None:
    text = plain().replace("0027" if column == "patient_id" else "s2", f'"{rounded}"')
    path = write(tmp_path, text)
    with pytest.raises(ManifestError, match=f"{column}.*holds 1 identifiers.*data row 3"):
        load(path)
    assert main(["prepare", "manifest", "--root", str(tmp_path), "--out", f"{tmp_path}.out"]) == 3
    assert "data row 3" in capsys.readouterr().err


def test_one_file_under_two_spellings_is_one_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = plain() + lines()[2].replace("2.png", "./2.png") + "\n"
    path = write(tmp_path, again)
    with pytest.raises(ManifestError, match="1 image paths occur more than once.*data row 3"):
        load(path)
    assert main(["prepare", "manifest", "--root", str(tmp_path), "--out", f"{tmp_path}.out"]) == 3
    assert "data rows 3 and 7 name the same image" in capsys.readouterr().err


def test_prepare_finds_columns_in_untidy_headers_and_counts_unknown_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A header cell over two lines once hid the columns behind it: all reports were gone."""
    for i in range(6):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((40, 40), 9 * i, np.uint8))
    rows = lines()
    rows[5] = rows[5].replace(",train", ",trian")
    write(tmp_path, "\n".join(['image, patient_id,"study\nid",report,split', *rows]))
    out = tmp_path.with_name(f"{tmp_path.name} out")
    assert (
        main(["prepare", "manifest", "--root", str(tmp_path), "--out", str(out), "--workers", "1"])
        == 0
    )
    assert "left out by rule unknown_split: 1" in capsys.readouterr().out
    reports = pyarrow.parquet.read_table(out / "manifest.parquet")["report"].to_pylist()
    assert reports == [f"{SECRET}, number {i}" for i in range(5)]
