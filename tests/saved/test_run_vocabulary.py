"""Which vocabulary a run takes and keeps, and which one a checkpoint of it is opened with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlip.dataloading.manifest import ManifestError
from mlip.dataloading.reports.tokenizer import train_tokenizer
from mlip.saved.run_vocabulary import open_tokenizer, vocabulary_of_run
from mlip.saved.weights import PretrainedError
from mlip.settings.config import Config, Text, load
from mlip.transfer.fingerprint import hash_of_vocabulary

NO_ROWS: Any = SimpleNamespace(path="m.csv", rows=lambda split: np.array([], dtype=np.int64))


def words_of(text: str, folder: Path) -> str:
    """A folder of the vocabulary of that text; its hash."""
    train_tokenizer([text] * 9, 60, folder)
    return hash_of_vocabulary(train_tokenizer([text] * 9, 60, folder))


def settings(run: Path, *more: str) -> Config:
    return load([], [f"run.dir={run}", *more])


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
    (run / "tokenizer").rename(tmp_path / "moved")
    with pytest.raises(PretrainedError, match="there is no such folder; restore it"):
        opened(own, tmp_path / "gone")
