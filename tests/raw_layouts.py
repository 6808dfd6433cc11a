"""Ten-row fakes of data sets in their publishers' exact layouts, written from the published pages.

Shared by the tests of the collectors and of configs/transfer.
"""

from __future__ import annotations

import csv
import gzip
import zipfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from mlip.dataloading.datasets import DATASETS
from mlip.dataloading.datasets.rows import Collected, Row
from mlip.dataloading.dicom.radiograph import write_radiograph
from mlip.dataloading.prepare import command as prepare

CHEXPERT = "Atelectasis,Cardiomegaly,Consolidation,Edema,Pleural Effusion,Pneumonia,Support Devices"
VINDR_BOXES = {  # every class of configs/transfer/vindr_detection.yaml
    "train1": ["Nodule/Mass"],
    "train3": ["Aortic enlargement", "Cardiomegaly"],
    "train5": ["Pleural effusion", "Pleural thickening"],
    "test1": ["Nodule/Mass", "Pulmonary fibrosis"],
}
HEIGHT, WIDTH = 24, 20  # px of every fake image


def table(path: Path, header: str, rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w", newline="")
    with opened as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        writer.writerows(rows)


def image(path: Path, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 65536, size).astype(np.uint16)
    if path.suffix in (".dcm", ".dicom"):
        write_radiograph(path, pixels, patient_id=f"MRN{seed // 2}", study_id=f"ACC{seed}")
    else:
        cv2.imwrite(str(path), (pixels >> 8).astype(np.uint8))


def make_chexpert(root: Path, count: int = 10) -> None:
    rows: dict[str, list] = {"train": [], "valid": []}
    for i in range(count):
        name = "valid" if i >= count - 2 else "train"
        view = "view2_lateral.jpg" if i == 1 else "view1_frontal.jpg"
        patient = 64541 + i if name == "valid" else i // 2
        path = f"CheXpert-v1.0/{name}/patient{patient:05d}/study{i}/{view}"
        image(root / path, i)
        lateral = i == 1
        labels = ["1.0" if j == i % 5 else "" for j in range(5)] + ["-1.0" if i == 0 else "", "0.0"]
        side = ["Lateral", ""] if lateral else ["Frontal", "AP"]
        sex = "Unknown" if i == 4 else ("Male", "Female")[i % 2]
        rows[name].append([path, sex, (0, 90, 18 + i)[min(i, 2)], *side, *labels])
    for name, lines in rows.items():
        header = f"Path,Sex,Age,Frontal/Lateral,AP/PA,{CHEXPERT}"
        table(root / "CheXpert-v1.0" / f"{name}.csv", header, lines)


def make_rsna(root: Path, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    """Boxes lie inside a 1024-px source unless the images are smaller."""
    lines = []
    for i in range(10):
        image(root / "stage_2_train_images" / f"id{i}.dcm", i, size)
        boxes = [[10.0 * k, 20.0, 30.0, 40.5, 1] for k in range(i % 3)] or [["", "", "", "", 0]]
        lines += [[f"id{i}", *box] for box in boxes]
    table(root / "stage_2_train_labels.csv", "patientId,x,y,width,height,Target", lines)


def make_siim(root: Path, stage: int) -> None:
    lines = []
    for i in range(10):
        folder = f"dicom-images-train/1.2.{i}/1.3.{i}" if stage == 1 else "stage_2_images"
        image(root / folder / f"1.2.276.{i}.dcm", i)
        masks = ["-1"] if i < 6 else ["5 3 1 2"] if i < 9 else ["5 3", "100 7"]
        lines += [[f"1.2.276.{i}", f" {mask}" if stage == 1 else mask] for mask in masks]
    header = "ImageId, EncodedPixels" if stage == 1 else "ImageId,EncodedPixels"
    table(root / ("train-rle.csv" if stage == 1 else "stage_2_train.csv"), header, lines)


def make_object_cxr(root: Path, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    for name, count in (("train", 7), ("dev", 3)):
        lines: list[list[object]] = []
        for i in range(count):
            image(root / name / f"{name}{i}.jpg", i, size)
            lines.append([f"{name}{i}.jpg", "0 10 20 30 60;2 1 1 5 9 3 2" if i % 2 else ""])
        table(root / f"{name}.csv", "image_name,annotation", lines)


def make_covidx(root: Path) -> None:
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for i in range(10):
        name = "test" if i >= 8 else "train"
        label = ("normal", "pneumonia", "COVID-19")[i % 3]
        file = f"a {i} (copy).jpg" if i == 2 else f"a{i}.png"
        image(root / name / file, i)
        lines[name].append(f"{'p1' if i in (0, 8) else i} {file} {label} rsna")
    for name, content in lines.items():
        (root / f"{name}_COVIDx9A.txt").write_text("\n".join(content) + "\n")


REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 COMPARISON:  ___.

 FINDINGS:

 Heart size is normal.
 No effusion of 1.5 cm.

 IMPRESSION:

 No acute process.
"""


def make_mimic(
    root: Path, suffix: str = "jpg", zipped: bool = True, size: tuple[int, int] = (HEIGHT, WIDTH)
) -> None:
    base = root / "physionet.org" / "files" / "mimic-cxr-jpg" / "2.1.0"
    metadata, split, reports = [], [], {}
    for i in range(10):
        subject, study, dicom = f"1000{i // 2:04d}", f"5000{i:04d}", f"{i:08x}-aaaa"
        folder = f"files/p10/p{subject}/s{study}"
        image(base / folder / f"{dicom}.{suffix}", i, size)
        view = "LATERAL" if i == 3 else "PA" if i % 2 else "AP"
        metadata.append([dicom, subject, study, view, f"{2150 + 2 * i}0506"])
        split.append(
            [dicom, study, subject, ("train", "train", "train", "validate", "test")[i // 2]]
        )
        reports[f"{folder}.txt"] = "" if i == 5 else REPORT
    table(
        base / "mimic-cxr-2.0.0-metadata.csv.gz",
        "dicom_id,subject_id,study_id,ViewPosition,StudyDate",
        metadata,
    )
    table(base / "mimic-cxr-2.0.0-split.csv.gz", "dicom_id,study_id,subject_id,split", split)
    labels = [["10000000", "50000000", "1.0", "0.0", "-1.0", ""]]
    table(
        base / "mimic-cxr-2.0.0-chexpert.csv.gz",
        "subject_id,study_id,Edema,Fracture,Pneumonia,No Finding",
        labels,
    )
    if zipped:
        with zipfile.ZipFile(root / "mimic-cxr-reports.zip", "w") as archive:
            for name, text in reports.items():
                archive.writestr(name, text)
    else:
        for name, text in reports.items():
            (base / name).write_text(text)


def make_mimic_iv(path: Path) -> Path:
    """The patients of make_mimic but the last, and one that is not in it; the file's path."""
    rows: list[list[object]] = [
        ["10000000", "F", 52, 2151, "2014 - 2016", ""],
        ["10000001", "M", 88, 2153, "2014 - 2016", "2160-01-01"],
        ["10000002", "M", 91, 2159, "2014 - 2016", ""],
        ["10000003", "F", 20, 2170, "2014 - 2016", ""],
        ["19999999", "F", 33, 2151, "2014 - 2016", ""],
    ]
    table(path, "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod", rows)
    return path


def make_ms_cxr(path: Path) -> Path:
    """Boxes of the images 0 and 8 of make_mimic, and of one that it has not; the file's path."""
    header = "dicom_id,category_name,label_text,path,x,y,w,h,image_width,image_height,split"
    effusion = ["Pleural Effusion", "small left effusion", "files/p10/a.jpg"]
    rows: list[list[object]] = [
        ["00000000-aaaa", *effusion, 2, 6, 30, 20, 72, 80, "train"],
        ["00000000-aaaa", *effusion, 40, 30, 10, 20, 72, 80, "train"],
        ["00000000-aaaa", "Edema", "mild  edema", "files/p10/a.jpg", 5, 5, 9, 9, 72, 80, "train"],
        ["00000008-aaaa", "Edema", "edema", "files/p10/b.jpg", 5, 5, 30, 30, 72, 80, "test"],
        ["not-there", "Edema", "edema", "files/p10/c.jpg", 5, 5, 30, 30, 72, 80, "test"],
    ]
    table(path, header, rows)
    return path


NIH_AGES = ("058Y", "058Y", "58", "013M", "414Y", "", "089Y", "090Y", "94", "001D")


def make_nih(root: Path) -> None:
    lines: list[list[object]] = []
    listed: dict[str, list[str]] = {"train_val": [], "test": []}
    for i in range(10):
        name = f"{i // 2:08d}_{i % 2:03d}.png"
        image(root / f"images_{1 + i % 2:03d}" / "images" / name, i)
        found = "No Finding" if i % 3 else "Mass|Pleural_Thickening"
        lines.append(
            [name, found, i, i // 2, NIH_AGES[i], "MF"[i % 2], "PA" if i % 2 else "AP"]
            + [2500, 2048, 0.1, 0.1]
        )
        if i != 9:
            listed["test" if i >= 6 else "train_val"].append(name)
    header = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,"
        "View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    )
    table(root / "Data_Entry_2017_v2020.csv", header, lines)
    boxes: list[list[object]] = [["00000000_000.png", "Infiltrate", 1.5, 2.5, 3.5, 4.5, "", "", ""]]
    table(root / "BBox_List_2017.csv", "Image Index,Finding Label,Bbox [x,y,w,h],,,", boxes)
    for name, names in listed.items():
        (root / f"{name}_list.txt").write_text("\n".join(names))


PADCHEST = (
    ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,"
    "ViewPosition_DICOM,Projection,MethodProjection,Pediatric,Modality_DICOM,Manufacturer_DICOM,"
    "PhotometricInterpretation_DICOM,PixelRepresentation_DICOM,PixelAspectRatio_DICOM,"
    "SpatialResolution_DICOM,BitsStored_DICOM,WindowCenter_DICOM,WindowWidth_DICOM,Rows_DICOM,"
    "Columns_DICOM,XRayTubeCurrent_DICOM,Exposure_DICOM,ExposureInuAs_DICOM,ExposureTime,"
    "RelativeXRayExposure_DICOM,ReportID,Report,MethodLabel,Labels,Localizations,"
    "LabelsLocalizationsBySentence,labelCUIS,LocalizationsCUIS"
)
PADCHEST_LABELS = (  # of the images 0 to 9; 0 to 5 are by physicians
    "['pleural effusion', 'cardiomegaly']",
    "['normal']",
    "['unchanged']",
    "['pneumonia', ' cardiomegaly', 'pneumonia', '']",
    "['normal', 'unchanged']",
    "['pleural effusion']",
    "['cardiomegaly']",
    "",
    "['exclude']",
    "['normal']",
)


def make_padchest(root: Path, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    lines: list[list[object]] = []
    for i, labels in enumerate(PADCHEST_LABELS):
        name, folder = f"2168{i}_02-094-10{i}.png", str(i % 3)
        path = root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 65536, size).astype(np.uint16)
        cv2.imwrite(str(path), pixels)
        method = "Physician" if i < 6 else "RNN_model"
        view = "AP_horizontal" if i == 3 else "PA"
        given = {
            **{"": i, "ImageID": name, "ImageDir": folder, "StudyID": f"21{i}"},
            **{"PatientID": f"839{i if i < 7 else 5}", "Projection": view},
            **{"StudyDate_DICOM": "20140915", "PatientBirth": f"{1920 + 10 * i}.0"},
            **{"PatientSex_DICOM": "MFO"[i] if i < 3 else "None" if i == 3 else "F"},
            **{"PhotometricInterpretation_DICOM": "MONOCHROME2", "Report": "derram pleural ."},
            **{"MethodLabel": method, "Labels": labels},
        }
        lines.append([given.get(column, "") for column in PADCHEST.split(",")])
    table(root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", PADCHEST, lines)


def make_vindr(root: Path, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    for name, count in (("train", 7), ("test", 3)):
        labels: list[list[object]] = []
        boxes: list[list[object]] = []
        for i in range(count):
            image(root / name / f"{name}{i}.dicom", i, size)
            readers = ("R1", "R2", "R3") if name == "train" else ("",)
            for place, reader in enumerate(readers):
                cells: list[object] = [f"{name}{i}", reader, int(place < 2), int(place == 0), 0]
                labels.append(cells if name == "train" else [cells[0], *cells[2:]])
            for found in VINDR_BOXES.get(f"{name}{i}", ["No finding"]):
                box = [1, 2, 11, 22] if i % 2 else ["", "", "", ""]
                boxes.append([f"{name}{i}", *(["R1"] if name == "train" else []), found, *box])
        reader = "rad_id," if name == "train" else ""
        folder = root / "annotations"
        table(
            folder / f"image_labels_{name}.csv", f"image_id,{reader}Nodule/Mass,Edema,Other", labels
        )
        table(
            folder / f"annotations_{name}.csv",
            f"image_id,{reader}class_name,x_min,y_min,x_max,y_max",
            boxes,
        )


def collect(name: str, root: Path, **options: str) -> Collected:
    """What a data set's collector finds below `root`, checked as `mlip prepare` checks it."""
    known = {key: default for key, (default, _) in DATASETS[name].options.items()}
    collected = DATASETS[name].collect(root, {**known, **options})
    prepare.check_rows(collected.rows)
    for row in collected.rows:
        assert (root / row.image).is_file(), row.image
        assert row.split in ("train", "val", "test") and row.patient_id
    return collected


def by_id(collected: Collected) -> dict[str, Row]:
    return {row.image_id: row for row in collected.rows}


def encode_mask(mask: NDArray[np.uint8]) -> str:
    """The run lengths of one mask, "-1" where it is empty.

    Shapes:  mask [H, W], nonzero = object
    """
    flat = (mask.T.reshape(-1) != 0).astype(np.int8)
    edges = np.flatnonzero(np.diff(flat, prepend=0, append=0))
    if len(edges) == 0:
        return "-1"
    starts, stops = edges[::2], edges[1::2]
    gaps = starts - np.concatenate(([0], stops[:-1]))
    pairs = np.stack((gaps, stops - starts), axis=1).reshape(-1)
    return " ".join(str(number) for number in pairs)
