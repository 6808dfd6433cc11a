"""Where a command writes: tried before the work, whole or not at all, and what to say if it fails.

What does not live here: checkpoints (training/checkpoint.py) and shards (dataloading/shards.py),
which are synced to the disk as well.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlip.settings.typed_tree import ConfigError
from mlip.system.folder_lock import is_alive, lock, open_lock, open_own, release

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_FAILING = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EREMOTEIO}  # a disk, or its network
_RENAMES_TRIED = 3  # in some of rclone's modes every second one goes well
_REFUSED = {
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.EBUSY, errno.ENAMETOOLONG, errno.ELOOP),
}


class KeptBesideError(ConfigError):
    """Another's file lies by now where this command was to write; names where its own file is."""


def require_writable(folder: Path) -> Path:
    """The folder, tried out before the work: after hours is too late to find out.

    One that is not there yet is not made, its parent is tried: a mistake leaves nothing behind.
    A byte is written and read again: a full disk takes names, a mounted bucket (rclone without a
    cache) loses results.
    Raises:  ConfigError naming the folder and the reason.
    """
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
            file.seek(0)
            file.read()
        return folder
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written to: {error.strerror}; name another place with --out"
        ) from None


def require_replaceable(path: Path, option: str, kind: str, *, is_ours: bool) -> None:
    """Raises:  ConfigError for a folder, a file that is there and of another kind, or a name that
             the disk does not take.

    A manifest, a model's weights or what the command reads, named by mistake, would be lost.
    is_ours  whether the file, where there is one that holds something, is of this kind
    """
    if path.exists() and not (path.is_file() and (is_ours or not path.stat().st_size)):
        raise ConfigError(
            f"{option} {path}: is there already and is no {kind}: expected the name of a new file, "
            "or of one to replace"
        )
    require_name(path, option)


def require_name(path: Path, option: str) -> None:
    """Raises:  ConfigError for a name too long for what stands around it while it is written, or
    with a sign that FAT and exFAT refuse, as ":": after hours is too late to find out.
    """
    partial = _partial(path)
    # a folder that is made later; a file that is written, which is asked about again at its end
    if not path.parent.is_dir() or os.path.lexists(partial):
        return
    try:
        os.close(new_file(partial))
        partial.unlink()
    except OSError as error:
        raise ConfigError(
            f"{option} {path}: a file of this name cannot be made: {error.strerror}; name another"
        ) from None


def begins_with(path: Path, begin: str) -> bool:
    """Whether it is a file with this text in front."""
    wanted = begin.encode()
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(wanted)) == wanted


def sync(path: Path) -> None:
    """Makes the content of a file, or the renames in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # AFS, VirtualBox's shared folders, 9p: a folder takes no fsync, a file does
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """`sync` of all that a folder holds, and of itself: to be renamed to what others trust."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def require_renames(folder: Path) -> None:
    """Tries in a folder what checkpoints and exports need: that another one, written and synced
    there, keeps its files when it is renamed.

    A bucket mounted by rclone refuses that, or loses the files for seconds or for good.
    Raises:  ConfigError that says so; OSError where nothing can be written
    """
    own = tempfile.TemporaryDirectory(prefix=".renames-", dir=folder, ignore_cleanup_errors=True)
    with own as place:
        for number in range(_RENAMES_TRIED):
            written, renamed = Path(place, f"{number}-written"), Path(place, f"{number}-renamed")
            try:
                written.mkdir()
                (written / "file").write_bytes(b"whole")
                sync(written / "file")
                written.rename(renamed)
                is_whole = (renamed / "file").read_bytes() == b"whole"
            except OSError as error:
                if error.errno in _FULL | _REFUSED:
                    raise
                is_whole = False
            if not is_whole:
                raise ConfigError(
                    f"{folder}: cannot be written to: a folder that is renamed in it loses its "
                    "files, as in a mounted bucket; name a folder on a disk, and copy it at the end"
                )


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def new_file(path: Path, mode: int = 0o666) -> int:
    """A descriptor of a file that nobody has open and no link leads to, to write.

    In a folder that several people may write to, whatever stands under a name that can be guessed
    may be another's: a link to what is to be lost, or a file that he reads while it is filled.
    mode    before the umask
    Raises:  OSError where what stands there cannot be removed
    """
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)


def open_to_append(path: Path, mode: int = 0o666) -> int:
    """A descriptor of a file that keeps what it holds, to add lines and to read.

    mode    before the umask
    Raises:  OSError, as of `open_own`
    """
    return open_own(path, os.O_RDWR | os.O_APPEND, mode)


@contextlib.contextmanager
def whole_file(
    path: Path,
    *,
    is_private: bool = False,
    require_own: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """The name to write under: renamed to `path` once it is on the disk, removed where the writing
    failed.

    What a killed process of this host left of the same file is removed first.
    is_private   for its owner alone, from the first byte on: it holds a patient's picture or text,
                 or numbers of single films
    require_own  the question of before the work, asked again before the renaming: what has appeared
                 there since is another's and stays, and hours of work are kept beside it. A file
                 that appears after the question stays too; one of this kind may be replaced
    Raises:  KeptBesideError where `require_own` raises ConfigError by then, or nothing can be
             renamed to `path`
    """
    partial = _partial(path)
    _remove_leftovers(path.parent, partial.name.removesuffix(str(os.getpid())))
    try:
        os.close(new_file(partial, 0o600 if is_private else 0o666))
        yield partial
        sync(partial)  # renamed before, it can be a file of zeros after a power cut
        if require_own is None:
            partial.replace(path)
        else:
            _put_or_keep(partial, path, require_own)
        with contextlib.suppress(OSError):  # of a folder that may be written to and not read
            sync(path.parent)
    except BaseException:
        # the first error is the one to tell: there may be nothing to remove, or a read-only disk
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _partial(path: Path) -> Path:
    """What this process writes first, beside `path`."""
    # containers on one disk have equal process numbers
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")


def _put_or_keep(partial: Path, path: Path, require_own: Callable[[Path], None]) -> None:
    try:
        while not _put_asking(partial, path, require_own):
            pass
    except (ConfigError, OSError) as error:  # a folder by then, or a file that is not to be read
        for number in itertools.count(2):
            beside = path.with_name(f"{path.stem}-{number}{path.suffix}")
            with contextlib.suppress(FileExistsError):
                _put_new(partial, beside)
                break
        why = refusal(error, path) or str(error)
        raise KeptBesideError(f"{why}; what was made meanwhile is kept in {beside}") from None


def _put_asking(partial: Path, path: Path, require_own: Callable[[Path], None]) -> bool:
    """False where a file has come to lie there since it was looked: it is to be asked about too."""
    is_there = os.path.lexists(path)  # before the question, whose answer may be of nothing there
    require_own(path)
    if is_there:
        partial.replace(path)
        return True
    try:
        _put_new(partial, path)
    except FileExistsError:
        return False
    return True


def _put_new(partial: Path, path: Path) -> None:
    """Renames a file to a name that nothing has, or leaves all as it is; renaming alone replaces.

    Raises:  FileExistsError; OSError
    """
    try:
        os.link(partial, path, follow_symlinks=False)
    except FileExistsError:
        # man 2 open: a file server that is asked twice refuses what it did at the first time
        if not (path.exists() and path.samefile(partial)):
            raise
    except OSError:  # FAT, exFAT, some servers' disks and programs' (FUSE) have no links
        _take_name(partial, path)
        return
    with contextlib.suppress(OSError):  # of two names the right one is there
        partial.unlink()


def _take_name(partial: Path, path: Path) -> None:
    """As `_put_new`, by an empty file that is then replaced.

    What another writes into that file, and not into one of his own, in that moment is lost.
    """
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            if not path.lstat().st_size:  # not another's, who has renamed his own to it
                path.unlink()
        raise


def _remove_leftovers(folder: Path, begin: str) -> None:
    with contextlib.suppress(OSError):  # what keeps the folder from being read is told by the write
        for name in os.listdir(folder):
            pid = name.removeprefix(begin)
            if pid != name and pid.isdecimal() and not is_alive(int(pid)):
                (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def only_writer(lock_file: Path, out: str | Path) -> Iterator[None]:
    """Keeps other processes from writing `out` until the block, or this process, ends.

    lock_file  made here, gone at the end; one that a killed process left is free
    Raises:  ConfigError where another process is at work; OSError where no file can be made
    """
    with contextlib.ExitStack() as stack:
        descriptor = open_lock(lock_file)
        stack.callback(release, descriptor)
        try:
            lock(descriptor, lock_file.parent)
            # the one who held it may have removed it since it was opened here
            is_ours = os.path.samestat(os.fstat(descriptor), lock_file.stat())
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        if not is_ours:
            raise ConfigError(
                f"{out}: another process is writing there: wait for its end, or name another place "
                "with --out"
            )
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock_file.unlink()


def refusal(error: Exception, out: str | Path | None) -> str | None:
    """One line for a full or a failing disk, a place or temporary folders that cannot be written;
    else None.

    out  what the command was told to write: writing to an open file fails without any name
    """
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):  # tempfile's
        return f"{error.strerror}: all are full or closed; make room or set TMPDIR to another"
    code = _errno_of(error)
    if code not in _FULL | _REFUSED | _FAILING:
        return None
    named = getattr(error, "filename", None)
    is_out = out is not None and (named is None or _belongs_to(named, Path(out)))
    named = os.fsdecode(named) if isinstance(named, bytes) else named  # of TensorBoard and others
    place = out if is_out else named or "the output"
    own = getattr(error, "strerror", None) if code == errno.ELOOP else None  # open_own's
    reason = "a file stands in the way" if code == errno.EEXIST else own or os.strerror(code)
    if code in _FAILING:  # without a name it may be of what was read
        place = place if named else "a file"
        return f"{place} cannot be read or written: {reason}: its disk, or the way there, fails"
    if is_out or code in _FULL:
        return f"{place} cannot be written: {reason}; make room or name another place"
    return f"{place} cannot be used: {reason}"


def _errno_of(error: Exception) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    # safetensors has one error for all, and the system's number in its text
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found and type(error).__name__ == "SafetensorError" else 0


def _belongs_to(named: Any, out: Path) -> bool:
    """Whether a file is `out`, below it, the folder that it is to lie in, or beside it under the
    hidden name that is written first: others beside it are read, and are named themselves."""
    whole = out.absolute()
    try:
        place = Path(os.fsdecode(named)).absolute().relative_to(whole.parent)
    except ValueError:
        return False
    first = next(iter(place.parts), whole.name)
    return first == whole.name or first.startswith(f".{whole.name}.")
