"""`mlip classify`: scores of findings for the images of a manifest, as a CSV."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlip.dataloading.manifest import Manifest
from mlip.system.output_file import require_replaceable
from mlip.transfer.films.classify import (
    Question,
    QuestionError,
    ScoreHead,
    called,
    encode_question,
    scores,
)
from mlip.transfer.films.row_images import RowImages
from mlip.transfer.films.row_table import (
    begins_as_formula,
    unread,
    write_row_table,
)

_CALLED = " called"


def require_own_file(path: Path) -> None:
    """Raises:  ConfigError for a folder, or a file that this command did not write."""
    is_ours = False
    if path.is_file():
        with path.open("rb") as stream:
            names = stream.readline(1 << 16).rstrip(b"\r\n").split(b",")
        is_ours = names[0] == b"row_index" and names[-1] == b"reason" and names[1] != b"p_value"
    require_replaceable(path, "--out", "table of mlip classify", is_ours=is_ours)


def write_classification(
    opened: Any,
    manifest: Manifest,
    question: Question,
    out: Path,
    *,
    split: str,
    head: ScoreHead,
    say: Callable[[str], None],
) -> None:
    """A CSV of row_index, a score a finding, yes or no (1 or 0) where thresholds are known, and
    reason (of images that cannot be read), by row.

    say  is told the counts before the table is written: they are not lost with its place
    """
    findings = [prompt.finding for prompt in question.prompts]
    decided = [f for f in findings if question.thresholds.get(f) is not None]
    columns = _columns(findings, decided)
    texts = encode_question(opened, question)
    lines: dict[int, list[object]] = {}
    counts = dict.fromkeys(decided, 0)
    images = RowImages(opened, manifest, split)
    for bank in images:
        values = scores(opened, bank.features, question, texts, head)
        answers = called(values, question)
        for finding in decided:
            counts[finding] += int(answers[finding].sum())
        yes = np.stack([answers[f] for f in decided], axis=1) if decided else values[:, :0]
        for row, own, said in zip(bank.row_index, values, yes, strict=True):
            lines[int(row)] = [*(f"{value:.6g}" for value in own), *map(int, said)]
    say(
        f"{len(lines)} images, {len(findings)} findings by the {head} score (high = there; no "
        "probability)"
    )
    for line in _told_of_thresholds(question, findings, counts):
        say(f"  {line}")
    write_row_table(out, columns, lines, images.bad, require_own=require_own_file)
    say(f"{out}: {len(lines) + len(images.bad)} rows{unread(images.bad)}")


def _columns(findings: list[str], decided: list[str]) -> list[str]:
    """The table's columns between row_index and reason.

    Raises:  QuestionError where one would stand twice, or would be run as a formula
    """
    columns = [*findings, *(f"{finding}{_CALLED}" for finding in decided)]
    if clash := sorted({name for name in columns if columns.count(name) > 1}):
        raise QuestionError(f"finding {clash[0]!r}: its column would stand twice; rename it")
    if taken := sorted({"row_index", "reason"} & set(findings)):
        raise QuestionError(f"finding {taken[0]!r} is a column of the table: rename it")
    # another sign in front would make it another name than the one that was asked
    if formulas := [name for name in findings if begins_as_formula(name)]:
        raise QuestionError(
            f"finding {formulas[0]!r}: a spreadsheet would run a column of that name as a formula: "
            "begin it with a letter"
        )
    return columns


def _told_of_thresholds(
    question: Question, findings: list[str], counts: dict[str, int]
) -> Iterator[str]:
    """How many images each threshold calls, and which findings have none, and why."""
    for finding, count in counts.items():
        yield f"{finding}: {count} called (threshold {question.thresholds[finding]:.6g})"
    if question.thresholds:
        for finding in (f for f in findings if f not in counts):
            is_asked = finding in question.thresholds
            why = "val cannot tell" if is_asked else "the results name none"
            yield f"{finding}: no threshold: {why}"
    if question.no_thresholds:
        yield f"no thresholds ({question.no_thresholds})"
