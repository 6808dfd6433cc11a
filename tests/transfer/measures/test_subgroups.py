"""Scores by group of patients.

Oracle: the rows of a group scored alone; planted gaps; resamples of patients by hand. What a group
of few patients is called, and who is in it, never comes out.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from sklearn.metrics import roc_auc_score

from mlip.dataloading.manifest import Manifest, ManifestError, load_manifest
from mlip.settings.config import ConfigError, load
from mlip.transfer.alignment.zero_shot import zero_shot_measures
from mlip.transfer.fits import protocol
from mlip.transfer.measures import subgroups
from mlip.transfer.measures.interval import Measured, patient_resamples
from mlip.transfer.measures.subgroups import Measures, read_groupings, subgroup_scores
from tests.transfer.small_manifest import BOXES, LABELS, MASKS, SECRETS, evaluate, write

ROWS = 120
SEX = ["F" if i % 2 else "M" for i in range(ROWS)]


def _manifest(tmp_path: Path, asked: str, **columns: Any) -> tuple[Any, Manifest, np.ndarray]:
    cells = {"sex": SEX, "patient_id": [f"p{i}" for i in range(ROWS)], **columns}
    lines = ["image,report,split," + ",".join(cells)]
    for i in range(ROWS):
        lines.append(f"{i}.png,Clear.,test," + ",".join(str(cells[c][i]) for c in cells))
    path = tmp_path / "manifest.csv"
    path.write_text("\n".join(lines) + "\n")
    given = [f"data.manifest={path}", "data.columns.study_id=null", f"evaluate.subgroups={asked}"]
    config = load(overrides=given)
    return config, load_manifest(config.data), np.arange(ROWS)


def test_groups_are_the_cells_of_a_column_and_ranges_of_a_number(tmp_path: Path) -> None:
    ages = [str(i) if i < 100 else " " if i < 110 else "nan" for i in range(ROWS)]
    config, manifest, rows = _manifest(tmp_path, "{sex: [], age: [20, 40, 95]}", age=ages)
    sex, age = read_groupings(config, manifest, rows)
    assert (sex.column, sex.names) == ("sex", ("F", "M"))
    assert (sex.members[0] == (np.arange(ROWS) % 2 == 1)).all() and sex.stated.all()
    assert age.names == ("below 20", "20 to below 40", "40 to below 95")
    assert [m.sum() for m in age.members] == [20, 20, 55] and age.members[1][20]
    assert age.stated.sum() == 100
    # five patients of 95 and more: counted, not shown
    assert age.small == {"groups": 1, "images": 5, "patients": 5}


def test_ranges_of_large_numbers_are_told_apart(tmp_path: Path) -> None:
    days = [20200100 + i % 4 for i in range(ROWS)]
    edges = "[20200101, 20200102, 20200103.5]"
    (day,) = read_groupings(*_manifest(tmp_path, f"{{day: {edges}}}", day=days))
    assert day.names == (
        *("below 20200101", "20200101 to below 20200102"),
        "20200102 to below 20200103.5",
    )
    assert [m.sum() for m in day.members] == [30, 30, 60] and not day.small["groups"]


@pytest.mark.parametrize("kind", [pa.date32(), pa.timestamp("us", "UTC")])
def test_a_column_of_days_is_refused_with_what_to_write(tmp_path: Path, kind: Any) -> None:
    _manifest(tmp_path, "{}")
    table = pyarrow.csv.read_csv(tmp_path / "manifest.csv")
    days = pa.array(range(ROWS), pa.int32() if kind == pa.date32() else pa.int64()).cast(kind)
    path = tmp_path / "manifest.parquet"
    pyarrow.parquet.write_table(table.append_column("day", days), path)
    given = [f"data.manifest={path}", "data.columns.study_id=null"]
    config = load(overrides=[*given, "evaluate.subgroups={day: [20200101]}"])
    with pytest.raises(ManifestError, match=r"'day': .* days as numbers such as 20200131"):
        read_groupings(config, load_manifest(config.data), np.arange(ROWS))


def test_what_programs_write_for_a_gap_is_no_group_and_names_fit_a_line(tmp_path: Path) -> None:
    cells = ["NA", " None ", "<NA>", "nan", "null", "#N/A"] * 10
    cells += ["ward  3", "ward 3 ", '"ward\n3"', "ward\x1b3", "Ward 3", "Ward 3"] * 10
    (ward,) = read_groupings(*_manifest(tmp_path, "{ward: []}", ward=cells))
    assert ward.names == ("Ward 3", "ward 3")
    assert [m.sum() for m in ward.members] == [20, 40] and ward.stated.sum() == 60
    (ward,) = read_groupings(*_manifest(tmp_path, "{ward: []}", ward=["na"] * ROWS))
    assert ward.names == () and ward.members.shape == (0, ROWS) and not ward.stated.any()


def test_groups_are_of_patients_however_many_images_they_have(tmp_path: Path) -> None:
    patients = [f"p{i // 3}" for i in range(ROWS)]  # forty of three images
    long = "w" * 80  # characters that a name may have
    wards = ["A"] * 30 + ["B"] * 27 + ["C"] * 3 + [long] * 60
    years = [10 * (i // 30) for i in range(ROWS)]
    columns = {"patient_id": patients, "ward": wards, "year": years}
    given = _manifest(tmp_path, "{ward: [], year: [10, 20, 30]}", **columns)
    ward, year = read_groupings(*given)
    # ten patients are shown; nine, and one, are not
    assert ward.names == ("A", long) and [m.sum() for m in ward.members] == [30, 60]
    assert ward.small == {"groups": 2, "images": 30, "patients": 10}
    assert year.names == ("below 10", "10 to below 20", "20 to below 30", "30 or more")


def test_a_subset_of_rows_is_grouped_by_its_own_cells(tmp_path: Path) -> None:
    config, manifest, _ = _manifest(tmp_path, "{sex: []}")
    rows = np.array([5, 1, 100, *range(20, 60)])
    (sex,) = read_groupings(config, manifest, rows)
    assert sex.members[0][:3].tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("asked", "column", "expected"),
    [
        ("{ward: []}", ["A"] * ROWS, None),
        ("{site: []}", ["A"] * ROWS, "site"),
        ("{patient_id: []}", ["A"] * ROWS, "data.columns.patient_id"),
        ("{report: []}", ["A"] * ROWS, "data.columns.report"),
        ("{ward: [1, 2]}", ["1"] * 60 + ["SECRET"] * 60, "data row 61: column 'ward' holds no"),
        ("{ward: [1, 2]}", ["inf"] * ROWS, "data row 1"),
        ("{ward: []}", ["SECRET" * 20] * ROWS, "more than 80 characters"),
    ],
)
def test_columns_that_group_nobody_are_refused_without_their_cells(
    asked: str, column: list[str], expected: str | None, tmp_path: Path
) -> None:
    config, manifest, rows = _manifest(tmp_path, asked, ward=column)
    if expected is None:
        assert read_groupings(config, manifest, rows)[0].names == ("A",)
        return
    with pytest.raises(ManifestError) as error:
        read_groupings(config, manifest, rows)
    assert expected in str(error.value) and "SECRET" not in str(error.value)


@pytest.mark.parametrize("edges", ["[2, 1]", "[1, 1]", "[a]", "5", "[true]", "{a: 1}", "[.nan]"])
def test_edges_that_do_not_rise_are_refused(edges: str) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.subgroups\.age|evaluate\.subgroups"):
        load(overrides=[f"evaluate.subgroups={{age: {edges}}}"])


def test_a_column_may_be_called_by_a_number(tmp_path: Path) -> None:
    columns = {"2021": ["new"] * 60 + ["old"] * 60}
    (scanner,) = read_groupings(*_manifest(tmp_path, "{2021: []}", **columns))
    assert (scanner.column, scanner.names) == ("2021", ("new", "old"))
    with pytest.raises(ManifestError, match="has no column '2022'"):
        read_groupings(*_manifest(tmp_path, "{2022: []}"))
    assert load(overrides=["transfer.classes={1: zero}"]).transfer.classes == {"1": "zero"}


def test_null_takes_a_column_away(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("evaluate: {subgroups: {sex: [], age: [40]}}\n")
    (tmp_path / "b.yaml").write_text("evaluate: {subgroups: {sex: null}}\n")
    config = load([tmp_path / "a.yaml", tmp_path / "b.yaml"])
    assert config.evaluate.subgroups == {"age": [40]}


def _scored(tmp_path: Path, gap: float) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    """Zero-shot of two findings, the first told apart in M alone where gap is 1."""
    config, manifest, rows = _manifest(tmp_path, "{sex: []}")
    rng = np.random.default_rng(1)
    labels = (rng.random((ROWS, 2)) < 0.4).astype(np.int8)
    labels[:7, 1] = -1
    noise = rng.normal(0, 1, (ROWS, 2))
    is_f = np.array(SEX) == "F"
    seen = 2.5 * labels.clip(0)
    seen[is_f, 0] *= 1.0 - gap
    scores = {"global": noise + seen}
    patients = manifest.patient_key
    weights = patient_resamples(patients, 200, 0)
    cuts = {"global": [1.0, None]}
    measure = zero_shot_measures(scores, labels, "ab", cuts, weights, patients)
    found = subgroup_scores(read_groupings(config, manifest, rows), patients, measure)
    return found, scores["global"], labels


def test_a_groups_scores_are_those_of_its_rows_alone(tmp_path: Path) -> None:
    (sex,), scores, labels = _scored(tmp_path, gap=1.0)
    of = {group["name"]: group for group in sex["groups"]}
    inside = np.array(SEX) == "F"
    first, second = of["F"]["classes"]
    assert (first["n"], first["positives"]) == (60, labels[inside, 0].sum())
    assert first["global"]["value"] == pytest.approx(
        roc_auc_score(labels[inside, 0], scores[inside, 0])
    )
    known = inside & (labels[:, 1] >= 0)
    assert second["n"] == known.sum() < 60
    area = roc_auc_score(labels[known, 1], scores[known, 1])
    assert second["global"]["value"] == pytest.approx(area)
    # only one finding has a threshold
    called = scores[inside, 0] >= 1.0
    sensitivity = called[labels[inside, 0] == 1].mean()
    assert first["global_sensitivity"]["value"] == pytest.approx(sensitivity)
    assert of["F"]["macro"]["global_sensitivity"]["value"] == pytest.approx(sensitivity)
    assert of["F"]["macro"]["global_sensitivity"]["classes"] == 1
    assert of["F"]["macro"]["global"]["value"] == pytest.approx(
        np.mean([first["global"]["value"], area])
    )
    assert sex["not_stated"] == 0 and of["F"]["patients"] == 60


def test_a_planted_gap_is_found_and_none_where_there_is_none(tmp_path: Path) -> None:
    (sex,), _, _ = _scored(tmp_path, gap=1.0)
    f, m = sex["groups"]
    gap = f["classes"][0]["difference"]["global"]
    assert gap["high"] < 0 and gap["value"] < -0.1
    assert gap["value"] == pytest.approx(
        f["classes"][0]["global"]["value"] - m["classes"][0]["global"]["value"]
    )
    # of two groups the one's difference is the other's, turned: the same draws serve both
    back = m["classes"][0]["difference"]["global"]
    assert (back["low"], back["high"]) == pytest.approx((-gap["high"], -gap["low"]))
    mean = f["difference"]["global"]
    assert mean["value"] == pytest.approx(
        np.mean([row["difference"]["global"]["value"] for row in f["classes"]])
    )
    (sex,), _, _ = _scored(tmp_path, gap=0.0)
    none = sex["groups"][0]["classes"][0]["difference"]["global"]
    assert none["low"] < 0 < none["high"]


def test_a_mean_of_differences_is_over_the_findings_both_sides_can_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subgroups, "FEWEST_PATIENTS", 1)

    def scores(a: float, b: float | None) -> Measures:
        found = {"a": a} if b is None else {"a": a, "b": b}
        return Measures(
            {
                name: {"auroc": Measured(value, np.full(9, value), 7 if name == "a" else 5)}
                for name, value in found.items()
            },
            {"a": (9, 5), "b": (9, 0 if b is None else 5)},
        )

    grouping = subgroups.Grouping(
        "sex", ("F",), np.array([[True, False]]), np.ones(2, bool), dict.fromkeys("gip", 0)
    )
    measure = {True: scores(0.8, 0.4), False: scores(0.6, None)}
    (table,) = subgroup_scores([grouping], np.arange(2), lambda inside: measure[bool(inside[0])])
    (group,) = table["groups"]
    assert group["macro"]["auroc"]["value"] == pytest.approx(0.6)
    assert group["macro"]["auroc"]["classes"] == 2
    assert group["difference"]["auroc"]["value"] == pytest.approx(0.2)
    assert group["difference"]["auroc"]["classes"] == 1
    assert group["macro"]["auroc"]["n"] == 7  # the most rows that a finding has
    b = group["classes"][1]
    assert b["auroc"]["value"] == 0.4 and b["difference"]["auroc"]["value"] is None


@pytest.mark.parametrize("side", [0, 1])
def test_few_patients_of_a_finding_give_no_score_however_many_rows_they_have(side: int) -> None:
    labels = np.array([[side]] * 8 + [[1 - side]] * 36, dtype=np.int8)
    scores = {"global": labels.astype(float)}
    patients = np.arange(44).clip(4)  # the first five rows are of one
    everybody = np.ones(44, bool)
    given = (scores, labels, ["a"], {}, np.ones((3, 44)))
    found = zero_shot_measures(*given, patients)(everybody)
    assert found.classes["a"] == {} and found.counts["a"] == (44, int(labels.sum()))
    patients[0] = 0
    assert zero_shot_measures(*given, patients)(everybody).classes["a"]["global"][2] == 44


def test_a_difference_from_few_patients_is_not_told(tmp_path: Path) -> None:
    """Else the group's own score less the difference would be theirs."""
    wards = ["A"] * (ROWS - 9) + ["B"] * 9
    (grouping,) = read_groupings(*_manifest(tmp_path, "{ward: []}", ward=wards))
    one = Measures({"a": {"auroc": Measured(0.5, np.full(9, 0.5), 9)}}, {"a": (9, 5)})
    told = Measures(one.classes, one.counts, {"accuracy": Measured(0.5, np.full(9, 0.5), 9)})
    (table,) = subgroup_scores([grouping], np.arange(ROWS), lambda inside: told)
    (group,) = table["groups"]
    assert group["macro"]["auroc"]["value"] == group["macro"]["accuracy"]["value"] == 0.5
    for difference in (group["difference"], group["classes"][0]["difference"]):
        for estimate in difference.values():
            assert estimate["value"] is None and "10 patients" in estimate["reason"]
    # ten images of nine patients are nine patients
    wards[-10] = "B"
    (grouping,) = read_groupings(*_manifest(tmp_path, "{ward: []}", ward=wards))
    patients = np.arange(ROWS).clip(max=ROWS - 2)
    (table,) = subgroup_scores([grouping], patients, lambda inside: told)
    assert table["groups"][0]["difference"]["auroc"]["value"] is None
    (table,) = subgroup_scores([grouping], np.arange(ROWS), lambda inside: told)
    assert table["groups"][0]["difference"]["auroc"]["value"] == 0.0


GROUPED = "evaluate.subgroups={sex: [], age: [50], ward: []}"
COLUMNS = {
    "sex": lambda i: "F" if (i // 5) % 2 else "M",
    "age": lambda i: "" if i == 3 else 40 + i,
    "ward": lambda i: f"PATIENT-SECRET ward {i}",
}


@pytest.mark.parametrize("task", ["classification", "exclusive", "segmentation", "detection"])
def test_every_task_tells_its_scores_by_group(
    task: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(subgroups, "FEWEST_PATIENTS", 3)
    monkeypatch.setattr(subgroups, "FEWEST_OF_EACH", 1)
    rows = {
        **COLUMNS,
        "mask": "mask.png",
        "boxes": lambda i: json.dumps([[4, 4, 20, 20, "nodule"]] if i % 2 else []),
    }
    of = {
        "classification": LABELS,
        "exclusive": [LABELS[0], "transfer.classes={Edema: zero, Mass: zero}"]
        + ["transfer.exclusive=true"],
        "segmentation": MASKS,
        "detection": BOXES,
    }[task]
    labels = {"labels": lambda i: "Edema" if (i // 3) % 2 else "Mass"}
    settings = [*write(tmp_path, **rows, **labels), *of, GROUPED]
    assert evaluate(tmp_path, settings) == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    sex, age, ward = results["fractions"][0]["scores"]["subgroups"]
    assert [group["images"] for group in sex["groups"]] == [6, 6]
    key = {"segmentation": "published", "detection": "strict"}.get(task, "auroc")
    for group in sex["groups"]:
        assert group["macro"][key]["value"] is not None
        assert group["difference"][key]["value"] is not None
    assert age["not_stated"] == 1 and [g["images"] for g in age["groups"]] == [3, 8]
    # each ward has one patient: none is named
    assert ward["groups"] == [] and ward["small_groups"]["groups"] == 12
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'id="subgroups"' in page and "50 or more" in page and "50 or more" in said
    for text in (said, page, json.dumps(results["fractions"])):
        assert not [secret for secret in SECRETS if secret in text]


@pytest.mark.parametrize("task", [LABELS, []], ids=["probe", "nothing trained"])
def test_a_column_that_is_not_there_is_refused_before_images_are_encoded(
    task: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for late in (
        "mlip.transfer.alignment.evaluation.encode_split",
        "mlip.transfer.fits.protocol.open_start",
    ):
        monkeypatch.setattr(late, None)
    settings = [*write(tmp_path), *task, "evaluate.subgroups={sex: []}"]
    assert evaluate(tmp_path, settings) == 3
    said = capsys.readouterr().err
    assert "evaluate.subgroups: " in said and "has no column 'sex'; it has: image, " in said
    assert "evaluate.subgroups.sex=null" in said and "data.columns" not in said
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_manifest_may_change_while_fits_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*write(tmp_path, sex="F"), *LABELS, "evaluate.subgroups={sex: []}"]
    opened = protocol.open_start

    def change(*given: Any) -> Any:
        (tmp_path / "manifest.csv").write_text("image\n")
        return opened(*given)

    monkeypatch.setattr(protocol, "open_start", change)
    assert evaluate(tmp_path, settings) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (sex,) = results["fractions"][0]["scores"]["subgroups"]
    assert [group["name"] for group in sex["groups"]] == ["F"]


def test_a_manifest_that_changed_is_refused(tmp_path: Path) -> None:
    config, manifest, rows = _manifest(tmp_path, "{sex: []}")
    other = dataclasses.replace(manifest, fingerprint="0" * 64)
    with pytest.raises(ManifestError, match="changed while it was read"):
        read_groupings(config, other, rows)


def test_views_are_grouped_by_their_projection(tmp_path: Path) -> None:
    views = ["PA", "LL", "RL", "Lateral", "PA\\LL", ""] * 20
    (view,) = read_groupings(*_manifest(tmp_path, "{view: projections}", view=views))
    assert (view.column, view.names) == ("view", ("LATERAL", "PA"))
    assert [m.sum() for m in view.members] == [60, 20] and view.stated.sum() == 80
    (view,) = read_groupings(*_manifest(tmp_path, "{view: []}", view=views))
    assert view.names == ("LL", "Lateral", "PA", "PA\\LL", "RL")
