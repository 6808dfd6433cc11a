"""A file that comes to lie under --out while a command works on films is another's, and stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlip.cli import main
from mlip.model import MLIPModel
from mlip.transfer.films import outliers
from tests.small_run import small_export
from tests.transfer.small_manifest import pictures, write

PHRASE = ["--phrase", "There is edema.", "--in"]


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
def test_a_file_that_appears_during_the_work_is_not_replaced(
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
    out, seen = tmp_path / name, []

    def and_a_file_appears(work: Any) -> Any:
        def does(*args: Any) -> Any:
            seen.append(out.exists())
            out.write_text("another's")
            return work(*args)

        return does

    for method in ("encode_image", "encode_text"):
        monkeypatch.setattr(MLIPModel, method, and_a_file_appears(getattr(MLIPModel, method)))
    capsys.readouterr()
    assert main([*given, option, str(out)]) == 2
    assert f"{option} {out}: is there already" in capsys.readouterr().err
    assert not seen[0] and out.read_text() == "another's"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
