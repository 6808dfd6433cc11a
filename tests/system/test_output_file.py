"""Places that cannot be written: one line with the place and the reason, code 2, nothing left.

A full disk is played by the process's limit on the size of a file, which needs no rights: the
system refuses the write with EFBIG as it refuses it with ENOSPC there.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mlip.cli import main
from mlip.dataloading.prepare.output_folder import sole_writer
from mlip.dataloading.shards import synced_file
from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.vectors import knowledge_vectors
from mlip.pages.page import write_page
from mlip.pretrained import save_pretrained
from mlip.settings.config import Knowledge
from mlip.settings.typed_tree import ConfigError
from mlip.system import output_file
from mlip.system.output_file import (
    KeptBesideError,
    new_file,
    only_writer,
    refusal,
    require_renames,
    require_writable,
    whole_file,
)
from mlip.training.lifecycle import locked_folder, record_event
from mlip.training.line_file import open_for_lines
from mlip.transfer.films.row_table import write_row_table
from tests.small_run import small_export, small_run

PHANTOMS = ["data.phantom.studies=8", "data.phantom.val_studies=0", "data.phantom.test_studies=8"]


@contextlib.contextmanager
def full_disk(bytes_left: int = 1500) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def commands(name: str) -> list[str]:
    """Each command that writes, up to the value of --out."""
    run, model = small_run(), f"checkpoint={small_export()}"
    image = str(Path(run.manifest.root) / run.manifest.image_path(0))
    return {
        "evaluate": ["evaluate", *run.settings, model, "evaluate.max_studies=20", "--out"],
        "ground": ["ground", image, "nodule", "--checkpoint", str(small_export()), "--out"],
        "embed": ["embed", *run.settings, model, "--out"],
        "export": ["export", model, "--out"],
        "phantoms": ["phantoms", *PHANTOMS, "--workers", "1", "--out"],
        "knowledge": ["knowledge", "build", "--out"],
    }[name]


NAMES = {"ground": "map.png", "knowledge": "table.jsonl"}  # the others write folders
COMMANDS = ("evaluate", "ground", "embed", "export", "phantoms", "knowledge")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_in_place_of_a_folder_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.png").write_bytes(b"kept")
    places = [tmp_path / "m.png" / NAMES.get(name, "sub")]
    if name not in NAMES:
        places.append(tmp_path / "m.png")
    for place in places:
        assert main([*commands(name), str(place)]) == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1 and "m.png" in said.err and said.out == ""
    assert (tmp_path / "m.png").read_bytes() == b"kept"
    assert [p.name for p in tmp_path.iterdir()] == ["m.png"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line_and_leaves_no_half_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / NAMES.get(name, "out")
    command = commands(name)
    with full_disk():
        assert main([*command, str(place)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"mlip {name}: {place}") and "cannot be written: File too large" in line
    left = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert left in ([], ["index.json"])  # embed goes on from there


def test_a_map_that_is_there_stays_whole_on_a_full_disk(tmp_path: Path) -> None:
    out = tmp_path / "map.png"
    assert main([*commands("ground"), str(out)]) == 0
    before = out.read_bytes()
    assert out.stat().st_mode & 0o777 == 0o600  # it shows a patient's film
    with full_disk():
        assert main([*commands("ground"), str(out)]) == 2
    assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]


def test_a_phantom_worker_on_a_full_disk_says_so_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlip.dataloading.phantom import dataset as phantom_dataset

    # this process is the first worker, and leaves the error to the second
    monkeypatch.setattr(phantom_dataset, "_work", lambda argument: None)
    command = ["phantoms", "data.phantom.studies=128", "--workers", "2", "--out"]
    with full_disk():
        assert main([*command, str(tmp_path / "p")]) == 2
    assert "cannot be written: File too large" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["/proc/phantoms", "/proc/no/phantoms"])
def test_phantoms_on_a_disk_that_takes_no_folder_are_one_line(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it says, no such file or directory, was taken for a fault of ours, with a traceback."""
    assert main([*commands("phantoms"), place]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"mlip phantoms: {place}: cannot be written to: ")
    assert said.endswith("name another place with --out\n") and said.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_an_empty_out_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The empty path is the current folder."""
    assert main([*commands(name), ""]) == 2
    assert "is empty: expected" in capsys.readouterr().err


def test_a_place_is_tried_before_the_work_and_not_made(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c"
    assert require_writable(deep) == deep and not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/x: cannot be written to: Not a directory; name"):
        require_writable(tmp_path / "file" / "x")


def test_each_kind_of_error_names_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for code, words in (
        (errno.ENOSPC, "No space left on device"),
        (errno.EROFS, "Read-only file system"),
        (errno.EDQUOT, "quota exceeded"),
        (errno.EPERM, "not permitted"),
        (errno.EBUSY, "busy"),
        (errno.ENAMETOOLONG, "too long"),
        (errno.ENOTDIR, "Not a directory"),
        (errno.EISDIR, "Is a directory"),
        (errno.EEXIST, "a file stands in the way"),
    ):
        for named in (None, str(out / ".part.17"), str(tmp_path / ".out.17")):
            said = refusal(OSError(code, "", named), out)
            assert said is not None and said.startswith(f"{out} cannot be written: ")
            assert words in said
    monkeypatch.chdir(tmp_path)  # most say where by a path from where they are
    for told, name in (("out", str(out)), ("out", "out/.part.17"), (out, "out"), (out, ".out.17")):
        said = refusal(OSError(errno.EPERM, "", name), told)
        assert said is not None and said.startswith(f"{told} cannot be written: ")
    for named in (tmp_path, tmp_path / ".out.partial" / "config.json"):
        said = refusal(OSError(errno.EPERM, "", str(named)), out)
        assert said is not None and said.startswith(f"{out} cannot be written: ")
    # what lies beside it was read: "out cannot be written" was said of weights that are another's
    for named in (tmp_path / "model" / "model.safetensors", tmp_path / ".outer", tmp_path / "o"):
        denied = PermissionError(errno.EACCES, "", str(named))
        assert refusal(denied, out) == f"{named} cannot be used: Permission denied"
    # another disk than the one of --out is named itself
    said = refusal(OSError(errno.ENOSPC, "", "/var/x"), out)
    assert said is not None and said.startswith("/var/x cannot be written: ")
    for place in ("/other/weights", b"/other/weights"):  # TensorBoard names files as bytes
        denied = PermissionError(errno.EACCES, "", place)
        assert refusal(denied, out) == "/other/weights cannot be used: Permission denied"
    fails = "cannot be read or written: Input/output error: its disk, or the way there, fails"
    for name, place in ((str(out / "part"), str(out)), ("/m.csv", "/m.csv"), (None, "a file")):
        assert refusal(OSError(errno.EIO, "", name), out) == f"{place} {fails}"
        assert (refusal(OSError(errno.ESTALE, "", name), None) or "").startswith(name or "a file")
    loop = OSError(errno.ELOOP, "", str(out))  # links that lead to one another
    assert (
        refusal(loop, out)
        == f"{out} cannot be written: {os.strerror(errno.ELOOP)}; make room or name another place"
    )
    assert refusal(FileNotFoundError(errno.ENOENT, "", str(out)), out) is None
    assert refusal(RuntimeError("a bug (os error 28)"), out) is None
    assert refusal(OSError("without a number of the system's"), out) is None
    nowhere = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
    assert "set TMPDIR to another" in (refusal(nowhere, out) or "")
    with pytest.raises(SafetensorError) as caught, full_disk():
        save_file({"a": torch.zeros(5000)}, out)
    assert "File too large" in (refusal(caught.value, out) or "")


def test_a_disk_that_fills_with_the_vocabulary_says_so_and_keeps_no_part_of_it(
    tmp_path: Path,
) -> None:
    """The tokenizers library told of it by a bare Exception: export ended in a traceback."""
    tokenizer = small_run().tokenizer
    with pytest.raises(OSError) as caught, full_disk(100):
        tokenizer.save(tmp_path / "tokenizer")
    assert "File too large" in (refusal(caught.value, tmp_path) or "")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_with_concept_vectors_keeps_no_part_of_them(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File too large"), full_disk(100):
        knowledge_vectors(load_concepts(None), Knowledge(dim=8, cache_dir=str(tmp_path / "cache")))
    assert not list((tmp_path / "cache").iterdir())


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with whole_file(path) as partial:
        partial.write_text("first")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="the first error"), whole_file(path) as partial:
        partial.unlink()
        partial.mkdir()  # which cannot be unlinked: as on a disk that has become read-only
        raise ValueError("the first error")


def test_what_cannot_be_put_in_its_place_is_kept_beside_it(tmp_path: Path) -> None:
    """A folder that has come to lie there, even where the question of whose it is says nothing."""
    path, planted = tmp_path / "a.txt", tmp_path / "precious"
    planted.write_text("kept")
    (tmp_path / "a-2.txt").symlink_to(planted)
    path.mkdir()
    with (
        pytest.raises(KeptBesideError, match=r"a.txt cannot be written: Is a dir.* kept in .*a-3"),
        whole_file(path, require_own=lambda path: None) as partial,
    ):
        partial.write_text("hours of work")
    assert (tmp_path / "a-3.txt").read_text() == "hours of work" and planted.read_text() == "kept"
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "a-2.txt", "a-3.txt", "precious"}


def test_what_killed_writers_left_is_removed_and_what_others_are_writing_is_not(
    tmp_path: Path,
) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    host = socket.gethostname()
    kept = {f".a.txt.{host}.{os.getppid()}", f".a.txt.another.{ended.pid}", f".a.txt.{host}.x"}
    for name in (*kept, f".a.txt.{host}.{ended.pid}", f".a.txt.{host}.{10**12}"):
        (tmp_path / name).write_text("half")
    with whole_file(tmp_path / "a.txt") as partial:
        partial.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", *kept}


def test_a_folder_that_may_be_written_to_and_not_listed_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    with monkeypatch.context() as drop_box:
        drop_box.setattr(os, "listdir", refuse)
        with whole_file(tmp_path / "a.txt") as partial:
            partial.write_text("whole")
    assert (tmp_path / "a.txt").read_text() == "whole"


@pytest.mark.parametrize("name", ["whole", "synced", "table"])
def test_what_another_planted_under_the_name_that_is_written_first_is_not_written_to(
    name: str, tmp_path: Path
) -> None:
    """In a folder of a group: a link, through which a file was lost, or a file that its planter
    holds open and read the secret table of patient ids from."""
    out, mine = tmp_path / "out.csv", f".out.csv.{socket.gethostname()}.{os.getpid()}"
    planted = tmp_path / (f"{mine}.part" if name == "synced" else mine)

    def write() -> None:
        if name == "whole":
            with whole_file(out, is_private=True) as partial:
                partial.write_text("Jane Doe")
        elif name == "synced":
            with synced_file(out) as file:
                file.write(b"Jane Doe")
        else:
            write_row_table(out, ["name"], {3: ["Jane Doe"]}, {})
        assert "Jane Doe" in out.read_text() and not out.is_symlink()
        assert out.stat().st_mode & 0o777 == 0o600

    precious = tmp_path / "precious"
    precious.write_text("kept")
    planted.symlink_to(precious)
    write()
    assert precious.read_text() == "kept"
    planted.touch()
    planted.chmod(0o666)
    with planted.open() as spy:
        write()
        assert spy.read() == ""
    assert {path.name for path in tmp_path.iterdir()} == {"out.csv", "precious"}


def test_a_link_that_is_planted_when_what_stood_there_is_gone_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plant(self: Path, missing_ok: bool = False) -> None:
        self.symlink_to(tmp_path / "precious")

    (tmp_path / "precious").touch()
    monkeypatch.setattr(Path, "unlink", plant)
    with pytest.raises(FileExistsError):
        new_file(tmp_path / "out")


def test_what_is_private_is_so_from_the_first_byte_on_under_any_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with whole_file(tmp_path / "a", is_private=True) as partial:
            assert partial.stat().st_mode & 0o777 == 0o600
        with whole_file(tmp_path / "b") as partial:
            assert partial.stat().st_mode & 0o777 == 0o666
        with only_writer(tmp_path / ".lock", "a"):  # another of the group is told of it
            assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o666
    finally:
        os.umask(before)


def test_a_page_is_for_its_owner_alone(tmp_path: Path) -> None:
    """It shows films, and where it is asked to what reports say."""
    assert write_page(tmp_path / "page.html", "<html>").stat().st_mode & 0o777 == 0o600


def _plant(kind: str, path: Path, precious: Path) -> None:
    if kind == "link":
        path.symlink_to(precious)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as own:
            own.bind(str(path))


_PLANTED = {"link": "a link, which", **dict.fromkeys(("pipe", "folder", "socket"), "no file")}


@pytest.mark.parametrize("kind", _PLANTED)
def test_a_lock_is_no_link_that_leads_away_and_no_pipe(kind: str, tmp_path: Path) -> None:
    """Through a link of that name the file it leads to was emptied by a run's start; for the other
    end of a pipe nobody is to wait."""
    precious, folder, what = tmp_path / "precious", tmp_path / "out", _PLANTED[kind]
    precious.write_text("kept")
    folder.mkdir()
    for name in ("lock", ".lock"):
        _plant(kind, folder / name, precious)
    with (
        pytest.raises(ConfigError, match=f"run.dir=.* cannot be written: its lock lock is {what}"),
        locked_folder(folder),
    ):
        raise AssertionError("locked")
    with pytest.raises(OSError, match=f"lock .lock is {what}"), sole_writer(folder, (0, 1)):
        raise AssertionError("locked")
    with pytest.raises(OSError) as told, only_writer(folder / ".lock", "x"):
        raise AssertionError("locked")
    line = refusal(told.value, folder)
    assert line is not None and f"cannot be written: its lock .lock is {what}" in line
    assert precious.read_text() == "kept"


@pytest.mark.parametrize("name", ["events.jsonl", "log.jsonl", "validation.jsonl"])
@pytest.mark.parametrize("kind", _PLANTED)
def test_lines_are_added_through_no_link_and_no_start_waits_for_a_pipe(
    kind: str, name: str, tmp_path: Path
) -> None:
    """Lines of a run stood at the end of the file that such a link led to."""
    precious, what = tmp_path / "precious", _PLANTED[kind]
    precious.write_text("kept")
    folder = tmp_path / "run"
    folder.mkdir()
    _plant(kind, folder / name, precious)
    with (
        pytest.raises(ConfigError, match=f"run.dir=.* cannot be written: its {name} is {what}"),
        locked_folder(folder),
    ):
        raise AssertionError("a run begins")
    with pytest.raises(OSError, match=f"its {name} is {what}"):
        if name == "events.jsonl":
            record_event(folder, "started")
        else:
            open_for_lines(folder / name)
    assert precious.read_text() == "kept"
    (folder / name).rename(tmp_path / "removed")
    with locked_folder(folder):  # and makes none of them
        assert [path.name for path in folder.iterdir()] == ["lock"]


def test_one_process_at_a_time_writes_a_place(tmp_path: Path) -> None:
    held = tmp_path / ".model.lock"
    held.touch()  # of a process that was killed
    with only_writer(held, "model"):
        with (
            pytest.raises(ConfigError, match="model: another process is writing there"),
            only_writer(held, "model"),
        ):
            raise AssertionError("two writers")
        assert held.exists()
    assert not held.exists()
    with only_writer(held, "model"):
        held.unlink()  # by a cleaner of old files: the work is done all the same


@pytest.mark.parametrize("is_made_again", [True, False])
def test_a_lock_that_its_holder_removed_while_it_was_opened_here_keeps_nobody_out(
    is_made_again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third process may hold the file of that name by then."""
    held, lock = tmp_path / ".lock", output_file.lock

    def late(descriptor: int, folder: Path) -> None:
        held.unlink()
        if is_made_again:
            held.touch()
        lock(descriptor, folder)

    monkeypatch.setattr(output_file, "lock", late)
    with pytest.raises(ConfigError, match="another process"), only_writer(held, "out"):
        raise AssertionError("two writers")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "no more memory for this process"),
        (RuntimeError("can't start new thread"), "start no more processes or threads"),
        (OSError(errno.EMFILE, "Too many open files", "m.csv"), "too many files are open"),
    ],
)
def test_a_limit_of_the_account_is_one_line_too(
    error: Exception,
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(settings: object) -> None:
        raise error

    monkeypatch.setattr("mlip.commands.actions.read_given", fail)
    assert main(["phantoms", "--out", str(tmp_path / "p")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mlip phantoms: ") and told in said and said.count("\n") == 1


def _as_in_a_bucket(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders renamed as rclone's mounts do it, by cache mode: seen with version 1.60."""
    rename = Path.rename
    calls = itertools.count()

    def renamed(path: Path, target: Path) -> Path:
        if kind == "refused":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        moved = rename(path, target)
        if kind == "every third is lost" and next(calls) % 3 < 2:
            return moved
        for file in moved.iterdir():
            file.write_bytes(b"") if kind == "emptied" else file.unlink()
        return moved

    monkeypatch.setattr(Path, "rename", renamed)


@pytest.mark.parametrize("kind", ["refused", "emptied", "gone", "every third is lost"])
def test_a_mounted_bucket_that_loses_renamed_folders_is_found_before_the_work(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training of days had lost every checkpoint, and said so at its end."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    run = small_run()
    _as_in_a_bucket(kind, monkeypatch)
    told = "cannot be written to: a folder that is renamed in it loses its files"
    for folder in (tmp_path / "run", tmp_path / "new"):
        with pytest.raises(ConfigError, match=f"^run.dir={folder}.*: {told}"):
            with locked_folder(folder):
                raise AssertionError("trains")
    with pytest.raises(ConfigError, match=told):
        save_pretrained(tmp_path / "model", run.model, run.config, run.tokenizer, run.table)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"run", "run/checkpoints", "run/lock", "new", "new/lock"}


def test_where_folders_keep_their_files_the_trial_leaves_nothing(tmp_path: Path) -> None:
    require_renames(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_no_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        require_renames(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "held",
    [
        lambda folder: locked_folder(folder),
        lambda folder: only_writer(folder / ".out.lock", "out"),
        lambda folder: sole_writer(folder, (0, 1)),
    ],
    ids=["run", "out", "prepare"],
)
def test_a_lock_that_cannot_be_closed_ends_no_finished_work(
    held: Callable[[Path], contextlib.AbstractContextManager[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its network's disk was gone for 12 s: a trained run ended as an unexpected error."""
    close = os.close
    refused = []

    def gone(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        close(descriptor)
        if "lock" in Path(path).name:
            refused.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with held(tmp_path):
        monkeypatch.setattr(os, "close", gone)
    assert len(refused) == 1
    monkeypatch.undo()
    with held(tmp_path) as is_free:
        assert is_free in (None, True)
