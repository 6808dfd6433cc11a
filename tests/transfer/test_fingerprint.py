"""What a result rests on: the commit of the checkout it was made from."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

import train
from mlip.settings.config import ConfigError, load
from mlip.transfer import fingerprint
from mlip.transfer.alignment.evaluation import evaluate_run
from mlip.transfer.fits.protocol import transfer_run


def test_asking_for_the_commit_leaves_the_checkouts_index_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a status refreshes the index under a lock; a run that was killed meanwhile left it behind
    def git(*arguments: str) -> str:
        person = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        command = ["git", *person, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "--quiet")
    (tmp_path / "a.py").write_text("x = 1\n", encoding="utf-8")
    git("add", "a.py")
    git("commit", "--quiet", "-m", "One file.")
    os.utime(tmp_path / "a.py", (1, 1))
    before = (tmp_path / ".git" / "index").read_bytes()
    monkeypatch.setattr(fingerprint, "__file__", str(tmp_path / "mlip" / "transfer" / "f.py"))
    monkeypatch.delenv("MLIP_COMMIT", raising=False)
    assert fingerprint.source_commit() == git("rev-parse", "--short=12", "HEAD")
    assert (tmp_path / ".git" / "index").read_bytes() == before
    (tmp_path / "a.py").write_text("x = 2\n", encoding="utf-8")
    assert fingerprint.source_commit() == git("rev-parse", "--short=12", "HEAD") + "+"


def test_a_copy_without_history_is_told_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "__file__", str(tmp_path / "mlip" / "transfer" / "f.py"))
    monkeypatch.delenv("MLIP_COMMIT", raising=False)
    assert fingerprint.source_commit() is None
    monkeypatch.setenv("MLIP_COMMIT", "")  # of an image that was built without it
    assert fingerprint.source_commit() is None
    for commit in ("0123456789ab", "0123456789ab+", "a" * 40):
        monkeypatch.setenv("MLIP_COMMIT", commit)
        assert fingerprint.source_commit() == commit
    for other in ("main", "0123456789AB", "012345", "0123456789ab\n", "0123456789ab++"):
        monkeypatch.setenv("MLIP_COMMIT", other)
        with pytest.raises(ConfigError, match="MLIP_COMMIT: expected 7 to 40"):
            fingerprint.source_commit()


def test_what_is_no_commit_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when results are written, hours later: nothing here is any data or model."""
    config, nothing = load([], []), cast(Any, None)
    monkeypatch.setenv("MLIP_COMMIT", "main")
    works: list[Callable[[], object]] = [
        lambda: train.train(nothing, config, nothing),
        lambda: evaluate_run(nothing, config, nothing),
        lambda: transfer_run(config, nothing, nothing),
    ]
    for work in works:
        with pytest.raises(ConfigError, match="MLIP_COMMIT: expected 7 to 40"):
            work()


def test_the_source_of_some_folders_is_that_of_their_modules_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tmp_path / "mlip"
    linked = tmp_path / "elsewhere" / "reports"
    for folder in (top / "transfer", top / "knowledge" / "lexicon", linked):
        folder.mkdir(parents=True)
        (folder / "a.py").write_text("x = 1\n", encoding="utf-8")
    (top / "dataloading").symlink_to(linked.parent)
    monkeypatch.setattr(fingerprint, "__file__", str(top / "transfer" / "fingerprint.py"))

    def hashes() -> tuple[str, str, str]:
        of = fingerprint.hash_of_source
        return of(), of("knowledge"), of("knowledge", "dataloading/reports")

    for path, equal in (
        (top / "transfer" / "a.py", (False, True, True)),
        (linked / "a.py", (False, True, False)),
        (top / "knowledge" / "lexicon" / "a.py", (False, False, False)),
        (top / "knowledge" / "notes.md", (True, True, True)),
    ):
        before = hashes()
        path.write_text("x = 2\n", encoding="utf-8")
        assert tuple(a == b for a, b in zip(before, hashes(), strict=True)) == equal, path
    assert len({*hashes()}) == 3
