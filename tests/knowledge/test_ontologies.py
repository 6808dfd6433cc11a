"""OBO, CSV and UMLS readers and the merging of their tables; bad lines are named."""

import argparse
import gzip
import tracemalloc
from pathlib import Path

import pytest

from mlip.commands.knowledge import add_arguments, run
from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.concepts import Concept, ConceptTable, LexiconError
from mlip.knowledge.linker import Linker
from mlip.knowledge.merging import cycles, merge, open_part
from mlip.knowledge.ontologies import read_csv, read_obo
from mlip.knowledge.umls import SEMANTIC_TYPES, read_umls, surface_form
from mlip.system.output_file import file_sha256

KNOWLEDGE = Path(__file__).resolve().parents[3] / "shared/data/knowledge"
OBO = """format-version: 1.2

[Term]
id: XX:1
name: chest sign
def: "A sign, called \\"so\\"." [me]
synonym: "thorax sign" EXACT []
synonym: "vague" BROAD []
xref: UMLS:C0000001

[Term]
id: XX:2
name: blue chest sign
is_a: XX:1 ! chest sign

[Term]
id: XX:3
name: old sign
is_obsolete: true

[Typedef]
id: part_of
name: part of
"""


def obo(tmp_path, text):
    path = tmp_path / "small.obo"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_obo_file_gives_terms_synonyms_definitions_and_parents(tmp_path):
    table = read_obo(obo(tmp_path, OBO))
    assert list(table.index) == ["xx:1", "xx:2"]
    first = table["xx:1"]
    assert (first.name, first.synonyms) == ("chest sign", ("thorax sign",))
    assert first.definition == 'A sign, called "so".'
    assert first.mappings == {"xx": ("XX:1",), "umls": ("C0000001",)}
    assert table["xx:2"].parents == ("xx:1",)
    assert table.provenance["sha256"]["small.obo"] == file_sha256(tmp_path / "small.obo")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: blue chest sign", "name blue chest sign", r"small\.obo, line 13"),
        ('def: "A sign', "def: A sign", "line 6: expected a text in double quotes"),
        ("id: XX:2", "id: XX:1", "line 12: id XX:1 occurs twice"),
        ("name: chest sign", "name: chest sign\nid: XX:1", "line 6: id XX:1 occurs twice"),
        ("name: chest sign", "comment: none", "XX:1 has no name"),
        ("format-version: 1.2", "", "not an OBO file"),
    ],
)
def test_a_malformed_obo_file_is_named_with_its_line(tmp_path, old, new, message):
    with pytest.raises(LexiconError, match=message):
        read_obo(obo(tmp_path, OBO.replace(old, new, 1)))


def test_a_cut_off_gzip_and_a_wrong_encoding_are_named(tmp_path):
    whole = gzip.compress(OBO.encode() * 50)
    (tmp_path / "cut.obo.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LexiconError, match=r"cut\.obo\.gz"):
        read_obo(tmp_path / "cut.obo.gz")
    (tmp_path / "latin.obo").write_bytes(OBO.replace("blue", "bl\xfc").encode("latin-1"))
    with pytest.raises(LexiconError, match=r"latin\.obo: not UTF-8"):
        read_obo(tmp_path / "latin.obo")


@pytest.mark.skipif(not KNOWLEDGE.exists(), reason="no ../shared/data/knowledge on this machine")
def test_the_disease_ontology_subset_merges_into_the_lexicon_by_its_codes():
    own = load_concepts(None)
    diseases = read_obo(KNOWLEDGE / "DO_RAD_slim.obo")
    assert len(diseases) >= 80
    both = merge(own, diseases)
    assert len(own) < len(both) < len(own) + len(diseases)
    assert cycles(both) == []
    assert list(both.index)[: len(own)] == list(own.index)
    assert sum("doid" in both[concept.id].mappings for concept in own) >= 4
    with pytest.raises(LexiconError, match="DOID:0"):
        read_obo(KNOWLEDGE / "DO_RAD_slim.obo", under=["DOID:0"])


@pytest.mark.skipif(not KNOWLEDGE.exists(), reason="no ../shared/data/knowledge on this machine")
def test_the_phenotype_ontology_below_one_term_agrees_with_our_codes():
    # HP:0002086 is the branch of the respiratory system
    phenotypes = read_obo(KNOWLEDGE / "hp_2025-01-16.obo.gz", under=["HP:0002086"])
    assert 300 < len(phenotypes) < 3000
    theirs = {c.mappings["hpo"][0]: c for c in phenotypes}
    own = load_concepts(None)
    checked = 0
    for concept in own:
        for code in concept.mappings.get("hpo", ()):
            match = theirs.get(code)
            if match and "umls" in match.mappings and "umls" in concept.mappings:
                assert set(match.mappings["umls"]) & set(concept.mappings["umls"]), concept.id
                checked += 1
    assert checked >= 12


def test_a_csv_table_is_read_and_a_bad_line_is_named(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text(
        "id,name,synonyms,parents,umls\n a,sign,mark|spot,,C0000007\nb ,blue sign,,a,\n"
    )
    table = load_concepts(path)
    assert table["a"].synonyms == ("mark", "spot") and table["b"].parents == ("a",)
    assert table["a"].mappings == {"umls": ("C0000007",)}
    for text, message in (
        ("id,name\na,b,c\n", "line 2: expected 2 cells"),
        ("id,name\na\n", "line 2: expected 2 cells"),
        ("id,title\na,b\n", "line 1: expected the columns id and name"),
        ("id,synonyms\na,b\n", "line 1: expected the columns id and name"),
        ("id,name,title\na,b,c\n", "line 1: expected the columns id and name"),
        ("id,name\na,\n", "line 2: id or name is empty"),
        ("id,name\na,b\na,c\n", "line 3: id 'a' occurs twice .first in line 2"),
        ('id,name\na,"b\n', "not valid CSV"),
    ):
        path.write_text(text)
        with pytest.raises(LexiconError, match=message):
            read_csv(path)


def rrf(columns, **cells):
    """One RRF line: column number -> text, the rest empty."""
    row = [""] * columns
    for key, value in cells.items():
        row[int(key[1:])] = value
    return "|".join(row) + "|\n"


def conso(cui, text, lat="ENG", ts="P", stt="PF", pref="Y", sab="SNOMEDCT_US", suppress="N"):
    return rrf(18, c0=cui, c1=lat, c2=ts, c4=stt, c6=pref, c11=sab, c14=text, c16=suppress)


@pytest.fixture
def release(tmp_path):
    """A made-up release of five concepts; no UMLS text is in it."""
    folder = tmp_path / "META"
    folder.mkdir()
    (folder / "MRCONSO.RRF").write_text(
        conso("C0032227", "Pleural zebra (disorder)")
        + conso("C0032227", "Zebra of pleura", ts="S", pref="N")
        + conso("C0032227", "Derrame", lat="SPA")
        + conso("C0000010", "Blue lung sign")
        + conso("C0000010", "Secret blue", sab="MEDCIN")
        + conso("C0000010", "Withdrawn sign", suppress="O")
        + conso("C0000011", "Very blue lung sign")
        + conso("C0000012", "Aspirin tablet")
        + conso("C0000013", "Green lobe")
    )
    (folder / "MRSTY.RRF").write_text(
        rrf(6, c0="C0032227", c1="T047", c3="x")
        + rrf(6, c0="C0000010", c1="T033")
        + rrf(6, c0="C0000011", c1="T033")
        + rrf(6, c0="C0000012", c1="T121")
        + rrf(6, c0="C0000013", c1="T023")
    )
    (folder / "MRDEF.RRF").write_text(
        rrf(8, c0="C0000010", c5="A made-up  sign.", c6="N")
        + rrf(8, c0="C0000012", c5="Not kept.", c6="N")
    )
    (folder / "MRREL.RRF").write_text(
        rrf(16, c0="C0000010", c3="CHD", c4="C0000011", c7="isa")
        + rrf(16, c0="C0000010", c3="PAR", c4="C0000011", c7="inverse_isa")
        + rrf(16, c0="C0000013", c3="RO", c4="C0000010", c7="has_finding_site")
        + rrf(16, c0="C0000012", c3="RO", c4="C0000010", c7="isa")
    )
    return folder


def test_umls_files_are_filtered_and_joined(release):
    seen = []
    table = read_umls(release, sources=["SNOMEDCT_US"], progress=lambda *a: seen.append(a))
    assert set(table.index) == {
        "umls:c0032227",
        "umls:c0000010",
        "umls:c0000011",
        "umls:c0000013",
    }
    assert table["umls:c0032227"].name == "Pleural zebra"
    assert table["umls:c0032227"].synonyms == ("Zebra of pleura",)
    sign = table["umls:c0000010"]
    assert sign.synonyms == () and sign.definition == "A made-up sign."
    assert sign.relations == (("located_in", "umls:c0000013"),)
    assert (sign.semantic_type, sign.category) == SEMANTIC_TYPES["T033"]
    assert table["umls:c0000013"].semantic_type == "anatomy"
    # the two isa lines point in both directions: one edge of the circle is dropped and counted
    assert cycles(table) == [] and table.provenance["is_a_edges_dropped"] == 1
    assert table.provenance["licensed"] is True
    assert set(table.provenance["sha256"]) == {
        "MRCONSO.RRF",
        "MRSTY.RRF",
        "MRDEF.RRF",
        "MRREL.RRF",
    }
    assert {name for name, _, _ in seen} == set(table.provenance["sha256"])


def test_the_trees_of_vocabularies_are_is_a_and_what_they_call_otherwise_is_not(release):
    """MeSH's and ICD's PAR and CHD rows name no relation (RELA): their concepts had no parent."""
    rows = [
        ("C0032227", "CHD", "C0000011", ""),  # the second concept is the child of the first
        ("C0000010", "PAR", "C0032227", ""),  # the second is the parent
        ("C0032227", "CHD", "C0000013", "part_of"),
        ("C0000013", "RB", "C0032227", ""),
        ("C0000013", "RO", "C0000010", ""),
    ]
    (release / "MRREL.RRF").write_text(
        "".join(rrf(16, c0=a, c3=rel, c4=b, c7=name, c10="MSH") for a, rel, b, name in rows)
    )
    table = read_umls(release)
    assert table["umls:c0000011"].parents == ("umls:c0032227",)
    assert table["umls:c0000010"].parents == ("umls:c0032227",)
    assert table["umls:c0000013"].parents == () and table["umls:c0032227"].parents == ()


def test_a_retired_cui_is_a_code_of_what_it_became(release, capsys):
    """A table of one's own with last year's codes was joined with nothing, without a word."""
    lines = [
        ("C0000910", "SY", "C0000010"),
        ("C0000911", "DEL", ""),
        ("C0000912", "SY", "C0000010"),
        ("C0000912", "SY", "C0000011"),  # split in two
        ("C0000913", "RB", "C0000011"),
        ("C0000914", "SY", "C0000012"),  # of a type that is not read
    ]
    (release / "MRCUI.RRF").write_text(
        "".join(rrf(7, c0=old, c1="2019AA", c2=kind, c5=new) for old, kind, new in lines)
    )
    table = read_umls(release)
    assert table["umls:c0000010"].mappings == {"umls": ("C0000010", "C0000910")}
    assert table["umls:c0000011"].mappings == {"umls": ("C0000011",)}
    assert table.provenance["retired_cuis"] == 1 and "MRCUI.RRF" in table.provenance["sha256"]
    own = release / "own.csv"
    own.write_text("id,name,umls\na,azure sign,C0000910\nb,gone sign,C0000911\n")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    out = release / "table.jsonl"
    words = ["build", "--no-lexicon", "--csv", str(own), "--umls", str(release), "--out", str(out)]
    assert run(parser.parse_args(words)) == 0
    assert "1 of 2 UMLS codes of the others are of no concept" in capsys.readouterr().out
    both = load_concepts(out)
    assert "umls:c0000010" not in both and "Blue lung sign" in both["a"].synonyms
    with (release / "MRCUI.RRF").open("a") as stream:
        stream.write(rrf(7, c0="C0000915", c2="SY", c5="none"))
    with pytest.raises(LexiconError, match=r"MRCUI\.RRF, line 7: .*sixth column"):
        read_umls(release)


def test_rows_of_a_concept_that_stand_apart_are_brought_together(release):
    with (release / "MRCONSO.RRF").open("a") as stream:
        stream.write(conso("C0000010", "Sky lung sign", ts="S", pref="N"))
        stream.write(conso("C0000010", "blue LUNG sign", ts="S", pref="N"))
    sign = read_umls(release, sources=["SNOMEDCT_US"])["umls:c0000010"]
    assert (sign.name, sign.synonyms) == ("Blue lung sign", ("Sky lung sign",))


def test_rows_that_no_filter_lets_through_cost_no_memory(release):
    def peak() -> int:
        tracemalloc.start()
        read_umls(release)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak()
    before = peak()
    with (release / "MRCONSO.RRF").open("a") as stream:
        stream.writelines(conso(f"C{i:07d}", f"other word {i}") for i in range(100, 8100))
    with (release / "MRREL.RRF").open("a") as stream:
        stream.writelines(
            rrf(16, c0="C0000010", c4=f"C{i:07d}", c7="isa") for i in range(100, 8100)
        )
    assert (release / "MRCONSO.RRF").stat().st_size > 400_000
    assert peak() < before + 100_000


def test_the_command_builds_a_licensed_table_with_filters_and_provenance(release, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    out = release / "table.jsonl"
    words = ["build", "--umls", str(release), "--types", "T033", "T023", "--out", str(out)]
    assert run(parser.parse_args(words)) == 0
    assert "under your licence" in capsys.readouterr().out
    table = load_concepts(out)
    assert "umls:c0000010" in table and "umls:c0032227" not in table
    part = table.provenance["parts"][1]
    assert part["sha256"]["MRCONSO.RRF"] == file_sha256(release / "MRCONSO.RRF")
    assert part["filters"]["semantic_types"] == ["T023", "T033"]
    assert table["umls:c0000010"].mappings == {"umls": ("C0000010",)}
    assert not list(release.glob(".table*"))


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("MRCONSO.RRF", "C0000010|ENG|P|\n", r"MRCONSO\.RRF, line 10: expected 18 columns"),
        ("MRSTY.RRF", rrf(6, c0="X1", c1="T033"), r"MRSTY\.RRF, line 6: .*CUI"),
        ("MRREL.RRF", "\n", r"MRREL\.RRF, line 5"),
    ],
)
def test_a_malformed_rrf_line_is_named(release, file, line, message):
    with (release / file).open("a") as stream:
        stream.write(line)
    with pytest.raises(LexiconError, match=message):
        read_umls(release)


def test_missing_rrf_files_wrong_encoding_and_unknown_types_are_named(release):
    with pytest.raises(LexiconError, match="T999"):
        read_umls(release, semantic_types=["T999"])
    with (release / "MRDEF.RRF").open("ab") as stream:
        stream.write(b"\xff\xfe|\n")
    with pytest.raises(LexiconError, match=r"MRDEF\.RRF: not UTF-8"):
        read_umls(release)
    (release / "MRSTY.RRF").unlink()
    with pytest.raises(LexiconError, match=r"MRSTY\.RRF: missing"):
        read_umls(release)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("Pleural effusion (disorder)", "Pleural effusion"),
        ("Pneumonia, NOS", "Pneumonia"),
        ("X", None),
        ("Structure of 12345 thing", None),
        ("a b c d e f g h i j", None),
        ("[V]Problem", None),
        ("\u00d6dem", None),
    ],
)
def test_only_names_that_a_report_could_hold_are_kept(name, form):
    assert surface_form(name) == form


def test_merging_joins_by_code_keeps_our_names_and_links_the_new_ones(release):
    own = load_concepts(None)
    both = merge(own, read_umls(release))
    assert both["pleural_effusion"].name == "pleural effusion"
    assert "Pleural zebra" in both["pleural_effusion"].synonyms
    assert "umls:c0032227" not in both and "umls:c0000010" in both
    found = {
        (m.concept_id, m.state) for m in Linker(both).link("No pleural zebra. Blue lung sign.")
    }
    assert {("pleural_effusion", "absent"), ("umls:c0000010", "present")} <= found
    assert both.provenance["licensed"] is True


def test_licensed_text_can_be_taken_out_again_without_trace(release):
    own = load_concepts(None)
    both = merge(own, read_umls(release))
    left = open_part(both)
    text = repr(left.concepts).lower()
    assert "zebra" not in text and "blue" not in text and "made-up" not in text
    assert list(left.index) == list(own.index)
    assert [c.surface_forms for c in left] == [c.surface_forms for c in own]


def test_a_joined_concept_gets_a_definition_only_where_it_has_none():
    for own, wanted in (("", "theirs"), ("ours", "ours")):
        codes = {"hpo": ("HP:1",)}
        base = ConceptTable([Concept(id="a", name="sign", definition=own, mappings=codes)])
        other = ConceptTable([Concept(id="b", name="mark", definition="theirs", mappings=codes)])
        assert merge(base, other)["a"].definition == wanted


def test_a_form_that_the_first_table_owns_is_taken_from_no_other_concept():
    base = ConceptTable([Concept(id="a", name="sign")])
    other = ConceptTable([Concept(id="b", name="mark", synonyms=("Sign", "dot"))])
    assert merge(base, other)["b"].synonyms == ("dot",)


def test_a_circle_of_is_a_is_found_edge_by_edge():
    table = ConceptTable(
        [
            Concept(id="a", name="a1", parents=("b",)),
            Concept(id="b", name="b1", parents=("c",)),
            Concept(id="c", name="c1", parents=("a", "d")),
            Concept(id="d", name="d1"),
        ]
    )
    assert cycles(table) == [("c", "a")]
