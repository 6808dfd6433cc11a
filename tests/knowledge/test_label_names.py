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
    ],
)
def test_what_lies_elsewhere_in_the_body_is_not_of_the_chest(linker, text):
    of_the_chest = {"hiatal_hernia", "lung_cyst", "pulmonary_infarct", "lung_abscess"}
    of_the_chest |= {"dilated_pulmonary_artery", "soft_tissue_swelling"}
    assert not findings_of(linker, text) & of_the_chest


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
