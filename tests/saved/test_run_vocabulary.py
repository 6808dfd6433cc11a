"""Which vocabulary a run takes and keeps, and which one a checkpoint of it is opened with."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlip.dataloading.manifest import ManifestError
from mlip.dataloading.reports.tokenizer import load_tokenizer, train_tokenizer
from mlip.saved import run_vocabulary
from mlip.saved.run_vocabulary import (
    given_words,
    keep_vocabulary,
    open_tokenizer,
    vocabulary_of_run,
)
from mlip.saved.weights import PretrainedError
from mlip.settings.config import Config, Text, load
from mlip.training.checkpoint import folder_of
from mlip.transfer.fingerprint import hash_of_vocabulary

NO_ROWS: Any = SimpleNamespace(path="m.csv", rows=lambda split: np.array([], dtype=np.int64))


def words_of(text: str, folder: Path) -> str:
    """A folder of the vocabulary of that text; its hash."""
    train_tokenizer([text] * 9, 60, folder)
    return hash_of_vocabulary(train_tokenizer([text] * 9, 60, folder))


def settings(run: Path, *more: str) -> Config:
    return load([], [f"run.dir={run}", *more])


def goes_on(run: Path) -> None:
    """A checkpoint, of which nothing but its name is looked at here."""
    folder_of(run, 7).mkdir(parents=True)


def in_other_bytes(folder: Path) -> None:
    """The same words as another version of the library writes them."""
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())))


def reports(*texts: str) -> Any:
    """A manifest of those training rows, a patient each; `asked` tells which were read."""
    asked: list[int] = []

    def text(row: int) -> str:
        asked.append(row)
        return texts[row]

    rows = np.arange(len(texts))
    patients = np.array([f"p{row}" for row in rows])
    train = {"train": rows}
    return SimpleNamespace(rows=train.__getitem__, text=text, patient_key=patients, asked=asked)


def test_a_given_vocabulary_is_kept_in_the_run_and_never_beside_another(tmp_path: Path) -> None:
    given, run = tmp_path / "given", tmp_path / "runs" / "a"
    wanted = words_of("heart and lungs", given)
    config = settings(run, f"model.text.tokenizer={given}")
    for _ in range(2):
        assert hash_of_vocabulary(open_tokenizer(config, NO_ROWS)) == wanted
        files = {path.name: path.read_bytes() for path in (run / "tokenizer").iterdir()}
        assert files == {path.name: path.read_bytes() for path in given.iterdir()}
    own = settings(run, f"model.text.tokenizer={run / 'tokenizer'}")  # its copy, by its name
    assert hash_of_vocabulary(open_tokenizer(own, NO_ROWS)) == wanted
    words_of("no rib was broken", tmp_path / "other" / "tokenizer")
    begun = settings(tmp_path / "other", f"model.text.tokenizer={given}")
    with pytest.raises(ValueError, match="holds another vocabulary"):
        open_tokenizer(begun, NO_ROWS)


def test_without_training_reports_there_is_no_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"manifest m\.csv: no training rows with a report"):
        open_tokenizer(settings(tmp_path / "run"), NO_ROWS)
    assert not list((tmp_path / "run").glob("*"))


def test_a_checkpoint_is_opened_with_the_words_that_it_was_trained_with(tmp_path: Path) -> None:
    run, given, empty = tmp_path / "run", tmp_path / "given", tmp_path / "empty"
    empty.mkdir()
    own = words_of("heart and lungs", run / "tokenizer")
    other = words_of("no rib was broken", given)

    def opened(trained: str | None, named: Path | None = given) -> str:
        text = Text(tokenizer=None if named is None else str(named))
        return hash_of_vocabulary(vocabulary_of_run(Path("step"), text, run, trained))

    assert opened(own) == opened(own, None) == opened(own, empty) == own
    assert opened(other) == opened(None) == other  # an earlier version took the given one
    assert opened(None, empty) == opened(None, tmp_path / "gone") == own
    with pytest.raises(PretrainedError) as told:
        opened("0123456789abcdef")
    for part in ("the vocabulary 0123456789ab, ", f"tokenizer is {own[:12]}", f"is {other[:12]}"):
        assert part in str(told.value)
    whole = (given / "tokenizer.json").read_bytes()
    (given / "tokenizer.json").write_bytes(whole[:99])
    assert opened(own) == own  # its own copy is looked at first
    bare = tmp_path / "bare"
    (bare / "tokenizer").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"{bare / 'tokenizer'}"):  # what it lacks, not what it is
        vocabulary_of_run(Path("step"), Text(), bare, own)
    (run / "tokenizer").rename(tmp_path / "moved")
    with pytest.raises(PretrainedError, match="there is no such folder; restore it"):
        opened(own, tmp_path / "gone")


def test_a_run_that_goes_on_takes_the_given_vocabulary_or_its_own_copy(tmp_path: Path) -> None:
    given, run = tmp_path / "given", tmp_path / "run"
    own = words_of("heart and lungs", run / "tokenizer")
    config = settings(run, f"model.text.tokenizer={given}")
    with pytest.raises(ValueError, match=f"{given}"):  # begins: nothing is taken for it
        open_tokenizer(config, NO_ROWS)
    goes_on(run)
    assert hash_of_vocabulary(open_tokenizer(config, NO_ROWS)) == own
    other = words_of("no rib was broken", given)  # the checkpoint's hash is held against it
    assert hash_of_vocabulary(open_tokenizer(config, NO_ROWS)) == other
    assert hash_of_vocabulary(load_tokenizer(run / "tokenizer")) == own
    for folder in (given, run / "tokenizer"):
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match=f"{given}"):
        open_tokenizer(config, NO_ROWS)


def test_the_vocabulary_of_a_start_is_kept_whether_one_is_named_or_not(tmp_path: Path) -> None:
    start: Any = SimpleNamespace(tokenizer=train_tokenizer(["heart"] * 9, 60, tmp_path / "start"))
    wanted = hash_of_vocabulary(start.tokenizer)
    for name, more in (("a", []), ("b", ["gone"]), ("c", ["c/tokenizer"])):
        run = tmp_path / name
        config = settings(run, *(f"model.text.tokenizer={tmp_path / path}" for path in more))
        assert hash_of_vocabulary(open_tokenizer(config, NO_ROWS, start)) == wanted
        assert hash_of_vocabulary(load_tokenizer(run / "tokenizer")) == wanted


def test_an_own_vocabulary_is_trained_once_on_rows_from_all_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_vocabulary, "_VOCABULARY_REPORTS", 3)
    given: dict[str, Any] = {}

    def trained(*of: Any, **more: Any) -> Any:
        given.update(more, words=of[1])
        return train_tokenizer(*of, **more)

    monkeypatch.setattr(run_vocabulary, "train_tokenizer", trained)
    first = reports(*(f"word{row} and lungs" for row in range(7)))
    more = ["data.vocab_size=123", "data.vocab_min_patients=1"]
    config, run = settings(tmp_path / "run", *more), tmp_path / "run"
    opened = open_tokenizer(config, first)
    assert first.asked == [0, 3, 6] and given["patients"] == ["p0", "p3", "p6"]
    assert given["words"] == 123
    # of a try that saved nothing: other reports are others'
    second = reports(*["no rib was broken"] * 3)
    with pytest.raises(ValueError, match="holds another vocabulary"):
        open_tokenizer(config, second)
    goes_on(run)
    assert hash_of_vocabulary(open_tokenizer(config, NO_ROWS)) == hash_of_vocabulary(opened)
    shutil.rmtree(run / "tokenizer")
    assert hash_of_vocabulary(open_tokenizer(config, second)) != hash_of_vocabulary(opened)


def test_the_named_vocabulary_is_counted_where_it_can_be_read(tmp_path: Path) -> None:
    words_of("heart and lungs", tmp_path / "a")
    words_of("no rib was broken", tmp_path / "b")
    a, b = (load_tokenizer(tmp_path / name).vocab_size for name in "ab")
    assert a != b

    def words(**named: str) -> int | None:
        places = (f"model.text.{key}={tmp_path / name}" for key, name in named.items())
        return given_words(settings(tmp_path, *places))

    assert (words(tokenizer="a"), words(source="a"), words(tokenizer="a", source="b")) == (a, a, a)
    assert words() is None and words(tokenizer="gone") is None


def test_a_run_of_before_gets_its_copy_and_one_in_other_bytes_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given, run = tmp_path / "given", tmp_path / "run"
    wanted = words_of("heart and lungs", given)
    config, tokenizer = settings(run, f"model.text.tokenizer={given}"), load_tokenizer(given)
    keep_vocabulary(config, tokenizer)
    assert hash_of_vocabulary(load_tokenizer(run / "tokenizer")) == wanted
    in_other_bytes(run / "tokenizer")
    whole = (run / "tokenizer" / "tokenizer.json").read_bytes()
    own = settings(run, f"model.text.tokenizer={run / 'tokenizer'}")
    with caplog.at_level(logging.WARNING, "mlip"):
        for named in (config, own, settings(run)):
            keep_vocabulary(named, tokenizer)
        assert hash_of_vocabulary(open_tokenizer(own, NO_ROWS)) == wanted  # a copy of itself
    assert caplog.messages == []
    assert (run / "tokenizer" / "tokenizer.json").read_bytes() == whole
    keep_vocabulary(settings(tmp_path / "none"), tokenizer)  # of its own reports
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("why", ["other words", "no folder can be made"])
def test_a_copy_that_cannot_be_kept_is_said_and_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    given, run = tmp_path / "given", tmp_path / "run"
    words_of("heart and lungs", given)
    if why == "other words":
        words_of("no rib was broken", run / "tokenizer")
    else:
        run.write_text("a file")
    with caplog.at_level(logging.WARNING, "mlip"):
        keep_vocabulary(settings(run, f"model.text.tokenizer={given}"), load_tokenizer(given))
    assert [m.split(": no copy")[0] for m in caplog.messages] == [
        f"{given} is needed to open this run"
    ]
