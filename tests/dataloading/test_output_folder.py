"""What `mlip prepare` may be given as --out: nobody's file is lost, and mistakes are found first.

Oracle: the bytes of everything that lay in the folder before.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlip.cli import main
from mlip.dataloading.datasets import folder
from mlip.dataloading.prepare.output_folder import (
    SETTINGS_FILE,
    OutputFolder,
    read_salt,
    sole_writer,
)
from mlip.dataloading.prepare.shard_build import OUTPUTS
from mlip.settings.config import ConfigError
from tests.raw_layouts import image, table

ASKED = {"dataset": "folder", "side_px": 64, "shard_images": 8}


def prepare(*arguments: object) -> int:
    return main(["prepare", *(str(argument) for argument in arguments)])


def own_data(root: Path) -> Path:
    for i in range(3):
        image(root / f"{i}.png", i)
    lines: list[list[object]] = [[f"{i}.png", f"p{i}", f"Text {i}."] for i in range(3)]
    table(root / "meta" / "manifest.csv", "image,patient_id,report", lines)
    return root


def contents(place: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}


def test_a_folder_of_other_files_is_refused_and_keeps_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its manifest, index, refused.csv and prepared.json were removed or replaced, all four."""
    root, out = own_data(tmp_path / "own"), tmp_path / "results"
    out.mkdir()
    for name in OUTPUTS:
        (out / name).write_text("of years")
    for changed in ([], ["--overwrite"], ["--part", "1/2"]):
        assert prepare("folder", "--root", root, "--out", out, *changed) == 2
        assert "holds other files, so nothing was written" in capsys.readouterr().err
    (out / SETTINGS_FILE).write_text('{"theme": "dark"}')  # of another program
    assert prepare("folder", "--root", root, "--out", out, "--overwrite") == 2
    assert set(contents(out).values()) == {b"of years", b'{"theme": "dark"}'}


def test_the_table_that_is_read_is_never_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = own_data(tmp_path / "own")
    manifest = root / "meta" / "manifest.csv"
    arguments = ["manifest", "--root", root, "--option", f"file={manifest}", "--workers", 1]
    before = contents(root)
    assert prepare(*arguments, "--out", root / "meta") == 2
    assert "--option file=" in capsys.readouterr().err
    for place in (manifest, root / "0.png"):
        assert prepare(*arguments, "--out", tmp_path / "out", "--id-map", place) == 2
        assert "written over what is read" in capsys.readouterr().err
    assert contents(root) == before
    # in a set of ours it would be replaced as well
    assert prepare(*arguments, "--out", tmp_path / "out") == 0
    shutil.copy(manifest, tmp_path / "out" / "new.csv")
    arguments[4] = f"file={tmp_path}/out/new.csv"
    assert prepare(*arguments, "--out", tmp_path / "out") == 2


def test_an_empty_path_is_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--out "$OUT" with OUT not set prepared into whatever folder the shell was in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for arguments in (["--root", own_data(tmp_path / "own"), "--out", ""], ["--check-phi", ""]):
        assert prepare("manifest", *arguments) == 2
        assert f"{arguments[-2]} is empty: expected" in capsys.readouterr().err
    assert not contents(tmp_path / "here")


def test_what_a_killed_run_leaves_is_no_other_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "lost+found").mkdir(parents=True)
    for name in (".lock", ".lock-12", ".salt", ".settings.json.host.7.part"):
        (out / name).touch()
    asked = OutputFolder(out, "out", ASKED)
    asked.check()
    with asked.held():
        assert json.loads((out / SETTINGS_FILE).read_text()) == ASKED


@pytest.mark.parametrize("content", [b'{"dataset": "fol\xff', b"[" * 100_000], ids=["cut", "deep"])
def test_a_damaged_settings_file_is_refused_with_a_remedy(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SETTINGS_FILE).write_bytes(content)
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"settings.json is damaged.* name another folder"):
            OutputFolder(tmp_path, "out", ASKED, overwrite=overwrite).check()


@pytest.mark.parametrize("mistake", ["a file", "not writable", "busy", "settings", "id map"])
def test_a_mistake_is_found_before_the_first_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    """All of these came up after every header had been read: hours of an archive."""
    root, out = own_data(tmp_path / "own"), tmp_path / "out"
    arguments: list[Any] = ["folder", "--root", root, "--out", out, "--workers", 1]
    if mistake == "a file":
        out.write_text("x")
    elif mistake == "not writable":
        arguments[4] = "/proc/no_folder"
    elif mistake == "id map":
        arguments += ["--id-map", tmp_path]
    else:
        assert prepare(*arguments) == 0
        arguments += ["--side", 32] if mistake == "settings" else []

    def read(*_: Any) -> None:
        raise AssertionError("the data were read")

    monkeypatch.setattr(folder, "_files", read)
    if mistake == "busy":
        with sole_writer(out, (0, 1)):
            assert prepare(*arguments) == 2
    else:
        assert prepare(*arguments) == 2


@pytest.mark.parametrize(
    "damaged",
    [b"\0" * 32, b"0123456789abcdef", b"\xff" * 32, b"of another program, 32 bytes it is"],
)
def test_a_damaged_salt_is_refused_and_the_ids_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damaged: bytes
) -> None:
    """A file of zeros, as a crash leaves, was taken for a secret, and all ids were made anew."""
    root, out = own_data(tmp_path / "own"), tmp_path / "out"
    arguments = ("folder", "--root", root, "--out", out, "--workers", 1)
    assert prepare(*arguments) == 0
    made, salt = (out / "manifest.parquet").read_bytes(), (out / ".salt").read_bytes()
    (out / ".salt").write_bytes(damaged)
    assert prepare(*arguments) == 2
    assert f"{out / '.salt'}: is not the salt that was written" in capsys.readouterr().err
    assert (out / "manifest.parquet").read_bytes() == made
    (out / ".salt").write_bytes(salt + b"\n")  # of an editor
    assert prepare(*arguments) == 0
    assert (out / "manifest.parquet").read_bytes() == made


def test_the_salt_is_on_the_disk_before_ids_are_made_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino) or real(fd))
    read_salt(tmp_path)
    assert synced == [(tmp_path / ".salt").stat().st_ino, tmp_path.stat().st_ino]
