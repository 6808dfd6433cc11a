"""The last step of writing: a file that appears between the last look and the renaming stays.

Where a disk has no hard links (FAT, exFAT) is played by os.link, which fails as it does there.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread, get_ident
from typing import Any

import pytest

from mlip.settings.typed_tree import ConfigError
from mlip.system import output_file
from mlip.system.output_file import (
    KeptBesideError,
    _put_or_keep,
    new_file,
    require_replaceable,
    sync,
    whole_file,
)

OWN = "ours: "


def _ask(path: Path) -> None:
    is_ours = path.is_file() and path.read_text().startswith(OWN)
    require_replaceable(path, "--out", "table", is_ours=is_ours)


def _write(path: Path, ask: Callable[[Path], None] = _ask) -> None:
    with whole_file(path, require_own=ask) as partial:
        partial.write_text(f"{OWN}hours of work")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(params=["links", "EPERM", "ENOSYS", "EOPNOTSUPP"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With hard links, or without them: vfat and exFAT, some FUSE programs, some servers."""

    def refuse(*given: object, **options: object) -> None:
        raise OSError(getattr(errno, request.param), "no links")

    if request.param != "links":
        monkeypatch.setattr(os, "link", refuse)
    return str(request.param)


def test_a_file_that_appears_after_the_last_look_stays(tmp_path: Path, disk: str) -> None:
    path, asked = tmp_path / "a.csv", 0

    def and_it_appears(path: Path) -> None:
        nonlocal asked
        asked += 1
        _ask(path)
        path.write_text("another's")

    with pytest.raises(KeptBesideError, match=r"a.csv: is there already .* kept in .*a-2.csv"):
        _write(path, and_it_appears)
    assert asked == 2 and path.read_text() == "another's"
    assert (tmp_path / "a-2.csv").read_text() == f"{OWN}hours of work"
    assert _names(tmp_path) == {"a.csv", "a-2.csv"}


def test_of_this_kind_it_may_be_replaced(tmp_path: Path, disk: str) -> None:
    path = tmp_path / "a.csv"

    def and_ours_appears(path: Path) -> None:
        _ask(path)
        if not path.exists():
            path.write_text(f"{OWN}of a second process")

    for _ in range(2):  # a new file, and one that was there
        _write(path, and_ours_appears)
        assert path.read_text() == f"{OWN}hours of work" and _names(tmp_path) == {"a.csv"}


def test_a_link_to_nowhere_is_replaced_and_not_followed(tmp_path: Path, disk: str) -> None:
    path = tmp_path / "a.csv"
    path.symlink_to(tmp_path / "elsewhere")
    _write(path)
    assert path.read_text() == f"{OWN}hours of work" and not path.is_symlink()
    assert _names(tmp_path) == {"a.csv"}


def test_many_that_end_at_once_keep_all_their_work(tmp_path: Path, disk: str) -> None:
    """Each asks while nothing is there: one has the name, the others' files lie beside it."""
    path, together, told = tmp_path / "a.csv", Barrier(8, timeout=60), list[str]()
    waited = set[int]()

    def require_none(path: Path) -> None:
        if path.exists():
            raise ConfigError(f"{path}: is there already")
        if get_ident() not in waited:
            waited.add(get_ident())
            together.wait()

    def write(number: int) -> None:
        partial = tmp_path / f".{number}"
        partial.write_text(f"work {number}")
        try:
            _put_or_keep(partial, path, require_none)
        except KeptBesideError as error:
            told.append(str(error))

    threads = [Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _names(tmp_path) == {"a.csv", *(f"a-{number}.csv" for number in range(2, 9))}
    assert len(told) == 7
    assert {p.read_text() for p in tmp_path.iterdir()} == {f"work {n}" for n in range(8)}


def test_a_server_that_refuses_what_it_has_done_is_believed_for_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS: the answer was lost, the question asked again, and the name is there by then."""
    link = os.link

    def twice(*given: Any, **options: Any) -> None:
        link(*given, **options)
        link(*given, **options)

    monkeypatch.setattr(os, "link", twice)
    _write(tmp_path / "a.csv")
    assert _names(tmp_path) == {"a.csv"}
    assert (tmp_path / "a.csv").read_text() == f"{OWN}hours of work"


@pytest.mark.parametrize("last", [errno.EIO, errno.EACCES])
def test_a_last_renaming_that_fails_leaves_no_empty_file(
    last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither under the name nor beside it; another's, which has come under it, stays."""

    def fail(*given: object, **options: object) -> None:
        raise OSError(last, os.strerror(last))

    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match=os.strerror(last)):
        _write(tmp_path / "a.csv")
    assert not _names(tmp_path)
    (tmp_path / "a.csv").write_text("another's")
    with pytest.raises(OSError, match=os.strerror(last)):
        _write(tmp_path / "a.csv")
    assert _names(tmp_path) == {"a.csv"}

    def lose(self: Path, target: Path) -> None:
        target.unlink()
        target.write_text("another's, too")
        fail()

    monkeypatch.setattr(Path, "replace", lose)
    with pytest.raises(OSError, match=os.strerror(last)):
        _write(tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text() == "another's, too"


def test_a_folder_that_takes_no_fsync_is_no_fault_and_a_file_that_takes_none_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AFS, VirtualBox's shared folders: every checkpoint "cannot be written: Invalid argument"."""
    code, fsync = errno.EINVAL, os.fsync

    def refuse(descriptor: int) -> None:
        fsync(descriptor)
        if is_dir is None or is_dir == stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    (tmp_path / "file").touch()
    is_dir: bool | None = True
    sync(tmp_path)
    sync(tmp_path / "file")
    is_dir = False
    with pytest.raises(OSError, match="Invalid"):
        sync(tmp_path / "file")
    is_dir, code = True, errno.EIO
    with pytest.raises(OSError, match="error"):
        sync(tmp_path)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOENT])
def test_a_name_that_the_disk_does_not_take_is_told_before_the_work(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end it was a traceback. 245 letters have no room for what is written first; exFAT by
    the kernel's driver has EINVAL for a colon, by FUSE ENOENT."""
    long = tmp_path / ("x" * 245 + ".csv")
    with pytest.raises(
        ConfigError, match="--out .*x.csv: a file of this name cannot be made: .*long"
    ):
        _ask(long)
    _ask(tmp_path / "not yet" / "a.csv")
    _ask(tmp_path / "a.csv")
    assert not _names(tmp_path)
    ours = tmp_path / ("y" * 245 + ".csv")  # replaced by way of a longer name
    ours.write_text(OWN)
    with pytest.raises(ConfigError, match="y.csv: a file of this name cannot be made"):
        _ask(ours)

    def refuse(path: str, *given: Any, **options: Any) -> int:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        ConfigError, match=f"a:b.csv: a file .* cannot be made: {os.strerror(code)}"
    ):
        _ask(tmp_path / "a:b.csv")


def test_the_name_is_tried_before_the_work_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked again at the end, where a disk may have no room for one more file, and a link has."""
    made = list[Path]()

    def count(path: Path, mode: int = 0o666) -> int:
        made.append(path)
        return new_file(path, mode)

    monkeypatch.setattr(output_file, "new_file", count)
    _ask(tmp_path / "a.csv")
    _write(tmp_path / "a.csv")
    assert len(made) == 2 and len(set(made)) == 1  # the trial, and what is then renamed
    assert _names(tmp_path) == {"a.csv"}


def test_a_trial_that_is_killed_leaves_what_the_next_write_removes(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, signal, sys\n"
        "from mlip.system import output_file\n"
        "output_file.os.close = lambda number: os.kill(os.getpid(), signal.SIGKILL)\n"
        "output_file.require_name(pathlib.Path(sys.argv[1]), '--out')\n"
    )
    path = tmp_path / "a.csv"
    ended = subprocess.run([sys.executable, "-c", script, path], check=False)
    assert ended.returncode == -signal.SIGKILL and len(_names(tmp_path)) == 1
    _write(path)
    assert _names(tmp_path) == {"a.csv"}


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asks: bool, is_there: bool
) -> None:
    """Renamed before, it can be a file of zeros after a power cut."""
    path, steps, fsync = tmp_path / "a.csv", list[tuple[bool, str]](), os.fsync
    if is_there:
        path.write_text(f"{OWN}before")

    def look(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        steps.append((is_folder, path.read_text() if path.exists() else ""))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    with whole_file(path, require_own=_ask if asks else None) as partial:
        partial.write_text(f"{OWN}after")
    assert steps == [(False, f"{OWN}before" if is_there else ""), (True, f"{OWN}after")]


def test_a_folder_that_may_not_be_read_takes_a_file(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read every folder")
    tmp_path.chmod(0o300)
    try:
        _write(tmp_path / "a.csv")
    finally:
        tmp_path.chmod(0o700)
    assert (tmp_path / "a.csv").exists()
