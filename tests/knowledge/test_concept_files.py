"""Concept files as they come: byte order marks, typographic signs, comments, damage, and joining.

Oracle: the same content written plainly, or the sentence of the format's manual that a test names.
"""

import gzip

import pytest
import torch

from mlip.dataloading.reports.text import clean_report
from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.concepts import Concept, ConceptTable, LexiconError
from mlip.knowledge.linker import Linker
from mlip.knowledge.merging import cycles, merge, open_part
from mlip.knowledge.ontologies import read_csv, read_obo
from mlip.knowledge.umls import read_umls
from mlip.knowledge.vectors import knowledge_vectors
from mlip.settings.config import Knowledge

OBO = "format-version: 1.2\n\n[Term]\nid: XX:1\nname: chest sign\n"
MARK = b"\xef\xbb\xbf"


def write(path, text: str, before: bytes = b""):
    path.write_bytes(before + text.encode())
    return path


def test_a_byte_order_mark_and_windows_lines_change_nothing(tmp_path):
    csv = "id,name,synonyms\na,sign,mark\n"
    for name, text in (("own.csv", csv), ("own.obo", OBO)):
        plain = load_concepts(write(tmp_path / name, text))
        marked = write(tmp_path / name, text.replace("\n", "\r\n"), MARK)
        assert load_concepts(marked).concepts == plain.concepts


def test_a_term_typed_in_a_word_processor_finds_the_report_that_was_cleaned(tmp_path):
    path = write(tmp_path / "own.csv", "id,name\na,Hampton\u2019s hump\nb,tree\u2013in\u2013bud\n")
    linker = Linker(read_csv(path))
    report = clean_report("A Hampton\u2019s hump. Tree\u2010in\u2010bud pattern.")
    assert [mention.concept_id for mention in linker.link(report)] == ["a", "b"]
    (tmp_path / "own.yaml").write_text("concepts: {hump: {name: Hampton\u2019s hump}}", "utf-8")
    assert Linker(load_concepts(tmp_path / "own.yaml")).link(report)
    with pytest.raises(LexiconError, match="only letters, digits and ASCII signs"):
        Linker(ConceptTable([Concept(id="a", name="x \u00b1 5")]))


def test_a_damaged_gzip_file_is_named_wherever_it_is_damaged(tmp_path):
    terms = "".join(f"\n[Term]\nid: XX:{i}\nname: n{i * i * 7919}\n" for i in range(10, 500))
    whole = gzip.compress((OBO + terms).encode())
    path = tmp_path / "own.obo.gz"
    for place in range(10, len(whole), 23):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(LexiconError, match=r"own\.obo\.gz"):
            read_obo(path)


def test_comments_qualifiers_and_escapes_of_obo_are_no_part_of_a_value(tmp_path):
    # OBO Flat File Format 1.4: "! comment" ends a value, {a="b"} qualifies it, \n is a line break
    more = (
        "\n[Term]\nid: XX:2 ! two\nname: blue\\, sign ! a comment\n"
        'def: "joints, \\nsecond \\"so\\"" [me]\nis_a: XX:1 {source="me"} ! chest sign\n'
        "\n[Term]\nid: XX:3\nname: old\nis_obsolete: true ! gone\n"
        '\n[Term]\nid: XX:4\nname: older\nis_obsolete: true {by="me"}\n'
    )
    table = read_obo(write(tmp_path / "own.obo", OBO + more))
    assert list(table.index) == ["xx:1", "xx:2"]
    second = table["xx:2"]
    assert (second.name, second.parents) == ("blue, sign", ("xx:1",))
    assert second.definition == 'joints, second "so"' and second.mappings == {"xx": ("XX:2",)}
    for lost in (OBO + "\n[Term]\nname: lost\n", OBO.replace("id: XX:1\n", "") + "\n[Typedef]\n"):
        with pytest.raises(LexiconError, match=r"line (3|7): a \[Term\] without an id"):
            read_obo(write(tmp_path / "own.obo", lost))


def test_circles_are_cut_and_counted_in_a_file_read_alone(tmp_path):
    text = OBO + "is_a: XX:2\n\n[Term]\nid: XX:2\nname: two\nis_a: XX:1\n"
    for path in (
        write(tmp_path / "own.obo", text),
        write(tmp_path / "own.csv", "id,name,parents\na,one,b\nb,two,a\n"),
    ):
        table = load_concepts(path)
        assert cycles(table) == [] and table.provenance["is_a_edges_dropped"] == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("apart: 5", "a list of terms for apart"),
        ("maps: [a]", "a mapping for maps"),
        ("maps: 0", "a mapping for maps"),
        # YAML's no and 1 are no text: sorting them beside text ended in a traceback
        ("maps: {1: A, hpo: B}", "maps must be text .*quote numbers"),
        ("{no: one, nam: two}", "unknown key False"),
        ("name: no", "name must be text .*quote numbers, yes, no"),
        ("name: [one, two]", "expected one text for name, got 2"),
        ("definition: [1]", "definition must be text"),
    ],
)
def test_a_yaml_concept_of_another_shape_is_named(tmp_path, lines, message):
    path = write(tmp_path / "own.yaml", f"concepts:\n  hump:\n    {lines}\n")
    with pytest.raises(LexiconError, match=rf"own\.yaml, concept hump: .*{message}"):
        load_concepts(path)


@pytest.mark.parametrize(
    "line",
    [
        '{"provenance": 3}',
        '{"id": "a", "name": "b", "mappings": {"radlex": [12]}}',
        '{"id": "a", "name": "b", "relations": [["suggests", 3]]}',
        '{"id": "a", "name": "b", "apart": [["one", "two"]]}',
        '{"id": "a", "name": "b", "apart": [[[1], ["two"]]]}',
    ],
)
def test_a_line_of_a_table_whose_deeper_values_are_no_texts_is_named(tmp_path, line):
    """It was read, and ended in a traceback where the concept was shown or linked."""
    path = write(tmp_path / "own.jsonl", '{"id": "x", "name": "y"}\n' + line + "\n")
    with pytest.raises(LexiconError, match=r"own\.jsonl, line 2: expected one concept"):
        load_concepts(path)


def test_a_key_left_empty_in_yaml_is_as_one_left_out(tmp_path):
    empty = "concepts:\n  hump: {definition: , category: , apart: , maps: , name: []}\ncategory:\n"
    concept = load_concepts(write(tmp_path / "own.yaml", empty))["hump"]
    assert concept == Concept(id="hump", name="hump", category="own")


def row(columns: int, **cells: str) -> str:
    values = [""] * columns
    for key, value in cells.items():
        values[int(key[1:])] = value
    return "|".join(values) + "|\n"


@pytest.fixture
def release(tmp_path):
    """Three made-up concepts; a Spanish vocabulary defines the second one."""
    names = [("C0000001", "ENG", "A"), ("C0000002", "ENG", "A"), ("C0000003", "ENG", "A")]
    names += [("C0000001", "SPA", "ES"), ("C0000002", "SPA", "ES")]
    conso = [
        row(18, c0=c, c1=lang, c11=sab, c14=f"word {c[-1]}", c16="N") for c, lang, sab in names
    ]
    (tmp_path / "MRCONSO.RRF").write_text("".join(conso))
    (tmp_path / "MRSTY.RRF").write_text("".join(row(6, c0=n[0], c1="T033") for n in names[:3]))
    (tmp_path / "MRDEF.RRF").write_text(
        row(8, c0="C0000001", c4="ES", c5="Una palabra.", c6="N")
        + row(8, c0="C0000001", c4="A", c5="A word.", c6="N")
        + row(8, c0="C0000002", c4="ES", c5="Otra palabra.", c6="N")
        + row(8, c0="C0000003", c4="NEVER SEEN", c5="Another word.", c6="N")
    )
    (tmp_path / "MRREL.RRF").write_text(
        row(16, c0="C0000001", c4="C0000002", c7="isa", c14="N")
        + row(16, c0="C0000001", c4="C0000003", c7="isa", c14="O")
        + row(16, c0="C0000003", c4="C0000002", c7="has_finding_site", c14="Y")
    )
    return tmp_path


def test_definitions_of_another_language_and_suppressed_relations_are_left_out(release):
    table = read_umls(release)
    assert [concept.definition for concept in table] == ["A word.", "", "Another word."]
    assert [concept.parents for concept in table] == [(), ("umls:c0000001",), ()]
    assert not any(concept.relations for concept in table)
    both = read_umls(release, languages=["ENG", "SPA"])
    assert [c.definition for c in both] == ["Una palabra.", "Otra palabra.", "Another word."]


def test_a_relation_to_no_concept_is_named_by_its_line_without_its_text(release):
    with (release / "MRREL.RRF").open("a") as stream:
        stream.write(row(16, c0="C0000001", c4="secret", c7="isa"))
    with pytest.raises(LexiconError, match=r"MRREL\.RRF, line 4: expected a CUI") as caught:
        read_umls(release)
    assert "secret" not in str(caught.value)


def test_codes_join_concepts_of_later_tables_too():
    base = ConceptTable([Concept(id="a", name="sign", mappings={"hpo": ("HP:1",)})])
    middle = ConceptTable(
        [
            Concept(id="hp:1", name="mark", mappings={"hpo": ("HP:1",), "umls": ("C0000001",)}),
            Concept(id="hp:2", name="dot", mappings={"hpo": ("HP:2",), "umls": ("C0000002",)}),
        ]
    )
    last = ConceptTable(
        [
            Concept(id="u1", name="blot", mappings={"umls": ("C0000001",)}, source="umls"),
            Concept(id="u2", name="spot", mappings={"umls": ("C0000002",)}, source="umls"),
            Concept(id="u3", name="speck", parents=("u1", "u2"), source="umls"),
        ]
    )
    both = merge(base, middle, last)
    assert list(both.index) == ["a", "hp:2", "u3"] and both["u3"].parents == ("a", "hp:2")
    assert both["a"].synonyms == ("mark", "blot") and both["hp:2"].synonyms == ("spot",)
    left = open_part(both)
    assert list(left.index) == ["a", "hp:2"] and left["a"].synonyms == ("mark",)


def test_a_damaged_cache_of_vectors_is_named(tmp_path):
    table = ConceptTable([Concept(id=w, name=f"sign {w}") for w in "abcd"])
    settings = Knowledge(dim=4, cache_dir=str(tmp_path))
    first = knowledge_vectors(table, settings)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match="delete it, it will be made again"):
        knowledge_vectors(table, settings)
    file.unlink()
    assert torch.equal(knowledge_vectors(table, settings), first)
