"""What says that anatomy is as it should be, alone or in a list, and what changes are denied.

Oracle: labels written by hand before the rules, sentences of our own. P present, A absent,
U uncertain, - not mentioned; the concept's first mention counts.
"""

from __future__ import annotations

import pytest

from mlip.knowledge.linker import default_linker, link
from mlip.knowledge.report_labels import ReportLabels, chexpert_names
from tests.knowledge.sentences import LETTER, check_states

HEART, MEDIASTINUM = "normal_heart_size=P", "normal_mediastinum=P"
BOTH = f"{HEART} {MEDIASTINUM}"
SENTENCES = {
    "a list before one predicate": f"""
        Heart size and mediastinal contours are within normal limits. | {BOTH}
        The heart size and mediastinal silhouette appear normal. | {BOTH}
        Cardiac and mediastinal silhouettes are unremarkable. | {BOTH}
        The heart and the mediastinum remain normal. | {BOTH}
        The cardiomediastinal silhouette is within normal limits. | {BOTH}
        Cardiomediastinal contours are grossly unremarkable. | {BOTH}
        The cardiomediastinal silhouette is normal in size and contour. | {BOTH}
        Normal cardiomediastinal silhouette. | {BOTH}
        The heart, lungs and pleura are normal. | {HEART} clear_lungs=P normal_pleura=P
        Pulmonary vascularity and heart size normal. | normal_vessels=P {HEART}
        Heart size, mediastinal contour, and pulmonary vasculature within normal limits. | {BOTH}
        The heart, pulmonary arteries and mediastinum are within normal limits. | {BOTH}
        Cardiomediastinal silhouette and vasculature are within normal limits. | {BOTH}
        Cardiomediastinal silhouette is stable and within normal limits. | {BOTH} stable=-
        Heart and mediastinum of normal size and contour. | {BOTH}
        The cardiac silhouette and mediastinum size are normal. | {BOTH}
        Heart, lungs, bony structures and visualized abdomen are normal. | {HEART} normal_bones=P
        Osseous structures and soft tissues are normal. | normal_bones=P
        Ribs and thoracic spine are intact. | normal_bones=P
        The cardiac, mediastinal and hilar contours are normal. | {BOTH}
        Cardiac, mediastinal, and hilar contours are unremarkable. | {BOTH}
        The cardiomediastinal and hilar contours are within normal limits. | {BOTH}
        The mediastinal and hilar contours are normal. | {MEDIASTINUM} normal_heart_size=-
        Hilar and mediastinal contours are unremarkable. | {MEDIASTINUM} normal_heart_size=-
        Lungs, bones and soft tissues are unremarkable. | clear_lungs=P normal_bones=P
        Bilateral costophrenic angles are clear. | normal_pleura=P
        No effusion, heart and mediastinum are normal. | pleural_effusion=A {BOTH}
        Heart size and vascular engorgement within normal limits. | vascular_congestion=A {HEART}
    """,
    "a list behind one adjective": f"""
        Normal heart size and mediastinal contours. | {BOTH}
        Normal heart size, mediastinum and pulmonary vasculature. | {BOTH} normal_vessels=P
        Normal heart size and mediastinum without effusion. | {BOTH} pleural_effusion=A
        Normal size and configuration of the cardiac silhouette. | {HEART}
    """,
    "a subject in other words": f"""
        The lungs are unremarkable. | clear_lungs=P
        Lungs otherwise appear clear. | clear_lungs=P
        Heart size is now normal. | {HEART}
        Heart: normal. | {HEART}
        Lungs: Clear. Mediastinum: unremarkable. | clear_lungs=P {MEDIASTINUM}
        Heart size upper limits normal. | {HEART}
        The heart is on the upper limits of normal. | {HEART}
        The thoracic spine appears intact. | normal_bones=P
        The costophrenic angles and lungs are clear. | normal_pleura=P clear_lungs=P
    """,
    "a list behind a finding": f"""
        There is no effusion and the cardiac silhouette and mediastinum are normal. | {BOTH}
        No change in the effusion and heart and mediastinum are normal. | {BOTH}
        Opacity in the lungs and the heart is normal. | clear_lungs=- lung_opacity=P
        Opacity in the lungs and heart and mediastinum are normal. | clear_lungs=-
    """,
    "where a list begins and ends": f"""
        Heart/aorta/mediastinum are normal. | {BOTH}
        Small effusion but heart and mediastinum are normal. | pleural_effusion=P {BOTH}
        Lungs are clear heart and mediastinum are normal. | clear_lungs=P {BOTH}
        The effusion has resolved and heart and mediastinum are normal. | {BOTH}
        Effusions are not seen and heart and mediastinum are normal. | {BOTH}
        Normal heart size and mediastinum, no effusion. | {BOTH}
        Normal heart size and mediastinum but effusion. | {BOTH}
        Normal heart size, the mediastinum and the lungs. | {BOTH} clear_lungs=P
        Normal heart size, thoracic inlet and mediastinum. | {BOTH}
        Normal heart size and mediastinum, lungs with opacity. | {BOTH} clear_lungs=-
        Normal heart size, lungs, effusion. | {HEART} clear_lungs=-
        Unremarkable pulmonary vessels with effusion. | normal_vessels=P pleural_effusion=P
        Normal lungs show effusion. | clear_lungs=- pleural_effusion=P
        Heart, the great vessels and mediastinum are normal. | {BOTH}
        The heart and great vessels are unchanged and normal. | {HEART}
        Heart, the thoracic inlet and mediastinum are normal. | {BOTH}
        Opacity seen in the lungs and heart are normal. | clear_lungs=-
        No effusion; heart and mediastinum are normal. | {BOTH}
        No effusion! Heart and mediastinum are normal. | {BOTH}
        Effusion? Heart and mediastinum are normal. | {BOTH}
        Chest: heart and mediastinum are normal. | {BOTH}
        No edema, heart and lungs normal and mass. | pulmonary_edema=A lung_mass=P
    """,
    "as written elsewhere": f"""
        The heart as well as the mediastinum are normal. | {BOTH}
        No effusion, consolidation as well as pneumothorax. | consolidation=A pneumothorax=A
        Visualised heart and lungs are normal. | {HEART} clear_lungs=P
        The heart and mediastinum have remained normal. | {BOTH}
        No effusion visualised, nodule at the apex. | pleural_effusion=A lung_nodule=P
    """,
    "an adjective in other places": f"""
        Normal and stable cardiomediastinal contours. | {BOTH}
        Cardiomediastinal contour stable and within normal limits. | {BOTH}
        Unremarkable heart and clear pleural spaces. | {HEART} normal_pleura=P
        Normal lung volumes. | clear_lungs=-
        Rib cage and soft tissues grossly unremarkable. | normal_bones=P
        Osseous structures of the thorax are without acute abnormality. | normal_bones=P acute=-
        The visualized osseous structures show no acute abnormality. | normal_bones=P
        No acute bony or soft tissue abnormality. | normal_bones=P
    """,
    "suspicious is an adjective of what is there or denied": """
        No effusion, suspicious opacity, or pneumothorax. | lung_opacity=A pneumothorax=A
        No suspicious nodules. | lung_nodule=A
        A suspicious nodule at the apex. | lung_nodule=P
        Opacity suspicious for pneumonia. | lung_opacity=P pneumonia=U
    """,
    "up to enlarged is enlarged": f"""
        The cardiomediastinal silhouette is at upper limits of normal or large. | cardiomegaly=P
        The cardiac contour remains normal to mildly enlarged. | cardiomegaly=P normal_heart_size=-
        Heart and mediastinum are normal or slightly enlarged. | cardiomegaly=P normal_heart_size=-
        The cardiomediastinal silhouette is normal to slightly enlarged. | cardiomegaly=P
        The cardiomediastinal silhouette is normal in size, aorta enlarged. | cardiomegaly=-
        Heart and mediastinum are normal to very mildly enlarged. | cardiomegaly=P
        Heart and mediastinum are normal to large. | cardiomegaly=P normal_heart_size=-
        The heart is normal to mildly enlarged. | cardiomegaly=P normal_heart_size=-
        Heart size is normal or slightly enlarged. | cardiomegaly=P normal_heart_size=-
        Heart and mediastinum normal or enlarged. | cardiomegaly=P {BOTH.replace("P", "-")}
        Heart and mediastinum are normal aside from small effusions. | {BOTH} pleural_effusion=P
        Heart and mediastinum are normal with small effusions. | {BOTH} pleural_effusion=P
        Heart and mediastinum are normal without large effusion. | {BOTH} pleural_effusion=A
        Heart and lungs are normal but large nodes are seen. | {HEART} clear_lungs=P
    """,
    "not of the list": """
        Lungs hazy, heart normal. | clear_lungs=- normal_heart_size=P
        The heart is enlarged, mediastinum normal. | cardiomegaly=P normal_heart_size=-
        Heart size mildly enlarged, pulmonary vascularity normal. | normal_heart_size=-
        Heart generous and mediastinum normal. | normal_heart_size=-
        Scarring in both lungs, heart size normal. | clear_lungs=- normal_heart_size=P
        Opacity in the lungs, heart and mediastinum normal. | clear_lungs=- normal_heart_size=P
        Widening of the mediastinum and the heart is normal. | normal_mediastinum=-
        Normal heart size and mediastinum stable. | normal_mediastinum=-
        Normal heart size and lungs with opacities. | clear_lungs=- lung_opacity=P
        Normal heart size, lungs with scattered nodules. | clear_lungs=-
        Normal heart size and mediastinum is widened. | normal_mediastinum=- wide_mediastinum=P
        The left lung is clear, the heart is normal. | clear_lungs=- normal_heart_size=P
        Heart and mediastinum are not normal. | normal_heart_size=- normal_mediastinum=-
        Heart and mediastinum are probably normal. | normal_heart_size=- normal_mediastinum=-
        The lungs are not clear. | clear_lungs=-
        Heart and mediastinum are normal, aorta enlarged. | cardiomegaly=- dilated_aorta=P
        The lungs are clear of opacities. | clear_lungs=- lung_opacity=A
        The lungs remain grossly clear of infiltrate or edema. | infiltrate=A pulmonary_edema=A
    """,
    "a finding before a comma is no subject of normal": f"""
        Small effusion, heart size and mediastinum are normal. | pleural_effusion=P {BOTH}
        Atelectasis at the left base, heart and mediastinum are normal. | atelectasis=P {BOTH}
        Calcified aorta, heart and mediastinum are within normal limits. | aortic_calcification=P
        There is a pneumothorax, and heart and mediastinum are normal. | pneumothorax=P {BOTH}
        Effusion and pneumothorax, hila are unremarkable. | pleural_effusion=P pneumothorax=P
        Granuloma in the right lung, mediastinum and hila are normal. | granuloma=P
        Small effusion, aorta is normal. | pleural_effusion=P
        Small effusion and the aorta is normal. | pleural_effusion=P
        Vascular engorgement and heart size are within normal limits. | vascular_congestion=A
        Effusion, if there, is not seen. | pleural_effusion=A
        Heart size, vascular engorgement, within normal limits. | vascular_congestion=A
    """,
    "a normal device is there": f"""
        The endotracheal tube is normal. | endotracheal_tube=P
        Pacemaker leads are within normal limits. | pacemaker=P
        Pacemaker, heart and mediastinum are unremarkable. | pacemaker=P {BOTH}
        Pacemaker lead fracture. | pacemaker=P fracture=-
        The port is not seen. | port_catheter=A
    """,
    "too full of air, but clear": """
        The lungs are hyperinflated but clear. | hyperinflation=P clear_lungs=P
        Lungs hyperexpanded but otherwise clear. | hyperinflation=P clear_lungs=P
        Hypoinflated but grossly clear lungs. | low_lung_volumes=P clear_lungs=P
        Lungs are hyperexpanded but clear of edema or mass. | hyperinflation=P lung_mass=A
        Lungs are mildly hypoinflated but clear of infiltrate. | low_lung_volumes=P infiltrate=A
        Lungs are clear but hyperinflated. | hyperinflation=P clear_lungs=P
    """,
    "a denied change is no denial": """
        No evidence that the effusion has increased. | pleural_effusion=P
        There is no evidence that the nodules have grown. | lung_nodule=P
        No indication that the pneumothorax has resolved. | pneumothorax=P
        No sign that the opacity has progressed. | lung_opacity=P
        The effusion has not increased. | pleural_effusion=P
        The nodule has not grown. | lung_nodule=P
        The opacities have not significantly progressed. | lung_opacity=P
        The pneumothorax is not increased. | pneumothorax=P
        No evidence that the effusion is present. | pleural_effusion=A
        No evidence that the nodule has grown but the effusion has resolved. | pleural_effusion=A
        No evidence that the patient has pneumonia. | pneumonia=A
        No evidence that there is an effusion. | pleural_effusion=A
        The effusion has resolved. | pleural_effusion=A
        No pneumothorax, the effusion has increased. | pneumothorax=A pleural_effusion=P
    """,
    "whitened lungs": """
        The left base is opacified. | lung_opacity=P
        The right hemithorax is completely opacified. | lung_opacity=P
        Opacified left lung. | lung_opacity=P
        The bases are not opacified. | lung_opacity=A
    """,
    "older ones": """
        The main pulmonary artery is enlarged. | dilated_pulmonary_artery=P
        The pulmonary arteries are not enlarged. | dilated_pulmonary_artery=A
        The minor fissure is thickened. | fissure_thickening=P
        Normal mediastinal fat. | mediastinal_lipomatosis=-
        Mediastinal fat is unremarkable. | mediastinal_lipomatosis=-
        Abundant mediastinal fat. | mediastinal_lipomatosis=P
        Diffuse axonal injury (DAI) after a fall. | defibrillator=-
        DAI. | defibrillator=P
        Situs inversus. | dextrocardia=P
        Normal situs. | dextrocardia=-
        Abdominal situs inversus without dextrocardia. | dextrocardia=A
    """,
}
LABELS = {
    "Heart size and mediastinal contours are within normal limits.": {
        "Cardiomegaly": "A",
        "Enlarged Cardiomediastinum": "A",
    },
    "The cardiomediastinal silhouette is normal.": {
        "Cardiomegaly": "A",
        "Enlarged Cardiomediastinum": "A",
    },
    "The mediastinum is unremarkable.": {"Enlarged Cardiomediastinum": "A"},
    "The trachea is midline.": {},
    "The lungs are well aerated.": {},
    "Bony structures are intact.": {"Fracture": "A"},
    "No acute bony abnormality. Old rib fracture.": {"Fracture": "P"},
    "Costophrenic angles are sharp.": {"Pleural Effusion": "A"},
    "No infiltrate.": {"Lung Opacity": "A"},
    "Infiltrate at the left base.": {"Lung Opacity": "P"},
    "Central venous catheter fracture at the clavicle.": {"Support Devices": "P"},
}


@pytest.mark.parametrize("row", SENTENCES)
def test_states_of_sentences(row: str) -> None:
    check_states(SENTENCES[row])


def test_labels_of_normal_statements() -> None:
    linker = default_linker()
    labels = ReportLabels(linker, [n for n in chexpert_names(linker.table) if n != "No Finding"])
    for text, wanted in LABELS.items():
        said = {name: LETTER[state] for name, state in labels.states(text).items()}
        assert said == wanted, text


def test_a_normal_statement_spans_its_subject_and_its_predicate() -> None:
    text = "No edema. Heart size and mediastinal contours are within normal limits."
    spans = {m.concept_id: text[m.start : m.end] for m in link(text)}
    assert spans["normal_heart_size"] == text[10:-1]
    assert spans["normal_mediastinum"] == "mediastinal contours are within normal limits"


def test_of_a_range_the_name_alone_is_the_mention() -> None:
    text = "The heart is normal to mildly enlarged."
    assert [text[m.start : m.end] for m in link(text) if m.concept_id == "heart"] == ["heart"]


@pytest.mark.parametrize("before", ["\n", "No effusion\n\n"])
def test_a_list_begins_on_a_line_of_its_own(before: str) -> None:
    found = {m.concept_id for m in link(f"{before}Heart and mediastinum are normal.")}
    assert {"normal_heart_size", "normal_mediastinum"} <= found


def test_the_silhouette_by_any_of_its_names_can_be_enlarged_and_normal() -> None:
    """A name that is longer than the words of a term written apart swallowed them."""
    silhouette = default_linker().table["cardiomediastinal_silhouette"]
    for form in silhouette.surface_forms:
        for predicate, concept in (
            ("is enlarged", "cardiomegaly"),
            ("is borderline enlarged", "borderline_cardiomegaly"),
            ("is normal", "normal_heart_size"),
            ("is normal", "normal_mediastinum"),
        ):
            found = {m.concept_id for m in link(f"The {form} {predicate}.")}
            assert concept in found, f"{form} {predicate}"
    for form in default_linker().table["mediastinum"].surface_forms:
        if "mediastin" in form and not form.startswith(("anterior", "posterior")):
            found = {m.concept_id for m in link(f"The {form} is widened.")}
            assert "wide_mediastinum" in found, form
