"""One whole evaluation of an untrained model: what it must and must not contain."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlip.dataloading import progress
from mlip.dataloading.loader import pair_ids_by_concepts
from mlip.dataloading.phantom.study_types import CONCEPT_IDS
from mlip.knowledge.linker import Mention
from mlip.pages.run_page import render
from mlip.pretrained import save_pretrained
from mlip.transfer.alignment.chosen_rows import choose_rows
from mlip.transfer.alignment.encoded_split import encode_split
from mlip.transfer.alignment.evaluation import evaluate_run
from mlip.transfer.alignment.prompts import phrase_encoder
from mlip.transfer.draws import splits_hash
from mlip.transfer.fingerprint import hash_of_weights
from mlip.transfer.results_file import save_results
from mlip.transfer.summary import mean_scores, summary_lines
from tests.small_run import small_results, small_run
from tests.transfer.small_manifest import LABELS, evaluate, write


def test_every_score_has_n_and_an_interval_around_it() -> None:
    results = small_results()
    seen = []

    def walk(value: object) -> None:
        if isinstance(value, dict):
            if {"value", "low", "high", "n", "reason"} <= value.keys():
                seen.append(value)
                assert isinstance(value["n"], int)
                if value["value"] is None:
                    assert value["reason"]
                elif value["low"] is not None:
                    assert value["low"] <= value["value"] + 0.2 and value["low"] <= value["high"]
            for child in value.values():
                walk(child)
        elif isinstance(value, list):
            for child in value:
                walk(child)

    walk({k: v for k, v in results.items() if k != "examples"})
    assert len(seen) > 60


def test_all_findings_of_the_phantoms_are_scored_against_their_true_labels() -> None:
    run, results = small_run(), small_results()
    rows = run.manifest.rows("test").tolist()
    found = {row["finding"]: row for row in results["zero_shot"]["findings"]}
    assert found.keys() == set(CONCEPT_IDS)
    for finding, row in found.items():
        assert row["n"] == len(rows)
        assert row["positives"] == sum(finding in run.manifest.labels(r) for r in rows)


def test_generated_studies_without_labels_are_not_said_to_carry_nothing() -> None:
    """They read "0 of 32 images carry the finding", of all findings."""
    run = small_run()
    columns = dataclasses.replace(run.config.data.columns, labels=None)
    config = dataclasses.replace(
        run.config, data=dataclasses.replace(run.config.data, columns=columns)
    )
    manifest = dataclasses.replace(run.manifest, label_column=None)
    results = evaluate_run(run, config, manifest)
    assert "data.columns.labels is not set" in results["zero_shot"]["reason"]
    assert not [name for name in mean_scores(results) if name.startswith("AUROC")]
    assert "zero-shot   n/a: data.columns.labels" in "\n".join(summary_lines(results))


def test_means_for_trackers_are_those_of_the_lines_and_name_no_finding() -> None:
    results = small_results()
    found, lines = mean_scores(results), "\n".join(summary_lines(results))
    heads = ("global", "local", "combined")
    recalls = [f"recall@10 {way} {h}" for h in heads for way in ("image to text", "text to image")]
    pointing = ["pointing by keyword", "pointing by sentence"]
    assert sorted(found) == sorted([*(f"AUROC {h}" for h in heads), *recalls, *pointing])
    for head in heads:
        both = [f"{way} {found[f'recall@10 {way} {head}']:.2f}" for way in ("image to text",)]
        assert f"  {head:<24}{both[0]}" in lines
    (mean,) = [line for line in lines.splitlines() if line.startswith("  mean      ")]
    assert [f"{found[f'AUROC {h}']:.2f}" for h in heads] == re.findall(r"(0\.\d\d) \(", mean)
    for name in pointing:
        assert re.search(rf"{name} +{found[name]:.2f} ", lines)
    clip_style = {**results, "run": {**results["run"], "is_local_trained": False}}
    controls = {name for name in found if not name.endswith("global")}
    assert set(mean_scores(clip_style)) == set(found) - controls and len(controls) == 8
    none = {"zero_shot": {"reason": ""}, "retrieval": {"scores": {}}, "grounding": {"reason": ""}}
    assert mean_scores({"run": {}, **none}) == {}


def test_the_oracle_stands_beside_retrieval_and_beats_an_untrained_model() -> None:
    retrieval = small_results()["retrieval"]
    assert retrieval["scores"].keys() == {"global", "local", "combined"}
    for direction in ("image_to_text", "text_to_image"):
        best = retrieval["oracle"][direction]["recall@10"]["value"]
        assert best >= 0.95
        assert best > retrieval["scores"]["global"][direction]["recall@1"]["value"]
    assert retrieval["chance"]["recall@10"] >= 10 / 16


def test_a_setting_of_training_makes_no_more_answers_right() -> None:
    # the page says that pairs of one study or one text are right for each other
    class OneConcept:
        def link(self, text: str) -> list[Mention]:
            return [Mention("pulmonary_edema", 0, 1, "present")]

    run = small_run()
    knowledge = dataclasses.replace(run.config.knowledge, pair_id_by_concepts=True)
    config = dataclasses.replace(run.config, knowledge=knowledge)
    rows, parts = run.manifest.rows("test"), (run.tokenizer, OneConcept(), run.table)
    joined = pair_ids_by_concepts(run.manifest, rows, phrase_encoder(config, *parts))
    assert len(np.unique(joined[rows])) == 1
    opened = dataclasses.replace(run, config=config, linker=OneConcept())  # type: ignore
    split = encode_split(opened, run.manifest, rows)
    assert split.pair_id.tolist() == run.manifest.pair_id[rows].tolist()


def test_grounding_asks_every_finding_by_name_and_by_sentence_with_all_controls() -> None:
    run, grounding = small_run(), small_results()["grounding"]
    present = {f for r in run.manifest.rows("test").tolist() for f in run.manifest.labels(r)}
    for kind in ("keyword", "sentence"):
        rows = {row["finding"]: row for row in grounding[kind]["findings"]}
        assert rows.keys() <= present and len(rows) >= len(present) - 1
        for row in rows.values():
            assert 0 < row["area"] < 1 and row["n"] > 0
            assert row["swapped"]["value"] is not None
            # generated studies have a mask for every finding, inside its box
            assert row["mask"]["n"] == row["n"] and 0 < row["mask"]["area"] <= row["area"]


def test_the_saved_results_are_strict_json_without_report_text(tmp_path: Path) -> None:
    run, results = small_run(), small_results()
    text = save_results(results, tmp_path / "deep").read_text()
    read = json.loads(text)
    assert "examples" not in read and read["run"]["step"] == 7
    for row in run.manifest.rows("test").tolist():
        assert run.manifest.text(row) not in text
    written = sorted(path.name for path in (tmp_path / "deep").iterdir())
    assert written == ["predictions.parquet", "results.json"]


def test_fingerprints_name_weights_data_and_preprocessing() -> None:
    run, results = small_run(), small_results()
    assert results["fingerprints"]["manifest"] == run.manifest.fingerprint
    assert results["fingerprints"]["concept_table"] == run.table.fingerprint
    changed = copy.deepcopy(run.model)
    with torch.no_grad():
        changed.scales.log_scale.add_(1e-6)
    assert results["fingerprints"]["weights"] == hash_of_weights(run.model)
    assert results["fingerprints"]["weights"] != hash_of_weights(changed)


def test_a_result_names_its_splits_its_scored_rows_and_its_seed() -> None:
    """The splits' hash is that of a trained task; one more image in any split changes it."""
    import dataclasses

    from mlip.transfer.fingerprint import fingerprints

    run, results = small_run(), small_results()
    rows = {name: run.manifest.rows(name, with_report=False) for name in ("train", "val", "test")}
    found = results["fingerprints"]
    assert found["splits"] == splits_hash(run.manifest, rows)
    fewer = {**rows, "train": rows["train"][1:]}
    assert found["splits"] != splits_hash(run.manifest, fewer)
    assert results["run"]["seed"] == run.config.run.seed
    assert {"weights", "splits", "rows", "preprocessing"} <= found.keys()
    half = dataclasses.replace(
        run.config, evaluate=dataclasses.replace(run.config.evaluate, max_studies=9)
    )
    chosen = choose_rows(half, run.manifest)
    other = fingerprints(run.model, half, run.manifest, run.tokenizer, run.table, chosen)
    assert other["splits"] == found["splits"] and other["rows"] != found["rows"]


def test_the_model_is_left_in_the_mode_it_was_in_and_nan_features_are_an_error() -> None:
    run = small_run()
    broken = copy.deepcopy(run.model).train()
    with torch.no_grad():
        next(broken.image_head.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="image features hold NaN"):
        evaluate_run(dataclasses.replace(run, model=broken), run.config, run.manifest)
    assert broken.training


def test_what_an_evaluation_knows_itself_no_export_can_tell_it() -> None:
    """Facts of an export are those of whoever wrote it; the model says where it computes."""
    run = small_run()
    few = dataclasses.replace(
        run.config, evaluate=dataclasses.replace(run.config.evaluate, max_studies=4)
    )
    told = {"device": "abacus", "precision": "exact", "is_local_trained": "yes", "seed": 9}
    results = evaluate_run(dataclasses.replace(run, facts={**run.facts, **told}), few, run.manifest)
    found = {key: results["run"][key] for key in (*told, "step")}
    expected = {"device": "cpu", "precision": "fp32", "is_local_trained": True, "seed": 1}
    assert found == {**expected, "step": 7}


def test_more_rows_than_asked_for_are_a_keyed_choice(tmp_path: Path) -> None:
    run = small_run()
    few = dataclasses.replace(
        run.config, evaluate=dataclasses.replace(run.config.evaluate, max_studies=9)
    )
    chosen = choose_rows(few, run.manifest)
    assert len(chosen) == 9 == len(np.unique(chosen))
    np.testing.assert_array_equal(chosen, choose_rows(few, run.manifest))
    assert set(chosen.tolist()) <= set(run.manifest.rows("test").tolist())
    # which every place says that shows scores
    results = evaluate_run(run, few, run.manifest)
    asked = {key: results["data"][key] for key in ("rows_in_split", "rows_asked", "images")}
    assert asked == {"rows_in_split": 32, "rows_asked": 9, "images": 9}
    assert "drawn from 32 rows (evaluate.max_studies)" in summary_lines(results)[0]
    assert "a random draw of 32 (evaluate.max_studies)" in render(tmp_path, results)
    out = tmp_path / "model"
    save_pretrained(out, run.model, run.config, run.tokenizer, run.table, results=results)
    assert "the split has 32 rows, of which" in (out / "README.md").read_text()
    for told in (summary_lines(small_results())[0], render(tmp_path, small_results())):
        assert "drawn from" not in told and "random draw of" not in told


@pytest.mark.parametrize(
    ("asked", "has_products"), [("auto", True), ("auto", False), ("bf16", False)]
)
def test_results_and_page_say_which_precision_the_machine_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any, has_products: bool
) -> None:
    run = small_run()
    monkeypatch.setattr("mlip.precision.multiplies_bf16", lambda device: has_products)
    model = copy.deepcopy(run.model)
    train = dataclasses.replace(run.config.train, precision=asked)
    model.config = dataclasses.replace(run.config, train=train)
    results = evaluate_run(dataclasses.replace(run, model=model), run.config, run.manifest)
    expected = "bf16" if has_products else "fp32"
    assert results["run"]["precision"] == expected
    assert results["predictions"].facts["precision"] == expected
    entry = f'<dt class="k">precision</dt><dd class="v mono">{expected}</dd>'
    assert entry in render(tmp_path, results)


def test_the_summary_says_each_headline_number() -> None:
    lines = "\n".join(summary_lines(small_results()))
    for part in ("zero-shot AUROC", "recall@10 of 16", "pointing by keyword", "Pneumothorax"):
        assert part in lines


def test_all_rows_are_one_pool_too_and_pointing_has_its_overlap() -> None:
    results = small_results()
    whole = results["retrieval"]["whole"]
    assert whole["n"] == results["data"]["reports"]
    assert whole["scores"].keys() == {"image_to_text", "text_to_image"}
    row = results["grounding"]["keyword"]["all"]
    assert 0.0 <= row["miou"]["value"] <= 1.0
    # this run has no val split: no threshold can be chosen, and that is said
    assert "no val rows" in results["zero_shot"]["at_thresholds"]["reason"]


def test_exclusive_labels_subsets_and_val_thresholds_reach_results_and_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings of configs/transfer/chexpert_zero_shot.yaml, on generated studies."""
    import csv

    from mlip.dataloading.manifest import load_manifest
    from mlip.settings.config import load

    run = small_run()
    with open(run.folder / "data" / "manifest.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    named = ("Nodule", "Pneumothorax")
    for i, row in enumerate(rows):
        row["subset"] = "5x200" if row["split"] == "test" and i % 2 else ""
        row["split"] = (
            "val" if row["split"] == "train" and int(row["patient_id"][-1]) < 5 else (row["split"])
        )
        row["labels"] = named[i // 2 % 2]
        row["sex"] = "FM"[i // 4 % 2]
    path = tmp_path / "manifest.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    settings = [*run.settings, f"data.manifest={path}", f"data.root={run.folder / 'data'}"]
    settings += ["transfer.columns.subset=subset", "evaluate.subset=5x200"]
    settings += ["evaluate.exclusive=true", "evaluate.examples=0"]
    settings += ["evaluate.subgroups={sex: []}", "evaluate.threshold_rule=sensitivity=0.9"]
    for name, least in (("FEWEST_PATIENTS", 2), ("FEWEST_OF_EACH", 1)):
        monkeypatch.setattr(f"mlip.transfer.measures.subgroups.{name}", least)
    monkeypatch.setattr("mlip.transfer.measures.mark_subgroups.FEWEST_PATIENTS", 2)
    config = load([], settings)
    results = evaluate_run(run, config, load_manifest(config.data))
    assert results["data"]["images"] == 16
    assert results["zero_shot"]["exclusive"]["global"]["plain"]["n"] == 16
    assert results["zero_shot"]["at_thresholds"]["macro"]["local"]["f1"]["value"] is not None
    (sex,) = results["zero_shot"]["subgroups"]
    assert [group["images"] for group in sex["groups"]] == [8, 8]
    for score in ("local", "global_specificity"):
        assert sex["groups"][0]["macro"][score]["value"] is not None
        assert sex["groups"][0]["difference"][score]["low"] is not None
    (by_sex,) = results["retrieval"]["subgroups"]
    told = [[g["name"], g["patients"], g["macro"]["global"]["n"]] for g in by_sex["groups"]]
    assert told == [["F", 8, 8], ["M", 8, 8]]
    by_class = results["retrieval"]["by_class"]["image_to_text"]
    assert by_class["classes"].keys() == set(named) and by_class["precision@5"]["n"] == 16
    # each class has 8 of the 16 reports, so that of ten answers eight can be right
    assert [by_class["best"][f"precision@{k}"] for k in (5, 10)] == [1.0, 0.8]
    lines = "\n".join(summary_lines(results))
    results["zero_shot"]["labels_without_concept"] = ["Hernia"]
    assert "not scored, no concept: Hernia" in "\n".join(summary_lines(results))
    for part in (
        "F1 at val thresholds",
        "by sex",
        "accuracy, plain",
        "class precision image to text",
        " of 0.80 possible  @100 n/a  chance",
    ):
        assert part in lines
    page = render(tmp_path, results)
    for part in (
        "evaluate.threshold_rule: sensitivity=0.9",
        "By sex",
        "whose one finding scores",
        "Precision by class",
        " of 0.80 possible, @100 ",
    ):
        assert part in page
    assert "mIoU" in render(tmp_path, small_results())


def test_retrieval_and_pointing_are_told_by_group_too(tmp_path: Path) -> None:
    """Oracle: the kept marks of each image. The candidates are those of the whole."""
    run = small_run()
    asked = dataclasses.replace(run.config.evaluate, subgroups={"view": []}, thresholds=False)
    config = dataclasses.replace(run.config, evaluate=asked)
    results = evaluate_run(run, config, run.manifest)
    plain = small_results()
    assert results["retrieval"]["scores"] == plain["retrieval"]["scores"]
    (zero_shot,) = results["zero_shot"]["subgroups"]
    (retrieval,) = results["retrieval"]["subgroups"]
    views = {g["name"]: g["images"] for g in zero_shot["groups"]}
    assert {g["name"]: g["images"] for g in retrieval["groups"]} == views and len(views) > 0
    reader = csv.DictReader((run.folder / "data" / "manifest.csv").open(encoding="utf-8"))
    view = np.array([row["view"] for row in reader])
    for one in results["predictions"].series:
        for group in retrieval["groups"] if one.measure == "recall@10" else ():
            told = {c["class"]: c[one.method]["value"] for c in group["classes"]}
            own = one.scores[view[one.rows] == group["name"]].mean()
            assert told[one.finding.partition(" among ")[0]] == pytest.approx(own)
    for kind in ("keyword", "sentence"):
        (pointing,) = results["grounding"][kind]["subgroups"]
        names = {row["name"] for row in results["grounding"][kind]["findings"]}
        assert {c["class"] for g in pointing["groups"] for c in g["classes"]} <= names
        assert all(g["images"] <= views[g["name"]] for g in pointing["groups"])
    page, lines = render(tmp_path, results), "\n".join(summary_lines(results))
    assert "By group of the query" in page and "By group of the image" in page
    assert "retrieval by view" in lines and "pointing by keyword by view" in lines
    assert "recall@10, global" in lines
    assert "By group of" not in render(tmp_path, plain)


def test_sentences_of_unknown_words_are_told_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Findings asked in a language of which the vocabulary has no letter scored without a word."""
    settings = [*write(tmp_path), "evaluate.examples=0"]
    assert evaluate(tmp_path, settings) == 0 and "vocabulary" not in caplog.text
    assert evaluate(tmp_path, [*settings, "evaluate.positive_prompts=['{} \u5de6', '{}.']"]) == 0
    (line,) = [line for line in caplog.messages if "vocabulary does not know" in line]
    assert "phrase 1 (1 of " in line and "phrase 2" not in line and "\u5de6" not in line


@pytest.mark.parametrize("task", [LABELS, []], ids=["probe", "nothing trained"])
def test_whatever_grows_with_the_films_says_how_far_it_is(
    task: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of 25,000 films nothing was said for minutes: scores and their intervals by group."""
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    boxes = {"boxes": '[[5, 10, 30, 5, "Edema"]]', "sex": lambda i: "MF"[i > 27]}
    asked = [*write(tmp_path, **boxes), *task, "transfer.columns.boxes=boxes"]
    asked += ["evaluate.subgroups={sex: []}"]
    assert evaluate(tmp_path, asked) == 0
    told = capsys.readouterr().err
    for what in (
        ("images looked at", "images encoded", "classes scored", "groups scored")
        if task
        else (
            *("images and reports encoded", "val images scored", "findings scored"),
            *("heads scored", "groups scored", "pools ranked", "phrases looked for"),
            *("images and texts ranked among all", "queries of a class ranked"),
        )
    ):
        assert f" {what}" in told
