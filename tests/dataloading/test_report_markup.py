"""Reports with markup: HTML becomes text, RTF is left out and counted."""

from __future__ import annotations

import time

import pyarrow as pa
import pytest

from mlip.dataloading.reports.column import RULES, ReportColumn
from mlip.dataloading.reports.markup import without_markup
from mlip.dataloading.reports.text import clean_report


@pytest.mark.parametrize(
    "text, clean",
    [
        ("Heart&nbsp;is&nbsp;enlarged", "Heart is enlarged"),
        ("<p>No pneumothorax</p><p>Cardiomegaly</p>", "No pneumothorax\n\nCardiomegaly"),
        ("<UL><LI>No effusion</LI><li>edema</li></UL>", "No effusion. edema"),
        ("No effusion<br/>Heart <b>normal</b>", "No effusion. Heart normal"),
        ("<table><tr><td>Heart</td><td>normal</td></tr></table>", "Heart. normal"),
        ("<style>p { color: red }</style><!-- x -->Clear.", "Clear."),
        ("Nodule &lt;5 mm, R&amp;D", "Nodule <5 mm, R&D"),
        ("Nodule <5 mm in <NAME>", "Nodule <5 mm in"),
        ("<paragraph>No edema</paragraph><paragraph>Nodule</paragraph>", "No edema\n\nNodule"),
        (
            "<content ID='a'>No</content> edema<list><item>Nodule</item></list>",
            "No edema\n\nNodule",
        ),
        ("No edema\\.br\\Nodule\\.sp2\\Mass", "No edema. Nodule. Mass"),
        (
            "No edema\\.br\\\\.in+4\\Nodule\\.sk3\\left\\.sp 2\\\\.fi\\Mass",
            "No edema. Nodule left. Mass",
        ),
        ("No edema\\X0D\\\\X0A\\Nodule\\x0a\\Mass", "No edema. Nodule. Mass"),
        ("A \\T\\ B \\f\\ C \\S\\ D \\R\\ E \\E\\ \\H\\F\\N\\", "A & B | C ^ D ~ E \\ F"),
        ("C:\\reports\\new", "C:\\reports\\new"),
        ("AT&T; pH < 7 & > 6", "AT&T; pH < 7 & > 6"),
    ],
)
def test_html_becomes_plain_text(text: str, clean: str) -> None:
    assert clean_report(without_markup(text)) == clean


def test_a_column_is_read_without_markup_and_rtf_is_counted() -> None:
    column = ReportColumn("findings")
    texts = [
        "<p>INDICATION: pain</p><p>FINDINGS: No effusion.</p>",
        r"{\rtf1\ansi FINDINGS: No effusion.\par}",
        "FINDINGS: Clear lungs.",
        "FINDINGS: Heart &gt; half.",
        "FINDINGS: No edema\\.br\\Mass",
        None,
    ]
    column.append(pa.array(texts, pa.large_string()))
    assert list(column.texts)[0] == "No effusion."
    assert list(column.texts)[2:4] == ["Clear lungs.", "Heart > half."]
    assert column.texts[4] == "No edema\nMass"
    assert [RULES[code] for code in column.rule()] == ["", "rtf_report", "", "", "", "no_report"]


@pytest.mark.parametrize("cell", ["td", "li", "dt"])
def test_headings_in_cells_and_items_are_headings(cell: str) -> None:
    """In capitals they were; as "Findings:" the whole text was taken, its indication too."""
    rows = [
        ("Indication:", "Rule out effusion."),
        ("Findings:", "Clear lungs."),
        ("Impression:", "Normal."),
    ]
    text = "".join(f"<{cell}>{a}</{cell}><{cell}>{b}</{cell}>" for a, b in rows)
    for sections, expected in (("findings", "Clear lungs."), ("all", "Clear lungs. Normal.")):
        column = ReportColumn(sections)
        column.append(pa.array([text], pa.large_string()))
        assert clean_report(column.texts[0]).replace("\n\n", " ") == expected


def test_a_column_without_markup_is_left_as_it_is() -> None:
    column = ReportColumn("all")
    texts = ["No effusion < 5 mm.", "a & b", "", "{curly}"]
    column.append(pa.array(texts, pa.large_string()))
    assert list(column.texts) == texts


def test_a_cell_padded_with_blanks_takes_no_longer_than_its_length() -> None:
    """A column of fixed width is filled up with them: 2 s a report of 50,000 characters."""
    begin = time.process_time()
    assert without_markup("No effusion.<br> Clear." + " " * 50_000 + "x").endswith("x")
    assert time.process_time() - begin < 0.5


@pytest.mark.parametrize("begin", ["<!--", "<style>", "<SCRIPT x=1>", "<head>", "<style></style "])
def test_what_hides_text_and_never_ends_is_text_and_takes_no_longer_than_its_length(
    begin: str,
) -> None:
    """Each one was looked for to the end: 200 KB took minutes, a megabyte hours."""
    start = time.process_time()
    text = without_markup(begin * (200_000 // len(begin)) + "No effusion.")
    assert time.process_time() - start < 5
    assert text.endswith("No effusion.")
    assert without_markup("a <style> b <!-- c --> d").split() == ["a", "<style>", "b", "d"]


def test_hidden_text_ends_at_the_first_end_of_its_own_kind() -> None:
    text = "a<style>x<!--</style>b<!--y-->c<SCRIPT>z</style></script >d<!doctype html>e"
    assert without_markup(text).split() == ["a", "b", "c", "d", "e"]
