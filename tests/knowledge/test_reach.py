"""How far a denial reaches: which findings behind a comma, "and" or a verb it still denies.

Oracle: states written by hand, P present, A absent, U uncertain (docs/knowledge.md says why).
"""

import pytest

from tests.knowledge.sentences import check_states

SENTENCES = {
    "a subject that is denied denies all that its verb shows": """
        Neither lung shows consolidation, effusion or nodule. | pleural_effusion=A lung_nodule=A
        Neither lung demonstrates edema, mass, or scar. | pulmonary_edema=A lung_mass=A scar=A
        Neither side has effusion or pneumothorax. | pleural_effusion=A pneumothorax=A
        Neither edema nor effusion is seen. | pulmonary_edema=A pleural_effusion=A
        Neither lung shows edema, and the PICC is unchanged. | pulmonary_edema=A picc=P
        Neither lung shows edema, mild scoliosis. | pulmonary_edema=A scoliosis=P
        No problem in lungs is seen, granuloma. | granuloma=P
        No nodule shows calcification, effusion. | lung_nodule=A pleural_effusion=P
    """,
    "qualities of one finding are a list": """
        No displaced, healing or acute fracture. | fracture=A
        No acute, old, or healing rib fracture or effusion. | rib_fracture=A pleural_effusion=A
        There is no new, stable or improved edema. | pulmonary_edema=A
        No effusion, healing or old fracture. | pleural_effusion=A fracture=P
        No old, healing, stable or new fracture. | fracture=A
        No effusion, healing fracture. | pleural_effusion=A fracture=P
        No PICC, stable or improved edema. | picc=A pulmonary_edema=P
        Displaced, healing or acute fracture. | fracture=P
    """,
    "what 'and a' begins is no list of denials": """
        There is no edema, and a small effusion is seen. | pulmonary_edema=A pleural_effusion=P
        No pneumothorax and an effusion on the left. | pneumothorax=A pleural_effusion=P
        No evidence of a nodule and an effusion. | lung_nodule=A pleural_effusion=A
        There is no edema, and small effusions are seen. | pleural_effusion=P
        No edema or mass, and small effusions are not seen. | lung_mass=A pleural_effusion=A
        No edema, mass, and large effusion are seen. | lung_mass=A pleural_effusion=A
        No edema or mass, and large effusion is seen. | lung_mass=A pleural_effusion=A
        No edema and large effusion is seen. | pulmonary_edema=A pleural_effusion=A
        No edema, mass, and effusion. | lung_mass=A pleural_effusion=A
        Possible edema and a nodule. | pulmonary_edema=U lung_nodule=U
        Consistent with an effusion and a nodule. | pleural_effusion=P lung_nodule=P
    """,
    "what is said behind a finding makes a statement of it": """
        No edema, atelectasis unchanged. | pulmonary_edema=A atelectasis=P
        No pneumothorax or edema, effusion small. | pulmonary_edema=A pleural_effusion=P
        No edema and pleural effusion stable. | pulmonary_edema=A pleural_effusion=P
        No pneumothorax, ETT in good position. | pneumothorax=A endotracheal_tube=P
        No pneumothorax with chest tube in place. | pneumothorax=A chest_tube=P
        No mass, effusion, stable nodule. | pleural_effusion=A lung_nodule=P
        No mass or edema, effusion unchanged or nodule. | pleural_effusion=P
        No mass, edema or effusion unchanged. | pulmonary_edema=A pleural_effusion=A
        No edema, fracture involving small ribs. | fracture=A
        No effusion, pneumothorax lungs clear. | pneumothorax=A
        Possible edema and effusion stable. | pulmonary_edema=U pleural_effusion=U
        No edema, only scarring. | pulmonary_edema=A scar=P
        No edema, a mild scar, or mass. | scar=A lung_mass=A
    """,
    "a device behind denied findings is there": """
        No edema, PICC tip in the SVC. | pulmonary_edema=A picc=P
        No edema, ETT, PICC and pacemaker unchanged. | endotracheal_tube=P picc=P pacemaker=P
        No effusion, right chest tube. | pleural_effusion=A chest_tube=P
        No effusion, pacemaker or mass. | pacemaker=A lung_mass=A
        No pacemaker, PICC, chest tube. | pacemaker=A picc=A chest_tube=A
        No effusion, edema, PICC. | pulmonary_edema=A picc=P
        No PICC or edema, chest tube. | picc=A chest_tube=A
        Possible edema, PICC. | pulmonary_edema=U picc=P
        Possible edema, pacemaker, and mass. | pacemaker=U lung_mass=U
        No pneumothorax and sternal wires are intact. | pneumothorax=A sternal_wires=P
        No pneumothorax, PICC again noted. | pneumothorax=A picc=P
        No effusion, right atrium pacemaker. | pleural_effusion=A pacemaker=P
        No PICC, no edema, chest tube. | picc=A pulmonary_edema=A chest_tube=P
    """,
    "a size or a use behind a finding is a part of its name, a comparison a statement": """
        No nodule, mass larger than 1 cm. | lung_nodule=A lung_mass=A
        No mass, nodule smaller than 5 mm or scar. | lung_nodule=A scar=A
        No mass and nodule larger than 5 mm. | lung_mass=A lung_nodule=A
        No edema, effusion large enough to drain, or mass. | pleural_effusion=A lung_mass=A
        No edema, effusion smaller than before. | pulmonary_edema=A pleural_effusion=P
        No edema and nodule larger than on the prior film. | lung_nodule=P
        No edema, effusion persisting. | pulmonary_edema=A pleural_effusion=P
        No edema, effusion unchanged beside the scar. | pleural_effusion=P
        No edema, effusion small nodule. | pulmonary_edema=A pleural_effusion=A
        No edema, small scar but no mass or effusion. | scar=P lung_mass=A pleural_effusion=A
    """,
    "a size before or right behind a finding begins a statement": """
        No effusion, 8 mm nodule. | pleural_effusion=A lung_nodule=P
        No pneumothorax, 1.2 x 0.8 cm mass in the left lung. | pneumothorax=A lung_mass=P
        No effusion, 8mm nodule. | pleural_effusion=A lung_nodule=P
        No effusion, 5-6-mm nodule. | lung_nodule=P
        No effusion, 5 or 6 mm nodule. | pleural_effusion=A lung_nodule=P
        No edema, left upper lobe 9 mm nodule. | pulmonary_edema=A lung_nodule=P
        No edema, nodule measuring 8 mm. | pulmonary_edema=A lung_nodule=P
        No edema and 8 mm nodule, or mass. | pulmonary_edema=A lung_nodule=P
        No edema with 8 mm nodule. | pulmonary_edema=A lung_nodule=P
        No edema, subcentimeter nodule. | pulmonary_edema=A lung_nodule=P
        No edema, sub-5-mm nodule. | pulmonary_edema=A lung_nodule=P
        No edema, mass, sub-centimeter nodule or effusion. | lung_nodule=A pleural_effusion=A
        No edema, 8 mm nodule or granuloma. | pulmonary_edema=A lung_nodule=U granuloma=U
        No edema, 8 mm nodule, or effusion. | lung_nodule=A pleural_effusion=A
        Possible edema, 8 mm nodule. | pulmonary_edema=U lung_nodule=P
        No effusion, 5 mm nodule or pneumonia. | pleural_effusion=A lung_nodule=U pneumonia=U
        Possible nodule, 8 mm, mass, or granuloma. | lung_nodule=U lung_mass=U granuloma=U
        Atelectasis or 8 mm nodule. | atelectasis=U lung_nodule=U
    """,
    "a limit begins none, nor does a size of what is denied": """
        No edema, or 8 mm nodule. | pulmonary_edema=A lung_nodule=A
        No edema, effusion, or 3 cm mass. | pleural_effusion=A lung_mass=A
        No nodule or mass larger than 1 cm. | lung_nodule=A lung_mass=A
        No edema, nodules > 4 mm. | pulmonary_edema=A lung_nodule=A
        No edema, >5mm nodule. | pulmonary_edema=A lung_nodule=A
        No edema, over 3 cm mass or effusion. | lung_mass=A pleural_effusion=A
        No edema, 1 cm or larger mass. | pulmonary_edema=A lung_mass=A
        No edema, mass 1 cm or larger. | pulmonary_edema=A lung_mass=A
        No small effusion, small mass or larger nodule. | lung_mass=A lung_nodule=A
        Effusion or larger mass. | pleural_effusion=U lung_mass=U
        No 3 mm, 5 mm or 8 mm nodule. | lung_nodule=A
        Without effusion or the 8 mm nodule seen previously. | pleural_effusion=A lung_nodule=A
        No edema, nodule and 8 mm mass. | lung_nodule=A lung_mass=P
        No edema, effusion, 2 cm above the carina. | pleural_effusion=A
        No nodule, 8 mm previously, effusion. | lung_nodule=A pleural_effusion=A
        No nodule \u2265 6 mm. | lung_nodule=A
        No effusion, nodule \u2265 6 mm. | pleural_effusion=A lung_nodule=A
        No effusion, \u22656mm nodule. | lung_nodule=A
        No effusion, nodule >= 6 mm. | lung_nodule=A
        No effusion, nodule measuring at least 6 mm. | lung_nodule=A
        No effusion, at least 6 mm nodule. | lung_nodule=A
        No effusion, nodule 6 mm or more. | lung_nodule=A
        No effusion, nodule of 6 mm and larger. | lung_nodule=A
        No effusion, at least moderate edema. | pleural_effusion=A pulmonary_edema=P
        New or more conspicuous nodule. | lung_nodule=P
    """,
    "what cannot be the measured finding ends the list by 'or'": """
        No consolidation, 8 mm nodule or effusion. | lung_nodule=A pleural_effusion=A
        No edema, 5 mm nodule or pneumothorax. | lung_nodule=A pneumothorax=A
        No edema, 8 mm calcified granuloma or effusion. | calcified_granuloma=A pleural_effusion=A
        No edema, 8 mm nodule or fracture. | lung_nodule=U fracture=U
        No edema, 8 mm nodule or interstitial lung disease. | lung_nodule=U
        Consolidation, 8 mm nodule or effusion. | lung_nodule=U pleural_effusion=U
        No edema, 8 mm nodule, effusion or scar. | lung_nodule=P
    """,
    "behind a whole list what is seen is a statement": """
        No effusion or mass, scoliosis is noted. | lung_mass=A scoliosis=P
        No effusion or pneumothorax, scarring in the apices is seen. | pneumothorax=A scar=P
        Neither effusion nor mass, scoliosis is noted. | lung_mass=A scoliosis=P
        No effusion and no mass, scoliosis is noted. | lung_mass=A scoliosis=P
        No mass or nodule, edema, effusion is seen. | pulmonary_edema=A pleural_effusion=A
        No edema or mass, cardiomegaly and effusion are noted. | cardiomegaly=P pleural_effusion=P
        No effusion or mass, scoliosis or fracture is seen. | scoliosis=A fracture=A
        No acute or chronic fracture, dislocation is seen. | fracture=A dislocation=A
        No effusion in the right or left base, pneumothorax is seen. | pneumothorax=A
        No edema or mass, and large effusion is seen. | lung_mass=A pleural_effusion=A
        No effusion or mass, scoliosis is not seen. | scoliosis=A
        No effusion or mass, scoliosis. | lung_mass=A scoliosis=A
    """,
    "of two that 'and' joins the doubt behind is of the second where the first is denied": """
        No effusion and pneumonia cannot be excluded. | pleural_effusion=A pneumonia=U
        No edema in the left base and a nodule is suspected. | pulmonary_edema=A lung_nodule=U
        No edema, and pneumonia or aspiration is not excluded. | pulmonary_edema=A aspiration=U
        No pneumothorax, effusion and pneumonia is possible. | pleural_effusion=A pneumonia=U
        No effusion and pneumonia unlikely. | pleural_effusion=A pneumonia=U
        Effusion and pneumonia cannot be excluded. | pleural_effusion=U pneumonia=U
        No evidence that edema and effusion have resolved. | pulmonary_edema=P pleural_effusion=P
        No effusion and pneumonia has resolved. | pleural_effusion=A pneumonia=A
    """,
    "a bare finding behind a comma that is seen is the last of a list": """
        No effusion, pneumothorax is seen. | pleural_effusion=A pneumothorax=A
        No effusion, edema, pneumothorax is identified. | pulmonary_edema=A pneumothorax=A
        No effusion, a pneumothorax is seen. | pleural_effusion=A pneumothorax=P
        No effusion, small pneumothorax is seen. | pleural_effusion=A pneumothorax=P
        No effusion, pneumothorax is again seen. | pleural_effusion=A pneumothorax=P
    """,
    "what is gone up or down is there": """
        The effusion has gone down. | pleural_effusion=P
        Effusions have gone from small to moderate. | pleural_effusion=P
        The edema has gone. | pulmonary_edema=A
        The edema is gone, effusion gone up. | pulmonary_edema=A pleural_effusion=P
    """,
    "'with', 'the' and what is seen again begin a statement behind a comma": """
        No edema, with atelectasis at the base. | pulmonary_edema=A atelectasis=P
        No edema, with possible effusion. | pulmonary_edema=A pleural_effusion=U
        No edema, with associated effusion, mass, or scar. | pleural_effusion=A scar=A
        No edema, the nodule again measures 8 mm. | pulmonary_edema=A lung_nodule=P
        No evidence of the edema, the mass, or the scar. | lung_mass=A scar=A
        Possible edema, the effusion or the mass. | pleural_effusion=U
        No edema or mass, and cardiomegaly is again seen. | lung_mass=A cardiomegaly=P
        No edema, cardiomegaly again noted. | pulmonary_edema=A cardiomegaly=P
        No edema, mass, again noted scoliosis. | lung_mass=A scoliosis=P
        No edema, interval increase in effusion. | pulmonary_edema=A pleural_effusion=P
        No pneumonia, just atelectasis. | pneumonia=A atelectasis=P
        No edema, mass versus scar. | pulmonary_edema=A lung_mass=U scar=U
        No edema, mass, or effusion versus scar. | lung_mass=A pleural_effusion=A
    """,
    "a denial that stands first denies what follows": """
        Absent edema, effusion and mass. | pulmonary_edema=A pleural_effusion=A lung_mass=A
        Absent left effusion, mild scoliosis. | pleural_effusion=A scoliosis=P
        Unremarkable scar. | scar=P
        Effusion absent, edema or mass. | pleural_effusion=A lung_mass=U
        None of edema, effusion or mass is seen. | pulmonary_edema=A lung_mass=A
        None of the following is seen: edema, effusion or mass. | pulmonary_edema=A lung_mass=A
        Several nodules, none of them new. | lung_nodule=P
        Effusion: none of note. | pleural_effusion=A
        Neither the left nor the right lung shows edema, scar or mass. | scar=A lung_mass=A
    """,
    "what stands behind a second comma ends the list there, not before": """
        No edema, effusion, heart is enlarged. | pleural_effusion=A cardiomegaly=P
        No edema, effusion, nodule is unchanged. | pleural_effusion=A lung_nodule=P
        No edema, mass, PICC unchanged. | lung_mass=A picc=P
        No edema, effusion, scoliosis versus kyphosis. | pleural_effusion=A scoliosis=U
        No effusion, or mass, scoliosis is noted. | lung_mass=A scoliosis=P
        No effusion or large mass in the left lung, scoliosis is noted. | scoliosis=P
        Possible edema, or larger than 8 mm nodule. | pulmonary_edema=U lung_nodule=U
    """,
    "behind 'and' or 'with' what is new is no history": """
        Hx of lung cancer with new effusion. | lung_cancer=U pleural_effusion=P
        History of CHF with new small effusion. | heart_failure=U pleural_effusion=P
        H/o lung cancer with new nodules. | lung_cancer=U lung_nodule=P
        History of lung cancer and new effusion. | lung_cancer=U pleural_effusion=P
        History of CHF with increased interstitial markings. | prominent_markings=P
        History of CHF and pneumonia with new effusion. | pneumonia=U pleural_effusion=P
        History of trauma with new rib fractures. | rib_fracture=P
        History of lung cancer with new or increased effusion. | pleural_effusion=P
        History of lung cancer with new effusion and nodule. | pleural_effusion=P lung_nodule=P
        History of CHF with increasing effusions. | pleural_effusion=P
        History of CHF with small new effusion. | pleural_effusion=P
        History of CHF and a moderate new effusion. | pleural_effusion=P
        History of cancer with a new nodule. | malignancy=U lung_nodule=P
        History of cancer with the new nodule. | malignancy=U lung_nodule=P
        Hx of lung cancer, new effusion. | lung_cancer=U pleural_effusion=P
        History of pneumonia with old rib fracture. | pneumonia=U rib_fracture=P
        History of lung cancer with effusion. | lung_cancer=U pleural_effusion=U
        History of CHF with small effusion. | heart_failure=U pleural_effusion=U
        History of edema or new effusion. | pulmonary_edema=U pleural_effusion=U
    """,
    "a hedge that is no history reaches over what is new, as over all else": """
        History of lung cancer with new effusion or edema. | pleural_effusion=U pulmonary_edema=U
        Hx of lung cancer with possible new effusion. | lung_cancer=U pleural_effusion=U
        Hx of lung cancer with no new effusion. | lung_cancer=U pleural_effusion=A
        Hx of cancer, evaluate for edema and new effusion. | pleural_effusion=U
        Mother has a history of lung cancer with new nodule. | lung_cancer=U lung_nodule=U
        Prior exam showed effusion with new nodule. | pleural_effusion=U lung_nodule=U
        History of CHF with new pneumonia? | heart_failure=U pneumonia=U
        History of CHF, rule out pneumonia and new infiltrate. | pneumonia=U infiltrate=U
        History of lung cancer with new nodule versus scar. | lung_nodule=U scar=U
        History of lung cancer with new nodule suspected. | lung_nodule=U
        History of COPD with increased risk for pneumonia. | pneumonia=U
        History of smoking and increased risk of lung cancer. | lung_cancer=U
        History of cancer with a small nodule, effusion. | lung_nodule=U pleural_effusion=P
        Possible pneumonia with new effusion. | pneumonia=U pleural_effusion=U
        Assess for edema with new pneumothorax. | pulmonary_edema=U pneumothorax=U
        Evaluate for edema and new effusion. | pulmonary_edema=U pleural_effusion=U
        No history of lung cancer and new effusion. | lung_cancer=A pleural_effusion=A
        No history of lung cancer or new effusion. | lung_cancer=A pleural_effusion=A
    """,
}


@pytest.mark.parametrize("rule", SENTENCES)
def test_states_of_sentences(rule):
    check_states(SENTENCES[rule])
