"""A file that comes to lie under --out while a command works on films is another's, and stays: what
the command made lies beside it then, under a free name that its line tells."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from mlip.cli import main
from mlip.model import MLIPModel
from mlip.transfer.films import outliers
from tests.small_run import small_export
from tests.transfer.small_manifest import pictures, write

PHRASE = ["--phrase", "There is edema.", "--in"]


def _let_appear(monkeypatch: pytest.MonkeyPatch, *files: Path) -> list[bool]:
    """Another's files come to lie there when the model encodes; whether one was there before."""
    seen: list[bool] = []

    def and_files_appear(work: Any) -> Any:
        def does(*args: Any) -> Any:
            for file in files:
                seen.append(file.exists())
                file.write_text("another's")
            return work(*args)

        return does

    for method in ("encode_image", "encode_text"):
        monkeypatch.setattr(MLIPModel, method, and_files_appear(getattr(MLIPModel, method)))
    return seen


def _without_file(said: str, out: Path) -> list[str]:
    """The lines that do not name the file, or say behind it what the maps are no use for."""
    return [
        line
        for line in said.splitlines()
        if not line.startswith(str(out)) and line != "Not for clinical use."
    ]


@pytest.mark.parametrize(
    ("option", "name", "command"),
    [
        ("--out", "map.png", ["ground", "{film}", "edema", "--checkpoint", "{model}"]),
        ("--out", "f.csv", ["classify", "{settings}", "--finding", "Edema"]),
        ("--fit", "r.safetensors", ["outliers", "{settings}"]),
        ("--out", "o.csv", ["outliers", "{settings}", "--reference", "{folder}/reference"]),
        ("--out", "s.csv", ["search", "{settings}", *PHRASE, "{folder}/archive"]),
        (
            "--page",
            "s.html",
            ["search", "{settings}", *PHRASE, "{folder}/archive", "--out", "{folder}/t.csv"],
        ),
    ],
)
def test_a_file_that_appears_during_the_work_stays_and_what_was_made_lies_beside_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    name: str,
    command: list[str],
) -> None:
    monkeypatch.setattr(outliers, "FEWEST", 4)
    settings = [*write(tmp_path), f"checkpoint={small_export()}"]
    if "{folder}/reference" in command:
        assert main(["outliers", *settings, "--fit", str(tmp_path / "reference")]) == 0
    if "{folder}/archive" in command:
        assert main(["embed", *settings, "--images", "--out", str(tmp_path / "archive")]) == 0
    places = {"film": pictures() / "5.png", "model": small_export(), "folder": tmp_path}
    given = [
        each
        for word in command
        for each in (settings if word == "{settings}" else [word.format(**places)])
    ]
    out = tmp_path / name
    capsys.readouterr()
    assert main([*given, option, str(out)]) == 0
    summary = _without_file(capsys.readouterr().out, out)
    made = out.read_bytes()
    out.unlink()
    beside = [out.with_name(f"{out.stem}-{n}{out.suffix}") for n in (2, 3)]
    beside[0].write_text("another's, too")
    seen = _let_appear(monkeypatch, out)
    capsys.readouterr()
    assert main([*given, option, str(out)]) == 2
    told, said = capsys.readouterr()
    # as otherwise, but that it lies there
    assert summary and _without_file(told, out) == summary and str(out) not in told
    assert f"{option} {out}: is there already" in said
    assert said.endswith(f"; what was made meanwhile is kept in {beside[1]}\n")
    assert not seen[0] and out.read_text() == "another's"
    assert beside[0].read_text() == "another's, too"
    assert beside[1].read_bytes() == made and beside[1].stat().st_mode & 0o777 == 0o600
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_search_keeps_its_table_and_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*write(tmp_path), f"checkpoint={small_export()}"]
    archive, out, page = (tmp_path / name for name in ("archive", "s.csv", "s.html"))
    assert main(["embed", *settings, "--images", "--out", str(archive)]) == 0
    _let_appear(monkeypatch, out, page)
    capsys.readouterr()
    given = [*PHRASE, str(archive), "--out", str(out), "--page", str(page)]
    assert main(["search", *settings, *given]) == 2
    answers, said = capsys.readouterr()
    assert "There is edema.: " in answers  # told all the same
    assert out.read_text() == page.read_text() == "another's"
    for name, begin in (("s-2.csv", "kind,query"), ("s-2.html", "<!doctype html>")):
        assert f"kept in {tmp_path / name}" in said
        assert (tmp_path / name).read_text().startswith(begin)


def test_a_page_that_cannot_be_written_does_not_hide_where_the_table_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both at once: another's file under --out, and a disk that is full when the page comes."""
    settings = [*write(tmp_path), f"checkpoint={small_export()}"]
    archive, out, page = (tmp_path / name for name in ("archive", "s.csv", "s.html"))
    assert main(["embed", *settings, "--images", "--out", str(archive)]) == 0
    _let_appear(monkeypatch, out)

    def fill(*given: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(page))

    monkeypatch.setattr("mlip.pages.search_page.write_page", fill)
    capsys.readouterr()
    given = [*PHRASE, str(archive), "--out", str(out), "--page", str(page)]
    assert main(["search", *settings, *given]) == 2
    said = capsys.readouterr().err
    assert f"kept in {tmp_path / 's-2.csv'}; {page} cannot be written: No space left" in said
    out.unlink()
    monkeypatch.undo()
    monkeypatch.setattr("mlip.pages.search_page.write_page", fill)
    assert main(["search", *settings, *given]) == 2
    assert f"mlip search: {page} cannot be written: No space" in capsys.readouterr().err
