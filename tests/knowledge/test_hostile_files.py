"""Ontology files of strangers: no line, and no file that unpacks, takes hours or gigabytes."""

from __future__ import annotations

import gzip
import time
from pathlib import Path

import pytest

from mlip.cli import main
from mlip.knowledge import ontologies
from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.concepts import LexiconError
from mlip.knowledge.ontologies import read_obo
from mlip.knowledge.umls import surface_form

HEAD = "format-version: 1.2\n\n[Term]\nid: XX:1\n"


@pytest.mark.parametrize("name", ["a" + " " * 300_000 + "b", "a {" + "=" * 300_000])
def test_a_line_takes_no_longer_than_its_length(tmp_path: Path, name: str) -> None:
    """The comment behind a value was looked for from each of its blanks on: hours a megabyte."""
    (tmp_path / "a.obo").write_text(f"{HEAD}name: {name}\n")
    begin = time.process_time()
    table = read_obo(tmp_path / "a.obo")
    assert surface_form("x" + " " * 300_000 + "y") == "x" + " " * 300_000 + "y"
    assert time.process_time() - begin < 3 and len(table) == 1


def test_what_stands_behind_a_name_is_still_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.obo").write_text(HEAD + 'name: chest  sign \t {source="x", a=b}  ! said\n')
    assert read_obo(tmp_path / "a.obo").concepts[0].name == "chest sign"


def test_a_line_or_file_that_unpacks_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.obo.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(f"{HEAD}name: ".encode())
        for _ in range(8):
            file.write(b"x" * (1 << 20))
    with pytest.raises(LexiconError, match=r"a\.obo\.gz, line 5: expected lines of at most"):
        read_obo(path)
    monkeypatch.setattr(ontologies, "_MAX_UNPACKED", 1 << 16)
    path.write_bytes(gzip.compress((HEAD + "name: x\n" + "! comment\n" * 10_000).encode()))
    with pytest.raises(LexiconError, match=r"line 6\d\d\d: expected lines"):
        read_obo(path)


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.jsonl", '{"id": ' + "[" * 100_000),
        ("a.yaml", "semantic_type: finding\nconcepts:\n  a:\n    name: 2026-13-45\n"),
        (
            "c.yaml",
            "semantic_type: finding\nconcepts:\n  a:\n    synonyms: '" + "[a|b]" * 40 + "'\n",
        ),
        ("b.yaml", "semantic_type: finding\nconcepts: !!map [a]\n"),
    ],
)
def test_what_a_parser_trips_over_is_an_error_of_the_file(
    tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(LexiconError, match=name):
        load_concepts(tmp_path / name)


def test_no_word_of_a_file_is_a_command_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Columns, ids and names stand in messages and tables: "\\x1b]0;" renamed the window."""
    hostile = "x\x1b]0;owned\x07\x1b[2J\x9b2J\u202e"
    for name, text in (
        ("a.obo", f"format-version: 1.2\n[Term]\nid: {hostile}\nid: {hostile}\n"),
        ("a.csv", f"id,name,definition,category\nedema,{hostile},{hostile},{hostile}\n"),
        ("b.csv", f"id,{hostile}\n"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        for action in (["show", "edema"], ["stats"]):
            main(["knowledge", *action, "--lexicon", str(tmp_path / name)])
    main(["embed", f"data.manifest={tmp_path / 'b.csv'}", "--out", str(tmp_path / "out")])
    said = "".join(capsys.readouterr())
    assert "\\x1b]0;owned" in said
    assert not set(said) & set("\x1b\x07\x9b\u202e")
