"""Names of files as a disk and a table hold them: bytes and text, and the two forms of Unicode.

An accent stands in one character (NFC), or apart (NFD). macOS writes names apart, most tables hold
them in one, and Linux compares bytes: a file that is plainly there would be missing.
"""

from __future__ import annotations

import functools
import os
import unicodedata
from collections.abc import Iterable


def on_disk(name: str) -> bytes:
    """The bytes of a name that a table holds; what is no UTF-8 in it stays as it was."""
    return name.encode("utf-8", "surrogateescape")


def as_utf8(name: str | bytes | os.PathLike[str]) -> str:
    """The text of a name of the disk, whatever the locale says, so that on_disk gives it again."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def composed(name: str) -> str:
    """The name in the one form, by which names of either form are the same."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def as_it_lies(root: bytes, below: bytes) -> bytes | None:
    """A path below root that is not there, in the forms in which its folders hold its parts.

    None where a part is there in no form, or in several of which none is the one that was asked
    for: those are different files, and nobody can tell which is meant.
    """
    folder, found = root, []
    for part in below.split(b"/"):
        if not os.path.lexists(os.path.join(folder, part)):
            names = () if part.isascii() else _names(folder).get(composed(as_utf8(part)), ())
            if len(names) != 1:
                return None
            part = on_disk(names[0])
        found.append(part)
        folder = os.path.join(folder, part)
    return b"/".join(found)


def by_composed(names: Iterable[str]) -> dict[str, list[str]]:
    """The names that have two forms, by the composed one."""
    found: dict[str, list[str]] = {}
    for name in names:
        if not name.isascii():
            found.setdefault(composed(name), []).append(name)
    return found


def _names(folder: bytes) -> dict[str, list[str]]:
    """Listed once while the folder stays as it is: else a folder of n such names costs n^2."""
    try:
        changed_ns, kept = os.stat(folder).st_mtime_ns, _kept(folder)
        names = kept.get(changed_ns)
        if names is None:
            names = by_composed(map(as_utf8, os.listdir(folder)))
            kept.clear()
            kept[changed_ns] = names
        return names
    except OSError:
        return {}


@functools.lru_cache(maxsize=64)
def _kept(folder: bytes) -> dict[int, dict[str, list[str]]]:
    """A folder's names by the time of its last change: those of one time, or of none yet.

    A folder that files still come into would be held once for every time otherwise.
    """
    return {}
