"""Labels of findings from reports. Oracle: sentences of our own, their labels written by hand."""

from __future__ import annotations

import pytest

from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.concepts import ConceptTable, LexiconError
from mlip.knowledge.linker import Linker, default_linker
from mlip.knowledge.report_labels import ReportLabels, chexpert_names
from tests.knowledge.test_cues import GERMAN

CHEXPERT_14 = {
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum"),
    *("Fracture", "Lung Lesion", "Lung Opacity", "No Finding", "Pleural Effusion"),
    *("Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices"),
}
P, A, U = "present", "absent", "uncertain"
CASES = {
    "Small left effusion.": {"Pleural Effusion": P, "No Finding": A},
    "No effusion or pneumothorax.": {"Pleural Effusion": A, "Pneumothorax": A, "No Finding": P},
    # stated before doubted before denied, wherever each stands
    "No pneumothorax. There is a pneumothorax.": {"Pneumothorax": P, "No Finding": A},
    "There is a pneumothorax. No pneumothorax.": {"Pneumothorax": P, "No Finding": A},
    "Possible pneumonia. No pneumonia.": {"Pneumonia": U, "No Finding": A},
    "No pneumonia. Possible pneumonia.": {"Pneumonia": U, "No Finding": A},
    "Possible pneumonia. There is pneumonia.": {"Pneumonia": P, "No Finding": A},
    # a kind of it states it; denied, it says nothing of it
    "Hydropneumothorax on the right.": {"Pneumothorax": P, "Pleural Effusion": P, "No Finding": A},
    "No empyema.": {"No Finding": P},
    "Consolidation in the left base.": {"Consolidation": P, "Lung Opacity": P, "No Finding": A},
    # but where it bears the finding's name, as any narrower denial does
    "No rib fracture.": {"Fracture": A, "No Finding": P},
    "No rib fracture. Fracture of the clavicle.": {"Fracture": P, "No Finding": A},
    "No ground glass opacity.": {"Lung Opacity": A, "No Finding": P},
    "No consolidation.": {"Consolidation": A, "No Finding": P},
    # alternatives are doubts, of which one label may be certain
    "Atelectasis or pneumonia.": {"Atelectasis": U, "Pneumonia": U, "No Finding": A},
    "Nodule or mass in the right apex.": {"Lung Lesion": P, "No Finding": A},
    # what denies it denies its kinds
    "No airspace opacity.": {"Lung Opacity": A, "Consolidation": A, "No Finding": P},
    # several concepts of one label
    "There is a nodule.": {"Lung Lesion": P, "No Finding": A},
    "There is a mass.": {"Lung Lesion": P, "No Finding": A},
    "Pacemaker. PICC line.": {"Support Devices": P, "No Finding": P},
    # normal statements
    "Heart size is normal.": {"Cardiomegaly": A, "No Finding": P},
    "The lungs are clear.": {"Lung Opacity": A, "Consolidation": A, "No Finding": P},
    "The lungs are clear. Small nodule.": {
        **{"Lung Opacity": A, "Consolidation": A, "Lung Lesion": P, "No Finding": A}
    },
    "Cardiomediastinal silhouette within normal limits.": {
        **{"Cardiomegaly": A, "Enlarged Cardiomediastinum": A, "No Finding": P}
    },
    "Heart size is not normal.": {"No Finding": P},
    "No acute cardiopulmonary disease.": {"No Finding": P},
    # none of CheXpert's labels
    "Scoliosis.": {"No Finding": P},
}


@pytest.fixture(scope="module")
def labels() -> ReportLabels:
    linker = default_linker()
    return ReportLabels(linker, chexpert_names(linker.table))


def test_the_lexicon_names_all_labels_of_chexpert(labels: ReportLabels) -> None:
    assert set(labels.names) == CHEXPERT_14 and len(labels.names) == 14


@pytest.mark.parametrize("text", CASES)
def test_a_report_says_of_each_label(text: str, labels: ReportLabels) -> None:
    assert labels.states(text) == CASES[text]
    assert list(labels.states(text)) == [n for n in labels.names if n in CASES[text]]


def test_a_denied_device_says_nothing_of_other_devices_called_so() -> None:
    labels = ReportLabels(default_linker(), ("tube", "fracture"))
    assert labels.states("No chest tube. No rib fracture.") == {"fracture": A}


def test_names_are_those_of_the_lexicon_and_no_finding_does_not_depend_on_them() -> None:
    linker = default_linker()
    labels = ReportLabels(linker, ("hiatal_hernia", "No Finding"))
    assert labels.states("Hiatal hernia.") == {"hiatal_hernia": P, "No Finding": P}
    assert labels.states("Effusion.") == {"No Finding": A}  # a label that was not asked for
    synonym = ReportLabels(linker, ["Pleural Fluid", "EDEMA"])
    assert synonym.states("Effusion. No pulmonary edema.") == {"Pleural Fluid": P, "EDEMA": A}


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["Pneumothoraxx"], "no concept 'Pneumothoraxx' .*; near: .*[Pp]neumothorax"),
        (["Edema", "Edema"], "expected different names"),
        ([], "expected different names"),
    ],
)
def test_names_that_cannot_be_asked_are_refused(names: list[str], told: str) -> None:
    with pytest.raises(LexiconError, match=told):
        ReportLabels(default_linker(), names)


def test_a_lexicon_without_labels_of_chexpert_says_so() -> None:
    with pytest.raises(LexiconError, match="say which findings to label"):
        chexpert_names(load_concepts(GERMAN))


def test_a_lexicon_of_a_few_concepts_reads_normal_statements_too() -> None:
    few = [c for c in load_concepts() if c.id in ("clear_lungs", "pneumothorax")]
    labels = ReportLabels(Linker(ConceptTable(few)), ["Pneumothorax"])
    assert labels.states("The lungs are clear. No pneumothorax.") == {"Pneumothorax": A}
