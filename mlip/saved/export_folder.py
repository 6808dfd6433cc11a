"""The files of an export's folder: their names, the list of their hashes, and what may be replaced.

What is in them is written by mlip/pretrained.py and read by trained_model.py.
"""

from __future__ import annotations

import os
from pathlib import Path

from mlip.saved.weights import PretrainedError
from mlip.system.output_file import file_sha256

WEIGHTS, SETTINGS, SUMS = "model.safetensors", "config.json", "SHA256SUMS"
CONTRACT, CARD = "preprocessing.json", "README.md"
FORMAT = 1  # of config.json


def require_free(folder: Path) -> None:
    """What is there goes: so only what an export has written, every file of it in its list.

    Raises:  PretrainedError naming what is there besides, or a card that somebody has gone on with
    """
    if not folder.exists():
        return
    sums = _sums(folder) if (folder / SUMS).is_file() else {}
    own = {*sums, SUMS}
    if not {WEIGHTS, SETTINGS, CONTRACT} <= own:  # a list of hashes of somebody else
        own = set()
    files = [p for p in folder.rglob("*") if not p.is_dir()] if folder.is_dir() else [folder]
    other = next((p for p in files if p.relative_to(folder).as_posix() not in own), None)
    if other is not None:
        raise PretrainedError(
            f"{folder}: expected no folder, an empty one or an earlier export; it is or holds "
            f"other files ({other}), so nothing was written; name another folder"
        )
    _require_own_card(folder, sums)


def _require_own_card(folder: Path, sums: dict[str, str]) -> None:
    card = folder / CARD
    if CARD in sums and card.is_file() and file_sha256(card) != sums[CARD]:
        raise PretrainedError(
            f"{card}: was changed after the export and would be lost, so nothing was written; "
            "move it to another place, or name another folder"
        )


def put_into(written: Path, folder: Path) -> None:
    """Move the files of an export into a folder that may hold others, which stay.

    Until the list of hashes comes, as the last file, the folder is no export.
    Raises:  PretrainedError for a card that somebody has gone on with
    """
    earlier = _sums(folder) if (folder / SUMS).is_file() else {}
    _require_own_card(folder, earlier)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMS).unlink(missing_ok=True)
    new = [p.relative_to(written).as_posix() for p in written.rglob("*") if p.is_file()]
    for name in earlier.keys() - set(new):  # an ONNX graph of other weights, for instance
        if _is_inside(name):
            (folder / name).unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: (name == SUMS, name)):
        (folder / name).parent.mkdir(exist_ok=True)
        os.replace(written / name, folder / name)


def _is_inside(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def write_sums(folder: Path) -> None:
    """The list of all files that lie in the folder, as sha256sum writes it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    lines = [f"{file_sha256(p)}  {p.relative_to(folder).as_posix()}" for p in files]
    (folder / SUMS).write_text("\n".join(lines) + "\n", encoding="utf-8")


def check_sums(folder: Path, *, weights: bool = True) -> None:
    """Raises:  PretrainedError where a listed file is missing or another, the card apart.

    weights  False leaves them out, whose hash takes longest, for what reads none
    """
    sums = _sums(folder)
    for name in (WEIGHTS, SETTINGS):
        if name not in sums:
            raise PretrainedError(f"{folder / SUMS}: does not list {name}; copy the folder again")
    for name, expected in sums.items():
        path = folder / name
        if not _is_inside(name):
            raise PretrainedError(f"{folder / SUMS}: names a file outside: {name!r}")
        if name == WEIGHTS and not weights:
            continue
        if name == CARD:  # for people: who hands the model on may change it or leave it out
            continue
        if not path.is_file():
            raise PretrainedError(f"{path}: missing; copy the whole folder again")
        if file_sha256(path) != expected:
            raise PretrainedError(f"{path}: damaged or changed (SHA-256 differs); copy it again")


def _sums(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 as the folder's list has them."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise PretrainedError(f"{folder / SUMS}: cannot be read: {error.strerror}") from error
    return {name: expected for expected, _, name in (line.partition("  ") for line in lines)}
