"""Every file of configs/transfer on the ten-row fake of its data set, from raw files to a page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mlip.cli import main
from mlip.dataloading.prepare import command as prepare
from mlip.settings.config import load
from mlip.settings.transfer import at_fraction
from tests import raw_layouts, report_layouts
from tests.small_run import small_export, small_run

CONFIGS = Path(__file__).parents[2] / "configs" / "transfer"
BIG = (80, 72)  # px: the fakes' boxes lie inside
# data set -> how its fake is made, what `mlip prepare` is told
RAW: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "chexpert": (raw_layouts.make_chexpert, []),
    "rsna_pneumonia": (lambda root: raw_layouts.make_rsna(root, BIG), []),
    "siim_pneumothorax": (lambda root: raw_layouts.make_siim(root, 1), []),
    "object_cxr": (lambda root: raw_layouts.make_object_cxr(root, BIG), []),
    "covidx": (raw_layouts.make_covidx, []),
    "nih_cxr14": (raw_layouts.make_nih, []),
    "vindr_cxr": (lambda root: raw_layouts.make_vindr(root, BIG), []),
    "padchest": (
        lambda root: raw_layouts.make_padchest(root, BIG),
        ["--option", "split=physician"],
    ),
}
ROWS = {
    "chexpert_classification": "chexpert",
    "rsna_classification": "rsna_pneumonia",
    "covidx_classification": "covidx",
    "rsna_segmentation": "rsna_pneumonia",
    "siim_segmentation": "siim_pneumothorax",
    "rsna_detection": "rsna_pneumonia",
    "object_cxr_detection": "object_cxr",
    "nih_classification": "nih_cxr14",
    "vindr_detection": "vindr_cxr",
}
SMALL = [
    *("data.resize_px=112", "data.crop_px=96", "data.channels=1", "data.workers=1"),
    *("transfer.epochs=1", "transfer.seeds=[1]", "transfer.fractions=[100]"),
    *("transfer.val_share=0.4", "transfer.batch=4"),
    *("transfer.decoder_width=4", "evaluate.bootstrap=20", "evaluate.examples=2"),
]
DENSE = ["transfer.image_px=32"]


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return small_export()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The manifest of a data set's fake, made by `mlip prepare` once a module."""
    made: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("data")

    def manifest(name: str) -> Path:
        if name not in made:
            make, options = RAW[name]
            raw, out = folder / f"{name}-raw", folder / name
            make(raw)
            lists = _lists(name, folder)
            arguments = [name, "--root", str(raw), "--out", str(out), "--workers", "1"]
            arguments += ["--side", "96", *options, *lists]
            parser = argparse.ArgumentParser()
            prepare.add_arguments(parser)
            assert prepare.run(parser.parse_args(arguments)) == 0
            made[name] = out / "manifest.parquet"
        return made[name]

    return manifest


def _lists(name: str, folder: Path) -> list[str]:
    """Published split lists, where ten rows by hash would leave a split empty."""
    ids = {"rsna_pneumonia": "id{}", "siim_pneumothorax": "1.2.276.{}"}.get(name)
    if ids is None:
        return []
    where = folder / f"{name}-lists"
    for split, members in (("train", (0, 1, 2, 8, 6)), ("validation", (3, 5)), ("test", (4, 7, 9))):
        raw_layouts.table(where / f"{split}.csv", "ID", [[ids.format(i)] for i in members])
    return ["--option", f"split_lists={where}"]


def evaluate(row: str, manifest: Path, out: Path, *more: str) -> dict[str, Any]:
    config = CONFIGS / f"{row}.yaml"
    task = load([config]).transfer.task
    settings = [*SMALL, *(DENSE if task != "classification" else []), f"data.manifest={manifest}"]
    if row == "nih_classification":
        # ten rows are five patients, of whom three may train: too few for train and val
        settings.append("data.columns.patient_id=image_id")
    assert main(["evaluate", str(config), *settings, *more, "--out", str(out)]) == 0
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", ROWS)
def test_each_row_of_the_paper_runs_from_raw_files_to_a_page(
    row: str, prepared: Any, checkpoint: Path, tmp_path: Path
) -> None:
    results = evaluate(row, prepared(ROWS[row]), tmp_path, f"checkpoint={checkpoint}")
    assert results["kind"] == "transfer" and results["task"]["start"] == "checkpoint"
    for key in ("splits", "preprocessing", "weights", "manifest"):
        assert len(results["fingerprints"][key]) == 64
    assert results["run"]["seeds"] == [1] and results["run"]["checkpoint"] == str(checkpoint)
    (fraction,) = results["fractions"]
    scores = fraction["scores"]
    if "dice" in scores:
        estimate = scores["dice"]["published"]
    elif "strict" in scores:
        estimate = scores["strict"]
    else:
        estimate = scores["macro"][scores["headline"]]
    assert estimate["value"] is not None or estimate["reason"]
    assert isinstance(estimate["n"], int)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Not for clinical use" in page and "http" not in page.split("</style>")[1]


def test_uncertain_labels_follow_the_published_policy_and_test_is_the_valid_subset(
    prepared: Any, checkpoint: Path, tmp_path: Path
) -> None:
    row = "chexpert_classification"
    results = evaluate(row, prepared("chexpert"), tmp_path, f"checkpoint={checkpoint}")
    assert results["data"]["splits"]["test"]["images"] == 2
    classes = load([CONFIGS / f"{row}.yaml"]).transfer.classes
    ones = {name for name, policy in classes.items() if policy == "one"}
    assert ones == {"Atelectasis", "Edema", "Pleural Effusion"} and len(classes) == 5


@pytest.mark.parametrize("baseline", ["random", "imagenet"])
def test_baselines_lie_over_a_row(
    baseline: str, prepared: Any, tmp_path: Path, checkpoint: Path
) -> None:
    more = [str(CONFIGS / f"baseline_{baseline}.yaml")]
    if baseline == "random":
        more.append(f"checkpoint={checkpoint}")
    else:
        from transformers import ResNetConfig, ResNetModel

        tiny = ResNetConfig(
            num_channels=3,  # as ImageNet's weights: they see the grey picture three times
            embedding_size=8,
            hidden_sizes=[8, 16, 16],
            depths=[1, 1, 1],
            layer_type="basic",
        )
        ResNetModel(tiny).save_pretrained(tmp_path / "weights")
        more += [f"model.vision.source={tmp_path / 'weights'}", "data.channels=3"]
    results = evaluate("rsna_detection", prepared("rsna_pneumonia"), tmp_path / "out", *more)
    assert results["task"]["start"] == baseline and "checkpoint" not in results["run"]


@pytest.mark.parametrize("baseline", ["convirt", "gloria", "mgca"])
def test_published_pre_trainings_are_settings_of_the_objective(
    baseline: str, tmp_path: Path
) -> None:
    from mlip.assembly import build_objective, open_corpus, open_loader

    run = small_run()
    settings = [*run.settings, "batch.global_pairs=8", "loss.category.prototypes=8"]
    settings.append(f"run.dir={tmp_path}")  # whose vocabulary is learnt from these reports
    config = load([CONFIGS / f"baseline_{baseline}.yaml"], settings)
    corpus = open_corpus(config)
    objective = build_objective(config, corpus)
    loader = open_loader(config, corpus)
    try:
        total, _ = objective(next(iter(loader)), step=0, progress=2.0)
    finally:
        loader.close()
    total.backward()
    wanted = {
        "convirt": {"global_contrastive"},
        "gloria": {"global_contrastive", "local_alignment"},
        "mgca": {"global_contrastive", "local_alignment", "category"},
    }[baseline]
    assert set(objective.losses) == wanted and float(total.detach()) > 0


def test_mgca_is_set_as_its_released_code_runs() -> None:
    # protocols.md B.2: [CLS] attention weighs words, K = 500, weights 1, 1, 1 where the first two
    # are sums of two halves and ours are means
    loss = load([CONFIGS / "baseline_mgca.yaml"]).loss
    assert loss.local_alignment.token_weights == "attention" and loss.category.prototypes == 500
    weights = (loss.global_contrastive.weight, loss.local_alignment.weight, loss.category.weight)
    assert weights == (1.0, 1.0, 0.5)


def test_a_checkpoint_of_another_preprocessing_is_refused_with_both_hashes(
    prepared: Any, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*SMALL, f"data.manifest={prepared('covidx')}", "data.crop_px=64"]
    config = str(CONFIGS / "covidx_classification.yaml")
    code = main(["evaluate", config, *settings, f"checkpoint={checkpoint}", "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert code == 4 and "trained with 96, asked 64" in said and "add data.crop_px=96" in said
    import re

    first, second = re.search(
        r"preprocessing (\w{12}), the settings ask for (\w{12})", said
    ).groups()
    assert first != second and not (tmp_path / "results.json").exists()


def test_null_takes_a_class_away_and_an_empty_mapping_all_settings_of_a_fraction() -> None:
    config = load([CONFIGS / "covidx_classification.yaml"], ["transfer.classes={normal: null}"])
    assert list(config.transfer.classes) == ["pneumonia", "COVID-19"]
    transfer = load([CONFIGS / "rsna_detection.yaml"]).transfer
    assert (at_fraction(transfer, 1.0).batch, at_fraction(transfer, 1.0).lr) == (8, 2e-4)
    assert at_fraction(transfer, 10.0) == transfer
    for over in ("transfer.by_fraction.1.lr=1e-4", 'transfer.by_fraction={"1": {lr: 1e-4}}'):
        laid = at_fraction(load([CONFIGS / "rsna_detection.yaml"], [over]).transfer, 1.0)
        assert (laid.batch, laid.lr) == (8, 1e-4)
    for over in ("transfer.by_fraction={}", "transfer.by_fraction.1={}"):
        bare = load([CONFIGS / "rsna_detection.yaml"], [over, "transfer={}"]).transfer
        assert at_fraction(bare, 1.0) == bare and bare.batch == transfer.batch != 8
    changed = load([], ["transfer.by_fraction={1: {lr: 2e-4, batch: 1e1}}"]).transfer
    assert (at_fraction(changed, 1.0).lr, at_fraction(changed, 1.0).batch) == (2e-4, 10)
    assert isinstance(at_fraction(changed, 1.0).batch, int)
    with pytest.raises(ValueError, match="by_fraction.1: expected numbers for batch"):
        load([], ["transfer.by_fraction={1: {speed: 3}}"])


def test_what_the_data_lacks_is_named(
    prepared: Any, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(CONFIGS / "covidx_classification.yaml")
    base = [config, *SMALL, f"data.manifest={prepared('covidx')}", f"checkpoint={checkpoint}"]
    for changes, expected in (
        (["transfer.classes={normal: zero, Flu: zero}"], "no row carries the classes Flu"),
        (["data.columns.labels=null"], "needs labels: set data.columns.labels"),
        (["transfer.columns.uncertain=doubts"], "'doubts' (transfer.columns.uncertain"),
        (
            ["transfer.task=segmentation", "transfer.exclusive=false"],
            "set transfer.columns.mask",
        ),
        (
            ["transfer.task=detection", "transfer.exclusive=false"],
            "no boxes: set transfer.columns.boxes",
        ),
        (["transfer.subset=valid"], "set transfer.columns.subset"),
        (
            ["transfer.subset=none-such", "transfer.columns.subset=subset"],
            "split 'test' has 0 usable patients",
        ),
    ):
        assert main(["evaluate", *base, *changes, "--out", str(tmp_path)]) == 3, changes
        assert expected in capsys.readouterr().err
    assert main(["evaluate", config, *SMALL]) == 2
    assert "checkpoint=DIR" in capsys.readouterr().err


def _radiographs(folder: Path) -> Path:
    """Ten rows in the layout of configs/real_cxr.yaml: text, labels, mask files, boxes.csv."""
    header = "image_id,path,dataset,patient_id,split,view,text,findings,mask,sex,age"
    rows: list[list[object]] = []
    boxes: list[list[object]] = []
    for i in range(10):
        raw_layouts.image(folder / f"{i}.png", i, BIG)
        mask = np.zeros(BIG, dtype=np.uint8)
        for name, left in (("Left_Lung", 40), ("Right_Lung", 8)):
            mask[15:65, left : left + 22] = 255
            boxes.append([f"{i}.png", name, left, 15, 22, 50])
        cv2.imwrite(str(folder / f"{i}-mask.png"), mask)
        split = ("train", "train", "val", "test")[i % 4]
        finding = "Pneumonia" if i % 8 < 4 else "No_Finding"
        text = "There is pneumonia." if i % 8 < 4 else "Clear lungs."
        rows.append([i, f"{i}.png", "nih-chestxray14", f"p{i}", split, "PA", text, finding])
        rows[-1] += [f"{i}-mask.png", "FM"[i % 2], 30 + i]
    raw_layouts.table(folder / "manifest.csv", header, rows)
    raw_layouts.table(folder / "boxes.csv", "path,label,x,y,w,h", boxes)
    return folder / "manifest.csv"


@pytest.mark.parametrize(
    "row",
    [
        *("phantom_classification", "phantom_segmentation", "phantom_detection"),
        *("lung_segmentation", "lung_detection", "nih_pneumonia_classification"),
    ],
)
def test_each_row_that_needs_no_download_runs(row: str, checkpoint: Path, tmp_path: Path) -> None:
    is_phantom = row.startswith("phantom")
    data = small_run().folder / "data" / "manifest.csv"
    manifest = data if is_phantom else _radiographs(tmp_path / "data")
    results = evaluate(row, manifest, tmp_path / "out", f"checkpoint={checkpoint}")
    (fraction,) = results["fractions"]
    scores, test = fraction["scores"], results["data"]["splits"]["test"]
    assert test["images"] == (32 if is_phantom else 2) and test["with_a_positive"] > 0
    if "dice" in scores:
        values = [scores["dice"][form]["value"] for form in ("positive_only", "pooled")]
    elif "strict" in scores:
        values = [scores["strict"]["value"], scores["froc"]["mean"]["value"]]
    else:
        values = [row["auroc"]["value"] for row in scores["classes"]]
    assert all(value is not None and 0.0 <= value <= 1.0 for value in values)


def test_the_published_list_of_5x200_is_scored_from_raw_files(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Four images of one finding each: the row's own subset, prompts, accuracy and n."""
    raw, out = tmp_path / "raw", tmp_path / "data"
    raw_layouts.make_chexpert(raw)
    listed = [
        f"CheXpert-v1.0/train/patient{i // 2:05d}/study{i}/view1_frontal.jpg" for i in range(2, 6)
    ]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    arguments = ["chexpert", "--root", str(raw), "--out", str(out), "--workers", "1"]
    arguments += ["--side", "96", "--option", f"five_by_200={tmp_path / 'list.json'}"]
    assert prepare.run(parser.parse_args(arguments)) == 0
    config = CONFIGS / "chexpert_zero_shot.yaml"
    settings = [*SMALL, "data.max_tokens=64", f"data.manifest={out / 'manifest.parquet'}"]
    command = ["evaluate", str(config), *settings, f"checkpoint={checkpoint}"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["data"]["images"] == 4 and results["run"]["name"] == "chexpert_zero_shot"
    zero_shot = results["zero_shot"]
    named = {"Atelectasis", "Consolidation", "Edema", "Pleural Effusion"}
    assert {row["finding"] for row in zero_shot["findings"]} == named
    for wordings in zero_shot["wordings"].values():
        assert len(set(wordings["positive"])) >= 3 and len(set(wordings["negative"])) >= 3
    for head in ("global", "local", "combined"):
        assert zero_shot["exclusive"][head]["plain"]["n"] == 4
        assert 0.0 <= zero_shot["macro"][head]["value"] <= 1.0


def test_images_without_the_finding_count_in_zero_shot(
    prepared: Any, checkpoint: Path, tmp_path: Path
) -> None:
    """RSNA's Target 0 stands in the negative column: without those images nothing is scored."""
    command = [
        *("evaluate", *SMALL, "data.max_tokens=64", f"checkpoint={checkpoint}"),
        f"data.manifest={prepared('rsna_pneumonia')}",
        "data.columns={labels: labels, image_id: image_id, sha256: sha256}",
    ]
    columns = "transfer.columns={uncertain: uncertain, negative: negative}"
    found = {}
    for name, more in (("stated", [columns]), ("labels alone", [])):
        assert main([*command, *more, "--out", str(tmp_path / name)]) == 0
        results = json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8"))
        (found[name],) = results["zero_shot"]["findings"]
    assert (found["stated"]["positives"], found["stated"]["n"]) == (2, 3)
    assert found["stated"]["global"]["value"] is not None
    assert (found["labels alone"]["positives"], found["labels alone"]["n"]) == (2, 2)


def test_padchest_zero_shot_asks_for_what_physicians_labelled(
    prepared: Any, checkpoint: Path, tmp_path: Path
) -> None:
    """Of six test images one says nothing of any finding: it counts in no score."""
    settings = [*SMALL, "data.max_tokens=64", f"data.manifest={prepared('padchest')}"]
    config = str(CONFIGS / "padchest_zero_shot.yaml")
    command = ["evaluate", config, *settings, f"checkpoint={checkpoint}"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    found = {row["finding"]: row for row in results["zero_shot"]["findings"]}
    assert results["data"]["images"] == 6
    counts = {name: (row["positives"], row["n"]) for name, row in found.items()}
    assert counts == {"cardiomegaly": (2, 5), "pleural effusion": (2, 5), "pneumonia": (1, 5)}
    assert "normal" in str(results["zero_shot"]["labels_without_concept"])


def test_ms_cxr_points_by_the_words_of_reports_and_repeats_none_of_them(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One query a phrase of an image, against all boxes of that phrase."""
    raw, out = tmp_path / "raw", tmp_path / "data"
    raw_layouts.make_mimic(raw, size=BIG)
    listed = raw_layouts.make_ms_cxr(tmp_path / "MS_CXR_Local_Alignment_v1.1.0.csv")
    command = ["prepare", "mimic_cxr", "--root", str(raw), "--out", str(out), "--workers", "1"]
    assert main([*command, "--side", "96", "--option", f"ms_cxr={listed}"]) == 0
    settings = [*SMALL, "data.max_tokens=64", f"data.manifest={out / 'manifest.parquet'}"]
    config = str(CONFIGS / "ms_cxr_grounding.yaml")
    command = ["evaluate", config, *settings, f"checkpoint={checkpoint}"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["data"]["images"] == 2
    found = results["grounding"]["phrase"]
    assert {row["finding"]: row["n"] for row in found["findings"]} == {
        "Edema": 2,
        "Pleural Effusion": 1,
    }
    effusion = found["findings"][1]
    # 800 px of two boxes; 80 x 72 px in a letterbox of 112, cropped to 96
    assert effusion["area"] == pytest.approx(800 * (112 / 80) ** 2 / 96**2, rel=0.03)
    assert 0.0 <= found["all"]["miou"]["value"] <= 1.0
    said = capsys.readouterr()
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "By the words of its own report" in page
    for text in (said.out, said.err, page, json.dumps(results)):
        assert "small left effusion" not in text and "mild edema" not in text


def test_padchest_gr_points_by_its_sentences_and_repeats_none_of_them(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sentence of two labels is one query; a name asks for the boxes of all its sentences."""
    raw, out = tmp_path / "raw", tmp_path / "data"
    report_layouts.make_padchest_gr(raw, BIG)
    command = ["prepare", "padchest_gr", "--root", str(raw), "--out", str(out), "--workers", "1"]
    assert main([*command, "--side", "96", "--png-white", "own"]) == 0
    settings = [*SMALL, "data.max_tokens=64", f"data.manifest={out / 'manifest.parquet'}"]
    config = str(CONFIGS / "padchest_gr_grounding.yaml")
    command = ["evaluate", config, *settings, f"checkpoint={checkpoint}"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["data"]["images"] == 3
    by_kind = {
        kind: {row["finding"]: row["n"] for row in results["grounding"][kind]["findings"]}
        for kind in ("phrase", "keyword")
    }
    assert by_kind == {
        "phrase": {"cardiomegaly": 1, "pleural effusion": 1},
        "keyword": {"cardiomegaly": 1, "pleural effusion": 2},
    }
    effusion = results["grounding"]["phrase"]["findings"][1]
    # (0.5, 0.5, 0.9, 1.0) of 80 x 72 px in a letterbox of 112, of which 8 px are cut at each side
    seen = 0.4 * 72 * 1.4 * (0.5 * 80 * 1.4 - 8)
    assert effusion["area"] == pytest.approx(seen / 96**2, rel=0.03)
    said = capsys.readouterr()
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for text in (said.out, said.err, page, json.dumps(results)):
        assert "Small left effusion" not in text and "Heart is large" not in text


def test_every_config_is_run_here() -> None:
    run = {*ROWS, "chexpert_zero_shot", "padchest_zero_shot", "ms_cxr_grounding"} | {
        "padchest_gr_grounding",
        *("phantom_classification", "phantom_segmentation", "phantom_detection"),
        *("lung_segmentation", "lung_detection", "nih_pneumonia_classification"),
        *(f"baseline_{name}" for name in ("random", "imagenet", "convirt", "gloria", "mgca")),
    }
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == run


def test_every_config_has_its_commands_on_top() -> None:
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert set(ROWS) <= names
    for path in CONFIGS.glob("*.yaml"):
        head = path.read_text(encoding="utf-8").splitlines()
        assert head[0].startswith("# ") and any(
            "mlip evaluate configs/transfer/" in x for x in head
        )
        if path.stem in ROWS:
            assert any(f"mlip prepare {ROWS[path.stem]} --root RAW --out" in line for line in head)
