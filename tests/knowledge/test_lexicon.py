"""The project's own lexicon: complete, sound, and of the size that was promised."""

import re
import shutil
import subprocess
import sys

import pytest

from mlip.knowledge.concept_files import load_concepts, read_table, write_table
from mlip.knowledge.concepts import Concept, ConceptTable, LexiconError
from mlip.knowledge.lexicon_text import LEXICON_DIR
from mlip.knowledge.linker import link
from mlip.knowledge.validate import main, problems

CHEXPERT = {
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
}


@pytest.fixture(scope="module")
def table():
    return load_concepts(None)


def copy_with(tmp_path, text, file="extra.yaml"):
    folder = tmp_path / "lexicon"
    shutil.copytree(LEXICON_DIR, folder)
    (folder / file).write_text(text, encoding="utf-8")
    return folder


def test_the_lexicon_passes_its_validator(table):
    assert problems(table) == []


def test_the_lexicon_has_250_concepts_of_every_kind(table):
    assert len(table) >= 250
    types = {concept.semantic_type for concept in table}
    assert {"finding", "disease", "anatomy", "device", "qualifier", "normal"} <= types
    relations = {relation for concept in table for relation, _ in concept.relations}
    assert {"located_in", "suggests", "device_at", "part_of"} <= relations
    assert all(len(concept.definition.split()) >= 3 for concept in table)


def test_every_concept_has_another_wording_than_its_name(table):
    assert [c.id for c in table if len(c.surface_forms) < 2] == []


def test_the_concepts_that_the_phantoms_speak_of_exist(table):
    for concept_id in (
        "pleural_effusion",
        "pneumothorax",
        "consolidation",
        "lung_nodule",
        "cardiomegaly",
        "atelectasis",
        "pacemaker",
        "central_venous_catheter",
        "left_lung",
        "right_lung",
        "lung_base",
    ):
        assert concept_id in table


def test_every_chexpert_label_is_mapped(table):
    mapped = {code for concept in table for code in concept.mappings.get("chexpert", ())}
    assert mapped == CHEXPERT


def test_codes_have_the_form_of_their_vocabulary(table):
    forms = {"umls": r"C\d{7}", "hpo": r"HP:\d{7}", "radlex": r"RID\d+"}
    for concept in table:
        for vocabulary, codes in concept.mappings.items():
            for code in codes:
                assert re.fullmatch(forms.get(vocabulary, ".+"), code), (concept.id, code)


def test_the_fingerprint_is_stable_across_processes_and_changes_with_any_field(table):
    script = (
        "from mlip.knowledge.concept_files import load_concepts; print(load_concepts().fingerprint)"
    )
    other = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert other == table.fingerprint and len(other) == 64
    first = Concept(id="a", name="sign", definition="one")
    second = Concept(id="a", name="sign", definition="two")
    assert ConceptTable([first]).fingerprint != ConceptTable([second]).fingerprint


def test_a_written_table_is_read_back_equal(table, tmp_path):
    write_table(table, tmp_path / "table.jsonl")
    again = load_concepts(tmp_path / "table.jsonl")
    assert again.concepts == table.concepts
    assert again.fingerprint == table.fingerprint
    assert again.provenance == table.provenance


def test_a_table_edited_or_cut_off_is_refused(table, tmp_path):
    path = tmp_path / "table.jsonl"
    write_table(table, path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-3]))
    with pytest.raises(LexiconError, match="fingerprint"):
        read_table(path)
    path.write_text("\n".join([lines[0], lines[1][:-9]]))
    with pytest.raises(LexiconError, match="line 2"):
        read_table(path)


@pytest.mark.parametrize("field", ['"synonyms": "edema"', '"category": []', '"excludes": [1]'])
def test_a_table_edited_by_hand_is_read_as_it_is_meant_or_not_at_all(tmp_path, field):
    # a text in place of a list was synonyms of a letter each
    path = tmp_path / "table.jsonl"
    path.write_text('{"id": "a", "name": "a", ' + field + "}\n")
    with pytest.raises(LexiconError, match="table.jsonl, line 1: .*are (lists|texts)"):
        read_table(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("category: x\nconcepts:\n  a: {name: b]\n", "not valid YAML"),
        ("- a\n- b\n", "expected a mapping"),
        ("concepts:\n  a_b:\n    nmae: x\n", "unknown key 'nmae'"),
        ("concepts:\n  A-B: {name: x}\n", "snake_case"),
        ("concepts:\n  new_sign: {name: x, synonyms: [no, yes]}\n", "quote"),
        ("concepts:\n  new_sign: {name: x, apart: [[only one]]}\n", "two slots"),
        ("concepts:\n  new_sign: {name: x}\n  new_sign: {name: y}\n", "stands in lines 2 and 3"),
        (
            "concepts:\n  pneumothorax: {name: x}\n",
            r"yaml: .*'pneumothorax' occurs twice, in .*yaml too",
        ),
    ],
)
def test_a_bad_lexicon_file_is_an_error_that_says_what_is_wrong(tmp_path, text, message):
    with pytest.raises(LexiconError, match=message):
        load_concepts(copy_with(tmp_path, text))


def test_a_table_that_holds_a_concept_twice_is_named(tmp_path):
    path = tmp_path / "table.jsonl"
    path.write_text('{"id": "a", "name": "a"}\n{"id": "a", "name": "b"}\n')
    with pytest.raises(LexiconError, match=r"table\.jsonl: concept id 'a' occurs twice"):
        read_table(path)


def test_a_lexicon_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("concepts:\n  a: {name: caf\xe9}\n".encode("latin-1"))
    with pytest.raises(LexiconError, match=r"latin\.yaml: not UTF-8"):
        load_concepts(path)


def test_a_missing_file_and_an_unknown_kind_are_named(tmp_path):
    with pytest.raises(LexiconError, match="nowhere"):
        load_concepts(tmp_path / "nowhere")
    (tmp_path / "table.txt").write_text("x")
    with pytest.raises(LexiconError, match=r"table\.txt: expected"):
        load_concepts(tmp_path / "table.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LexiconError, match="no .*yaml"):
        load_concepts(tmp_path / "empty")


def test_the_validator_finds_each_kind_of_problem():
    bad = ConceptTable(
        [
            Concept(id="a", name="sign", definition="One thing.", parents=("b",)),
            Concept(id="b", name="mark", definition="Another thing.", parents=("a",)),
            Concept(id="c", name="signs", definition="One thing."),
            Concept(id="d", name="spot", parents=("nothing",), relations=(("suggests", "gone"),)),
            Concept(id="e", name="blot", definition="word " * 60),
        ]
    )
    text = "\n".join(problems(bad))
    assert "b: is_a a closes a circle" in text
    assert "c: 'signs' already belongs to a" in text  # a plural is the same form
    assert "c: has the definition of a" in text
    assert "d: the definition is empty" in text
    assert "d: is_a nothing does not exist" in text
    assert "d: suggests gone does not exist" in text
    assert "e: the definition is longer" in text


def test_ancestors_and_descendants_follow_is_a_over_any_number_of_steps(table):
    assert {"catheter", "device"} <= table.ancestors("picc")
    assert "picc" in table.descendants("device")
    assert "picc" not in table.ancestors("picc")


def test_the_command_names_what_it_cannot_read(tmp_path, monkeypatch, capsys):
    file = tmp_path / "own.yaml"
    for text, told in (("concepts: {a: {name: \u2603}}", "cannot be matched"), ("", "expected")):
        file.write_text(text, encoding="utf-8")
        monkeypatch.setattr("sys.argv", ["validate", str(file)])
        assert main() == 2 and told in capsys.readouterr().err


def test_the_abbreviations_of_chest_reports_name_their_concepts():
    """Each stands in docs/knowledge.md; none of the second list may, as it has another sense."""
    wanted = {
        "RLL PNA.": "right_lower_lobe pneumonia",
        "No PTX.": "pneumothorax",
        "CHF.": "heart_failure",
        "GGOs.": "ground_glass",
        "ATX.": "atelectasis",
        "IPF, NSCLC.": "pulmonary_fibrosis lung_cancer",
        "TAA.": "aortic_aneurysm",
        "ETT, NGT, OGT.": "endotracheal_tube enteric_tube enteric_tube",
        "CVC, CVL, PICC.": "central_venous_catheter central_venous_catheter picc",
        "ICD, AICD, PPM.": "defibrillator defibrillator pacemaker",
        "AVR, MVR, TAVI.": "prosthetic_valve prosthetic_valve prosthetic_valve",
        "Swan, trach.": "swan_ganz_catheter tracheostomy_tube",
        "Consol, infiltrates.": "consolidation infiltrate",
        "Rib fx, fx.": "rib_fracture fracture",
        "Alveolar haemorrhage.": "pulmonary_hemorrhage",
        "Oesophageal dilatation.": "esophageal_dilation",
        "Pedal oedema.": "",
        "PE. LAD. CT. CM. HF. Pneumo.": "",
    }
    found = {text: " ".join(m.concept_id for m in link(text)) for text in wanted}
    assert found == wanted


def test_an_abbreviation_in_another_of_its_senses_names_nothing():
    """What is no chest finding or device by the word beside it."""
    texts = (
        "iNO at 20 ppm.",
        "60 Gy in 30 fx.",
        "50 Gy / 5 fx.",
        "LV fx.",
        "ST elevation in aVR.",
        "Leads aVR.",
        "Trach midline.",
        "PNA FISH.",
        "Swan-neck deformity of the finger.",
    )
    wrong = {"pacemaker", "fracture", "prosthetic_valve", "tracheostomy_tube", "pneumonia"}
    wrong.add("swan_ganz_catheter")
    assert {text: {m.concept_id for m in link(text)} & wrong for text in texts} == dict.fromkeys(
        texts, set()
    )
    kept = {"Rib 8 fx.": "fracture", "Change in AVR.": "prosthetic_valve"}
    kept["Trach in place, dual lead PPM."] = "tracheostomy_tube pacemaker"
    for text, wanted in kept.items():
        found = {m.concept_id for m in link(text)}
        assert found >= set(wanted.split()), text
