"""Sections of a report as a publisher's table or JSON holds them, and the report they make."""

from __future__ import annotations

from typing import Any

from mlip.dataloading.datasets.report_columns import said


def cell_text(value: Any) -> str:
    """A value of JSON or a table as text; "" for null, NaN and the words that stand for none."""
    return "" if value is None else said(str(value))


def section_text(value: Any) -> str:
    r"""The section's lines, one blank between words; "" where nothing is said.

    Lines stay: they end statements that have no full stop (mlip/knowledge/report_lines.py). The two
    characters \n, which some tables hold in place of a line's end, are one.
    """
    lines = [" ".join(line.split()) for line in cell_text(value).replace("\\n", "\n").splitlines()]
    return "\n".join(line for line in lines if line) if any(map(_speaks, lines)) else ""


def _speaks(line: str) -> bool:
    return any(letter.isalnum() for letter in line)


def joined_sections(impression: Any, findings: Any) -> str:
    """joined_report of two cells."""
    return joined_report(section_text(impression), section_text(findings))


def joined_report(impression: str, findings: str) -> str:
    """The text for the manifest, with headings that data.sections can choose from.

    The impression first, as published: a long report is cut at data.max_tokens, at its end.
    """
    parts = {"IMPRESSION": impression, "FINDINGS": findings}
    return "\n".join(f"{heading}: {text}" for heading, text in parts.items() if text)
