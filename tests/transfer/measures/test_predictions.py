"""predictions.parquet: what evaluations scored of every image, and nothing that names anybody."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from sklearn.metrics import roc_auc_score

from mlip.transfer.measures.predictions import (
    FILE,
    Predictions,
    PredictionsError,
    load_predictions,
    of_findings,
    of_marks,
    save_predictions,
)
from mlip.transfer.results_file import save_results
from tests.small_run import small_export, small_results, small_run
from tests.transfer.small_manifest import BOXES, LABELS, MASKS, SECRETS, evaluate, write


def drawn() -> Predictions:
    generator = np.random.default_rng(0)
    rows = np.array([7, 3, 12, 4])
    truth = np.array([[1, 0], [0, 1], [-1, 1], [1, -1]], dtype=np.int8)
    series = [
        *of_findings("global", None, ["b", "a|c"], rows, truth, generator.normal(size=(4, 2))),
        *of_findings("10 %", 3, ["b", "a|c"], rows, truth, generator.normal(size=(4, 2))),
        of_marks("10 %", 3, "all classes", "accuracy", rows[:2], np.array([True, False])),
    ]
    facts = {"name": "mine", "split": "test", "manifest": "0" * 64}
    return Predictions(series, {7: 0, 3: 2, 12: 0, 4: 4}, facts)


def test_a_file_gives_back_what_was_written_to_the_bit(tmp_path):
    made = drawn()
    path = tmp_path / FILE
    save_predictions(made, path)
    assert path.stat().st_mode & 0o777 == 0o600
    for place in (path, tmp_path):
        found = load_predictions(place)
        assert found.patients == made.patients and found.facts == made.facts
        assert len(found.series) == len(made.series)
        for one, other in zip(made.series, found.series, strict=True):
            assert (one.method, one.seed, one.key) == (other.method, other.seed, other.key)
            for name in ("rows", "truth", "scores"):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    table = pa.parquet.read_table(path).to_pylist()
    assert len(table) == 18 and table[2]["truth"] is None and table[0]["seed"] is None
    assert table[-1] == {
        **{"row_index": 3, "patient": 2, "method": "10 %", "seed": 3, "finding": "all classes"},
        **{"measure": "accuracy", "truth": None, "score": 0.0},
    }
    for _ in range(2):  # an evaluation without any: the earlier one's would lie
        save_results({"of": "later"}, tmp_path)
        assert not path.exists()
        told = json.loads((tmp_path / "results.json").read_text())
        assert told["fingerprints"] == {"predictions": None}


def test_seeds_as_large_as_settings_take_stay_apart(tmp_path):
    """Of 32 bits, 4294967297 was 1: both fits' scores were one series under one seed."""
    rows, truth = np.arange(2), np.array([[1], [0]], dtype=np.int8)
    seeds = [1, 2**32 + 1, 2**63 - 1]
    series = [
        s for n in seeds for s in of_findings("1 %", n, ["a"], rows, truth, truth * (n / 2.0))
    ]
    facts = {"name": "mine", "split": "test", "manifest": "0" * 64}
    save_predictions(Predictions(series, {0: 0, 1: 1}, facts), tmp_path / FILE)
    found = load_predictions(tmp_path)
    assert sorted(s.seed for s in found.series) == seeds
    assert all(s.scores[0] == s.seed / 2 for s in found.series)


def test_files_that_are_none_or_hold_no_numbers_are_refused(tmp_path):
    path = tmp_path / FILE
    with pytest.raises(PredictionsError, match=r"cannot be read: there is none.*evaluate again"):
        load_predictions(tmp_path)
    for content in (b"", b"junk" * 40):
        path.write_bytes(content)
        with pytest.raises(PredictionsError, match=r"predictions\.parquet: is no file of"):
            load_predictions(path)
    save_predictions(drawn(), path)
    whole = pa.parquet.read_table(path)
    facts = json.loads(whole.schema.metadata[b"mlip"])
    for table, told in (
        (whole.replace_schema_metadata({}), "is no file of predictions"),
        (whole.replace_schema_metadata({"mlip": "{"}), "is no file of predictions"),
        (
            whole.replace_schema_metadata({"mlip": json.dumps({**facts, "format": 2})}),
            "of another version",
        ),
        (whole.drop_columns(["seed"]), "of another version"),
        (
            whole.set_column(5, "measure", pa.array(["kappa"] * len(whole))),
            "measure 'kappa': expected one of auroc",
        ),
        (whole.slice(0, 0), "holds no scores"),
        (
            whole.set_column(7, "score", pa.array(np.full(len(whole), np.nan))),
            "holds no scores, or some",
        ),
    ):
        pa.parquet.write_table(table, path)
        with pytest.raises(PredictionsError, match=told):
            load_predictions(path)


@pytest.mark.parametrize("name", ["row_index", "method", "finding", "measure", "score", "patient"])
def test_a_stranger_s_file_of_other_types_is_refused_and_breaks_nothing(name, tmp_path):
    """Each ended `mlip compare` by a traceback: of numpy, of Arrow, or where lines are written."""
    path = tmp_path / FILE
    save_predictions(drawn(), path)
    whole = pa.parquet.read_table(path)
    place, n = whole.schema.names.index(name), len(whole)
    first = whole[name].slice(0, 1).to_pylist()
    gap = pa.array([None, *first * (n - 1)])
    for values in (pa.array([[1]] * n), pa.array([{"a": 1}] * n), pa.nulls(n), gap):
        pa.parquet.write_table(whole.set_column(place, name, values), path)
        with pytest.raises(PredictionsError, match=r"is no file of predictions: expected"):
            load_predictions(path)
    facts = json.loads(whole.schema.metadata[b"mlip"])
    for other in (json.dumps({**facts, "split": ["test"]}), "[" * 100_000):
        pa.parquet.write_table(whole.replace_schema_metadata({"mlip": other}), path)
        with pytest.raises(PredictionsError, match="is no file of predictions"):
            load_predictions(path)


def test_an_evaluation_keeps_every_image_s_scores_and_names_nobody(tmp_path):
    """Two images a patient: of either the first row of the manifest stands for the patient."""
    settings = write(tmp_path, patient_id=lambda i: f"PATIENT-SECRET-{i // 5 * 5 + min(i % 5, 3)}")
    assert evaluate(tmp_path, settings) == 0
    found = load_predictions(tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found.facts == {
        **{"name": small_export().name, "split": "test"},
        **{"manifest": results["fingerprints"]["manifest"]},
        **{"precision": results["run"]["precision"]},
    }
    # rows 3 and 4 of each five are one patient's, both of test
    assert found.patients == {row: row - row % 5 + 3 for row in range(30) if row % 5 >= 3}
    scored = {f["finding"]: f for f in results["zero_shot"]["findings"]}
    assert {s.method for s in found.series} == {"global", "local", "combined"}
    for one in found.series:
        if one.measure == "auroc":
            value = roc_auc_score(one.truth, one.scores)
            assert value == pytest.approx(scored[one.finding][one.method]["value"])
    raw = (tmp_path / "out" / FILE).read_bytes()
    assert not any(secret.encode() in raw for secret in SECRETS)


def test_retrieval_and_pointing_keep_what_each_image_hit():
    """Oracle: the means in results; of a finding's several phrases an image keeps the mean."""
    results, config = small_results(), small_run().config
    kept = results["predictions"]
    retrieval, told = results["retrieval"], set()
    for one in kept.series:
        if one.measure.startswith("recall@"):
            direction, pool = one.finding.rsplit(" among ", 1)
            own = retrieval["scores"][one.method][direction.replace(" ", "_")]
            assert one.scores.mean() == pytest.approx(own[one.measure]["value"])
            assert len(one.rows) == len(set(one.rows)) == retrieval["n"]
            assert int(pool) == retrieval["pool"] == config.evaluate.retrieval_pool
            told.add((one.method, direction, one.measure))
    assert len(told) == 3 * 2 * 3 and "oracle" in retrieval
    pointing = [s for s in kept.series if s.measure == "hit"]
    assert {s.method for s in pointing} == {"pointing by keyword", "pointing by sentence"}
    for one in pointing:
        rows = results["grounding"][one.method.rsplit(" ", 1)[1]]["findings"]
        (own,) = [row for row in rows if row["finding"] == one.finding]
        assert set(one.rows) <= set(kept.patients) and len(set(one.rows)) == len(one.rows)
        if own["n"] == len(one.rows):  # a phrase an image
            assert one.scores.mean() == pytest.approx(own["hit"]["value"])
    assert any(len(s.rows) > 1 for s in pointing)


def test_a_probe_and_masks_keep_their_scores_by_share_and_seed(tmp_path):
    more = ["transfer.seeds=[1, 2]", "transfer.fractions=[50, 100]"]
    assert evaluate(tmp_path, [*write(tmp_path), *LABELS, *more]) == 0
    found = load_predictions(tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(s.method, s.seed) for s in found.series] == [
        *(("50 %", 1), ("50 %", 2), ("100 %", 1), ("100 %", 2)),
    ]
    for fraction in results["fractions"]:
        told = fraction["scores"]["classes"][0]["auroc"]["seeds"]
        own = [s for s in found.series if s.method == f"{fraction['percent']:g} %"]
        assert [roc_auc_score(s.truth, s.scores) for s in own] == pytest.approx(told)

    assert evaluate(tmp_path, [*write(tmp_path, mask="mask.png"), *MASKS]) == 0
    found = load_predictions(tmp_path / "out")
    dice = json.loads((tmp_path / "out" / "results.json").read_text())["fractions"][0]["scores"]
    assert [s.measure for s in found.series] == ["dice", "dice_positive"]
    for one, form in zip(found.series, ("published", "positive_only"), strict=True):
        assert one.scores.mean() == pytest.approx(dice["dice"][form]["value"])

    boxes = '[[5, 5, 20, 20, "Edema"]]'
    assert evaluate(tmp_path, [*write(tmp_path, boxes=boxes), *BOXES]) == 0
    assert not (tmp_path / "out" / FILE).exists()  # no score of an image makes a mAP


def test_classes_that_exclude_each_other_keep_the_answer_s_mark(tmp_path):
    settings = [
        *write(tmp_path),
        "transfer.task=classification",
        "transfer.classes={Edema: zero, Mass: zero}",
        "transfer.exclusive=true",
    ]
    assert evaluate(tmp_path, settings) == 0
    found = load_predictions(tmp_path / "out").series
    scores = json.loads((tmp_path / "out" / "results.json").read_text())["fractions"][0]["scores"]
    # of two classes one against the other is one number
    assert [s.key for s in found] == [("Mass", "auroc"), ("all classes", "accuracy")]
    assert roc_auc_score(found[0].truth, found[0].scores) == pytest.approx(
        scores["classes"][1]["auroc"]["value"]
    )
    assert 0.0 <= found[0].scores.min() <= found[0].scores.max() <= 1.0
    assert found[1].scores.mean() == pytest.approx(scores["macro"]["accuracy"]["value"])


def test_a_class_that_the_fit_could_not_learn_has_no_scores(tmp_path):
    settings = [
        *write(tmp_path, labels=lambda i: "Mass" if i % 5 < 2 else ("Edema|Mass", "Mass")[i % 2]),
        "transfer.task=classification",
        "transfer.classes={Edema: zero, Mass: zero}",
    ]
    assert evaluate(tmp_path, settings) == 0  # train shows no edema, and mass everywhere
    assert not (tmp_path / "out" / FILE).exists()


def test_rows_of_the_series_are_of_the_manifest_not_of_the_split(tmp_path: Path):
    assert evaluate(tmp_path, [*write(tmp_path), "evaluate.split=val"]) == 0
    found = load_predictions(tmp_path / "out")
    assert {tuple(sorted(s.rows)) for s in found.series} == {(2, 7, 12, 17, 22, 27)}
    assert found.facts["split"] == "val"


@pytest.mark.parametrize("odd", ["results", "predictions"])
def test_results_and_predictions_stay_of_one_evaluation_where_one_cannot_be_written(tmp_path, odd):
    save_results({"of": "first", "predictions": drawn()}, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    kept = drawn()
    second = {"of": "second", "predictions": dataclasses.replace(kept, series=kept.series[:1])}
    if odd == "results":
        second["score"] = float("nan")
    else:
        second["predictions"] = dataclasses.replace(kept, patients={})
    with pytest.raises((ValueError, KeyError)):
        save_results(second, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_copy_under_another_name_is_no_part_of_the_evaluation_it_lies_beside(tmp_path):
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        made = {"of": name, "predictions": drawn().named(name)}
        save_results(made, tmp_path / name)
    (tmp_path / "other" / FILE).rename(tmp_path / "mine" / "other.parquet")
    assert load_predictions(tmp_path / "mine" / "other.parquet").facts["name"] == "other"
    assert load_predictions(tmp_path / "mine").facts["name"] == "mine"


def test_the_page_of_earlier_results_goes_when_they_are_replaced_and_not_before(tmp_path: Path):
    """A kill between results and page left a page of other numbers beside the results."""
    page = tmp_path / "report.html"
    for later in ({"of": "second", "predictions": drawn()}, {"of": "third"}):
        save_results({"of": "first", "predictions": drawn()}, tmp_path)
        page.write_text("of the first")
        with pytest.raises(ValueError, match="JSON"):
            save_results({**later, "score": float("nan")}, tmp_path)
        assert page.read_text() == "of the first"
        save_results(later, tmp_path)
        assert not page.exists()


def test_a_kill_between_the_two_files_is_found_out_by_whoever_reads_them(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    save_results({"of": "first", "predictions": drawn()}, tmp_path)
    assert load_predictions(tmp_path).facts == drawn().facts
    rename = Path.replace

    def until_the_results(partial: Path, name: Path) -> Path:
        if name == path:
            raise KeyboardInterrupt
        return rename(partial, name)

    later = {"of": "second", "predictions": drawn().named("other")}
    with monkeypatch.context() as killed:
        killed.setattr(Path, "replace", until_the_results)
        with pytest.raises(KeyboardInterrupt):
            save_results(later, tmp_path)
    assert json.loads(path.read_text())["of"] == "first"
    with pytest.raises(PredictionsError, match=r"is not of the evaluation of .*evaluate again"):
        load_predictions(tmp_path)
    save_results(later, tmp_path)
    assert load_predictions(tmp_path).facts["name"] == "other"
    # earlier versions told no hash, and whoever takes the file elsewhere has no results beside it
    for told in ({"of": "second"}, {"fingerprints": {"manifest": "m"}}, []):
        path.write_text(json.dumps(told))
        load_predictions(tmp_path)
    path.write_text("{")
    load_predictions(tmp_path)
    path.unlink()
    load_predictions(tmp_path)
