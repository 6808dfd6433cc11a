"""`mlip classify`: findings of films without labels, as an evaluation of the same model scores
them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mlip.cli import main
from mlip.commands.inputs import read_given
from mlip.dataloading.dicom.write import write_radiograph
from mlip.pretrained import open_checkpoint
from mlip.transfer.alignment.zero_shot import Prompts
from mlip.transfer.films.classify import (
    Question,
    QuestionError,
    ask_as_evaluated,
    ask_names,
    ask_wordings,
    called,
    encode_question,
    scores,
)
from mlip.transfer.measures.predictions import load_predictions
from tests.small_run import small_export
from tests.transfer.small_manifest import SECRETS, evaluate, pictures, write


def run(folder: Path, *options: str, root: Path | None = None, **columns: Any) -> int:
    settings = [*write(folder, **columns), f"checkpoint={small_export()}"]
    settings += [f"data.root={root}"] if root else []
    out = [] if "--out" in options else ["--out", str(folder / "f.csv")]
    return main(["classify", *settings, *out, *options])


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "f.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_score_is_what_states_the_finding_minus_what_denies_it():
    opened = open_checkpoint(small_export())
    images = opened.encode_images([pictures() / "3.png", pictures() / "4.png"])
    found = {
        head: opened.classify(images, ["Edema", "pleural effusion"], head)
        for head in ("global", "local", "combined")
    }
    for place, name in enumerate(("pulmonary edema", "pleural effusion")):
        for head in ("global", "local"):
            stated = opened.encode_texts(
                [s.replace("{}", name) for s in opened.config.evaluate.positive_prompts]
            )
            denied = opened.encode_texts(
                [s.replace("{}", name) for s in opened.config.evaluate.negative_prompts]
            )
            own = opened.similarity(images, stated, head).mean(axis=1)
            own -= opened.similarity(images, denied, head).mean(axis=1)
            np.testing.assert_allclose(found[head][:, place], own, atol=1e-6)
    scales = opened.model.scales
    both = scales.logit_scale().item() * found["global"]
    both += scales.logit_scale_local().item() * found["local"]
    np.testing.assert_allclose(found["combined"], both, rtol=1e-5, atol=1e-6)
    assert np.abs(found["global"] - found["local"]).max() > 1e-3
    with pytest.raises(ValueError, match="head: expected one of combined, global, local"):
        opened.classify(images, ["Edema"], "both")  # type: ignore[arg-type]


@pytest.mark.parametrize("head", ["combined", "global", "local"])
def test_as_evaluated_the_films_get_the_evaluation_s_scores_and_answers(tmp_path, capsys, head):
    assert evaluate(tmp_path, write(tmp_path)) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    kept = load_predictions(tmp_path / "out")
    asked = ("--like", str(tmp_path / "out" / "results.json"), "--head", head)
    capsys.readouterr()
    assert run(tmp_path, *asked, "--split", "test", report="", labels="") == 0
    said, rows = capsys.readouterr().out, read(tmp_path)
    told = results["zero_shot"]["at_thresholds"]["findings"]
    for one in kept.series:
        if one.method != head or one.measure != "auroc":
            continue
        found = {int(row["row_index"]): float(row[one.finding]) for row in rows}
        assert sorted(found) == sorted(one.rows.tolist())
        expected = dict(zip(one.rows.tolist(), one.scores, strict=True))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
        cut = told[one.finding][head]["threshold"]
        yes = sum(int(row[f"{one.finding} called"]) for row in rows)
        assert yes == told[one.finding][head]["ppv"]["n"] == sum(one.scores >= cut)
        assert f"  {one.finding}: {yes} called (threshold {cut:.6g})" in said
    assert f"12 images, 2 findings by the {head} score" in said and "Not for clinical use" in said


def test_a_sentence_that_cannot_be_asked_names_its_file_and_finding(tmp_path, capsys):
    """The message said "phrase 4 has 901 tokens" and left its reader to count."""
    long = "Extensive edema of the lungs. " * 300
    for text, told in ((long, "phrase 4 has"), (" ", "the phrase ' '")):
        wordings = tmp_path / "w.yaml"
        side = {"positive": ["edema."], "negative": ["no edema."]}
        own = {"first": side, "wet lungs": {"positive": ["wet lungs."], "negative": [text]}}
        wordings.write_text(json.dumps(own))
        assert run(tmp_path, "--wordings", str(wordings)) == 4
        said = capsys.readouterr().err
        assert f"{wordings}: finding 'wet lungs': {told}" in said and long[:20] not in said
    with pytest.raises(QuestionError, match="^finding 'wet lungs': "):
        encode_question(
            open_checkpoint(small_export()),
            Question((Prompts("wet lungs", "Wet lungs", ("wet.",), (long,)),)),
        )


def test_a_file_that_cannot_be_read_has_its_reason_and_nobody_is_named(tmp_path, capsys):
    root = Path(shutil.copytree(pictures(), tmp_path / "images"))
    cut = root / "8.png"
    cut.write_bytes(cut.read_bytes()[:100])
    assert run(tmp_path, "--finding", "Edema", "--finding", "chest tube", root=root) == 0
    said, rows = capsys.readouterr().out, read(tmp_path)
    assert [int(row["row_index"]) for row in rows] == list(range(30))
    assert list(rows[0]) == ["row_index", "Edema", "chest tube", "reason"]
    assert list(rows[8].values()) == ["8", "", "", "truncated"]
    assert all(row["Edema"] and not row["reason"] for i, row in enumerate(rows) if i != 8)
    assert "30 rows; 1 cannot be read (truncated 1)" in said and "threshold" not in said
    assert not any(secret in said + (tmp_path / "f.csv").read_text() for secret in SECRETS)
    assert (tmp_path / "f.csv").stat().st_mode & 0o777 == 0o600
    assert run(tmp_path, "--finding", "Edema", "--split", "val", split="") == 3
    assert "split 'val' has none of its 30 rows" in capsys.readouterr().err


def test_a_film_that_prepare_refuses_as_too_dark_gets_the_reason_and_no_score(tmp_path, capsys):
    """12-bit values as they are in a PNG, and a DICOM file of one value."""
    root = Path(shutil.copytree(pictures(), tmp_path / "images"))
    low = np.random.default_rng(0).integers(0, 4096, (40, 60)).astype(np.uint16)
    cv2.imwrite(str(root / "8.png"), low)
    cv2.imwrite(str(root / "9.png"), low * 16)
    flat = np.full((40, 60), 7, np.uint16)
    write_radiograph(root / "flat.dcm", flat, patient_id="p", study_id="s", bits_stored=12)

    def image(i: int) -> str:
        return "flat.dcm" if i == 3 else f"{i}.png"

    assert run(tmp_path, "--finding", "Edema", root=root, image=image) == 0
    rows = read(tmp_path)
    for i, row in enumerate(rows):
        expected = "too_dark" if i in (3, 8) else ""
        assert row["reason"] == expected and bool(row["Edema"]) == (not expected)
    assert "30 rows; 2 cannot be read (too_dark 2)" in capsys.readouterr().out


def test_sentences_of_one_s_own_ask_for_anything(tmp_path, capsys):
    path = tmp_path / "wordings.yaml"
    path.write_text("edema, mild: {positive: [mild edema.], negative: [no edema., clear lungs.]}\n")
    assert run(tmp_path, "--wordings", str(path), "--head", "global") == 0
    opened = open_checkpoint(small_export())
    images = opened.encode_images([pictures() / f"{i}.png" for i in range(30)])
    similar = opened.similarity(
        images, opened.encode_texts(["mild edema.", "no edema.", "clear lungs."])
    )
    own = similar[:, 0] - similar[:, 1:].mean(axis=1)
    found = [float(row["edema, mild"]) for row in read(tmp_path)]
    np.testing.assert_allclose(found, own, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "edema: yes",
        "edema: {positive: [a.]}",
        "edema: {positive: [], negative: [b.]}",
        "edema: {positive: a., negative: [b.]}",
        "edema: {positive: [1], negative: [b.]}",
        "1: {positive: [a.], negative: [b.]}",
        "edema: {positive: [a.], negative: [b.], also: [c.]}",
        "edema: [",
    ],
)
def test_sentences_that_cannot_be_read_name_the_file_and_the_form(tmp_path, text):
    path = tmp_path / "wordings.yaml"
    path.write_text(text)
    with pytest.raises(QuestionError, match=r"(?s)wordings\.yaml: .*(expected YAML|is none of)"):
        ask_wordings(path)
    with pytest.raises(QuestionError, match="cannot be read"):
        ask_wordings(tmp_path / "missing.yaml")


def test_names_that_the_lexicon_does_not_know_are_told_all_at_once(tmp_path, capsys):
    assert run(tmp_path, *("--finding", "Edema", "--finding", "qqq", "--finding", "zzz")) == 4
    assert "no finding called 'qqq', 'zzz'" in capsys.readouterr().err
    assert run(tmp_path, "--finding", "Edema", "--finding", "Edema") == 4
    assert "'Edema' is asked twice" in capsys.readouterr().err
    assert not (tmp_path / "f.csv").exists()
    for options in ((), ("--finding", "Edema", "--like", "results.json")):
        with pytest.raises(SystemExit):
            run(tmp_path, *options)
    assert run(tmp_path, "--like", "") == 2
    assert "--like is empty" in capsys.readouterr().err


def test_results_of_another_model_or_none_are_refused(tmp_path):
    opened = open_checkpoint(small_export())
    assert evaluate(tmp_path, write(tmp_path)) == 0
    path = tmp_path / "out" / "results.json"
    whole = json.loads(path.read_text())
    assert ask_as_evaluated(path, opened, "local").thresholds
    for key, told in (
        ("weights", "other weights"),
        ("preprocessing", "other preprocessing"),
        ("concept_table", "other concepts"),
    ):
        other = {**whole, "fingerprints": {**whole["fingerprints"], key: "0"}}
        path.write_text(json.dumps(other))
        with pytest.raises(QuestionError, match=told):
            ask_as_evaluated(path, opened, "local")
    shot = whole["zero_shot"]
    broken = [
        {"findings": {"Edema": {"local": {"threshold": cut}}}}
        for cut in ("high", True, 10**400, float("nan"), float("inf"), float("-inf"))
    ]
    for change in (
        {"zero_shot": {"reason": "data.columns.labels is not set"}},
        *({"zero_shot": {**shot, "at_thresholds": one}} for one in broken),
        {"zero_shot": {**shot, "at_thresholds": {"findings": {"Edema": {}}}}},
        {"zero_shot": []},
        {"fingerprints": {}},
    ):
        path.write_text(json.dumps({**whole, **change}))
        with pytest.raises(QuestionError, match=r"expected results\.json of `mlip evaluate`"):
            ask_as_evaluated(path, opened, "local")
    for text in ("", "[]", "null"):
        path.write_text(text)
        with pytest.raises(QuestionError, match=r"expected results\.json of `mlip evaluate`"):
            ask_as_evaluated(path, opened, "local")
    with pytest.raises(QuestionError, match="cannot be read: No such file"):
        ask_as_evaluated(tmp_path / "none.json", opened, "local")


def test_an_evaluation_without_thresholds_gives_scores_and_says_why(tmp_path, capsys):
    assert evaluate(tmp_path, [*write(tmp_path), "evaluate.thresholds=false"]) == 0
    capsys.readouterr()
    assert run(tmp_path, "--like", str(tmp_path / "out" / "results.json")) == 0
    said = capsys.readouterr().out
    assert "no thresholds (" in said and "results.json: none chosen)" in said
    assert not any("called" in name for name in read(tmp_path)[0])
    assert evaluate(tmp_path, [*write(tmp_path), "evaluate.split=val"]) == 0
    capsys.readouterr()
    assert run(tmp_path, "--like", str(tmp_path / "out" / "results.json")) == 0
    said = capsys.readouterr().out
    assert "results.json: of val itself" in said and "evaluate.split=test)" in said
    settings = write(
        tmp_path, labels=lambda i: "Mass" if i % 5 == 2 else ("Edema|Mass", "Mass")[i % 2]
    )
    assert evaluate(tmp_path, settings) == 0  # val carries no edema, and only mass
    capsys.readouterr()
    assert run(tmp_path, "--like", str(tmp_path / "out" / "results.json")) == 0
    said = capsys.readouterr().out
    assert "  Edema: no threshold: val cannot tell\n" in said and "  Mass: " in said
    assert "Mass called" in read(tmp_path)[0] and "Edema called" not in read(tmp_path)[0]
    # neither has one: told of each, and one that the results name none of is no fault of val's
    path = tmp_path / "out" / "results.json"
    results = json.loads(path.read_text())
    of = results["zero_shot"]["at_thresholds"]["findings"]
    del of["Mass"]
    path.write_text(json.dumps(results))
    assert run(tmp_path, "--like", str(path)) == 0
    said = capsys.readouterr().out
    assert "  Edema: no threshold: val cannot tell\n" in said
    assert "  Mass: no threshold: the results name none\n" in said


def test_a_file_of_another_kind_is_never_replaced(tmp_path, capsys):
    assert run(tmp_path, "--finding", "Edema") == 0
    first = (tmp_path / "f.csv").read_bytes()
    assert run(tmp_path, "--finding", "chest tube") == 0  # a table of other findings is
    assert (tmp_path / "f.csv").read_bytes() != first
    outliers = tmp_path / "o.csv"
    outliers.write_text("row_index,p_value,distance,reason\n")
    weights = tmp_path / "w.safetensors"
    shutil.copy(next(Path(small_export()).glob("*.safetensors")), weights)
    for path in (tmp_path / "manifest.csv", outliers, weights, tmp_path):
        before = path.read_bytes() if path.is_file() else b""
        assert run(tmp_path, "--finding", "Edema", "--out", str(path)) == 2
        assert f"--out {path}: is there already" in capsys.readouterr().err
        assert not before or path.read_bytes() == before


def test_of_new_films_no_column_but_the_image_s_is_needed(tmp_path, capsys):
    assert run(tmp_path, "--finding", "Edema") == 0
    expected = read(tmp_path)
    capsys.readouterr()
    settings = [*write(tmp_path), f"checkpoint={small_export()}"]
    path = tmp_path / "manifest.csv"
    path.write_text("image\n" + "".join(f"{i}.png\n" for i in range(30)))
    # what a run's own settings name: none of them is there
    settings += ["data.columns.study_id=study_id", "data.columns.image_id=image_id"]
    settings += ["data.columns.sha256=sha256"]
    asked = ["classify", *settings, "--finding", "Edema", "--out", str(tmp_path / "f.csv")]
    assert main(asked) == 0
    assert read(tmp_path) == expected
    assert main([*asked, "--split", "test"]) == 3
    missing = "missing columns: 'patient_id' (data.columns.patient_id); 'split' (data.columns.split"
    assert missing in capsys.readouterr().err
    # but where files are to be checked: what to write without hashes is told at once
    assert main([*asked, "data.verify=hash"]) == 3
    told = capsys.readouterr().err
    assert "missing columns: 'sha256' (data.columns.sha256)" in told
    assert (remedy := "data.columns.sha256=null data.verify=none") in told
    assert main([*asked, "data.verify=hash", *remedy.split()]) == 0
    assert read(tmp_path) == expected


@pytest.mark.parametrize("name", ["", " edema", "edema ", "edema\nmild", "edema\u2028mild"])
def test_a_name_that_is_no_column_s_is_refused(name):
    with pytest.raises(QuestionError, match="expected a name in one line without blanks around"):
        Question((Prompts("fine", "Fine", ("a",), ("b",)), Prompts(name, name, ("a",), ("b",))))


def test_columns_that_would_stand_twice_are_refused(tmp_path, capsys):
    wordings = tmp_path / "w.yaml"
    wordings.write_text("reason: {positive: [edema.], negative: [no edema.]}\n")
    assert run(tmp_path, "--wordings", str(wordings)) == 4
    assert "'reason' is a column of the table" in capsys.readouterr().err


def test_answers_are_of_the_findings_with_a_threshold():
    prompts = tuple(Prompts(name, name, ("a",), ("b",)) for name in "xyz")
    question = Question(prompts, {"x": 0.5, "y": None})
    found = called(np.array([[0.5, 9.0, 9.0], [0.4, 9.0, 9.0]]), question)
    assert {name: answer.tolist() for name, answer in found.items()} == {"x": [True, False]}


def test_sentences_in_the_settings_are_those_that_are_asked(tmp_path):
    opened = open_checkpoint(small_export())
    items = [*write(tmp_path), "evaluate.positive_prompts=['{} is seen.']"]
    settings = read_given(items).config
    question = ask_names(["Edema"], opened, settings.evaluate)
    assert question.prompts[0].positive == ("pulmonary edema is seen.",)
    images = opened.encode_images([pictures() / "0.png"])
    texts = encode_question(opened, question)
    assert scores(opened, images, question, texts, "global").shape == (1, 1)
    assert len(texts) == 1 + len(settings.evaluate.negative_prompts)


@pytest.mark.parametrize("name", ["=1+1", "+edema", "-edema", "@SUM(A1)", "\uff1dedema"])
def test_a_column_that_a_spreadsheet_would_run_as_a_formula_is_refused(name, tmp_path, capsys):
    wordings = tmp_path / "w.yaml"
    wordings.write_text(f'"{name}": {{positive: [edema.], negative: [no edema.]}}\n', "utf-8")
    assert run(tmp_path, "--wordings", str(wordings)) == 4
    assert "would run a column of that name as a formula" in capsys.readouterr().err
    assert not (tmp_path / "f.csv").exists()
