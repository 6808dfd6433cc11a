"""Lines of a run on a disk that is full or gone for a while: each is there once, in order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlip.training import line_file
from mlip.training.line_file import LineFile


def _write(lines: LineFile, text: str) -> bool:
    try:
        lines.write(text)
    except OSError:
        return False
    return True


def test_lines_of_a_disk_that_was_gone_are_written_when_it_is_back(tmp_path: Path) -> None:
    """What was opened before takes nothing then (sshfs): 177 of a run's 200 steps had no line."""
    lines = LineFile(tmp_path / "mounted" / "log.jsonl")
    (tmp_path / "mounted").mkdir()
    lines.write("1")
    assert lines._descriptor is not None
    os.close(lines._descriptor)
    (tmp_path / "mounted").rename(tmp_path / "gone")
    assert [_write(lines, text) for text in "234"] == [False] * 3
    (tmp_path / "gone").rename(tmp_path / "mounted")
    assert _write(lines, "5")
    assert (tmp_path / "mounted" / "log.jsonl").read_text() == "1\n2\n3\n4\n5\n"
    lines.close()


@pytest.mark.parametrize("room", range(9))
def test_a_line_that_found_room_in_part_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    lines = LineFile(tmp_path / "log.jsonl")
    lines.write("first")
    write = os.write
    left = room
    with monkeypatch.context() as full:

        def cut(descriptor: int, content: bytes) -> int:
            nonlocal left
            taken = write(descriptor, content[:left])
            left -= taken
            return taken

        full.setattr(line_file.os, "write", cut)
        wrote = [_write(lines, text) for text in ("aa", "bb", "cc")]
    assert wrote == [room >= 3, room >= 6, False]
    lines.close()
    found = (tmp_path / "log.jsonl").read_text().splitlines()
    whole = [line for line in found if line in ("first", "aa", "bb", "cc")]
    assert whole == ["first", "aa", "bb", "cc"]
    assert len(found) <= 5  # and at most the one that was cut


def test_the_oldest_of_too_many_waiting_lines_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_file, "_MOST_WAITING", 3)
    lines = LineFile(tmp_path / "none" / "log.jsonl")
    assert not any(_write(lines, str(i)) for i in range(7))
    (tmp_path / "none").mkdir()
    lines.close()
    assert (tmp_path / "none" / "log.jsonl").read_text() == "4\n5\n6\n"


def test_closing_tells_of_lines_that_are_lost(tmp_path: Path) -> None:
    lines = LineFile(tmp_path / "none" / "log.jsonl")
    assert not _write(lines, "1")
    with pytest.raises(OSError, match="No such file"):
        lines.close()
    assert LineFile(tmp_path / "log.jsonl").close() is None
    assert not list(tmp_path.iterdir())
