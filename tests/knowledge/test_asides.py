"""Asides: what "rather than X", "status post X" and a denied "increase in X" say of X alone.

Oracle: states written by hand, P present, A absent, U uncertain (docs/knowledge.md says why).
"""

import pytest

from tests.knowledge.sentences import check_states

SENTENCES = {
    "what the rest of a statement is rather than is denied": """
        This is atelectasis rather than pneumonia. | atelectasis=P pneumonia=A
        Rather than consolidation this is atelectasis. | consolidation=A atelectasis=P
        Rather than a nodule this represents a granuloma. | lung_nodule=A granuloma=P
        Small effusion. Instead of edema, there is scarring. | pulmonary_edema=A scar=P
        Scarring, rather than a nodule. | scar=P lung_nodule=A
        Atelectasis at the left base as opposed to pneumonia. | atelectasis=P pneumonia=A
        Pleural thickening rather than effusion is seen. | pleural_thickening=P pleural_effusion=A
        Atelectasis is present instead of pneumonia. | atelectasis=P pneumonia=A
        PICC rather than a pacemaker lead. | picc=P pacemaker=A
    """,
    "it reaches over what 'or' joins to it and no further": """
        Scar rather than mass or a small nodule in the base. | scar=P lung_mass=A lung_nodule=A
        Atelectasis rather than pneumonia and small effusion. | pneumonia=A pleural_effusion=P
        Atelectasis rather than pneumonia, effusion. | pneumonia=A pleural_effusion=P
        Atelectasis rather than pneumonia with edema. | pneumonia=A pulmonary_edema=P
        Atelectasis rather than pneumonia, no edema. | pneumonia=A pulmonary_edema=A
        Rather than a pacemaker this is a port. | pacemaker=A port_catheter=P
        Scar rather than something else but a nodule is seen. | scar=P lung_nodule=P
        Scar rather than something else and there is a nodule. | scar=P lung_nodule=P
        Rather than mass or nodule a granuloma is seen. | lung_mass=A lung_nodule=A granuloma=P
        Tube in the bronchus rather than the trachea, effusion. | trachea=P pleural_effusion=P
    """,
    "a hedge before or behind it leaves both open": """
        Likely atelectasis rather than pneumonia. | atelectasis=U pneumonia=U
        Findings suggest edema instead of pneumonia. | pulmonary_edema=U pneumonia=U
        Atelectasis rather than pneumonia is suspected. | atelectasis=U pneumonia=U
        Atelectasis rather than pneumonia is favored. | atelectasis=U pneumonia=U
        Opacity is favored to reflect atelectasis. | lung_opacity=P atelectasis=U
        Opacity is favored as atelectasis. | lung_opacity=P atelectasis=U
    """,
    "between two qualities it denies no finding": """
        Chronic rather than acute rib fracture. | rib_fracture=P
        Small rather than moderate effusion. | pleural_effusion=P
        Calcified rather than soft granuloma. | granuloma=P
        Calcified granuloma rather than nodule. | calcified_granuloma=P lung_nodule=A
        Acute rather than chronic fracture. | fracture=U
        Linear rather than nodular opacity. | lung_opacity=U
        An artifact rather than pneumothorax. | pneumothorax=U
    """,
    "what was done to the patient is there": """
        No pneumothorax status post chest tube placement. | pneumothorax=A chest_tube=P
        No pneumothorax s/p chest tube placement. | pneumothorax=A chest_tube=P
        No edema, s/p CABG. | pulmonary_edema=A bypass_graft=P
        No edema, s/p lobectomy, effusion. | lung_resection=P pleural_effusion=P
        No pneumothorax post placement of a chest tube. | pneumothorax=A chest_tube=P
        Possible edema status post CABG. | pulmonary_edema=U bypass_graft=P
        No edema status post CABG and valve replacement. | bypass_graft=P prosthetic_valve=P
        No edema status post CABG, effusion or mass. | pleural_effusion=A lung_mass=A
        No edema status post biopsy or effusion. | pulmonary_edema=A pleural_effusion=A
        No pneumothorax status post chest tube removal. | pneumothorax=A chest_tube=A
        No pneumothorax status post removal of the chest tube. | pneumothorax=A chest_tube=A
        Effusion status post thoracentesis has resolved. | pleural_effusion=A
    """,
    "a denied change leaves what it is of": """
        No mass or interval increase in effusion. | lung_mass=A pleural_effusion=P
        No mass or change in the effusion or edema. | pleural_effusion=P pulmonary_edema=P
        No mass nor worsening of the edema. | lung_mass=A pulmonary_edema=P
        No mass, increase in effusion, or fracture. | pleural_effusion=P fracture=A
        No mass or further growth of the nodule, edema, or scar. | lung_nodule=P scar=A
        No evidence of increase in effusion. | pleural_effusion=P
        No sign of improvement in the edema. | pulmonary_edema=P
        No small mass, small nodule or increase in edema. | lung_nodule=A pulmonary_edema=P
        Increase in effusion or edema. | pleural_effusion=U pulmonary_edema=U
        No mass or changes in keeping with edema. | lung_mass=A pulmonary_edema=A
        No mass, changes in keeping with edema, or scar. | pulmonary_edema=A scar=A
        No mass, growth of the nodule, or effusion. | lung_nodule=P pleural_effusion=A
        No mass or change in effusion and edema. | pleural_effusion=P pulmonary_edema=P
        Possible increase in effusion. | pleural_effusion=U
        No mass or new effusion. | lung_mass=A pleural_effusion=A
        No mass or interval development of effusion. | lung_mass=A pleural_effusion=A
    """,
}


@pytest.mark.parametrize("rule", SENTENCES)
def test_states_of_sentences(rule):
    check_states(SENTENCES[rule])
