"""Sentences for labels: from the lexicon, in its language, or of generated studies."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlip.dataloading.phantom.reports import CONCEPT_IDS
from mlip.dataloading.tables.table import ManifestError
from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.concepts import ConceptTable
from mlip.knowledge.linker import Linker
from mlip.settings.evaluate import Evaluate
from mlip.transfer.alignment import label_prompts

GERMAN = Path(__file__).parents[2] / "knowledge" / "lexicon_de"


def test_labels_become_prompts_through_the_lexicon_and_no_finding_does_not() -> None:
    table = load_concepts()
    prompts, unknown = label_prompts.lexicon_prompts(
        ["Pleural_Effusion", "No Finding", "Xyzzy"], Linker(table), table, Evaluate()
    )
    assert [p.finding for p in prompts] == ["Pleural_Effusion"]
    assert "there is pleural effusion." in prompts[0].positive
    assert "no pleural effusion." in prompts[0].negative
    assert unknown == ["No Finding", "Xyzzy"]


def test_a_label_is_asked_by_what_it_says() -> None:
    """The first word that the lexicon has was asked for: a fissure for its thickening, a heart for
    its insufficiency, anything chronic for chronic changes."""
    table = load_concepts(None)
    labels = {
        "Edema": "pulmonary edema",
        "calcified pleural plaques": "calcified pleural plaques",
        "NSG tube": "enteric tube",
        "external foreign body": "external foreign body",
        "fissure thickening": "fissure thickening",
        "Pleural Other": "pleural abnormality",
        "Nodule/Mass": "nodule/mass",
        "Support Devices": "medical device",
        "Enlarged Cardiomediastinum": table["wide_mediastinum"].name,
    }
    nobody = ["chronic changes", "end on vessel", "clear lungs", "no pneumothorax"]
    prompts, unknown = label_prompts.lexicon_prompts(
        [*labels, *nobody], Linker(table), table, Evaluate()
    )
    assert {p.finding: p.positive[0] for p in prompts} == {k: f"{v}." for k, v in labels.items()}
    assert unknown == nobody
    fewer = ConceptTable([concept for concept in table if concept.id != "pleural_disease"])
    of_two = label_prompts.lexicon_prompts(["Pleural Other"], Linker(fewer), fewer, Evaluate())
    assert of_two == ([], ["Pleural Other"])  # CheXpert's label of two concepts names no one


def test_prompts_are_the_users_and_deny_in_the_language_of_the_cues() -> None:
    table = load_concepts(GERMAN)
    labels = ["Pneumothorax", "Pleuraerguss"]
    own = Evaluate(
        positive_prompts=("{} nachweisbar.",), negative_prompts=("Kein {}.", "Kein {} {x}.")
    )
    prompts, _ = label_prompts.lexicon_prompts(labels, Linker(table), table, own)
    assert prompts[0].positive == ("Pneumothorax nachweisbar.",)
    assert prompts[1].negative == ("Kein Pleuraerguss.", "Kein Pleuraerguss {x}.")
    apart = (
        "Rippenfellergu\u0308sse",
        "Pleuraergu\u0308sse",
    )  # an accent of its own, as files have it
    prompts, unknown = label_prompts.lexicon_prompts(apart, Linker(table), table, own)
    assert unknown == [apart[0]] and prompts[0].positive == ("Pleuraerguss nachweisbar.",)
    with pytest.raises(ManifestError, match="'no {}.' as a statement of pneumothorax"):
        label_prompts.lexicon_prompts(labels, Linker(table), table, Evaluate())


def test_prompts_of_phantoms_state_their_finding_or_deny_it() -> None:
    table = load_concepts(None)
    linker = Linker(table)
    prompts, unknown = label_prompts.phantom_prompts(linker, table, Evaluate())
    assert unknown == []
    assert {p.finding for p in prompts} == set(CONCEPT_IDS)
    for prompt in prompts:
        for texts, state in ((prompt.positive, "present"), (prompt.negative, "absent")):
            found = [{m.concept_id: m.state for m in linker.link(text)} for text in texts]
            assert {states.get(prompt.finding) for states in found} == {state}, prompt.finding


def test_findings_of_phantoms_are_asked_in_the_sentences_that_the_settings_name() -> None:
    """evaluate.positive_prompts of a run over generated studies were passed over."""
    table = load_concepts(None)
    own = Evaluate(positive_prompts=("I see {}.",))
    prompts, unknown = label_prompts.phantom_prompts(Linker(table), table, own)
    assert unknown == [] and {p.finding for p in prompts} == set(CONCEPT_IDS)
    (effusion,) = (p for p in prompts if p.finding == "pleural_effusion")
    assert effusion.positive == ("I see pleural effusion.",)
    assert effusion.negative[0] == "no pleural effusion."
    assert effusion.name == "Pleural effusion"
    denied = Evaluate(negative_prompts=("not {}.",))
    prompts, _ = label_prompts.phantom_prompts(Linker(table), table, denied)
    assert all(p.negative[0].startswith("not ") for p in prompts)
