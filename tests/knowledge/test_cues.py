"""Lexicons of other languages: a folder's own cue words, and what becomes of them on the way.

Oracle: what a reader of German and Spanish reports takes from the sentence, written down before the
cues of lexicon_de and lexicon_es were.
"""

import json
import shutil
from pathlib import Path

import pytest

from mlip.cli import main
from mlip.dataloading.reports.text import clean_report
from mlip.knowledge.concept_files import load_concepts, read_table, write_table
from mlip.knowledge.concepts import Concept, ConceptTable, LexiconError
from mlip.knowledge.cues import cues_of, english_cues, read_cues
from mlip.knowledge.lexicon_text import LEXICON_DIR
from mlip.knowledge.linker import Linker
from mlip.knowledge.merging import merge, open_part
from mlip.knowledge.validate import problems

HERE = Path(__file__).parent
GERMAN, SPANISH = HERE / "lexicon_de", HERE / "lexicon_es"


def states(table: ConceptTable, text: str) -> str:
    return " ".join(mention.state for mention in Linker(table).link(clean_report(text)))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Kein Pneumothorax, kein Pleuraerguss.", "absent absent"),
        ("Kein Pneumothorax, Erguss oder Infiltrat.", "absent absent absent"),
        ("Kein Nachweis eines Pneumothorax oder Pleuraergusses.", "absent absent"),
        ("Weder Erguss noch Pneumothorax.", "absent absent"),
        ("Ausschluss eines Pneumothorax.", "absent"),
        ("Ein Pneumothorax ist nicht nachweisbar.", "absent"),
        ("Der Erguss ist nicht mehr nachweisbar.", "absent"),
        ("Herz nicht vergrößert.", "absent"),
        ("Das Herz ist vergrößert.", "present"),
        ("Pneumothorax: nein.", "absent"),
        ("ZVK entfernt.", "absent"),
        ("Verdacht auf Infiltrat im rechten Unterlappen.", "uncertain"),
        ("V. a. Pneumonie.", "uncertain"),
        ("V.a. Pneumonie.", "uncertain"),
        ("Fraglicher Rundherd rechts.", "uncertain"),
        ("Ein Infiltrat kann nicht ausgeschlossen werden.", "uncertain"),
        ("Kardiomegalie, DD Perikarderguss.", "present uncertain"),
        ("Pleuraerguss links, kein Pneumothorax.", "present absent"),
        ("Keine Infiltrate, kein Erguss, beginnende Stauung.", "absent absent present"),
        ("Kein Hinweis auf Rundherd, jedoch Verschattung links.", "absent present"),
        ("Keine Zunahme des Ergusses.", "present"),
        ("Keine Befundänderung: unveränderter Pleuraerguss.", "present"),
        ("Fragestellung: Pneumonie? Beurteilung: Kein Infiltrat.", "absent"),
    ],
)
def test_german_reports_are_read_with_german_cues(text: str, expected: str) -> None:
    assert states(load_concepts(GERMAN), text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("No se observa derrame pleural ni neumotórax.", "absent absent"),
        ("Sin evidencia de neumonía.", "absent"),
        ("Se descarta neumotórax.", "absent"),
        ("Derrame resuelto.", "absent"),
        ("Corazón no aumentado de tamaño.", "absent"),
        ("Neumotórax: no.", "absent"),
        ("Derrame pleural derecho.", "present"),
        ("Silueta cardíaca aumentada.", "present"),
        ("Sin cambios del derrame.", "present"),
        ("Probable neumonía en lóbulo inferior derecho.", "uncertain"),
        ("No se puede descartar neumonía.", "uncertain"),
        ("Nódulo vs granuloma.", "uncertain uncertain"),
        ("Opacidad en lóbulo medio, a descartar neumonía.", "present uncertain"),
        ("No derrame, pero atelectasia basal.", "absent present"),
        ("Cardiomegalia, sin derrame.", "present absent"),
        ("Antecedentes: neumonía. Hallazgos: sin consolidación.", "absent"),
    ],
)
def test_spanish_reports_are_read_with_spanish_cues(text: str, expected: str) -> None:
    assert states(load_concepts(SPANISH), text) == expected


def test_without_own_cues_a_german_lexicon_is_read_with_english_ones(tmp_path: Path) -> None:
    shutil.copy(GERMAN / "befunde.yaml", tmp_path)
    assert load_concepts(tmp_path).cues is None
    assert states(load_concepts(tmp_path), "Kein Pneumothorax. No Pneumothorax.") == (
        "present absent"
    )
    assert states(load_concepts(GERMAN), "Kein Pneumothorax. No Pneumothorax.") == (
        "absent present"
    )


def test_cues_without_a_kind_for_normal_read_no_lists() -> None:
    """As before there was such a kind: a table built with cues of its own links as it did."""
    ours = load_concepts()
    cues = {kind: forms for kind, forms in english_cues().items() if kind != "normal"}
    silent = Linker(ConceptTable(ours.concepts, cues=cues))
    for text in ("Normal heart size and mediastinum.", "Mediastinum, heart size is normal."):
        assert "normal_mediastinum" in {m.concept_id for m in Linker(ours).link(text)}
        assert "normal_mediastinum" not in {m.concept_id for m in silent.link(text)}
        assert "normal_heart_size" in {m.concept_id for m in silent.link(text)}


@pytest.mark.parametrize("folder", [GERMAN, SPANISH])
def test_the_two_lexicons_are_sound(folder: Path) -> None:
    table = load_concepts(folder)
    assert problems(table) == []
    silent = ConceptTable(table.concepts, cues={"sentence": (".",), "clause": ("aber",)})
    assert [line for line in problems(silent) if line.startswith("cues: none denies")]


def test_a_letter_and_its_accent_are_one_character(tmp_path: Path) -> None:
    """A PDF's text may have them apart: "neumonía" was the words "neumoni" and "a"."""
    apart = "Sin neumoni\u0301a."
    assert states(load_concepts(SPANISH), apart) == "absent"
    for name in ("_cues.yaml", "hallazgos.yaml"):
        text = (SPANISH / name).read_text(encoding="utf-8")
        decomposed = text.replace("í", "i\u0301").replace("ó", "o\u0301")
        (tmp_path / name).write_text(decomposed, encoding="utf-8")
    assert load_concepts(tmp_path).fingerprint == load_concepts(SPANISH).fingerprint


def test_a_copy_of_the_projects_folder_is_the_projects_table(tmp_path: Path) -> None:
    shutil.copytree(LEXICON_DIR, tmp_path / "own")
    table = load_concepts(tmp_path / "own")
    assert table.cues is None and table.fingerprint == load_concepts(None).fingerprint
    with (tmp_path / "own" / "_cues.yaml").open("a") as file:
        file.write('doubt_one: ["[hardly]"]\n'.replace("doubt_one", "removal "))
    with pytest.raises(LexiconError, match="_cues.yaml: not valid YAML: 'removal'"):
        load_concepts(tmp_path / "own")


def test_cues_belong_to_a_table_and_travel_with_it(tmp_path: Path) -> None:
    table = load_concepts(GERMAN)
    bare = ConceptTable(table.concepts)
    assert cues_of(bare) is english_cues() and cues_of(table)["or"] == ("oder", "noch", "bzw")
    assert table.fingerprint != bare.fingerprint
    write_table(table, tmp_path / "table.jsonl")
    read = read_table(tmp_path / "table.jsonl")
    assert read.fingerprint == table.fingerprint and read.cues == table.cues
    other = ConceptTable([Concept(id="x", name="Xyz", parents=("y",)), Concept(id="y", name="Y")])
    circle = ConceptTable([Concept(id="x", name="X", parents=("x2",)),
                           Concept(id="x2", name="X2", parents=("x",))])  # fmt: skip
    for made in (merge(table, other), merge(table, circle), open_part(merge(table, other))):
        assert made.cues == table.cues
    # a cue taken out of the file by hand is a change of the table
    lines = (tmp_path / "table.jsonl").read_text().splitlines()
    del lines[1]
    (tmp_path / "table.jsonl").write_text("\n".join(lines))
    with pytest.raises(LexiconError, match="do not match the fingerprint"):
        read_table(tmp_path / "table.jsonl")


def test_a_table_is_built_with_cues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.csv").write_text("id,name,synonyms\nx:1,Zwerchfellhochstand,\n")
    (tmp_path / "report.txt").write_text("Kein Zwerchfellhochstand.")
    built = str(tmp_path / "t.jsonl")
    build = ["knowledge", "build", "--no-lexicon", "--csv", str(tmp_path / "own.csv")]
    assert main([*build, "--cues", str(GERMAN / "_cues.yaml"), "--out", built]) == 0
    capsys.readouterr()
    link = ["knowledge", "link", str(tmp_path / "report.txt"), "--json", "--lexicon", built]
    assert main(link) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "absent"
    assert main(["knowledge", "stats", "--lexicon", built]) == 0
    said = capsys.readouterr().out
    assert "kinds, its own" in said
    assert main([*build, "--cues", str(tmp_path / "none.yaml"), "--out", built]) == 2
    assert "none.yaml: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, told",
    [
        ("", "expected a mapping"),
        ("- no", "expected a mapping"),
        ("negation: [no]", "unknown kind of cue 'negation'"),
        ("negation_before: kein", "expected a list of texts for negation_before"),
        ("answer: [no]", "expected a list of texts for answer"),  # YAML's false
        ("negation_before: [kein\n", "not valid YAML"),
        ("negation_before: ['" + "[a|b]" * 14 + "']", "stands for more than"),
        ("negation_before: ['kein Hinweis|Nachweis']", "write alternatives as [a|b]"),
        ("negation_before: ['kein [Hinweis|Nachweis']", "write alternatives as [a|b]"),
        ("negation_before: ['kein [[Hinweis|Nachweis] auf|]']", "write alternatives as [a|b]"),
    ],
)
def test_a_file_of_cues_that_cannot_be_used_is_named(
    content: str, told: str, tmp_path: Path
) -> None:
    path = tmp_path / "_cues.yaml"
    path.write_text(content)
    with pytest.raises(LexiconError) as caught:
        read_cues(path)
    assert told in str(caught.value) and str(path) in str(caught.value)


def test_marks_that_a_file_does_not_name_are_as_ours(tmp_path: Path) -> None:
    path = tmp_path / "_cues.yaml"
    path.write_text("negation_before: [kein]\nquestion: ['\u00bf']\n", encoding="utf-8")
    cues = read_cues(path)
    assert cues["sentence"] == (".", ";", "!") and cues["comma"] == (",",)
    assert cues["question"] == ("\u00bf",)


def test_a_mistaken_file_of_cues_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "befunde.yaml").write_bytes((GERMAN / "befunde.yaml").read_bytes())
    path = tmp_path / "_cues.yaml"
    path.write_text("negation_before: []\n")
    assert any("none denies" in problem for problem in problems(load_concepts(tmp_path)))
    path.write_text("negation_before: [kein, '-']\n")
    with pytest.raises(LexiconError, match="cues, negation_before: term '-'"):
        Linker(load_concepts(tmp_path))
    path.rename(tmp_path / "_cues.yml")
    with pytest.raises(LexiconError, match=r"_cues\.yml: is not read: rename it to _cues\.yaml"):
        load_concepts(tmp_path)
