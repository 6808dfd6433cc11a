"""The names of public label sets are read: a class that links to nothing brings no knowledge."""

import pytest

from mlip.knowledge.linker import default_linker

# names as the data sets write them; "No Finding" and "other ..." name no one thing
NAMES = {
    "NIH ChestX-ray14": "Atelectasis, Cardiomegaly, Consolidation, Edema, Effusion, Emphysema,"
    "Fibrosis, Hernia, Infiltration, Mass, Nodule, Pleural_Thickening, Pneumonia, Pneumothorax",
    "CheXpert": "Enlarged Cardiomediastinum, Cardiomegaly, Lung Opacity, Lung Lesion, Edema,"
    "Consolidation, Pneumonia, Atelectasis, Pneumothorax, Pleural Effusion, Pleural Other,"
    " Fracture",
    "VinDr-CXR": "Aortic enlargement, Atelectasis, Calcification, Cardiomegaly, Clavicle fracture,"
    "Consolidation, Edema, Emphysema, Enlarged PA, ILD, Infiltration, Lung Opacity, Lung cavity,"
    "Lung cyst, Mediastinal shift, Nodule/Mass, Pleural effusion, Pleural thickening, Pneumothorax,"
    "Pulmonary fibrosis, Rib fracture, COPD, Lung tumor, Pneumonia, Tuberculosis",
    "CXR-LT": "Calcification of the Aorta, Pneumomediastinum, Pneumoperitoneum, Tortuous Aorta,"
    "Subcutaneous Emphysema, Adenopathy, Azygos Lobe, Granuloma, Hydropneumothorax, Infarction,"
    "Kyphosis, Lobar Atelectasis, Pulmonary Embolism, Pulmonary Hypertension, Rounded atelectasis,"
    "Bulla, Cardiomyopathy, Clavicle Fracture",
    "PadChest": "abscess, air trapping, alveolar pattern, aortic atheromatosis, aortic elongation,"
    "aortic button enlargement, aortic endoprosthesis, artificial mitral heart valve, bone cement,"
    "axial hyperostosis, breast mass, calcified fibroadenoma, chilaiditi sign, cyst, dai, obesity,"
    "double J stent, dual chamber device, electrical device, esophagic dilatation, gynecomastia,"
    "fissure thickening, heart insufficiency, heart valve calcified, hilar congestion, lipomatosis,"
    "laminar atelectasis, lepidic adenocarcinoma, lung vascular paucity, "
    "lymphangitis carcinomatosa,"
    "lytic bone lesion, mammary prosthesis, mediastinic lipomatosis, miliary opacities, NSG tube,"
    "minor fissure thickening, nephrostomy tube, osteosynthesis material, pectum carinatum,"
    "post radiotherapy changes, pulmonary artery enlargement, reticular interstitial pattern,"
    "round atelectasis, soft tissue mass, subacromial space narrowing, surgery lung,"
    "pneumoperitoneo,"
    "thoracic cage deformation, total atelectasis, tuberculosis sequelae, vertebral compression,"
    "ventriculoperitoneal drain tube, vertebral anterior compression",
}
CASES = [(of, name.strip()) for of, names in NAMES.items() for name in names.split(",")]


@pytest.fixture(scope="module")
def linker():
    return default_linker()


def findings_of(linker, text):
    found = linker.link(text)
    assert all(one.state == "present" for one in found)
    kinds = {one.concept_id: linker.table[one.concept_id].semantic_type for one in found}
    return {name for name, kind in kinds.items() if kind not in ("anatomy", "qualifier", "normal")}


@pytest.mark.parametrize(("of", "name"), CASES, ids=[f"{of}: {name}" for of, name in CASES])
def test_a_label_of_a_public_data_set_names_a_concept(linker, of, name):
    assert findings_of(linker, name.replace("_", " "))


@pytest.mark.parametrize(
    ("name", "concepts"),
    [
        ("Enlarged PA", {"dilated_pulmonary_artery"}),  # held for pulmonary hypertension before
        ("pulmonary artery hypertension", {"pulmonary_hypertension"}),
        ("ILD", {"interstitial_lung_disease"}),
        ("Aortic enlargement", {"dilated_aorta"}),
        ("Enlarged Cardiomediastinum", {"wide_mediastinum"}),
        ("mammary prosthesis", {"breast_implant"}),  # was hardware of a joint
        ("Infarction", {"pulmonary_infarct"}),  # another class than Pulmonary Embolism
        ("Hernia", {"hiatal_hernia"}),
        ("Nodule/Mass", {"lung_nodule", "lung_mass"}),
        ("supra aortic elongation", set()),  # of the vessels above the arch
    ],
)
def test_a_label_means_this_concept_and_no_other(linker, name, concepts):
    assert findings_of(linker, name) == concepts


@pytest.mark.parametrize(
    "text",
    [
        "Inguinal hernia repair.",
        "Renal cyst.",
        "Old myocardial infarction.",
        "Liver abscess.",
        "Enlarged PA and lateral views.",
        "Pedal swelling in the legs.",
        "Bilateral leg swelling and dyspnea.",
        "Left arm swelling with PICC.",
        "Dental abscess with fever.",
        "Perirectal abscess.",
        "Intravenous drug use and spinal abscess.",
        "Right MCA infarct, intubated.",
        "Cerebellar infarction.",
        "ST elevation infarct.",
        "Pilonidal cyst.",
        "Cyst in the left kidney.",
        "Pre-operative radiograph for hernia repair.",
        "Spigelian hernia.",
    ],
)
def test_what_lies_elsewhere_in_the_body_is_not_of_the_chest(linker, text):
    of_the_chest = {"hiatal_hernia", "lung_cyst", "pulmonary_infarct", "lung_abscess"}
    of_the_chest |= {"dilated_pulmonary_artery", "soft_tissue_swelling"}
    assert not findings_of(linker, text) & of_the_chest


@pytest.mark.parametrize(
    ("text", "concept"),
    [
        ("Thoracic surgery consultation is recommended.", "postsurgical_change"),
        ("Patient going for cardiac surgery.", "postsurgical_change"),
        ("Overlying electronic devices obscure the left base.", "pacemaker"),
        ("Hip endoprosthesis.", "stent"),
        ("Status post esophagectomy with colonic interposition.", "chilaiditi"),
        ("Normal mediastinal fat planes.", "mediastinal_lipomatosis"),
        ("Displaced sixth rib fracture without callus formation.", "fracture"),
    ],
)
def test_words_of_a_label_mean_another_thing_in_a_report(linker, text, concept):
    assert concept not in {one.concept_id for one in linker.link(text)}


@pytest.mark.parametrize(
    ("text", "concept"),
    [
        ("Sternal wires, s/p cardiac surgery.", "postsurgical_change"),
        ("Cardiac electronic device in the left chest wall.", "pacemaker"),
        ("Hip endoprosthesis.", "orthopedic_hardware"),
        ("Colonic interposition beneath the right hemidiaphragm.", "chilaiditi"),
        ("Rib with callus formation.", "fracture"),
        ("Hiatal hernia repair in 2019.", "hiatal_hernia"),
        ("Swelling of the chest wall.", "soft_tissue_swelling"),
    ],
)
def test_beside_the_excluded_words_the_finding_is_read(linker, text, concept):
    assert concept in {one.concept_id for one in linker.link(text)}


def test_miliary_nodules_are_nodules(linker):
    assert "lung_nodule" in linker.table["miliary_opacities"].parents


def test_the_upper_limit_of_normal_is_normal(linker):
    # of 56 public reports that say so two are indexed as cardiomegaly
    for text in (
        "Heart size is at the upper limits of normal.",
        "The heart is top normal in size.",
        "The cardiac silhouette is near upper limits of normal for size.",
    ):
        assert [one.concept_id for one in linker.link(text)] == ["normal_heart_size"]


def test_one_clear_lung_does_not_say_that_both_are(linker):
    found = {one.concept_id for one in linker.link("The left lung is clear. Right effusion.")}
    assert "left_lung" in found and "clear_lungs" not in found
    hyperexpanded = linker.link("Lungs are mildly hyperexpanded but clear.")
    assert "hyperinflation" in {one.concept_id for one in hyperexpanded}  # was swallowed
