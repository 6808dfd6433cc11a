"""Cleaning, sections and sentences on cases written for the purpose."""

from __future__ import annotations

import time

import pyarrow as pa
import pytest

from mlip.dataloading.reports.text import (
    MAX_CHARACTERS,
    choose_sections,
    clean_report,
    select_sections,
    sentence_spans,
    split_sections,
)


@pytest.mark.parametrize(
    "raw, clean",
    [
        ("No  effusion.\n\nHeart\tis normal.", "No effusion.\n\nHeart is normal."),
        ("Compared to ___, no change.", "Compared to, no change."),
        ("Seen by Dr. [**Last Name 123**] at 5.", "Seen by Dr. at 5."),
        ("XXXX view. No XXXX.", "view. No."),
        ("1. No nodule.\n2. Nodule of 1.5 cm.", "No nodule. Nodule of 1.5 cm."),
        ("Tip 2.5 cm above the carina", "Tip 2.5 cm above the carina"),
        ("isn\u2019t enlarged \u2013 stable", "isn't enlarged - stable"),
        ("nul\x00 and \ud800 lone \ufeff", "nul and lone"),
        ("\u202eright to left", "right to left"),
        ("Pleural ef\u00adfusion, in\ufb01ltrate", "Pleural effusion, infiltrate"),
        ("right\u2011sided", "right-sided"),
        ("Without effusion; not large, never", "Without effusion; not large, never"),
        ("", ""),
        ("___", ""),
    ],
)  # fmt: skip
def test_cleaning_keeps_meaning_and_drops_marks(raw: str, clean: str) -> None:
    assert clean_report(raw) == clean


def test_cleaning_is_idempotent_and_bounded() -> None:
    text = "1. Small effusion ___ . No 2.5 cm nodule;; heart \n\n 3) Normal. "
    assert clean_report(clean_report(text)) == clean_report(text)
    assert len(clean_report("word " * 1_000_000)) <= MAX_CHARACTERS
    assert len(clean_report("\ufb03" * MAX_CHARACTERS)) == MAX_CHARACTERS


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("No effusion. Heart normal.", ["No effusion.", "Heart normal."]),
        ("Tip 2.5 cm above. Done", ["Tip 2.5 cm above.", "Done"]),
        ("Seen by Dr. Who vs. prior. End.", ["Seen by Dr. Who vs. prior.", "End."]),
        ("Clear e.g. at the bases. Next.", ["Clear e.g. at the bases.", "Next."]),
        ("Clear lungs.Heart normal.", ["Clear lungs.", "Heart normal."]),  # a lost space
        ("Nodule in zone T. Stable. ", ["Nodule in zone T. Stable."]),
        ("Is it new? Yes! Done.", ["Is it new?", "Yes!", "Done."]),
        (". . .", []),
        ("", []),
    ],
)
def test_sentences_keep_decimals_and_abbreviations_whole(text: str, sentences: list[str]) -> None:
    assert [text[a:b] for a, b in sentence_spans(text)] == sentences


MIMIC = """                 FINAL REPORT
 EXAMINATION: CHEST (PA AND LAT)

 INDICATION:  Cough. Concern: finding of pneumonia

 COMPARISON:  None.

 FINDINGS:

 There is a small effusion.  Finding unchanged.

 IMPRESSION:

 Small effusion."""


def test_sections_of_a_report_with_line_headings() -> None:
    sections = split_sections(MIMIC)
    assert sections["findings"] == "There is a small effusion.  Finding unchanged."
    assert sections["impression"] == "Small effusion."
    assert sections[""] == "FINAL REPORT"
    assert set(sections) == {
        "",
        "examination",
        "indication",
        "comparison",
        "findings",
        "impression",
    }


@pytest.mark.parametrize(
    "sections, text",
    [
        ("findings", "There is a small effusion.  Finding unchanged."),
        ("impression", "Small effusion."),
        ("all", "There is a small effusion.  Finding unchanged.\n\nSmall effusion."),
    ],
)
def test_asked_sections_are_taken(sections: str, text: str) -> None:
    assert choose_sections(MIMIC, sections) == text


def test_a_text_without_headings_is_taken_whole_and_a_missing_section_is_none() -> None:
    assert choose_sections("The finding is stable.", "impression") == "The finding is stable."
    assert choose_sections("FINDINGS: Clear.", "impression") is None
    assert choose_sections("HISTORY: cough", "all") == "HISTORY: cough"
    assert choose_sections("Clear lungs.\nFINDINGS:", "all") == "Clear lungs.\nFINDINGS:"


EMPTY = "FINDINGS:\n\nIMPRESSION:\n"


@pytest.mark.parametrize("sections", ["all", "findings", "impression"])
@pytest.mark.parametrize("text", [EMPTY, f"INDICATION: rule out effusion.\n{EMPTY}"])
def test_a_report_of_empty_sections_has_none(text: str, sections: str) -> None:
    """A template that nobody filled in was trained on, with the question as its answer."""
    assert choose_sections(text, sections) is None


@pytest.mark.parametrize("blank", [" ", "\t", "\u00a0", "\u202f", "\ufeff"])
def test_a_heading_may_stand_between_any_blanks(blank: str) -> None:
    """HTML, French and the byte-order mark of a text file put others there."""
    text = f"{blank}Findings{blank}: Clear.\n{blank}Impression{blank}: Normal."
    assert choose_sections(text, "findings") == "Clear."
    assert choose_sections(text, "impression") == "Normal."
    column, missing = select_sections(pa.chunked_array([[text]], pa.large_string()), "findings")
    assert column.to_pylist() == ["Clear."] and not missing.any()


def test_the_column_form_agrees_with_the_single_form() -> None:
    texts = [MIMIC, "Plain text here.", "FINDINGS: Clear.", "study: see exam : x", "", MIMIC * 2]
    texts.append(EMPTY)
    for sections in ("all", "findings", "impression"):
        column, missing = select_sections(
            pa.chunked_array([texts[:2], [], texts[2:]], pa.large_string()), sections
        )
        singles = [choose_sections(t, sections) for t in texts]
        assert column.to_pylist() == [s or "" for s in singles]
        assert missing.tolist() == [s is None for s in singles]


LONG = {
    "a line of dots": "." * 19_900 + "x",
    "marks of questions": "?" * 19_900 + "x",
    "dots and commas": ".," * 9_900 + "x",
    "one long word": "a" * 19_900 + "1\nNo effusion",
    "tabs": "a" + "\t" * 19_900 + "x\nNo effusion",
    "stops in one word": "Aa." * 6_600 + "x",
    "one heading again and again": "FINDINGS: a\n" * 90_000,
}


@pytest.mark.parametrize("name", LONG)
def test_no_text_takes_longer_than_its_length(name: str) -> None:
    """A contents' line of 20,000 dots had taken a minute: each dot was tried as the first."""
    begin = time.process_time()
    sentence_spans(clean_report(LONG[name]))
    split_sections(LONG[name])
    assert time.process_time() - begin < 4


def test_abbreviations_are_found_at_the_end_of_long_words() -> None:
    text = "Seen by approx. Two, and abcapprox. Two."
    assert [text[a:b] for a, b in sentence_spans(text)] == [
        "Seen by approx. Two, and abcapprox.",
        "Two.",
    ]
