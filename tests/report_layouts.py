"""Fakes of sets with reports of 2024 and 2025, in the layouts that public readers of them state.

Shared by the tests of the collectors and of configs/transfer; raw_layouts.py has the older sets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tests.raw_layouts import HEIGHT, WIDTH, image, table

CHEXPERT_PLUS = (
    "path_to_image,path_to_dcm,frontal_lateral,ap_pa,deid_patient_id,patient_report_date_order,"
    "report,section_narrative,section_clinical_history,section_history,section_comparison,"
    "section_technique,section_procedure_comments,section_findings,section_impression,"
    "section_end_of_impression,section_summary,section_accession_number,age,sex,race,ethnicity,"
    "interpreter_needed,insurance_type,recent_bmi,deceased,split"
)
PLUS_LABELS = ("No Finding", "Edema", "Fracture", "Pneumonia")
PLUS_FOLDERS = {"png": "PNG/PNG", "dcm": "DICOM/Uncompressed", "jpg": "CheXpert-v1.0-small"}


def plus_row(patient: int, study: int, view: str = "view1_frontal", **given: object) -> dict:
    """One row of the table of CheXpert Plus; cells that are not given are usual ones."""
    split = str(given.get("split", "train"))
    path = f"{split}/patient{patient:05d}/study{study}/{view}"
    is_front = view.endswith("frontal")
    row: dict[str, object] = {
        **dict.fromkeys(CHEXPERT_PLUS.split(","), ""),
        **{"path_to_image": f"{path}.jpg", "path_to_dcm": f"{path}.dcm", "split": split},
        **{"frontal_lateral": "Frontal" if is_front else "Lateral", "ap_pa": "AP" * is_front},
        **{"deid_patient_id": f"patient{patient:05d}", "patient_report_date_order": study},
        **{"report": "NARRATIVE:\nChest 1 View\n\nIMPRESSION:\n\n1.Edema.\n\nSUMMARY: 2-ABNORMAL"},
        **{"section_narrative": "Chest 1 View, 8-8-2005", "section_impression": "1. Edema."},
        **{"section_end_of_impression": "2-ABNORMAL", "age": "62.0", "sex": "Female"},
    }
    return {**row, **given}


def plus_states(row: Mapping[str, object], **states: float | None) -> dict[str, object]:
    """One line of CheXbert's labels for a row."""
    named = {name.replace("_", " "): state for name, state in states.items()}
    return {"path_to_image": row["path_to_image"], **dict.fromkeys(PLUS_LABELS), **named}


def write_chexpert_plus(
    root: Path,
    rows: list[dict[str, object]],
    labels: Mapping[str, list[dict[str, object]]],
    files: str = "png",
    images: bool = True,
) -> None:
    """Table, labels by section and images of the rows."""
    cells = [[row[name] for name in CHEXPERT_PLUS.split(",")] for row in rows]
    table(root / "df_chexpert_plus_240401.csv", CHEXPERT_PLUS, cells)
    for section, lines in labels.items():
        path = root / "chexbert_labels" / f"{section}_fixed.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for i, row in enumerate(rows if images else []):
        name = str(row["path_to_dcm" if files == "dcm" else "path_to_image"])
        image((root / PLUS_FOLDERS[files] / name).with_suffix(f".{files}"), i)


def make_chexpert_plus(root: Path, files: str = "png") -> None:
    """Ten images of eight patients, two of valid; the third study has three, one lateral."""
    rows = [plus_row(i + 1, 1, sex="MFU"[i % 3] if i < 3 else "Male") for i in range(5)]
    dated = "1. Edema, as on 3/4/2001."
    rows[2]["section_impression"] = dated
    rows += [plus_row(3, 1, "view2_frontal"), plus_row(3, 1, "view3_lateral")]
    rows[3].update(section_impression="", section_findings="LINES IN\nPLACE.\n\n2.NO EFFUSION.")
    rows[4].update(section_impression="\\n", age="0.0", sex="Unknown")
    rows.append(plus_row(6, 2, section_findings="Clear lungs.", age="95.0", ap_pa="PA"))
    rows += [plus_row(64541 + i, 1, split="valid") for i in range(2)]
    impression = [plus_states(row, Edema=1.0, Fracture=0.0, Pneumonia=-1.0) for row in rows]
    impression[5]["Edema"] = None  # of the other wording of one report
    findings = [plus_states(row, No_Finding=1.0) for row in rows]
    write_chexpert_plus(root, rows, {"impression": impression, "findings": findings}, files)


def rex_study(patient: int, study: int, views: list[str | None], **given: Any) -> dict[str, Any]:
    """One entry of ReXGradient's JSON; it is named <PatientID>_<accession>_<study>."""
    patient_id, accession = f"GRDN{patient:012d}", f"GRDNACC{study:09d}"
    uid = f"1.2.826.{patient}.{study}"
    folder = f"../deid_png/{patient_id}/{accession}/studies/{uid}/series/{uid}.1/instances"
    return {
        **{"PatientID": patient_id, "AccessionNumber": accession, "StudyInstanceUid": uid},
        **{"PatientSex": "F", "PatientAge": "058Y", "StudyDate": 20150302},
        **{"StudyDescription": "XR CHEST", "Indication": "Cough.", "Comparison": "None"},
        **{"Findings": "Heart is normal.", "Impression": "No acute process."},
        **{"ImagePath": [f"{folder}/{uid}.{i}.png" for i in range(len(views))]},
        **{"ImageViewPosition": views, "ImageModality": ["DX"] * len(views)},
        **{"ImageShape": [[HEIGHT, WIDTH]] * len(views), "ImageBodyPart": ["CHEST"] * len(views)},
        **given,
    }


def write_rexgradient(
    root: Path, studies: Mapping[str, list[dict[str, Any]]], size: tuple[int, int] = (HEIGHT, WIDTH)
) -> None:
    """Metadata of each split and the images, of 16 and 8 bits in turn."""
    (root / "metadata").mkdir(parents=True, exist_ok=True)
    seed = 0
    for split, entries in studies.items():
        keyed = {f"{e['PatientID']}_{e['StudyInstanceUid']}": e for e in entries}
        path = root / "metadata" / f"{split}_metadata_view_position.json"
        path.write_text(json.dumps(keyed))
        for entry in entries:
            for name in entry["ImagePath"]:
                seed += 1
                grey_png(root / name.removeprefix("../"), seed, size, wide=bool(seed % 2))


def make_rexgradient(root: Path) -> None:
    """Seven studies of six patients, of whom one is in train alone twice; eleven images."""
    studies = {
        "train": [
            rex_study(1, 1, ["PA", "LATERAL"]),
            rex_study(1, 2, ["AP"], PatientAge="059Y", Impression=None, Findings="Heart is large."),
            rex_study(2, 3, ["UNKNOWN", None, "N/A"], PatientSex="M", PatientAge="002D"),
            rex_study(3, 4, ["POSTERO_ANTERIOR"], Findings="None", Impression=float("nan")),
        ],
        "valid": [rex_study(4, 5, ["ANTERO_POSTERIOR", "LL"], PatientSex=None, PatientAge=None)],
        "test": [rex_study(5, 6, ["AP"]), rex_study(6, 7, ["RAO"], PatientAge="094Y")],
    }
    write_rexgradient(root, studies)


def grey_png(path: Path, seed: int, size: tuple[int, int], wide: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 65536, size).astype(np.uint16)
    cv2.imwrite(str(path), pixels if wide else (pixels >> 8).astype(np.uint8))


GR_TABLE = (
    "StudyID,ImageID,label,boxes_count,extra_boxes_count,locations,prior_study,progression_status,"
    "prior_imageID,sentence_en,sentence_es,study_is_benchmark,study_is_validation,split,PatientID,"
    "patient_is_benchmark,PatientBirth,PatientSex_DICOM,StudyDate_DICOM,StudyDate,PatientAge,"
    "label_group,Year"
)


def gr_finding(sentence: str, labels: list[str], boxes: list[list[float]]) -> dict[str, Any]:
    """A finding that is there; of one that is not, the file has the sentences alone."""
    told = {"sentence_en": sentence, "sentence_es": f"ES {sentence}", "abnormal": bool(labels)}
    if not labels:
        return told
    more = {"extra_boxes": [[0.1, 0.1, 0.9, 0.9]], "locations": ["right"], "progression": None}
    return {**told, "labels": labels, "boxes": boxes, **more}


def gr_study(number: int, findings: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        **{"StudyID": f"251{number}", "ImageID": f"2514{number}_pic.png"},
        **{"PreviousStudyID": None, "PreviousImageID": None, "findings": findings},
    }


def gr_rows(study: Mapping[str, Any], split: str, patient: str, **given: object) -> list[list]:
    """The rows of the master table for a study: one for each label."""
    labels = [name for f in study["findings"] for name in f.get("labels", [])] or ["Normal"]
    row: dict[str, object] = {
        **dict.fromkeys(GR_TABLE.split(","), ""),
        **{"StudyID": study["StudyID"], "ImageID": study["ImageID"], "split": split},
        **{"PatientID": patient, "PatientSex_DICOM": "F", "PatientAge": "63"},
        **{"PatientBirth": "1950", "StudyDate_DICOM": "20130102", **given},
    }
    return [[{**row, "label": name}[cell] for cell in GR_TABLE.split(",")] for name in labels]


def make_padchest_gr(root: Path, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    """Eight films: four of train, one of validation, three of test, one of them normal."""
    effusion = gr_finding("Small left effusion.", ["pleural effusion"], [[0.5, 0.5, 0.9, 1.0]])
    both = gr_finding(
        "Heart is large, with effusion",
        ["cardiomegaly", "pleural effusion"],
        [[0.25, 0.25, 0.75, 0.5], [0.0, 0.5, 0.25, 1.0]],
    )
    none = gr_finding("No pneumothorax.", [], [])
    found = [[effusion], [none], [both], [effusion, none], [both], [effusion, none], [both], [none]]
    splits = [*["train"] * 4, "validation", *["test"] * 3]
    studies = [gr_study(i, findings) for i, findings in enumerate(found)]
    lines: list[list] = []
    for i, (study, split) in enumerate(zip(studies, splits, strict=True)):
        sex = "M" if i == 7 else "F"
        lines += gr_rows(study, split, f"p{i}", PatientSex_DICOM=sex)
        folder = root / "Padchest_GR_files" / "PadChest_GR"
        grey_png(folder / study["ImageID"], i, size)
    prior = root / "PadChest_GR_progression_prior_studies"
    grey_png(prior / studies[0]["ImageID"], 99, (HEIGHT + 8, WIDTH))
    (root / "grounded_reports_20240819.json").write_text(json.dumps(studies))
    table(root / "master_table.csv", GR_TABLE, lines)
