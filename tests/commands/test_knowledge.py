"""The knowledge command: what a user types and what comes back."""

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save

from mlip.commands.knowledge import _deepest, add_arguments, colour_view, run
from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.concepts import Concept, ConceptTable
from mlip.knowledge.linker import link
from mlip.knowledge.ontologies import read_csv


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(words))


def test_show_finds_a_concept_by_id_name_or_synonym(capsys):
    for words in ("pleural_effusion", "Pleural Effusion", "effusion"):
        assert call("show", words) == 0
        out = capsys.readouterr().out
        assert "pleural_effusion" in out and "HP:0002202" in out and "hydropneumothorax" in out


def test_what_takes_seconds_to_import_is_not_waited_for_where_it_is_not_used(tmp_path):
    """Three seconds of processor time and 390 MiB for a line of help."""
    code = (
        "import sys\n"
        "for name in ('torch', 'numba', 'sklearn', 'scipy', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "from mlip.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    report, table = tmp_path / "report.txt", tmp_path / "table.jsonl"
    report.write_text("No effusion.")
    rows = tmp_path / "rows.csv"
    rows.write_text("id,name\nown,okapi sign\n")
    for words in (("link", report, "--json"), ("build", "--csv", rows, "--out", table)):
        done = subprocess.run(
            [sys.executable, "-c", code, "knowledge", *map(str, words)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    assert "okapi sign" in table.read_text()


def test_a_table_replaces_a_table_and_no_other_file(tmp_path, capsys):
    """A manifest is a .jsonl too, and weights of a model are a .safetensors."""
    (tmp_path / "rows.csv").write_text("id,name\nown,okapi sign\n")
    build = ("build", "--csv", str(tmp_path / "rows.csv"), "--no-lexicon", "--out")
    row, weights = b'{"image": "a.png"}\n', save({"fc.weight": np.zeros((2, 3))}, {"format": "pt"})
    embed = ("embed", "--out")
    for kind, command, held in (("jsonl", build, row), ("safetensors", embed, weights)):
        path = tmp_path / f"own.{kind}"
        path.write_bytes(held)
        assert call(*command, str(path)) == 2
        assert "is there already and is no" in capsys.readouterr().err
        assert path.read_bytes() == held
    for _ in range(2):
        assert call(*build, str(tmp_path / "table.jsonl")) == 0
    assert "okapi sign" in (tmp_path / "table.jsonl").read_text()


def test_show_of_an_unknown_concept_names_near_ones(capsys):
    assert call("show", "plural_effusion") == 2
    assert "pleural_effusion" in capsys.readouterr().err


def test_link_prints_each_mention_with_its_state(tmp_path, capsys):
    path = tmp_path / "report.txt"
    path.write_text("No effusion. Possible nodule.")
    assert call("link", str(path)) == 0
    out = capsys.readouterr().out
    assert "absent     pleural_effusion" in out and "uncertain  lung_nodule" in out
    assert "other languages" not in out


def linked(text: str, monkeypatch, capsys) -> list[dict]:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert call("link", "-", "--json") == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_link_as_json_gives_spans_and_their_words(monkeypatch, capsys):
    text = "No effusion. Heart is enlarged."
    rows = linked(text, monkeypatch, capsys)
    words = [row.pop("words") for row in rows]
    assert [tuple(row.values()) for row in rows] == [tuple(m) for m in link(text)]
    assert words == [text[m.start : m.end] for m in link(text)]


@pytest.mark.parametrize(
    ("text", "states"),
    [
        ("[x] Edema [ ] Mass", {"edema": "present", "mass": "absent"}),
        ("1) No edema 2) Mass", {"edema": "absent", "mass": "present"}),
        ("<p>No edema</p><p>Mass</p>", {"edema": "absent", "mass": "present"}),
        ("No edema\\X0A\\Mass", {"edema": "absent", "mass": "present"}),
    ],
)
def test_link_reads_a_report_as_training_does(text, states, monkeypatch, capsys):
    """Forms, lists and markup are read before concepts are linked: the other way was inverted."""
    rows = linked(text, monkeypatch, capsys)
    assert {row["words"].lower(): row["state"] for row in rows} == states


def test_link_does_not_read_rtf(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(r"{\rtf1 No edema.\par}"))
    assert call("link", "-") == 2
    assert "RTF is not read: export plain text" in capsys.readouterr().err


def test_link_says_so_where_few_words_are_known(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Kein Pleuraerguss, Herz nicht vergroessert."))
    assert call("link", "-") == 0
    assert "other languages are not guessed" in capsys.readouterr().out


def test_the_colour_view_styles_each_state_and_keeps_the_text():
    text = "No effusion. Possible nodule. Mass [/bold] here."
    view = colour_view(text, link(text))
    assert view.plain == text
    file = io.StringIO()
    Console(file=file, force_terminal=True, color_system="standard", width=200).print(view)
    printed = file.getvalue()
    assert "\x1b[31meffusion\x1b[0m" in printed and "\x1b[33mnodule\x1b[0m" in printed


def test_stats_counts_concepts_relations_and_codes(capsys):
    assert call("stats") == 0
    out = capsys.readouterr().out
    table = load_concepts(None)
    assert f"concepts {len(table)}" in out and table.fingerprint in out
    assert "located_in" in out and "mean |cosine|" in out


def test_the_deepest_way_up_is_found_without_the_ancestors_of_each(monkeypatch):
    table = load_concepts(None)
    depth = {c.id: 0 for c in table if not c.parents}
    for concept in sorted(table, key=lambda c: len(table.ancestors(c.id))):
        ways = [depth[parent] for parent in concept.parents]
        depth.setdefault(concept.id, 1 + max(ways, default=0))
    monkeypatch.setattr(ConceptTable, "ancestors", None)
    assert _deepest(table) == max(depth.values()) > 1
    # two ways up, one of them longer; a parent that the table has not; a circle
    above = {"a": (), "b": ("a",), "c": ("b",), "d": ("a", "c"), "e": ("gone",), "f": ("f",)}
    made = ConceptTable(Concept(id=i, name=i, parents=parents) for i, parents in above.items())
    assert _deepest(made) == 3
    assert _deepest(ConceptTable(made.concepts[4:])) == 1


def test_build_merges_a_table_that_can_be_used_as_a_lexicon(tmp_path, capsys):
    own = tmp_path / "own.csv"
    own.write_text("id,name,umls\nmysign,purple sign,\nfluid,zebra fluid,C0032227\n")
    out = tmp_path / "table.jsonl"
    assert call("build", "--csv", str(own), "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert "fingerprint" in printed
    assert "  lexicon: 296 concepts\n" in printed
    assert "csv: 2 concepts, 1 joined to earlier ones by a code or an id: fluid" in printed
    table = load_concepts(out)
    assert "mysign" in table and "zebra fluid" in table["pleural_effusion"].synonyms
    assert call("show", "purple sign", "--lexicon", str(out)) == 0
    assert call("build", "--csv", str(own), "--out", str(out), "--no-lexicon") == 0
    assert len(load_concepts(out)) == 2


def test_a_file_that_appears_while_a_table_is_built_stays(tmp_path, capsys, monkeypatch):
    own, out = tmp_path / "own.csv", tmp_path / "table.jsonl"
    own.write_text("id,name,umls\nmysign,purple sign,\n")

    def and_a_file_appears(path):
        out.write_text("another's")
        return read_csv(path)

    monkeypatch.setattr("mlip.commands.knowledge_build.read_csv", and_a_file_appears)
    assert call("build", "--csv", str(own), "--out", str(out)) == 2
    told, said = capsys.readouterr()
    assert "  csv: 1 concepts\n" in told and str(out) not in told  # counts as otherwise
    assert said.endswith(f"kept in {tmp_path / 'table-2.jsonl'}\n")
    assert out.read_text() == "another's" and "mysign" in load_concepts(tmp_path / "table-2.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("build", "--out", "x.csv"), "ends in .jsonl"),
        (("build", "--no-lexicon", "--out", "x.jsonl"), "nothing to build"),
        (("build", "--umls", "nowhere", "--out", "x.jsonl"), "MRCONSO.RRF: missing"),
        (("link", "nowhere.txt"), "nowhere.txt: cannot be read"),
        (("stats", "--lexicon", "nowhere.yaml"), "nowhere.yaml: does not exist"),
    ],
)
def test_bad_input_is_named_and_gives_exit_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*words) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_build_makes_the_folder_after_its_work_and_refuses_what_would_do_nothing(tmp_path, capsys):
    csv, out = tmp_path / "own.csv", tmp_path / "new" / "own.jsonl"
    csv.write_text("id,name\na,zebra sign\n")
    assert call("build", "--csv", str(csv), "--out", str(out)) == 0
    assert load_concepts(out)["a"].name == "zebra sign"
    csv.write_text("id,name\n")
    for words, message in (
        (("--csv", str(csv)), "csv: no concept was found"),
        (("--under", "HP:1"), "--under filters what --obo reads"),
        (("--sources", "MSH"), "--sources filters what --umls reads"),
        (("--types", "T047"), "--types filters what --umls reads"),
        (("--languages", "GER"), "--languages filters what --umls reads"),
    ):
        capsys.readouterr()
        assert call("build", *words, "--out", str(out)) == 2
        assert message in capsys.readouterr().err
    assert call("stats", "--lexicon", str(csv)) == 2
    assert "holds no concept" in capsys.readouterr().err


def test_build_tells_of_is_a_that_it_left_out(tmp_path, capsys):
    own = tmp_path / "own.csv"
    rows = ["id,name,parents", "a,okapi sign,b|pleural_efusion", "b,gnu sign,a|pleural_effusion"]
    own.write_text("\n".join(rows) + "\n")
    assert call("build", "--csv", str(own), "--out", str(tmp_path / "table.jsonl")) == 0
    line = " ".join(capsys.readouterr().out.split())
    assert "1 is-a that close a circle left out" in line
    assert line.endswith(f"parents that are no id left out: pleural_efusion {tmp_path}/table.jsonl")
    own.write_text("id,name,parents\na,okapi sign,t|u|v|w|x|y|z")
    assert call("build", "--csv", str(own), "--out", str(tmp_path / "table.jsonl")) == 0
    assert "left out: t, u, v, w, x and 2 more" in " ".join(capsys.readouterr().out.split())


def test_link_says_where_a_report_is_cut(tmp_path, capsys):
    path = tmp_path / "report.txt"
    path.write_text("No effusion or nodule. " * 1_000)
    assert call("link", str(path)) == 0
    assert "cut at 20,000 of 23,000 characters" in capsys.readouterr().out
    assert call("link", str(path), "--json") == 0
    printed = capsys.readouterr()
    assert "cut at 20,000 of 23,000 characters" in printed.err and "cut at" not in printed.out
    path.write_text("No effusion or nodule. " * 800)
    assert call("link", str(path)) == 0
    assert "cut at" not in capsys.readouterr().out


@pytest.mark.parametrize("row", ['{"id": "a", "name": 5}', '{"name": "b"}'])
def test_a_built_table_with_something_else_than_texts_is_named(tmp_path, capsys, row):
    table = tmp_path / "own.jsonl"
    table.write_text('{"id": "b", "name": "sign"}\n' + row)
    assert call("stats", "--lexicon", str(table)) == 2
    assert "own.jsonl, line 2: expected one concept" in capsys.readouterr().err
