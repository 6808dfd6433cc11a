"""Which sentences an evaluation refuses where data.max_tokens does not hold them.

Oracle: what evaluate_run asks of the same rows, and what it cuts or leaves out.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mlip.dataloading.manifest import load_manifest
from mlip.settings.config import ConfigError, load
from mlip.transfer.readiness import check_evaluation, check_sentences
from tests.small_run import small_run
from tests.transfer.small_manifest import write

BOX = '[[5, 5, 20, 20, "Mass"{}]]'
PHRASE = ', "Secretword of a report, which is far longer than the model reads."'


def sentences(folder: Path, cell: str, *settings: str) -> list[str]:
    run = small_run()
    boxes = "transfer.columns.boxes=boxes"
    config = load([], [*write(folder, boxes=cell), boxes, *settings])
    return check_evaluation(config, load_manifest(config.data), run.linker, run.table)


def test_names_beside_words_of_a_report_are_cut_like_those_and_refuse_nothing(
    tmp_path: Path,
) -> None:
    unlabelled = "data.columns.labels=null"
    assert sentences(tmp_path, BOX.format(""), unlabelled) == ["mass"]
    assert sentences(tmp_path, BOX.format(PHRASE), unlabelled) == []
    both = f"{BOX.format(PHRASE)[:-1]}, {BOX.format('')[1:]}"
    assert sentences(tmp_path, both, unlabelled) == []
    assert sentences(tmp_path, "", unlabelled) == []


def test_labels_are_asked_by_the_sentences_of_the_settings(tmp_path: Path) -> None:
    own = ["evaluate.positive_prompts=['I see {}.']", "evaluate.negative_prompts=['No {}!']"]
    told = sentences(tmp_path, "", *own)
    assert "I see pulmonary edema." in told and "No pulmonary edema!" in told
    assert len(told) == 4  # edema and mass


def test_generated_studies_without_labels_are_not_asked_for_findings() -> None:
    """Their prompts were read all the same, and refused runs that nothing asks them of."""
    run = small_run()
    whole = check_evaluation(run.config, run.manifest, run.linker, run.table)
    manifest = dataclasses.replace(run.manifest, label_column=None)
    columns = dataclasses.replace(run.config.data.columns, labels=None)
    data = dataclasses.replace(run.config.data, columns=columns)
    config = dataclasses.replace(run.config, data=data)
    boxed = check_evaluation(config, manifest, run.linker, run.table)
    assert boxed and whole[-len(boxed) :] == boxed and len(whole) > len(boxed)


@pytest.mark.parametrize("short, is_held", [(1, False), (0, True)])
def test_the_longest_sentence_decides_with_both_ends_of_the_tokens(
    short: int, is_held: bool
) -> None:
    run = small_run()
    text = "edema " * 20
    count = len(run.tokenizer.encode_batch([text])[0].ids)
    config = load([], [f"data.max_tokens={count + 2 - short}"])
    parts = (config, run.tokenizer, run.linker, run.table)
    check_sentences([], *parts)
    check_sentences(["edema"], *parts)
    if is_held:
        check_sentences(["edema", text], *parts)
        return
    with pytest.raises(ConfigError, match="max_tokens.*phrase 2 has.*after_training=false") as told:
        check_sentences(["edema", text], *parts)
    assert "edema edema" not in str(told.value)
