"""Abbreviations of chest reports: which concept each is, and where it is another's.

Oracle: what they stand for in common lists of radiological abbreviations, written by hand.
"""

import pytest

from tests.knowledge.sentences import check_states

SENTENCES = {
    "findings": """
        Multiple old rib fxs. | rib_fracture=P
        Old fx's of the ribs. | rib_fracture=P
        T8 comp fx, hip fxs. | compression_fracture=P fracture=P
        Bilateral PTXs, no PNX. | pneumothorax=P
        R pleural eff, LLL atel, RLL infil. | pleural_effusion=P atelectasis=P infiltrate=P
        No ptx/eff. | pneumothorax=A pleural_effusion=A
        SQ emphysema along the chest wall. | subcutaneous_emphysema=P emphysema=-
        Lung mets, bone mets. | metastasis=P
        DJD of the spine. | degenerative_spine=P
        DJD of the left shoulder. | degenerative_spine=-
        ASCVD, HTN and PAH. | atherosclerosis=P hypertension=P pulmonary_hypertension=P
    """,
    "devices": """
        RIJ line, HD catheter, TDC in the RA. | central_venous_catheter=P catheter=-
        PA catheter tip in the RPA. | swan_ganz_catheter=P
        NG in the stomach. | enteric_tube=P
        NJ tube, G-tube. | enteric_tube=P tube=-
        UAC and UVC in place. | catheter=P
        Impella, no ILR. | ventricular_assist_device=P nerve_stimulator=A
        No PleurX. | chest_tube=A
        S/p TEVAR and TMVR. | stent=P prosthetic_valve=P
        Troponin 5 ng/ml, 0.5 ng/mL. | enteric_tube=-
        Left pigtail, Quinton catheter. | chest_tube=P central_venous_catheter=P
    """,
    "what has a second meaning": """
        VAD in the chest wall with its tip in the SVC. | ventricular_assist_device=-
        Cirrhosis and PHTN with varices. | pulmonary_hypertension=-
        Dr. Quinton was told of the pneumothorax. | central_venous_catheter=- pneumothorax=P
        Told to Dr. Ng, dr ng. Dictated by: Ng, MD | enteric_tube=-
        Biliary pigtail, pigtail nephrostomy. | chest_tube=-
        S/p right PNX. | pneumothorax=-
    """,
    "fractions and ejection fractions": """
        Received 5 fxs. | fracture=-
        Received 5 fx to the right lung. | fracture=-
        Completed 12 fxs of radiation. | fracture=-
        She has received 30 fxs. | fracture=-
        Delivered 8 fx, no pneumothorax. | fracture=- pneumothorax=A
        Sustained 5 fxs. | fracture=P
        Received treatment for 5 fxs. | fracture=U
        Received a PICC, 5 old fxs. | picc=P fracture=P
        5 fxs of the ribs. | rib_fracture=P
        Completed healing of 5 fxs. | fracture=P
        LV eff 55%. | pleural_effusion=-
        L eff 50%. | pleural_effusion=P
        Large eff, 50% of the hemithorax. | pleural_effusion=P
    """,
    "normal statements": """
        Heart size WNL, mediastinum nl. | normal_heart_size=P normal_mediastinum=P
        Nl heart. CP angles sharp. | normal_heart_size=P normal_pleura=P
        Effusion and heart size WNL. | pleural_effusion=P
        Effusion with heart WNL. | pleural_effusion=P
        Neg CXR. | no_acute_disease=P
        No acute CP process. | no_acute_disease=P
    """,
}


@pytest.mark.parametrize("kind", SENTENCES)
def test_states_of_sentences(kind: str) -> None:
    check_states(SENTENCES[kind])
