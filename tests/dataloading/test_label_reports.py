"""`mlip label`: a table comes out as it went in, with three columns more.

Oracle: labels written by hand; of generated studies their truth.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import stat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlip.cli import main
from mlip.dataloading.phantom.reports import HELD_OUT_PROMPTS
from mlip.dataloading.reports import label_reports
from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.linker import Linker
from mlip.knowledge.report_labels import ReportLabels
from tests.knowledge.test_cues import GERMAN
from tests.small_run import small_export, small_run

REPORTS = [
    'FINDINGS: Small "left" effusion; no pneumothorax.\nIMPRESSION: Effusion.',
    "",
    r"{\rtf1 Pneumothorax on the right.}",
    "Possible pneumonia. No pneumothorax is seen.",
    "nan",
]
ASKED = ("--findings", "Pneumothorax", "Pleural Effusion", "Pneumonia")
LABELS = ["Pleural Effusion", "", "", "", ""]
NEGATIVE = ["Pneumothorax|Pneumonia", "", "", "Pneumothorax|Pleural Effusion", ""]
UNCERTAIN = ["", "", "", "Pneumonia", ""]
STATED = ["Pneumothorax", "", "", "Pneumothorax", ""]  # denied in words


def rows_of(path: Path, delimiter: str = ",") -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def write_csv(path: Path, delimiter: str = ",", **more: list[str]) -> Path:
    columns = {"image": [f"{n}.png" for n in range(5)], "report": REPORTS, "a;b": [" x", "", "=1",
               "ä", "007"], **more}  # fmt: skip
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def label(*arguments: object) -> int:
    return main(["label", *map(str, arguments)])


@pytest.mark.parametrize(("name", "delimiter"), [("m.csv", ","), ("m.csv", ";"), ("m.tsv", "\t")])
def test_a_csv_keeps_its_cells_and_gets_three_columns(
    name: str, delimiter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = write_csv(tmp_path / name, delimiter), tmp_path / "out" / name
    assert label(table, "--out", out, *ASKED) == 0
    old, new = rows_of(table, delimiter), rows_of(out, delimiter)
    assert [{k: row[k] for k in old[0]} for row in new] == old
    assert list(new[0]) == [*old[0], "labels", "negative", "uncertain"]
    for column, wanted in zip(
        ("labels", "negative", "uncertain"), (LABELS, NEGATIVE, UNCERTAIN), strict=True
    ):
        assert [row[column] for row in new] == wanted
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert [path.name for path in out.parent.iterdir()] == [name]  # nothing half-written
    said = capsys.readouterr().out
    assert f"data.manifest={out} data.columns.labels=labels" in said
    assert "3 findings from 2 reports; 3 without one to read" in said
    assert "nan_report 1, no_report 1, rtf_report 1" in said
    assert "Pneumonia         present 0, uncertain 1, absent 0, not mentioned 1 (counted as" in said
    assert f"data.root={tmp_path}" in said and "transfer.columns.negative=negative" in said


def test_a_large_csv_is_written_a_piece_at_a_time_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, whole, pieces = write_csv(tmp_path / "m.csv"), tmp_path / "w.csv", tmp_path / "p.csv"
    assert label(table, "--out", whole, *ASKED) == 0
    monkeypatch.setattr(label_reports, "_ROWS_AT_ONCE", 2)  # of five rows: the last piece has one
    assert label(table, "--out", pieces, *ASKED) == 0
    assert pieces.read_bytes() == whole.read_bytes()


def test_equal_cells_of_a_million_reports_are_held_once() -> None:
    """0.3 kB a report else."""
    reports = label_reports.ReportColumn("all")
    reports.append(pa.array(["No pneumothorax is seen."] * 3, pa.large_string()))
    labels = ReportLabels(Linker(load_concepts()), ["Pneumothorax", "Pleural Effusion"])
    cells, _ = label_reports._labelled(reports, labels, True)
    assert cells[1] == ["Pneumothorax|Pleural Effusion"] * 3
    assert len({id(cell) for cell in cells[1]}) == 1


def test_what_is_not_mentioned_can_stay_unknown(tmp_path: Path) -> None:
    table, out = write_csv(tmp_path / "m.csv"), tmp_path / "out.csv"
    assert label(table, "--out", out, "--unmentioned", "unknown", *ASKED) == 0
    assert [row["negative"] for row in rows_of(out)] == STATED


def test_parquet_and_jsonl_keep_their_types(tmp_path: Path) -> None:
    columns = {"report": REPORTS, "width": [1, 2, 3, 4, 5], "boxes": [[1.5], [], [2.0], [], []]}
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    assert label(tmp_path / "m.parquet", "--out", tmp_path / "o.parquet", *ASKED) == 0
    made = pq.read_table(tmp_path / "o.parquet")
    assert made.select(list(columns)).equals(pa.table(columns))
    assert made["negative"].to_pylist() == NEGATIVE
    empty = pa.table({**columns, "negative": [""] * 5})
    pq.write_table(empty, tmp_path / "e.parquet")
    assert label(tmp_path / "e.parquet", "--out", tmp_path / "e2.parquet", *ASKED) == 0
    assert pq.read_table(tmp_path / "e2.parquet").column_names.count("negative") == 1
    lines = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    text = "\n\n".join(json.dumps(line) for line in lines)  # blank lines are no rows
    (tmp_path / "m.jsonl").write_text(text, encoding="utf-8")
    assert label(tmp_path / "m.jsonl", "--out", tmp_path / "o.jsonl", *ASKED) == 0
    made_lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [line.pop("uncertain") for line in made_lines] == UNCERTAIN
    assert [line.pop("negative") for line in made_lines] == NEGATIVE
    assert [line.pop("labels") for line in made_lines] == LABELS
    assert made_lines == lines


def test_cells_that_a_table_can_hold_come_back_as_they_went_in(tmp_path: Path) -> None:
    """A bare carriage return ends a row where its cell is not quoted: one row came out as three."""
    table = write_csv(tmp_path / "m.csv", site=["a\rb", "c\nd", 'e"f', "g\r\nh", ",;\t"])
    assert label(table, "--out", tmp_path / "o.csv", *ASKED) == 0
    assert [row["site"] for row in rows_of(tmp_path / "o.csv")] == [
        row["site"] for row in rows_of(table)
    ]
    line = '{"report": "No effusion.", "site": "\\ud800 \\u00e4"}'  # half a pair: no UTF-8
    (tmp_path / "m.jsonl").write_text(line, encoding="utf-8")
    assert label(tmp_path / "m.jsonl", "--out", tmp_path / "o.jsonl", *ASKED) == 0
    assert json.loads((tmp_path / "o.jsonl").read_bytes())["site"] == json.loads(line)["site"]
    twice = pa.Table.from_arrays(
        [pa.array(["No effusion."]), pa.array([1]), pa.array([2])], ["report", "x", "x"]
    )
    pq.write_table(twice, tmp_path / "m.parquet")
    assert label(tmp_path / "m.parquet", "--out", tmp_path / "o.parquet", *ASKED) == 0
    made = pq.ParquetFile(tmp_path / "o.parquet").read()
    assert made.column_names == ["report", "x", "x", "labels", "negative", "uncertain"]


def test_labels_of_a_late_row_and_lists_of_them_are_kept_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of JSONL the columns' names are those of its first 100 rows."""
    rows = [{"report": "Edema."}] * 101 + [{"report": "Edema.", "labels": "Edema"}]
    late, lists, out = tmp_path / "m.jsonl", tmp_path / "m.parquet", tmp_path / "out.jsonl"
    late.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert label(late, "--out", out, *ASKED) == 2 and not out.exists()
    assert "'labels' holds labels already" in capsys.readouterr().err
    late.write_text('{"report": "Edema.", "labels": 0}\n{"report": "", "labels": null}')
    assert label(late, "--out", out, *ASKED) == 2 and not out.exists()
    late.write_text('{"report": "Edema.", "labels": []}\n{"report": "", "labels": null}')
    assert label(late, "--out", out, *ASKED) == 0
    capsys.readouterr()
    out.unlink()
    pq.write_table(pa.table({"report": ["Edema."], "labels": [["Edema"]]}), lists)
    assert label(lists, "--out", tmp_path / "out.parquet", *ASKED) == 2
    assert "'labels' holds labels already" in capsys.readouterr().err
    assert label(tmp_path / "none.jsonl", "--out", out) == 3


def test_the_settings_are_words_that_a_shell_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = write_csv(tmp_path / "m.csv"), tmp_path / "own films" / "m.csv"
    assert label(table, "--out", out, "--prefix", "said & ", *ASKED) == 0
    told = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert told == [
        f"data.manifest={out}",
        "data.columns.labels=said & labels",
        "transfer.columns.negative=said & negative",
        "transfer.columns.uncertain=said & uncertain",
        f"data.root={tmp_path}",
    ]
    assert label(table, "--out", out, "--overwrite", "--unmentioned", "unknown", *ASKED) == 0
    assert "transfer.blank=ignore" in capsys.readouterr().out.splitlines()[-1]
    table.write_text(table.read_text().replace("report", "text", 1))
    assert label(table, "--out", out, "--overwrite", "--report", "text", *ASKED) == 0
    assert "data.columns.report=text" in shlex.split(capsys.readouterr().out.splitlines()[-1])


def test_labels_that_are_there_are_not_replaced_and_empty_columns_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_csv(tmp_path / "m.csv", labels=["Edema", "", "", "", ""], negative=[""] * 5)
    out = tmp_path / "out.csv"
    assert label(table, "--out", out, *ASKED) == 2
    assert "'labels' holds labels already" in capsys.readouterr().err and not out.exists()
    assert label(table, "--out", out, "--prefix", "report_", *ASKED) == 0
    (first, *_), names = rows_of(out), list(rows_of(out)[0])
    assert (first["labels"], first["report_labels"]) == ("Edema", "Pleural Effusion")
    assert names.count("negative") == 1 and first["negative"] == ""
    empty = write_csv(tmp_path / "e.csv", negative=[""] * 5)
    assert label(empty, "--out", tmp_path / "e2.csv", *ASKED) == 0
    assert list(rows_of(tmp_path / "e2.csv")[0]).count("negative") == 1
    assert [row["negative"] for row in rows_of(tmp_path / "e2.csv")] == NEGATIVE


def test_sections_are_chosen_as_for_training(tmp_path: Path) -> None:
    table, out = write_csv(tmp_path / "m.csv"), tmp_path / "out.csv"
    assert label(table, "--out", out, "--sections", "impression", *ASKED) == 0
    assert rows_of(out)[0]["negative"] == "Pneumothorax|Pneumonia"
    unknown = ("--unmentioned", "unknown", "--overwrite")
    assert label(table, "--out", out, "--sections", "impression", *unknown, *ASKED) == 0
    assert rows_of(out)[0]["negative"] == ""  # the denial stands in the findings


def test_what_cannot_be_honoured_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = write_csv(tmp_path / "m.csv"), tmp_path / "out.csv"
    before = table.read_bytes()
    refused = {
        ("--out", tmp_path / "out.parquet"): (2, "expected a .csv file"),
        ("--out", table): (2, "is there already"),
        ("--out", table, "--overwrite"): (2, "is there already"),
        ("--out", out, "--report", "text"): (2, "--report text: no such column; .* has: .*report"),
        ("--out", out, "--findings", "a|b"): (2, "cannot be blank or hold"),
        ("--out", out, "--findings", " "): (2, "cannot be blank or hold"),
        ("--out", out, "--prefix", "a\nb"): (2, "--prefix 'a.*nb': expected the begin"),
        # found out before the reports are read
        ("--out", "/proc/nowhere/x.csv"): (2, "/proc/nowhere: cannot be written to"),
        ("--out", out, "--findings", "Pneumothorx"): (2, "near: Pneumothorax"),
    }
    for arguments, (code, told) in refused.items():
        assert label(table, *arguments) == code, arguments
        assert re.search(told, capsys.readouterr().err), arguments
    assert label(tmp_path / "none.csv", "--out", out) == 3
    assert table.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m.csv"]
    assert label(table, "--out", out, *ASKED) == 0
    assert label(table, "--out", out, *ASKED) == 2
    assert label(table, "--out", out, "--overwrite", *ASKED) == 0


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_file_that_appears_during_the_work_stays_and_the_table_lies_beside_it(
    suffix: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table, out = tmp_path / f"m{suffix}", tmp_path / f"out{suffix}"
    if suffix == ".csv":
        write_csv(table)
    elif suffix == ".parquet":
        pq.write_table(pa.table({"report": [REPORTS[0]]}), table)
    else:
        table.write_text(json.dumps({"report": REPORTS[0]}) + "\n")
    assert label(table, "--out", out, *ASKED) == 0
    summary = capsys.readouterr().out.split(f"{out}: ")[0]
    made = out.read_bytes()
    out.unlink()
    states = ReportLabels.states

    def and_a_file_appears(*given: Any) -> Any:
        out.write_text("another's")
        return states(*given)

    monkeypatch.setattr(ReportLabels, "states", and_a_file_appears)
    assert label(table, "--out", out, *ASKED) == 2
    beside = tmp_path / f"out-2{suffix}"
    told, said = capsys.readouterr()
    assert "labels of" in summary and told == summary
    assert "is there already" in said
    assert said.endswith(f"what was made meanwhile is kept in {beside}\n")
    assert out.read_text() == "another's" and beside.read_bytes() == made
    assert beside.stat().st_mode & 0o777 == 0o600
    assert label(table, "--out", out, "--overwrite", *ASKED) == 0  # which was asked for
    assert out.read_bytes() == made


def test_reports_of_another_language_are_told_and_a_lexicon_of_it_reads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    german, english = "Kein Erguss, Herz nicht vergrößert.", "No effusion. The heart is enlarged."
    table, out = tmp_path / "m.csv", tmp_path / "o.csv"
    table.write_text(f'report\n"{german}"\n', encoding="utf-8")
    assert label(table, "--out", out) == 0
    assert "1 of 1 reports have less than 35 % words" in capsys.readouterr().out
    own = ("--lexicon", GERMAN, "--findings", "Erguss", "--overwrite")
    assert label(table, "--out", out, *own) == 0
    assert "less than" not in capsys.readouterr().out
    assert [row["negative"] for row in rows_of(out)] == ["Erguss"]
    table.write_text("report\n" + f'"{german}"\n' + f'"{english}"\n' * 19, encoding="utf-8")
    assert label(table, "--out", out, "--overwrite") == 0
    assert "less than" not in capsys.readouterr().out  # one of twenty


def test_generated_reports_give_the_truth_of_their_studies_and_an_evaluation_takes_them(
    tmp_path: Path,
) -> None:
    """A doubt is of a finding that is there: the generator hedges some."""
    run = small_run()
    manifest, out = Path(run.config.data.manifest), tmp_path / "labelled.csv"
    findings = list(HELD_OUT_PROMPTS)
    extra = ("--prefix", "said_", "--unmentioned", "unknown")
    assert label(manifest, "--out", out, *extra, "--findings", *findings) == 0
    for row in rows_of(out):
        truth = set(filter(None, row["labels"].split("|"))) & set(findings)
        stated, doubted, denied = (
            set(filter(None, row[f"said_{name}"].split("|")))
            for name in ("labels", "uncertain", "negative")
        )
        assert stated <= truth and stated | doubted == truth and not denied & truth
    settings = [s for s in run.settings if not s.startswith(("run.dir", "data.manifest"))]
    settings = [s for s in settings if not s.startswith(("data.columns.labels", "data.phantom"))]
    columns = ("data.columns.labels=said_labels", "transfer.columns.negative=said_negative",
               "transfer.columns.uncertain=said_uncertain", "transfer.blank=ignore")  # fmt: skip
    place = (f"data.manifest={out}", f"data.root={manifest.parent}")
    command = ["evaluate", *settings, *columns, *place, f"checkpoint={small_export()}"]
    assert main([*command, "--out", str(tmp_path / "scores")]) == 0
    scored = json.loads((tmp_path / "scores" / "results.json").read_text())
    per_finding = scored["zero_shot"]["findings"]
    assert {row["finding"] for row in per_finding} <= set(findings) and per_finding


def test_a_name_without_room_for_what_is_written_first_is_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table, out = write_csv(tmp_path / "m.csv"), tmp_path / f"{'x' * 245}.csv"
    monkeypatch.setattr(label_reports, "Linker", None)  # nothing is read by then
    assert label(table, "--out", out, *ASKED) == 2
    assert "x.csv: a file of this name cannot be made: File name too" in capsys.readouterr().err
