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
        No mass, interval increase in effusion, or fracture. | pleural_effusion=P fracture=A
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
        No obvious progression of the fibrosis. | pulmonary_fibrosis=P
        No displacement of the rib fracture. | rib_fracture=P
    """,
    "the enlargement of a part is a finding, that of a finding is a change": """
        No effusion or enlargement of the heart. | pleural_effusion=A cardiomegaly=A
        No effusion, enlargement of the heart, or mass. | cardiomegaly=A lung_mass=A
        No enlargement of cardiac silhouette. | cardiomegaly=A
        No effusion or enlargement of the left hilum. | pleural_effusion=A hilar_prominence=A
        No enlargement of the mediastinum or lymph nodes. | wide_mediastinum=A
        No mass or enlargement of hilar lymph nodes. | lung_mass=A lymphadenopathy=A
        No mass or enlargement of the thyroid. | lung_mass=A goiter=A
        No effusion or enlargement of the known nodule. | pleural_effusion=A lung_nodule=P
        No enlargement of the effusion. | pleural_effusion=P
        No evidence of enlargement of the mass. | lung_mass=P
        No effusion, enlargement of the nodule, or fracture. | lung_nodule=P fracture=A
        No nodal enlargement or effusion. | pleural_effusion=A
        Borderline enlargement of cardiac silhouette. | borderline_cardiomegaly=P
    """,
    "what everybody has is a finding where there is more of it": """
        No edema or increase in interstitial markings. | pulmonary_edema=A prominent_markings=A
        No edema, effusion, or increase in the lung markings. | prominent_markings=A
        No increase in interstitial markings. | prominent_markings=A
        No significant increase in interstitial markings. | prominent_markings=A
        No increase in size, interstitial markings unchanged. | prominent_markings=P
        No increase in markings or effusion. | prominent_markings=A pleural_effusion=A
        No edema or interval increase in markings. | pulmonary_edema=A prominent_markings=P
        No change in interstitial markings. | prominent_markings=P
        Increase in interstitial markings, no edema. | prominent_markings=P pulmonary_edema=A
        No increase in effusion or edema. | pleural_effusion=P pulmonary_edema=P
        Edema, markings: none. | pulmonary_edema=A prominent_markings=A
    """,
    "the place or cause of what is denied is there": """
        No calcification in the nodule. | calcification=A lung_nodule=P
        No cavitation within the left upper lobe mass. | cavity=A lung_mass=P
        No mass to account for the effusion. | lung_mass=A pleural_effusion=P
        No pneumothorax related to the new pacemaker. | pneumothorax=A pacemaker=P
        No effusion adjacent to the mass, edema or scar. | pleural_effusion=A scar=A
        No calcification in the nodule or cavity. | lung_nodule=P cavity=A
        Without effusion or the nodule. | pleural_effusion=A lung_nodule=A
        No edema or evidence of the nodule. | pulmonary_edema=A lung_nodule=A
        No effusion in the left base or the nodule. | pleural_effusion=A lung_nodule=A
        No residual of the pneumothorax. | pneumothorax=A
        No evidence of the previously seen effusion. | pleural_effusion=A
        No edema in this patient with CHF. | pulmonary_edema=A heart_failure=P
        No finding to explain fever or atelectasis. | atelectasis=P
        No effusion in the region of the nodule. | pleural_effusion=A lung_nodule=P
    """,
    "where it lies is no cause: what a denied finding would mean is denied": """
        No opacity in the lungs to suggest pneumonia. | lung_opacity=A pneumonia=A
        No consolidation in the right lower lobe suggestive of pneumonia. | pneumonia=A
        No opacity at the bases concerning for aspiration pneumonia. | pneumonia=A
        No lucency along the pleura to suggest pneumothorax. | pneumothorax=A
        No consolidation to indicate the clinically suspected pneumonia. | pneumonia=A
        No mass in the right upper lobe causing atelectasis. | lung_mass=A atelectasis=A
        No fracture of the ribs with pneumothorax. | pneumothorax=A
        No edema the lungs are hyperinflated. | pulmonary_edema=A hyperinflation=P
        No consolidation in the right upper lobe mass. | consolidation=A lung_mass=P
    """,
    "a device that could not be placed is not there, an attempt is open": """
        S/p failed PICC placement. | picc=A
        No pneumothorax status post failed PICC placement. | pneumothorax=A picc=A
        Status post unsuccessful right subclavian line placement. | central_venous_catheter=A
        Failed attempt at PICC placement, small effusion. | picc=A pleural_effusion=P
        PICC placement was unsuccessful. | picc=A
        Chest tube insertion failed. | chest_tube=A
        A PICC could not be placed. | picc=A
        PICC was not placed. | picc=A
        No pneumothorax status post attempted PICC placement. | pneumothorax=A picc=U
        Several attempts at PICC placement, now in the SVC. | picc=P
        Failed PICC. | picc=P
        Failed pacemaker and a small effusion. | pacemaker=P pleural_effusion=P
        No fracture status post failed pacemaker. | fracture=A pacemaker=P
        No pneumothorax status post PICC placement. | pneumothorax=A picc=P
        The feeding tube was not placed, effusion persists. | enteric_tube=A pleural_effusion=P
        NG tube is not inserted far enough. | enteric_tube=P
        The PICC is not placed in the SVC but in the azygos. | picc=P
        Failed therapy requiring chest tube placement. | chest_tube=P
        No edema status post failed therapy requiring chest tube placement. | chest_tube=P
        Failed attempt at the PICC placement. | picc=A
        Attempted PICC. | picc=U
        Failed needle aspiration requiring chest tube placement. | chest_tube=P
        After failed PICC placement a small pneumothorax is seen. | picc=A pneumothorax=P
        Status post attempted PICC placement with new pneumothorax. | picc=U pneumothorax=P
        Attempted thoracentesis with resulting pneumothorax. | pneumothorax=P
        Pneumothorax following attempted PICC placement. | pneumothorax=P picc=U
    """,
    "what is not assessed is open, unless it is said to be there": """
        Pneumothorax on this supine film cannot be evaluated. | pneumothorax=U
        Effusion and pneumothorax cannot be evaluated. | pleural_effusion=U pneumothorax=U
        The presence of pneumothorax cannot be determined. | pneumothorax=U
        Effusion: not assessed. | pleural_effusion=U
        Endotracheal tube tip cannot be assessed. | endotracheal_tube=P
        Large left effusion so that the left base cannot be evaluated. | pleural_effusion=P
        Because of the large effusion the left base cannot be evaluated. | pleural_effusion=P
        Due to the pneumothorax, heart size cannot be accurately determined. | pneumothorax=P
        The extent of the pneumothorax cannot be assessed. | pneumothorax=P
        The cause of the large opacity is not determined. | lung_opacity=P
        Effusion obscures the heart, whose size cannot be assessed. | pleural_effusion=P
        Nodule for which CT should be considered. | lung_nodule=P
        The nodule has grown and biopsy should also be considered. | lung_nodule=P
        Nodules, metastases must also be considered. | lung_nodule=P metastasis=U
        Cardiomegaly with small effusion likely. | cardiomegaly=P pleural_effusion=U
        Small effusion or pneumothorax possible. | pleural_effusion=U pneumothorax=U
    """,
    "where its tip is not seen the device is": """
        The tip of the nasogastric tube is not seen. | enteric_tube=P
        ETT tip not visualized. | endotracheal_tube=P
        The tip of the ETT on this film is not seen. | endotracheal_tube=P
        NG tube with its tip not seen. | enteric_tube=P
        The side port of the enteric tube is not visualized. | enteric_tube=P
        The PICC is not seen. | picc=A
        The tip of the chest tube is kinked and has been removed. | chest_tube=A
        The PICC with its tip in the SVC has been removed. | picc=A
    """,
    "what a clinical setting would make of it is open": """
        Pneumonia in the appropriate clinical setting. | pneumonia=U
        Left consolidation, pneumonia, in the right clinical setting. | consolidation=P pneumonia=U
        Opacity consistent with edema in the proper clinical context. | pulmonary_edema=U
        Nodule consistent with scar in the right clinical setting. | lung_nodule=P scar=U
        In the appropriate clinical setting, this is compatible with pneumonia. | pneumonia=U
        Opacity, which in the proper clinical setting is pneumonia. | lung_opacity=P pneumonia=U
        Opacity, in the proper clinical setting, may be pneumonia. | lung_opacity=P pneumonia=U
        Edema vs pneumonia in the appropriate clinical setting. | pulmonary_edema=U pneumonia=U
        Small effusion and pneumonia in the right clinical setting. | pleural_effusion=P pneumonia=U
        No pneumonia in the appropriate clinical setting. | pneumonia=A
        In the appropriate clinical setting pneumonia. Effusion. | pneumonia=U pleural_effusion=P
        In the appropriate clinical setting, pneumonia. | pneumonia=U
        In the proper clinical setting, opacity may be pneumonia. | lung_opacity=P pneumonia=U
        Consolidation in the base in the right clinical setting is edema. | consolidation=P
        Edema in the proper clinical setting, effusion is noted. | pleural_effusion=P
        Consolidation in the base in the right clinical setting represents edema. | consolidation=P
        Opacity could be edema in the proper clinical setting, scar is noted. | scar=P
    """,
    "what an earlier film did not assess is there": """
        Nodule not assessed on prior radiograph. | lung_nodule=P
        The nodule was not evaluated on the prior study. | lung_nodule=P
        Effusion, not assessed on the previous exam. | pleural_effusion=P
        Effusion not evaluated on the comparison film. | pleural_effusion=P
        Nodule was not assessed previously. | lung_nodule=P
        Nodule could not be assessed on the prior CT. | lung_nodule=P
        Nodule not assessed on prior, no effusion. | lung_nodule=P pleural_effusion=A
        No nodule, not assessed on prior radiograph. | lung_nodule=A
        Possible nodule not assessed on prior radiograph. | lung_nodule=U
        The left base was not evaluated on the prior, small effusion. | pleural_effusion=P
        Pneumothorax was not assessed on this study. | pneumothorax=U
        Pneumothorax not assessed, effusion as on prior. | pneumothorax=U pleural_effusion=P
        Effusion cannot be evaluated on this supine film. | pleural_effusion=U
        Nodule not assessed. Prior radiograph normal. | lung_nodule=U
        Nodule not assessed on prior or current radiographs. | lung_nodule=U
        Effusion cannot be evaluated on the prior and this supine film. | pleural_effusion=U
        Effusion was not evaluated on the prior or the present study. | pleural_effusion=U
        Pneumothorax cannot be assessed on comparison to the prior. | pneumothorax=U
        Nodule not assessed on prior and a small effusion. | lung_nodule=P pleural_effusion=P
        Nodule not assessed on prior and present today. | lung_nodule=P
    """,
    "where the device was removed its tip shows none": """
        The distal end of the PICC is no longer seen, as it was removed. | picc=A
        The tip of the PICC is not seen as it has been removed. | picc=A
        The PICC is no longer seen, as it was removed. | picc=A
        The PICC on the right is no longer seen, because it was removed. | picc=A
        The tips of the chest tubes are not seen, as they were removed. | chest_tube=A
        PICC and ETT on the right are no longer seen, as they were removed. | picc=A
        The effusion is no longer seen, as it was drained. | pleural_effusion=A
        PICC tip is not seen as it was removed, a pacemaker is present. | picc=A pacemaker=P
        The tip of the PICC is no longer seen. | picc=P
        The tip of the PICC is not seen, as it was not included. | picc=P
        The tip of the NG tube is not seen, as it is below the film. | enteric_tube=P
        The distal end of the PICC is not seen, as the arm was removed from the field. | picc=P
        The tip of the PICC is not seen, as it was withdrawn slightly. | picc=P
        The tip of the PICC is not seen, as it was removed from the field of view. | picc=P
    """,
}


@pytest.mark.parametrize("rule", SENTENCES)
def test_states_of_sentences(rule):
    check_states(SENTENCES[rule])
