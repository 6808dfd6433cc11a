"""`mlip label`: a table of reports with what each of them states, denies and doubts.

The columns are those that an evaluation reads: data.columns.labels, transfer.columns.negative and
transfer.columns.uncertain.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from mlip.dataloading.ledger import listed
from mlip.dataloading.progress import Progress
from mlip.dataloading.reports.column import ONE_WORD_REPORT, RULES, ReportColumn
from mlip.dataloading.tables.csv_text import read_header, shown
from mlip.dataloading.tables.table import column_names, json_rows, read_table
from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.linker import FEW_KNOWN_WORDS, Linker, few_known_words
from mlip.knowledge.report_labels import ReportLabels, chexpert_names
from mlip.settings.config import Columns, ConfigError
from mlip.system.output_file import require_name, require_writable, whole_file
from mlip.system.unread_output import terminal_text

# of each: the names that a report states, denies or leaves unmentioned, and doubts
COLUMNS = ("labels", "negative", "uncertain")
_STATES = ("present", "absent", "uncertain")
_FEW_TEXTS = 0.1  # share of reports with few known words that is told, as at a training's start
_JOIN = "|"
_LINES = (".jsonl", ".ndjson")
_ROWS_AT_ONCE = 10_000  # of a CSV as Python's objects: several times their size as Arrow's
_READ = (0, ONE_WORD_REPORT)  # "Normal." teaches a model nothing, and says something


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `mlip label`."""
    add = parser.add_argument
    add("table", type=Path, help="CSV, Parquet or JSONL with one report per row, like a manifest")
    add(
        "--out",
        type=Path,
        required=True,
        help="table to write: the same, in the same format, with three more columns",
    )
    add("--report", default="report", metavar="COLUMN", help="column of reports (default: report)")
    section_help = "sections to read, as data.sections in training (default: all)"
    add("--sections", choices=("all", "findings", "impression"), default="all", help=section_help)
    finding_help = "findings to label, by their names in the lexicon (default: CheXpert's 14)"
    add("--findings", nargs="+", action="extend", default=[], metavar="NAME", help=finding_help)
    mention_help = "what a finding is that a report does not mention (default: absent, as for a "
    mention_help += "blank of CheXpert)"
    add("--unmentioned", choices=("absent", "unknown"), default="absent", help=mention_help)
    add("--prefix", default="", help=f"text before the new columns' names ({', '.join(COLUMNS)})")
    add("--lexicon", help="concept folder or file (default: the project's own)")
    add("--overwrite", action="store_true", help="replace --out if it exists")


def run(arguments: argparse.Namespace) -> int:
    """Write the table; 0.

    Raises:  ConfigError for arguments that cannot be honoured (exit status 2), LexiconError for a
             finding that is not known (2), ManifestError for a table that cannot be used (3)
    """
    table, out = arguments.table, arguments.out
    if out.suffix.lower() != table.suffix.lower():
        raise ConfigError(f"--out {out}: expected a {table.suffix} file, as {table} is one")

    def require_free(out: Path) -> None:
        if out.exists() and not (arguments.overwrite and out.is_file() and not out.samefile(table)):
            raise ConfigError(f"--out {out}: is there already; name a new file, or say --overwrite")

    require_free(out)
    require_writable(out.absolute().parent)
    require_name(out, "--out")
    if not arguments.prefix.isprintable():
        raise ConfigError(f"--prefix {arguments.prefix!r}: expected the begin of a column's name")
    linker = Linker(load_concepts(arguments.lexicon))
    names = arguments.findings or chexpert_names(linker.table)
    if bad := [name for name in names if _JOIN in name or not name.strip()]:
        raise ConfigError(f"--findings {bad[0]!r}: a name cannot be blank or hold {_JOIN!r}")
    labels = ReportLabels(linker, names)
    columns = [f"{arguments.prefix}{name}" for name in COLUMNS]
    if arguments.report not in (there := column_names(table)):
        told = f"no such column; {table} has: {shown(there)}"
        raise ConfigError(f"--report {arguments.report}: {told}")
    reports = ReportColumn(arguments.sections)
    read_table(table, {"report": arguments.report}, {"report": reports})
    _require_free(table, columns)
    cells, lines = _labelled(reports, labels, arguments.unmentioned == "absent")
    print(terminal_text(lines))  # before the file: another's may have come to lie there
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out, is_private=True, require_own=require_free) as partial:
        _write(table, partial, dict(zip(columns, cells, strict=True)))
    print(f"{out}: {len(reports.texts)} rows; to evaluate on it:")
    settings = _settings(table, out, arguments.report, columns)
    if arguments.unmentioned == "unknown":
        settings["transfer.blank"] = "ignore"  # else what a row does not name is absent there
    print("  " + shlex.join(f"{key}={value}" for key, value in settings.items()))
    return 0


def _settings(table: Path, out: Path, report: str, columns: Sequence[str]) -> dict[str, object]:
    """What an evaluation of the new table needs; its images stay where the first table has them."""
    keys = ("data.columns.labels", "transfer.columns.negative", "transfer.columns.uncertain")
    settings: dict[str, object] = {"data.manifest": out, **dict(zip(keys, columns, strict=True))}
    if report != Columns().report:
        settings["data.columns.report"] = report
    if out.resolve().parent != table.resolve().parent:
        settings["data.root"] = table.parent
    return settings


def _require_free(table: Path, columns: Sequence[str]) -> None:
    """Raises:  ConfigError where a new column would replace one that says something"""
    for name in columns:
        if _holds_any(table, name):
            raise ConfigError(
                f"{table}: its column {name!r} holds labels already; keep them and say --prefix, "
                "for example --prefix report_"
            )


def _holds_any(table: Path, name: str) -> bool:
    """Whether a cell of this column holds more than blanks; of JSONL every row is looked at."""
    if table.suffix.lower() in _LINES:
        # 0 and false are labels: no
        values = (row.get(name) for _, row in json_rows(table))
        cells = {str(value) for value in values if value not in (None, [], {})}
    elif name in column_names(table):
        (column,) = read_table(table, {name: name}, anything=(name,))[0].values()
        cells = {value or "" for value in column.unique().to_pylist()}
    else:
        return False
    return any(value.strip() for value in cells)


def _labelled(
    reports: ReportColumn, labels: ReportLabels, blank_is_absent: bool
) -> tuple[list[list[str]], list[str]]:
    """The cells of the three columns, and lines for the terminal: counts of each finding."""
    cells: list[list[str]] = [[], [], []]
    once: dict[str, str] = {}  # a million reports have some thousand different cells
    counts = {name: Counter[str]() for name in labels.names}
    rules = reports.rule()
    progress = Progress("reports")
    for done, (rule, text) in enumerate(zip(rules.tolist(), reports.texts, strict=True), 1):
        states = labels.states(text) if rule in _READ else {}
        if rule in _READ:
            for name, counter in counts.items():
                counter[states.get(name, "")] += 1
            if blank_is_absent:
                states = {name: states.get(name, "absent") for name in labels.names}
        for column, state in zip(cells, _STATES, strict=True):
            cell = _JOIN.join(name for name, found in states.items() if found == state)
            column.append(once.setdefault(cell, cell))
        progress(done, len(rules))
    left = Counter(RULES[rule] for rule in rules.tolist() if rule not in _READ)
    read = len(rules) - left.total()
    without = f"; {left.total()} without one to read ({listed(left)}) have no label" if left else ""
    lines = [f"labels of {len(labels.names)} findings from {read} reports{without}"]
    width = max(map(len, labels.names))
    kept = "counted as absent" if blank_is_absent else "left unknown"
    for name, counter in counts.items():
        lines.append(
            f"  {name:<{width}}  present {counter['present']}, uncertain {counter['uncertain']}, "
            f"absent {counter['absent']}, not mentioned {counter['']} ({kept})"
        )
    if labels.linker.table.cues is None and read:
        texts = (text for rule, text in zip(rules, reports.texts, strict=True) if rule in _READ)
        few = few_known_words(texts)
        if few >= _FEW_TEXTS * read:
            lines.append(
                f"{few} of {read} reports have less than {100 * FEW_KNOWN_WORDS:.0f} % words that "
                "the lexicon knows: it is English, and what such reports deny may be read as stated"
            )
    return cells, lines


def _write(table: Path, out: Path, columns: Mapping[str, list[str]]) -> None:
    """The table in its own format with these columns, in place of empty ones of their names."""
    suffix = table.suffix.lower()
    if suffix == ".parquet":
        whole = pq.ParquetFile(table).read()  # of columns that share a name, too
        whole = whole.drop_columns([name for name in columns if name in whole.column_names])
        for name, cells in columns.items():
            whole = whole.append_column(name, pa.array(cells, pa.string()))
        pq.write_table(whole, out, compression="zstd")
        return
    # half a surrogate pair of a JSON text goes back as the \\ud800 that it came as
    with out.open("w", encoding="utf-8", errors="backslashreplace", newline="") as text:
        if suffix in _LINES:
            _write_lines(table, text, columns)
        else:
            _write_csv(table, text, columns)


def _write_lines(table: Path, text: TextIO, columns: Mapping[str, list[str]]) -> None:
    for (_, row), new in zip(json_rows(table), zip(*columns.values(), strict=True), strict=True):
        row |= dict(zip(columns, new, strict=True))
        text.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_csv(table: Path, text: TextIO, columns: Mapping[str, list[str]]) -> None:
    names, delimiter = read_header(table)
    kept = [name for name in names if name not in columns]
    old, _ = read_table(table, {name: name for name in kept})
    # lines end as those of prepare do: with "\n" alone a cell that holds "\r" would stand unquoted
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow([*kept, *columns])
    new = [*columns.values()]
    for begin in range(0, len(new[0]), _ROWS_AT_ONCE):
        cells = [old[name].slice(begin, _ROWS_AT_ONCE).to_pylist() for name in kept]
        here = [column[begin : begin + _ROWS_AT_ONCE] for column in new]
        writer.writerows(zip(*cells, *here, strict=True))
