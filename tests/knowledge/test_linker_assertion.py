"""Ways of doubting, denying and dating a finding, in other words than the rules' own examples.

Oracle: labels written by hand, P present, A absent, U uncertain (docs/knowledge.md says which is
which); the concept's first mention counts.
"""

from collections import defaultdict

import pytest

from mlip.knowledge.cues import english_cues
from mlip.knowledge.linker import default_linker, link
from mlip.knowledge.report_lines import joined_lines
from tests.knowledge.sentences import LETTER, check_states

SENTENCES = {
    "the improbable is uncertain": """
        Superimposed infection is thought to be unlikely. | lung_infection=U
        There is atelectasis and pneumonia is unlikely. | atelectasis=P pneumonia=U
        Aspiration and edema are unlikely. | aspiration=U pulmonary_edema=U
        Aspiration or edema unlikely. | aspiration=U pulmonary_edema=U
        Mild scarring at the apex, a nodule being less likely. | scar=P lung_nodule=U
        Dense opacity reflecting edema, less likely hemorrhage. | lung_opacity=P pulmonary_edema=P
        This could be scar or, less likely, a small nodule. | scar=U lung_nodule=U
        Bibasilar opacities, less likely infectious. | lung_opacity=P
        An underlying mass seems improbable. | lung_mass=U
        I doubt a significant effusion. | pleural_effusion=U
        Tuberculosis is considered doubtful. | tuberculosis=U
        Small effusion, infection not favored. | pleural_effusion=P lung_infection=U
        Heart failure is not suspected. | heart_failure=U
        The nodule is unlikely to represent a granuloma. | lung_nodule=P granuloma=U
        There is a low likelihood of pneumothorax. | pneumothorax=U
        Low suspicion for malignancy. | malignancy=U
        A finding of doubtful significance beside the known effusion. | pleural_effusion=P
        There is no doubt that the effusion is larger. | pleural_effusion=P
    """,
    "of two compared both stay open, what is rejected is denied": """
        Edema is less likely than pneumonia. | pulmonary_edema=U pneumonia=U
        Scarring is favored over a mass. | scar=U lung_mass=U
        The opacity reflects scar rather than a mass. | lung_opacity=P scar=P lung_mass=A
        Congestion as opposed to pneumonia is present. | vascular_congestion=P pneumonia=A
    """,
    "not consistent with is denied evidence": """
        Not compatible with heart failure. | heart_failure=A
        The pattern is not in keeping with edema. | pulmonary_edema=A
        Appearance inconsistent with tuberculosis. | tuberculosis=A
    """,
    "an answer alone denies its question": """
        Consolidation: No | consolidation=A
        Pleural effusion: no; rib fracture: no; cardiomegaly: yes | rib_fracture=A cardiomegaly=P
        Nodule: negative, atelectasis: present. | lung_nodule=A atelectasis=P
        Effusion or edema: No. | pleural_effusion=A pulmonary_edema=A
        Pulmonary edema = no. | pulmonary_edema=A
        Tuberculosis: no evidence. | tuberculosis=A
        Pneumothorax? No. | pneumothorax=A
        Nodule present: no | lung_nodule=A
        Left effusion resolved. | pleural_effusion=A
        Small effusion with no shift. | pleural_effusion=P
        Lungs: no infiltrate. | infiltrate=A
        Gram negative pneumonia. | pneumonia=P
    """,
    "a sign in brackets is the answer to what stands before it, or leads what follows": """
        Pleural effusion (-). | pleural_effusion=A
        Effusion(-), pneumothorax(-), cardiomegaly(+) | pneumothorax=A cardiomegaly=P
        Effusion (+) pneumothorax (-) nodule (+) | pleural_effusion=P pneumothorax=A lung_nodule=P
        Effusion (-) pneumothorax (+) | pleural_effusion=A pneumothorax=P
        Pneumothorax: (-), consolidation: (+). | pneumothorax=A consolidation=P
        Rib fracture: -, edema: +, mass: - | rib_fracture=A pulmonary_edema=P lung_mass=A
        Effusion/pneumothorax (-). | pleural_effusion=A pneumothorax=A
        Small effusion, pneumothorax (-). | pleural_effusion=P pneumothorax=A
        No pneumothorax, effusion (+). | pneumothorax=A pleural_effusion=P
        (-) effusion, (+) cardiomegaly. | pleural_effusion=A cardiomegaly=P
        (+) cardiomegaly (-) effusion (-) edema | cardiomegaly=P pulmonary_edema=A
        Cough (-), (+) consolidation and (-) nodule. | consolidation=P lung_nodule=A
        Hepatitis (-), small effusion. | pleural_effusion=P
        Small effusion - no pneumothorax. | pleural_effusion=P pneumothorax=A
    """,
    "what clears in part or nearly is there": """
        Partial clearing of the edema. | pulmonary_edema=P
        Near-complete resolution of the effusion. | pleural_effusion=P
        The effusions have nearly completely resolved. | pleural_effusion=P
        The infiltrate has almost entirely disappeared. | infiltrate=P
        The infiltrate has disappeared. | infiltrate=A
    """,
    "what cannot be excluded is open whatever is denied before it": """
        Absence of a fracture line does not exclude a rib fracture. | rib_fracture=U
        No effusion despite cardiomegaly. | pleural_effusion=A cardiomegaly=P
        No effusion in spite of cardiomegaly. | pleural_effusion=A cardiomegaly=P
    """,
    "other words that deny, doubt or do neither": """
        Nothing to suggest edema or effusion. | pulmonary_edema=A pleural_effusion=A
        Not without a small effusion. | pleural_effusion=P
        There is no reason to doubt the mass. | lung_mass=P
        Check for effusion. | pleural_effusion=U
        Admitted for pneumonia last week. | pneumonia=U
        A bulla mimics a pneumothorax. | bulla=P pneumothorax=U
        Poss. edema, prob. effusion. | pulmonary_edema=U pleural_effusion=U
        Opacity c/f pneumonia. | lung_opacity=P pneumonia=U
    """,
    "an answer behind a comma": """
        Effusion, no. | pleural_effusion=A
        Effusion, no, pneumothorax, no. | pleural_effusion=A pneumothorax=A
        Cardiomegaly, yes; rib fracture, no. | cardiomegaly=P rib_fracture=A
        Pneumothorax, negative. | pneumothorax=A
        Nodule (no). | lung_nodule=A
        Pneumothorax: No Effusion: Yes Mass: No | pneumothorax=A pleural_effusion=P lung_mass=A
        Lungs: No effusion Heart: enlarged | pleural_effusion=A
        Edema: possible. | pulmonary_edema=U
        Lungs: possible nodule. | lung_nodule=U
        Small effusion, no pneumothorax. | pleural_effusion=P pneumothorax=A
        Small effusion, no significant change. | pleural_effusion=P
    """,
    "neg for and nil": """
        Neg for effusion or edema. | pleural_effusion=A pulmonary_edema=A
        Neg. for pneumothorax. | pneumothorax=A
        Nil focal consolidation. | consolidation=A
        Pneumothorax: nil. | pneumothorax=A
    """,
    "a heading is no statement beside what stands behind it": """
        Pneumothorax: No pneumothorax. Effusion: Small. | pneumothorax=A pleural_effusion=P
        Pleural effusion: There is no left pleural effusion. | pleural_effusion=A
        Edema: Possible mild edema. | pulmonary_edema=U
        Fracture: No rib fracture. | fracture=A rib_fracture=A
        Pneumothorax: Small. No pneumothorax on the left. | pneumothorax=P
        Nodule: right nodule, no left nodule. | lung_nodule=P
        Pneumothorax: unchanged | pneumothorax=P
    """,
    "what was not there before is new": """
        Left base consolidation not previously present. | consolidation=P
        An opacity which was not evident on the prior study. | lung_opacity=P
        Small right pneumothorax, not visible on the previous film. | pneumothorax=P
        A nodule that was not there before. | lung_nodule=P
        Streaky atelectasis, not seen previously. | atelectasis=P
        The effusion seen on the prior study is not seen. | pleural_effusion=A
        The pneumothorax is not seen on the current study. | pneumothorax=A
    """,
    "what an examination is asked to rule out is uncertain": """
        Rule out effusion. | pleural_effusion=U
        Kindly rule out a rib fracture. | rib_fracture=U
        Exclude malignancy. | malignancy=U
        Chest CT rules out an embolism or mass. | lung_mass=A
        CT excludes a mass. | lung_mass=A
        Query nodule at the left apex. | lung_nodule=U
        Correlate clinically for aspiration. | aspiration=U
    """,
    "w/o is without": """
        Hyperinflation w/o consolidation or effusion. | consolidation=A pleural_effusion=A
        Stable scarring w/o nodule. | scar=P lung_nodule=A
        Old granuloma, w/o edema. | granuloma=P pulmonary_edema=A
        Effusion w/o interval worsening of edema. | pulmonary_edema=P
    """,
    "no worsening leaves the finding": """
        No deterioration of the consolidation. | consolidation=P
        Without significant worsening of the edema. | pulmonary_edema=P
        No further enlargement of the left effusion. | pleural_effusion=P
        No interval progression of the fibrosis. | pulmonary_fibrosis=P
        No enlargement of the cardiac silhouette. | cardiomegaly=A
    """,
    "unclear whether is uncertain": """
        It is not clear whether there are nodules. | lung_nodule=U
        Uncertain whether there was an effusion. | pleural_effusion=U
        Unclear if this is atelectasis. | atelectasis=U
        It was unclear whether there are rib fractures. | rib_fracture=U
        It is indeterminate whether there is a mass. | lung_mass=U
    """,
    "either opens alternatives": """
        Opacity due to either hemorrhage or edema. | lung_opacity=P pulmonary_edema=U
        Either scar or a small nodule at the apex. | scar=U lung_nodule=U
        Reflects either aspiration or infection. | aspiration=U lung_infection=U
        Scarring at either apex and effusion. | scar=P pleural_effusion=P
        No effusion on either side. | pleural_effusion=A
    """,
    "a subject with its own predicate ends a list": """
        No pneumothorax, aorta tortuous. | pneumothorax=A tortuous_aorta=P
        No effusion or edema, cardiac silhouette mildly enlarged. | cardiomegaly=P
        No infiltrate and heart moderately enlarged. | infiltrate=A cardiomegaly=P
        No consolidation, left hemidiaphragm elevated. | consolidation=A elevated_diaphragm=P
        No effusion, enlarged heart, or edema. | cardiomegaly=A pulmonary_edema=A
        No effusion, heart not enlarged. | cardiomegaly=A
        No effusion, pneumothorax. | pneumothorax=A
    """,
    "a name begins a statement as its first word does": """
        No pleural effusion, mild atelectasis. | pleural_effusion=A atelectasis=P
        No pneumothorax, calcified granuloma in the apex. | pneumothorax=A calcified_granuloma=P
        No effusion or edema, healed rib fracture. | pulmonary_edema=A rib_fracture=P
        No effusion, low lung volumes. | pleural_effusion=A low_lung_volumes=P
        No pneumothorax, left lower lobe consolidation. | pneumothorax=A consolidation=P
        No edema, calcified granuloma, or effusion. | calcified_granuloma=A pleural_effusion=A
        No pneumothorax, old rib fracture, mass, or edema. | rib_fracture=A pulmonary_edema=A
        No effusion and minimal atelectasis. | pleural_effusion=A atelectasis=P
        No effusion with mild atelectasis. | pleural_effusion=A atelectasis=P
        Possible pneumonia and old rib fracture. | pneumonia=U rib_fracture=P
    """,
    "with and lists": """
        No effusion with small nodule. | pleural_effusion=A lung_nodule=P
        Possible effusion with small nodule. | pleural_effusion=U lung_nodule=U
        Possible effusion, nodule, and scar. | pleural_effusion=U lung_nodule=U scar=U
        Possible effusion, nodule or scar. | pleural_effusion=U lung_nodule=U scar=U
        No edema or less likely infection. | pulmonary_edema=A lung_infection=A
        No effusion and scar, the heart is enlarged. | scar=A cardiomegaly=P
        The pattern may be compatible with mild edema. | pulmonary_edema=U
        No signs consistent with chronic edema. | pulmonary_edema=A
    """,
    "a device taken out is gone and a fault denied leaves it": """
        Stable effusion status post pigtail catheter removal. | pleural_effusion=P chest_tube=A
        Interval PICC removal. | picc=A
        The pacemaker leads have been explanted. | pacemaker=A
        The chest tube was withdrawn. | chest_tube=A
        The ETT was withdrawn 2 cm. | endotracheal_tube=P
        The PICC was withdrawn, now in the axillary vein. | picc=P
        The NG tube should be removed. | enteric_tube=P
        No port catheter fracture or effusion. | port_catheter=P pleural_effusion=A
        Without endotracheal tube malposition. | endotracheal_tube=P
        No evidence of pacemaker malfunction. | pacemaker=P
        No pacemaker. | pacemaker=A
    """,
    "a question mark written to a word leads it": """
        Right base opacity, ?pneumonia. | lung_opacity=P pneumonia=U
        Opacity (?scar) and an effusion? | lung_opacity=U scar=U pleural_effusion=U
        No effusion, ?nodule in the apex. | pleural_effusion=A lung_nodule=U
        Pneumothorax?No. | pneumothorax=A
        Edema?Effusion is small. | pulmonary_edema=U pleural_effusion=P
        Effusion? | pleural_effusion=U
    """,
    "what an image is too poor for is open": """
        Pneumothorax cannot be evaluated. | pneumothorax=U
        The bases are not included, and effusion cannot be assessed. | pleural_effusion=U
        Pneumothorax: not assessed. | pneumothorax=U
        The nodule is not well evaluated. | lung_nodule=P
        Supine technique limits sensitivity for pneumothorax. | pneumothorax=U
        Assessment for pneumothorax is limited by skin folds. | pneumothorax=U skin_fold=P
        Possible nodule obscured by the pacemaker. | lung_nodule=U pacemaker=P
        It is difficult to exclude a small pneumothorax. | pneumothorax=U
    """,
    "other hedges": """
        Small effusion possible. | pleural_effusion=U
        No pneumonia suspected. | pneumonia=A
        Atelectasis favored; pneumonia less likely. | atelectasis=U pneumonia=U
        Favored atelectasis. | atelectasis=U
        Opacity is indeterminate for pneumonia. | lung_opacity=P pneumonia=U
        Vague opacity, ? scar. | lung_opacity=P scar=U
        Vague opacity (? scar). | lung_opacity=P scar=U
        Effusions are probably present. | pleural_effusion=U
        Infection should be excluded. | lung_infection=U
        Malignancy has not been excluded. | malignancy=U
        Infection could have this appearance. | lung_infection=U
        Pneumonia is on the differential. | pneumonia=U
        Pneumonia is not out of the question. | pneumonia=U
        Suspicious for but not diagnostic of pneumonia. | pneumonia=U
        DDx: pneumonia, edema. | pneumonia=U pulmonary_edema=U
        Effusion, h/o CHF. | pleural_effusion=P heart_failure=U
        Opacity s/o PNA. | lung_opacity=P pneumonia=U
        Assess for interval change in effusion. | pleural_effusion=P
        Recommend removal of the PICC. | picc=P
        Near resolution of the edema. | pulmonary_edema=P
        No consolidation beyond atelectasis. | consolidation=A atelectasis=P
        Not c/w CHF. | heart_failure=A
        Effusion w/ atelectasis w/o pneumothorax. | atelectasis=P pneumothorax=A
    """,
    "the verb may stand before what it denies": """
        Absent are pneumonia and a mass. | pneumonia=A
        Absent are pneumonia and mass. | pneumonia=A lung_mass=A
        Not seen are edema, nodules and a large effusion. | pulmonary_edema=A lung_nodule=A
        No longer visible is the left pneumothorax. | pneumothorax=A
        Gone is the mass. | lung_mass=A
        The mass is gone. | lung_mass=A
        The nodule, not seen on the prior film, is calcified. | lung_nodule=P
        Nodule is absent, as are effusion and edema. | pleural_effusion=A pulmonary_edema=A
        The mass is unchanged, as is the effusion. | lung_mass=P pleural_effusion=P
        No edema but the mass is old, as is the effusion. | lung_mass=P pleural_effusion=P
        This view failed to show a pneumothorax. | pneumothorax=A
        None of the ribs shows a fracture. | fracture=A
        Edema resolved and effusion smaller. | pulmonary_edema=A pleural_effusion=P
        Status post treatment for tuberculosis. | tuberculosis=U
    """,
    "an earlier examination and a relative are history": """
        In the previous radiograph there was a left effusion. | pleural_effusion=U
        On the last exam, there were effusions, now resolved. | pleural_effusion=A
        Earlier CT demonstrated a nodule. | lung_nodule=U
        Her sister had emphysema. | emphysema=U
        Father with tuberculosis. | tuberculosis=U
        Compared to the prior exam there was growth of the nodule. | lung_nodule=P
    """,
}
# kinds that one wording may have together, each decided by its order in scope.resolve
ON_PURPOSE = {
    ("negation_before", "or"),  # nor
    ("answer", "negation_before"),  # no, nil, no evidence
    ("answer", "negation_after", "negation_before"),  # resolved
    ("uncertain_after", "uncertain_before"),  # cannot exclude
    ("positive", "said_behind", "seen"),  # again seen
    ("be", "seen"),  # is again seen
    ("be", "normal"),  # is intact
    ("predicate", "strong"),  # tortuous
    ("negation_after", "normal"),  # within normal limits
    ("negation_after_one", "normal"),  # is normal
    ("normal", "strong"),  # normal, intact
    ("be", "change"),  # has increased
    ("denied_clause", "negation_before"),  # no evidence that
    ("choice", "or"),  # or, and / or, /
    ("choice", "limit", "or"),  # or larger
    ("change_of", "or"),  # or increase in
    ("change_of", "more"),  # increase in
    ("more", "unchanged"),  # no increase in
    ("change_of", "more", "or"),  # or increase in
    ("change_of", "strong"),  # interval increase
    ("and", "limit"),  # and larger
    ("past", "strong"),  # status post
    ("clause", "uncertain_before"),  # does not exclude
    ("strong", "weak"),  # definite
    ("said_behind", "strong"),  # stable
    ("said_behind", "weak"),  # small
    ("normal", "said_behind", "strong"),  # intact
    ("be", "object"),  # shows
    ("indefinite", "weak"),  # a
    ("history", "uncertain_before"),  # hx of
    ("current", "said_behind", "weak"),  # new
    ("current", "said_behind"),  # increasing
    ("negation_after", "removal"),  # are not seen, as they were removed
    ("negation_after_one", "removal"),  # is not seen, as it was removed
}


@pytest.mark.parametrize("row", SENTENCES)
def test_states_of_sentences(row):
    check_states(SENTENCES[row])


def test_answers_written_line_by_line_stay_apart():
    text = joined_lines("Pneumothorax: No\nEffusion: No\nCardiomegaly: Yes")
    assert [LETTER[mention.state] for mention in link(text)] == ["A", "A", "P"]


def test_answers_in_signs_and_behind_commas_stay_apart_line_by_line():
    text = joined_lines("Edema (-)\nEffusion, no\nNodule: -\nPneumothorax: +\nMass: no mass")
    assert [LETTER[mention.state] for mention in link(text)] == ["A", "A", "A", "P", "A", "A"]


def test_a_sign_leaves_the_places_of_mentions():
    text = "Effusion (-), pneumothorax: (+) and nodule."
    spans = [(text[m.start : m.end], m.state) for m in link(text)]
    assert spans == [("Effusion", "absent"), ("pneumothorax", "present"), ("nodule", "present")]


def test_no_two_wordings_of_cues_share_a_key_across_kinds():
    linker = default_linker()
    kinds, wordings = defaultdict(set), defaultdict(set)
    for kind, forms in english_cues().items():
        for form in forms:
            kinds[linker.key(form)].add(kind)
            wordings[linker.key(form)].add(form)
    shared = [key for key, names in kinds.items() if len(names) > 1]
    assert [sorted(wordings[key]) for key in shared if len(wordings[key]) > 1] == []
    assert {tuple(sorted(kinds[key])) for key in shared} == ON_PURPOSE
