"""Findings that a report leaves open by joining them: "atelectasis or pneumonia".

Oracle: states written by hand, P present, A absent, U uncertain (docs/knowledge.md says why).
"""

import pytest

from mlip.knowledge.concepts import ConceptTable
from mlip.knowledge.cues import english_cues
from mlip.knowledge.linker import Linker, default_linker, link
from tests.knowledge.sentences import check_states

SENTENCES = {
    "of two joined neither is stated": """
        Edema or pneumonia in the right base. | pulmonary_edema=U pneumonia=U
        Scarring and/or atelectasis. | scar=U atelectasis=U
        Consistent with scar or granuloma. | scar=U granuloma=U
        Atelectasis or early developing pneumonia. | atelectasis=U pneumonia=U
        Edema or possibly pneumonia. | pulmonary_edema=U pneumonia=U
        Edema, or less likely a small scar. | pulmonary_edema=U scar=U
        Scar at the left base or atelectasis. | scar=U atelectasis=U
        Scar or left basilar atelectasis. | scar=U atelectasis=U
        Edema or aspiration or pneumonia. | pulmonary_edema=U aspiration=U pneumonia=U
        Edema, new consolidation, or effusion. | pulmonary_edema=U consolidation=U
        Nodule or left base atelectasis. | lung_nodule=U left_base=P atelectasis=U
        Opacity in the left lung versus scar. | lung_opacity=P left_lung=P scar=U
    """,
    "what stands beside them is judged as ever": """
        Left opacity, scar or atelectasis. | lung_opacity=P scar=U atelectasis=U
        Cardiomegaly and edema or pneumonia. | cardiomegaly=P pulmonary_edema=U pneumonia=U
        Edema or pneumonia with an effusion. | pulmonary_edema=U pneumonia=U pleural_effusion=P
        No effusion but scar or atelectasis. | pleural_effusion=A scar=U atelectasis=U
        Opacity represents linear or platelike atelectasis. | lung_opacity=P atelectasis=P
        Effusion is stable or slightly larger than the mass. | pleural_effusion=P lung_mass=P
    """,
    "a comma before the last joins the list": """
        Opacity from edema, aspiration, or pneumonia. | pulmonary_edema=U aspiration=U pneumonia=U
        Edema, a small scar, or pneumonia. | pulmonary_edema=U scar=U pneumonia=U
        Effusion on the left, scar, or pneumonia. | pleural_effusion=P scar=U pneumonia=U
    """,
    "denied they are denied": """
        No edema or pneumonia. | pulmonary_edema=A pneumonia=A
        No edema and/or pneumonia. | pulmonary_edema=A pneumonia=A
        Effusion or edema is not seen. | pleural_effusion=A pulmonary_edema=A
        No effusion/edema. | pleural_effusion=A pulmonary_edema=A
    """,
    "a list of denials stays one over its qualities": """
        No large effusion, definite pneumothorax or fracture. | pneumothorax=A fracture=A
        No evidence of pneumonia, calcified granuloma or mass. | calcified_granuloma=A lung_mass=A
        I do not see an effusion, definite infiltrate or pneumothorax. | infiltrate=A pneumothorax=A
        No consolidation, large effusion, or overt edema. | pleural_effusion=A pulmonary_edema=A
        No effusion, visible pneumothorax, or consolidation. | pneumothorax=A consolidation=A
        No effusion or visible pneumothorax, or consolidation. | pneumothorax=A consolidation=A
        Effusion, visible pneumothorax or edema is not seen. | pleural_effusion=A pneumothorax=A
        No consolidation, radiographically apparent edema or mass. | pulmonary_edema=A lung_mass=A
        No consolidation or suggestion of edema, or pneumothorax. | pulmonary_edema=A pneumothorax=A
        No definite or suspected effusion. | pleural_effusion=A
        Effusion, edema or pneumothorax have not developed. | pleural_effusion=A pneumothorax=A
        Pneumothorax or effusion has not developed. | pneumothorax=A pleural_effusion=A
    """,
    "what a list of denials does not reach": """
        No effusion, calcified granuloma. | pleural_effusion=A calcified_granuloma=P
        No effusion, definite pneumothorax. | pleural_effusion=A pneumothorax=P
        No effusion and definite pneumothorax. | pleural_effusion=A pneumothorax=P
        No effusion, possible edema or scar. | pleural_effusion=A pulmonary_edema=U scar=U
        No effusion visible, scar or atelectasis. | pleural_effusion=A
        Possible edema, definite effusion, scar or nodule. | pleural_effusion=P scar=U lung_nodule=U
        Possible edema with definite effusion. | pulmonary_edema=U pleural_effusion=P
    """,
    "a normal statement that denies begins such a list": """
        No acute cardiopulmonary disease, effusion or edema. | pleural_effusion=A pulmonary_edema=A
        No acute disease, effusion, or pneumothorax. | pleural_effusion=A pneumothorax=A
        No acute cardiopulmonary process or effusion. | no_acute_disease=P pleural_effusion=A
        No bony abnormality or pneumothorax. | normal_bones=P pneumothorax=A
        Negative for acute abnormality, effusion or mass. | pleural_effusion=A lung_mass=A
        No acute disease or effusion, cardiomegaly. | pleural_effusion=A cardiomegaly=P
        No acute disease, cardiomegaly. | cardiomegaly=P
        No acute disease, left effusion, and scar. | pleural_effusion=P scar=P
        Heart is not enlarged, small effusion, and scar. | pleural_effusion=P scar=P
        No acute disease with cardiomegaly. | cardiomegaly=P
        No acute disease and cardiomegaly. | cardiomegaly=P
        No acute disease cardiomegaly. | cardiomegaly=P
        No acute disease, mild atelectasis or scar. | atelectasis=U scar=U
        No acute disease is seen, scar or atelectasis. | scar=U atelectasis=U
        No acute disease; scar or atelectasis. | scar=U atelectasis=U
        Normal chest or small effusion. | pleural_effusion=P
        Lungs clear, scar or atelectasis at the apex. | scar=U atelectasis=U
    """,
    "a denied change is of findings that are there": """
        No significant change in the effusion or edema. | pleural_effusion=P pulmonary_edema=P
        Without worsening of edema or effusion. | pulmonary_edema=P pleural_effusion=P
        No change in mass, but scar or atelectasis. | lung_mass=P scar=U atelectasis=U
    """,
    "the word joins places, sizes, numbers and words of one finding too": """
        Consolidation in the lingula or left lower lobe. | consolidation=P
        Consolidation in the lingula or left lower lobe atelectasis. | consolidation=P
        A nodule of 3 or 4 mm. | lung_nodule=P
        There is a nodule or two in the right lung. | lung_nodule=P
        Atelectasis, more or less unchanged pneumonia. | atelectasis=P pneumonia=P
        There is tortuosity and/or ectasia of the abdominal aorta. | tortuous_aorta=P
        Edema slowly clearing from the left base or scar. | pulmonary_edema=P scar=P
        Scar or something quite unlike any pneumonia. | scar=U pneumonia=P
        Chest tube or drain in place. | chest_tube=P drain=P
        No pacemaker lead fracture or displacement. | pacemaker=P
    """,
    "what holds of either is there": """
        Effusion or hemothorax on the left. | pleural_effusion=P hemothorax=U
        Compatible with infection or pneumonia. | lung_infection=P pneumonia=U
        A nodule or mass in the left apex. | lung_nodule=P lung_mass=P
        Infiltrate or airspace disease. | infiltrate=P lung_opacity=P
        Tortuous aorta or tortuosity of the aorta. | tortuous_aorta=P
    """,
    "a word of no concept is an alternative": """
        A nodule or overlying vessel. | lung_nodule=U
        Atelectasis or XXXX at the base. | atelectasis=U
        The nodule is old or a vessel. | lung_nodule=P
        Or scar in the left apex and pneumonia. | scar=P pneumonia=P
    """,
    "a stroke is no or": """
        Infiltrate/atelectasis on the left. | infiltrate=P atelectasis=P
        Effusion/ left lung is clear. | pleural_effusion=P
        Granuloma / histoplasmoma. | granuloma=P
    """,
    "with or without leaves open what follows": """
        Edema with or without an effusion. | pulmonary_edema=P pleural_effusion=U
    """,
}


@pytest.mark.parametrize("rule", SENTENCES)
def test_states_of_sentences(rule):
    check_states(SENTENCES[rule])


def test_cues_without_the_kind_leave_nothing_open():
    """A kept table with cues of its own, made before this rule, links as it did."""
    cues = {kind: forms for kind, forms in english_cues().items() if kind != "choice"}
    linker = Linker(ConceptTable(default_linker().table, cues=cues))
    text = "Scarring or atelectasis. Edema and/or pneumonia. No effusion or mass."
    states = ["present"] * 4 + ["absent"] * 2
    assert [mention.state for mention in linker.link(text)] == states
    assert [mention.state for mention in link(text)] == ["uncertain"] * 4 + ["absent"] * 2
