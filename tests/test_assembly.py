"""What a run says at its start about data that would train in vain.

Oracle: manifests of which it is known that no two texts differ, no split is there, no word links.
"""

from __future__ import annotations

import csv
import dataclasses
import logging
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mlip.assembly import build_objective, open_corpus, provide_phantoms
from mlip.dataloading.manifest import ManifestError, load_manifest
from mlip.ranks import process_group
from mlip.settings.config import Config, ConfigError, load
from mlip.training.lifecycle import DATA, exit_code
from tests.small_run import SETTINGS


def settings(folder: Path, reports: list[str], *, val: bool = True, labels: str = "") -> Config:
    path = folder / "m.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "patient_id", "study_id", "report", "split", "labels"])
        for i, report in enumerate(reports):
            split = "val" if val and i == 0 else "train"
            table.writerow([f"{i}.png", f"p{i}", f"s{i}", report, split, labels])
    given = [f"data.manifest={path}", f"run.dir={folder / 'run'}", "evaluate.split=val"]
    return load([], [*SETTINGS, "data.phantom.studies=0", "data.vocab_size=300", *given])


def test_one_text_for_all_rows_is_an_error_and_no_loss_of_zero(tmp_path: Path) -> None:
    """A wrongly mapped column trained to the end with contrastive losses of exactly 0."""
    config = settings(tmp_path, ["Portable chest film."] * 8)
    with pytest.raises(ManifestError, match="all 7 training rows have the same report") as caught:
        open_corpus(config)
    assert "Portable" not in str(caught.value)


GERMAN = (
    "Kein Pneumothorax, Herz nicht verbreitert, Aufnahme {}.",
    "Keine Infiltrate oder Stauung, Bild {}.",
)
ENGLISH = ("No pneumothorax on this film {}.", "The lungs are clear, without edema {}.")


@pytest.mark.parametrize("kind, warned", [(GERMAN, True), (ENGLISH, False)])
def test_reports_in_another_language_are_counted_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: tuple[str, str], warned: bool
) -> None:
    """ "Kein Pneumothorax" is a present pneumothorax, and no run said a word."""
    config = settings(tmp_path, [kind[i % 2].format(i) for i in range(9)])
    with caplog.at_level(logging.WARNING, logger="mlip"):
        open_corpus(config)
    said = [r.getMessage() for r in caplog.records if "English lexicon" in r.getMessage()]
    assert bool(said) == warned
    assert all("8 of 8 training reports" in line and "Aufnahme" not in line for line in said)


@pytest.mark.parametrize("white, warned", [(4095, True), (65535, False)])
def test_films_that_are_nearly_black_are_told_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, white: int, warned: bool
) -> None:
    """12-bit values in 16-bit files: the run learned of black pictures and said nothing."""
    config = settings(tmp_path, [ENGLISH[i % 2].format(i) for i in range(9)])
    manifest = load_manifest(config.data)
    rows = manifest.rows("train").tolist()
    ramp = (np.arange(64, dtype=np.float32).reshape(8, 8) / 63 * white).astype(np.uint16)
    for row in rows[1:4]:  # others are missing: the training tells of those
        assert cv2.imwrite(str(Path(manifest.root) / manifest.image_path(row)), ramp)
    with caplog.at_level(logging.WARNING, logger="mlip"):
        open_corpus(config)
    said = [r.getMessage() for r in caplog.records if "nearly black" in r.getMessage()]
    assert bool(said) == warned
    assert all("3 of 8 training films" in line and "--png-white 4095" in line for line in said)


def test_a_split_without_rows_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    """It was a warning: the run trained for hours and was refused its evaluation."""
    texts = [f"No effusion, film {word}." for word in "one two three four five six".split()]
    config = settings(tmp_path, texts, val=False)
    with pytest.raises(ManifestError, match=r"'val' \(evaluate.split\) has no rows") as caught:
        open_corpus(config)
    assert "rows by split: train 6, val 0, test 0." in str(caught.value)
    assert "evaluate.after_training=false" in str(caught.value)
    assert exit_code(caught.value) == DATA
    # a vocabulary of these rows would be taken up by the next try, whatever its rows
    assert not Path(config.run.dir).exists()


def test_the_vocabulary_of_a_try_without_a_checkpoint_is_not_taken_up_by_another(
    tmp_path: Path,
) -> None:
    """A first try that ran out of memory left its vocabulary to the next one, of other reports."""
    texts = [f"No effusion, film {word}." for word in "one two three four five six".split()]
    first = settings(tmp_path, texts)
    same = open_corpus(first).tokenizer.backend.get_vocab()
    assert open_corpus(first).tokenizer.backend.get_vocab() == same
    other = settings(tmp_path, [f"{text} Cardiomegaly." for text in texts])
    with pytest.raises(ValueError, match="tokenizer.*another vocabulary.*run.dir"):
        open_corpus(other)
    # a run that has a checkpoint keeps what its weights were trained with
    (Path(first.run.dir) / "checkpoints" / "step_00000005").mkdir(parents=True)
    assert open_corpus(other).tokenizer.backend.get_vocab() == same


def test_what_evaluation_could_not_use_stops_the_run_before_it_trains(tmp_path: Path) -> None:
    """Each was found when the training was over."""
    texts = [f"No effusion, film {word}." for word in "one two three four five six".split()]
    config = settings(tmp_path, texts)
    boxes = Path(config.data.manifest).with_name("boxes.csv")
    boxes.write_text("path,label,x,y,w\nx.png,effusion,1,2,3\n")
    with pytest.raises(ManifestError, match=r"boxes\.csv.* h"):
        open_corpus(config)
    open_corpus(evaluated(config, after_training=False))
    boxes.unlink()
    with pytest.raises(
        ValueError, match=r"evaluate\.subset='5x200': set transfer\.columns\.subset"
    ):
        open_corpus(evaluated(config, subset="5x200"))
    named = dataclasses.replace(config.transfer.columns, subset="study_id")
    transfer = dataclasses.replace(config.transfer, columns=named)
    config = dataclasses.replace(config, transfer=transfer)
    open_corpus(evaluated(config, subset="s0"))
    with pytest.raises(ManifestError, match=r"none of the 1 rows of split 'val' .*subset='5x200'"):
        open_corpus(evaluated(config, subset="5x200"))


@pytest.mark.parametrize("labels, is_said", [("K35.8|J90", True), ("J90|pleural effusion", False)])
def test_labels_of_which_none_names_a_concept_are_said_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, labels: str, is_said: bool
) -> None:
    """The results said it, when the training was over. Labels themselves are not shown."""
    texts = [f"No effusion, film {word}." for word in "one two three four five six".split()]
    with caplog.at_level(logging.WARNING, logger="mlip"):
        open_corpus(settings(tmp_path, texts, labels=labels))
    assert ("none of the 2 labels of split val" in caplog.text) == is_said
    assert "K35" not in caplog.text


def test_a_finding_stated_in_two_ways_stops_the_run_before_it_trains(tmp_path: Path) -> None:
    """It ended the evaluation, when the training was over."""
    texts = [f"No effusion, film {word}." for word in "one two three four five six".split()]
    config = settings(tmp_path, texts, labels="pleural effusion")
    columns = dataclasses.replace(config.transfer.columns, negative=config.data.columns.labels)
    transfer = dataclasses.replace(config.transfer, columns=columns)
    with pytest.raises(ManifestError, match="states 'pleural effusion' in two of"):
        open_corpus(dataclasses.replace(config, transfer=transfer))


def test_boxes_of_the_evaluated_images_are_tried_and_boxes_of_others_refused(
    tmp_path: Path,
) -> None:
    """A boxes.csv with other paths was taken for none, which the results said; a box of any row
    behind the first 512 was looked at when the training was over."""
    config = settings(tmp_path, [f"No effusion, film {number}." for number in range(600)])
    rows = Path(config.data.manifest).read_text().replace(",train,", ",val,", 580)
    Path(config.data.manifest).write_text(rows)
    assert cv2.imwrite(str(tmp_path / "550.png"), np.zeros((90, 80), np.uint8))
    boxes = tmp_path / "boxes.csv"
    for path, width, fault in (
        ("550.png", 30, ""),
        ("599.png", 900, ""),  # of another split
        ("550.png", 90, "data row 551: .* does not lie inside its 80 x 90 image"),
        ("/data/550.png", 30, "none of its 1 paths is an image of the manifest"),
    ):
        boxes.write_text(f"path,label,x,y,w,h\n{path},effusion,5,5,{width},30\n")
        if not fault:
            open_corpus(config)
            continue
        with pytest.raises(ManifestError, match=fault) as caught:
            open_corpus(config)
        assert "/data/550" not in str(caught.value)


def evaluated(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **changes))


def test_labels_of_a_split_without_reports_can_be_evaluated(tmp_path: Path) -> None:
    texts = [f"No effusion, film {word}." for word in "one two three four five six".split()]
    corpus = open_corpus(settings(tmp_path, ["", *texts[1:]]))
    assert len(corpus.manifest.rows("val")) == 0


@pytest.mark.parametrize(
    "sentence, is_said", [("Kein Pleuraerguss, Bild {}.", True), ("No effusion, film {}.", False)]
)
def test_reports_that_name_no_concept_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sentence: str, is_said: bool
) -> None:
    """Reports in another language trained without knowledge, which nothing said."""
    texts = [sentence.format(word) for word in "one two three four five six".split()]
    config = settings(tmp_path, texts)
    with caplog.at_level(logging.WARNING, logger="mlip"):
        build_objective(config, open_corpus(config))
    assert ("0 of 5 training reports name a concept" in caplog.text) is is_said


def test_phantoms_that_cannot_be_written_are_a_mistake_in_the_settings(tmp_path: Path) -> None:
    """Below a file, a read-only disk or another user's folder: it was an unexpected error."""
    (tmp_path / "file").touch()
    settings = [*SETTINGS, f"data.manifest={tmp_path}/file/data/manifest.csv"]
    with pytest.raises(ConfigError, match=r"data: data\.phantom\.studies=32 cannot be generated"):
        provide_phantoms(load([], settings))


def test_a_manifest_of_ones_own_behind_the_settings_of_a_run_over_phantoms(tmp_path: Path) -> None:
    """--config RUN data.manifest=OWN: the line told to name another folder than one's own."""
    (tmp_path / "manifest.csv").write_text("image,report\n")
    settings = [*SETTINGS, f"data.manifest={tmp_path}/manifest.csv"]
    with pytest.raises(ConfigError, match=r"nothing was written.*studies=32 .*set it to 0 for a"):
        provide_phantoms(load([], settings))
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.csv"]


def test_phantoms_that_another_node_does_not_see_are_no_reason_to_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generated on a disk of rank 0's node alone: the other node looked for them for ever."""
    monkeypatch.setattr(process_group, "main_first", lambda work: None)
    settings = [*SETTINGS, f"data.manifest={tmp_path}/data/manifest.csv", "run.timeout_s=0.1"]
    with pytest.raises(ConfigError, match="does not see them: set data.manifest"):
        provide_phantoms(load([], settings))
