"""`mlip compare`: the difference of two models on the same patients, and when there is none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm, t
from sklearn.metrics import roc_auc_score

from mlip.cli import main
from mlip.transfer.comparison import comparison_lines
from mlip.transfer.measures.compare import compare, is_comparison
from mlip.transfer.measures.interval import patient_resamples
from mlip.transfer.measures.predictions import (
    FILE,
    Predictions,
    PredictionsError,
    of_findings,
    of_marks,
    save_predictions,
)
from tests.transfer.small_manifest import LABELS, evaluate, write

ROWS = np.arange(10, 210)
PATIENTS = ROWS // 2 * 2  # two images each
TRUTH = np.random.default_rng(3).random((200, 2)) < 0.3


def side(
    scores: np.ndarray,
    *,
    method: str = "global",
    seed: int | None = None,
    rows: np.ndarray = ROWS,
    truth: np.ndarray = TRUTH,
    names: Sequence[str] = ("x", "y"),
    **facts: Any,
) -> Predictions:
    series = of_findings(method, seed, names, rows, truth.astype(np.int8), scores)
    told = {"name": "one", "split": "test", "manifest": "m", **facts}
    patients = dict(zip(rows.tolist(), (rows // 2 * 2).tolist(), strict=True))
    return Predictions(series, patients, told)


def drawn(seed: int, signal: float = 1.0, count: int = 200) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(count, 2))
    return noise + signal * TRUTH[:count]


def run(a: Any, b: Any, methods: Any = None, **options: Any) -> dict[str, Any]:
    own, others = (s if isinstance(s, list) else [s] for s in (a, b))
    return compare(own, others, methods, **{"resamples": 50, "seed": 4, **options})


def ends(resampled: Any, units: float) -> Any:
    """Hesterberg's expanded percentiles."""
    tail = norm.cdf(-np.sqrt(units / (units - 1)) * t.ppf(0.975, units - 1))
    return pytest.approx(np.quantile(resampled, [tail, 1 - tail]))


def test_the_difference_is_that_of_each_resample_of_patients():
    a, b = drawn(1, 2.0), drawn(2)
    found = run(side(a), side(b, name="two"))
    weights = patient_resamples(PATIENTS, 50, 4)
    lines = found["methods"][0]["findings"]
    means = []
    for f, line in enumerate(lines):
        values = [roc_auc_score(TRUTH[:, f], s[:, f]) for s in (a, b)]
        assert [line["a"]["value"], line["b"]["value"]] == pytest.approx(values)
        assert line["difference"]["value"] == pytest.approx(values[0] - values[1])
        apart = [
            roc_auc_score(TRUTH[:, f], a[:, f], sample_weight=w)
            - roc_auc_score(TRUTH[:, f], b[:, f], sample_weight=w)
            for w in weights
        ]
        units = len(np.unique(PATIENTS[TRUTH[:, f]]))
        assert [line["difference"][k] for k in ("low", "high")] == ends(apart, units)
        assert (line["n"], line["positives"]) == (200, int(TRUTH[:, f].sum()))
        means.append(apart)
    mean = found["methods"][0]["mean"][0]
    spread = np.var(means, axis=1)
    carriers = np.array([len(np.unique(PATIENTS[TRUTH[:, f]])) for f in range(2)])
    units = 1 + spread.sum() ** 2 / (spread**2 / (carriers - 1)).sum()
    joined = np.mean(means, axis=0)
    assert [mean["difference"][k] for k in ("low", "high")] == ends(joined, units)
    assert (found["images"], found["patients"]) == (200, 100)
    assert found["pairs"] == [{"a": "one", "b": "two"}]


def test_two_that_never_disagree_have_no_interval_but_that_reason():
    """One without width would say that of no patient at all they can be told apart."""
    a = drawn(1)
    found = run(side(a), side(2 * a + 1), resamples=100)
    (table,) = found["methods"]
    for line in (*table["findings"], *table["mean"]):
        told = line["difference"]
        assert [told[k] for k in ("value", "low", "high", "n")] == [0.0, None, None, 200]
        assert told["reason"] == "no patient on which they differ"
        assert line["a"]["high"] - line["a"]["low"] > 0.02
    assert "+0.000 (no patient on which they differ)" in comparison_lines(found)[2]
    patients = dict(zip(ROWS.tolist(), PATIENTS.tolist(), strict=True))
    facts = {"name": "one", "split": "test", "manifest": "m"}
    marks = np.tile([0.0, 1.0], 100)
    other = marks.copy()
    other[[4, 9]] = 1 - other[[4, 9]]  # of two patients, one each way
    made = [
        Predictions([of_marks("100 %", 1, "mask", "dice", ROWS, m)], patients, facts)
        for m in (marks, other)
    ]
    told = run(*made, resamples=400)["methods"][0]["findings"][0]["difference"]
    assert told["value"] == 0.0 and told["low"] < 0 < told["high"] and told["reason"] is None


def test_models_that_err_alike_are_told_apart_where_two_intervals_overlap():
    shared = np.random.default_rng(8).normal(size=(200, 2)) + 0.8 * TRUTH
    found = run(side(shared + 0.25 * TRUTH), side(shared), resamples=300)
    line = found["methods"][0]["mean"][0]
    assert line["a"]["low"] < line["b"]["high"] and line["difference"]["low"] > 0.02


def test_without_a_difference_one_interval_in_twenty_leaves_0():
    away = 0
    for seed in range(150):
        a, b = (np.random.default_rng([seed, k]).normal(size=(200, 2)) + TRUTH for k in range(2))
        told = run(side(a), side(b), resamples=200)["methods"][0]["mean"][0]["difference"]
        away += told["low"] > 0 or told["high"] < 0
    assert 1 <= away <= 16  # 7.5 expected; a share of 5 % gives more than 16 once in 700


def test_only_images_that_both_scored_count_in_any_order():
    a, b = drawn(1), drawn(2)
    order = np.random.default_rng(0).permutation(200)
    shuffled = side(b[order], rows=ROWS[order], truth=TRUTH[order])
    assert run(side(a), shuffled) == run(side(a), side(b))
    fewer = side(a[20:], rows=ROWS[20:], truth=TRUTH[20:])
    found = run(fewer, side(b))
    both = run(fewer, side(b[20:], rows=ROWS[20:], truth=TRUTH[20:]))
    assert found == both and (found["images"], found["patients"]) == (180, 90)
    found = run(side(b), fewer)
    assert (found["images"], found["patients"]) == (180, 90)


def test_a_row_whose_truth_one_side_does_not_know_is_left_out_and_contradictions_refused():
    a, b = drawn(1), drawn(2)
    unsure = TRUTH.astype(np.int8)
    unsure[:50, 0] = -1
    found = run(side(a, truth=unsure), side(b))["methods"][0]["findings"]
    assert [line["n"] for line in found] == [150, 200]
    mean = run(side(a, truth=unsure), side(b))["methods"][0]["mean"][0]
    assert mean["difference"]["n"] == 200
    assert found[0]["b"]["value"] == pytest.approx(roc_auc_score(TRUTH[50:, 0], b[50:, 0]))
    other = TRUTH.copy()
    other[[3, 5], 1] ^= True
    with pytest.raises(PredictionsError, match=r"finding 'y'.* otherwise of 2 images"):
        run(side(a, truth=other), side(b))


def test_findings_that_few_patients_carry_have_a_reason_and_leave_the_mean():
    truth = TRUTH.copy()
    truth[:, 1] = False
    truth[:8, 1] = True  # four patients
    a, b = drawn(1), drawn(2)
    found = run(side(a, truth=truth), side(b, truth=truth))["methods"][0]
    assert found["findings"][1]["difference"]["value"] is None
    assert "fewer than 5 patients" in found["findings"][1]["difference"]["reason"]
    assert found["mean"][0]["classes"] == 1 and found["mean"][0]["classes_asked"] == 2
    assert found["mean"][0]["difference"] == found["findings"][0]["difference"]
    truth[8, 1] = True
    found = run(side(a, truth=truth), side(b, truth=truth))["methods"][0]
    assert found["findings"][1]["difference"]["value"] is not None
    # a mean is over the findings that every pair can score
    truth[8, 1] = False
    pairs = [[side(s), side(s, truth=truth, manifest="n")] for s in (a, b)]
    found = run(*pairs)["methods"][0]["mean"][0]
    assert found["classes"] == 1 and found["classes_asked"] == 2


def test_fits_of_equal_seeds_stand_against_each_other():
    scores = {(s, k): drawn(10 * s + k, 1.0 + s) for s in (0, 1) for k in (1, 2, 3)}

    def fits(s: int, seeds: Sequence[int]) -> Predictions:
        parts = [side(scores[s, k], method="100 %", seed=k) for k in seeds]
        return Predictions([x for p in parts for x in p.series], parts[0].patients, parts[0].facts)

    line = run(fits(1, (1, 2, 3)), fits(0, (3, 1, 2)))["methods"][0]["findings"][0]
    each = [
        roc_auc_score(TRUTH[:, 0], scores[1, k][:, 0])
        - roc_auc_score(TRUTH[:, 0], scores[0, k][:, 0])
        for k in (1, 2, 3)
    ]
    assert line["difference"]["seeds"] == pytest.approx(each)
    assert line["difference"]["value"] == pytest.approx(np.mean(each))
    assert line["difference"]["seed_sd"] == pytest.approx(np.std(each, ddof=1))
    # other seeds: the mean of one side against that of the other
    line = run(fits(1, (1, 2)), fits(0, (2, 3)))["methods"][0]["findings"][0]
    of = [
        np.mean([roc_auc_score(TRUTH[:, 0], scores[s, k][:, 0]) for k in seeds])
        for s, seeds in ((1, (1, 2)), (0, (2, 3)))
    ]
    assert line["difference"]["seeds"] == pytest.approx([of[0] - of[1]])
    other = [
        replace(fits(s, seeds), facts={"name": "n", "split": "test", "manifest": "n"})
        for s, seeds in ((1, (1, 2)), (0, (2, 3)))
    ]
    line = run([fits(1, (1, 2)), other[0]], [fits(0, (2, 3)), other[1]])["methods"][0]["findings"][
        0
    ]
    assert line["n"] == 400


@pytest.mark.parametrize("lost", ["x", "y"])
def test_a_finding_that_one_fit_did_not_learn_leaves_the_mean(lost: str):
    """Of the second it was a traceback, of the first a mean of that finding and one fit alone."""

    def fits(signal: float, of: Sequence[tuple[int, str]]) -> Predictions:
        parts = [side(drawn(k, signal), method="1 %", seed=k) for k in (1, 2)]
        series = [s for p in parts for s in p.series if (s.seed, s.finding) in of]
        return replace(parts[0], series=series)

    of = [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
    of.remove((2, lost))
    table = run(fits(2.0, of), fits(1.0, of))["methods"][0]
    lines = {line["finding"]: line for line in table["findings"]}
    assert [len(lines[name]["difference"]["seeds"]) for name in (lost, "xy".strip(lost))] == [1, 2]
    (mean,) = table["mean"]
    assert (mean["classes"], mean["classes_asked"]) == (1, 2)
    for name in ("a", "b", "difference"):
        assert mean[name]["seeds"] == lines["xy".strip(lost)][name]["seeds"]
    # each fit lacks one of the two: there is no finding to take a mean over
    of = [(1, "x"), (2, "y")]
    (mean,) = run(fits(2.0, of), fits(1.0, of))["methods"][0]["mean"]
    assert (mean["classes"], mean["difference"]["value"]) == (0, None)
    assert mean["difference"]["reason"] == "no finding that every fit learned"


def test_several_pre_trainings_are_compared_in_pairs():
    a = [side(drawn(k, 1.5), name=f"a{k}") for k in (1, 2)]
    b = [side(drawn(k, 1.0), name=f"b{k}") for k in (3, 4)]
    found = run(a, b)
    line = found["methods"][0]["findings"][0]
    single = [run(x, y)["methods"][0]["findings"][0] for x, y in zip(a, b, strict=True)]
    values = [one["difference"]["value"] for one in single]
    assert line["difference"]["seeds"] == pytest.approx(values)
    assert (found["images"], found["patients"], line["n"]) == (200, 100, 200)
    assert found["pairs"] == [{"a": "a1", "b": "b3"}, {"a": "a2", "b": "b4"}]
    # on manifests of their own, patients are others': twice as many, and a narrower interval
    apart = run(
        [a[0], side(drawn(2, 1.5), manifest="n")], [b[0], side(drawn(4, 1.0), manifest="n")]
    )
    assert (apart["images"], apart["patients"]) == (400, 200)
    other = apart["methods"][0]["findings"][0]
    assert other["n"] == 400
    for told in (other, apart["methods"][0]["mean"][0]):
        assert [told[name]["n"] for name in ("a", "b", "difference")] == [400] * 3
    assert other["difference"]["value"] == pytest.approx(line["difference"]["value"])
    same = run([a[0], a[0]], [b[0], b[0]], resamples=400)["methods"][0]["findings"][0]
    twins = run(
        [a[0], side(drawn(1, 1.5), manifest="n")],
        [b[0], side(drawn(3, 1.0), manifest="n")],
        resamples=400,
    )["methods"][0]["findings"][0]
    width = [one["difference"]["high"] - one["difference"]["low"] for one in (same, twins)]
    assert width[1] / width[0] == pytest.approx(2**-0.5, abs=0.1)


def test_marks_of_images_are_compared_by_their_mean():
    generator = np.random.default_rng(0)
    dice = generator.random((2, 200))
    patients = dict(zip(ROWS.tolist(), PATIENTS.tolist(), strict=True))
    facts = {"name": "one", "split": "test", "manifest": "m"}
    made = [
        Predictions([of_marks("100 %", 1, "mask", "dice", ROWS, d)], patients, facts) for d in dice
    ]
    found = run(*made)
    line = found["methods"][0]["findings"][0]
    assert line["difference"]["value"] == pytest.approx(dice[0].mean() - dice[1].mean())
    assert line["n"] == 200
    assert comparison_lines(found)[2].startswith("  mask, Dice, published form (empty = 1) ")
    assert len(comparison_lines(found)) == 3
    few = [
        Predictions([of_marks("100 %", 1, "mask", "dice", ROWS[:8], d[:8])], patients, facts)
        for d in dice
    ]
    assert run(*few)["methods"][0]["findings"][0]["difference"]["value"] is None  # four patients


def test_what_is_not_of_the_same_images_is_refused():
    a, b = drawn(1), drawn(2)
    for other, told in ((side(b, manifest="n"), "manifest"), (side(b, split="val"), "split")):
        with pytest.raises(PredictionsError, match=f"are of another {told}"):
            run(side(a), other)
    with pytest.raises(PredictionsError, match="no image in common"):
        run(side(a), side(b, rows=ROWS + 1000))
    with pytest.raises(PredictionsError, match="2 evaluations against 1"):
        run([side(a), side(a)], side(b))
    with pytest.raises(PredictionsError, match=r"the first has global; the second local"):
        run(side(a), side(b, method="local"))
    with pytest.raises(PredictionsError, match="no finding is scored on both sides"):
        run(side(a), side(b, names=("v", "w")))
    with pytest.raises(PredictionsError, match="no finding is scored on both sides"):
        run(side(a), side(b), ("global", "combined"))


def test_other_methods_may_be_set_against_each_other_and_what_is_left_out_is_told():
    a, b = drawn(1), drawn(2)
    mixed = Predictions(
        [*side(a).series, *side(b, method="local").series], side(a).patients, side(a).facts
    )
    found = run(mixed, mixed, ("global", "local"))
    assert (found["methods"][0]["a"], found["methods"][0]["b"]) == ("global", "local")
    line = found["methods"][0]["findings"][0]
    assert line["b"]["value"] == pytest.approx(roc_auc_score(TRUTH[:, 0], b[:, 0]))
    assert found["not_compared"] == []
    assert "global minus local" in comparison_lines(found)
    found = run(mixed, side(b, names=("x", "z")))
    assert found["not_compared"] == ["method local", "finding y", "finding z"]
    assert comparison_lines(found)[-1] == "not on both sides: method local, finding y, finding z"
    assert [row["finding"] for row in found["methods"][0]["findings"]] == ["x"]


def test_the_lines_say_how_many_intervals_leave_0():
    found = run(side(drawn(1, 3.0)), side(drawn(2, 0.2), name="two"), resamples=100)
    lines = comparison_lines(found)
    assert lines[0].startswith("one minus two, split test: 200 images of 100 patients")
    told = found["methods"][0]["findings"][0]
    own = (
        f"{told['a']['value']:.3f} and {told['b']['value']:.3f}: {told['difference']['value']:+.3f}"
    )
    assert any(line.startswith("  x") and own in line for line in lines)
    assert any("2 of 2 intervals of single findings leave 0" in line for line in lines)
    back = comparison_lines(run(side(drawn(2, 0.2)), side(drawn(1, 3.0)), resamples=100))
    assert any("2 of 2 intervals of single findings leave 0" in line for line in back)
    assert any("mean of 2 findings, AUROC" in line for line in lines)


def test_scores_of_two_precisions_are_compared_and_it_is_told():
    a, b = (side(drawn(k), precision=kind) for k, kind in ((1, "fp32"), (2, "bf16")))
    found = run(a, b)
    assert found["precision"] == {"a": ["fp32"], "b": ["bf16"]}
    told = "the first was computed in fp32, the second in bf16: some of the difference may be of"
    assert comparison_lines(found)[1].startswith(told)
    mixed = run([a, replace(b, facts={**b.facts, "name": "n"})], [b, b])
    assert "computed in bf16 and fp32, the second in bf16" in comparison_lines(mixed)[1]
    for other in (a, side(drawn(2))):  # the same, and a file of an earlier version
        assert not any("computed in" in line for line in comparison_lines(run(a, other)))


def test_the_command_compares_folders_of_evaluations(tmp_path, capsys):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder, more in ((first, []), (second, ["transfer.epochs=2"])):
        folder.mkdir()
        settings = write(tmp_path, labels=lambda i: ("Edema", "Mass")[i // 5 % 2])
        assert evaluate(folder, [*settings, *LABELS, *more, "transfer.seeds=[1, 2]"]) == 0
    capsys.readouterr()
    places = [str(first / "out"), "--with", str(second / "out" / FILE)]
    out = tmp_path / "new.json"
    assert main(["compare", *places, "--out", str(out), "--bootstrap", "30"]) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    assert said.startswith(f"{first / 'out'} minus {second / 'out' / FILE}, split test: 12 images")
    assert "12 images of 12 patients" in said and "100 %" in said and "fits +-" in said
    assert found["kind"] == "comparison" and found["methods"][0]["findings"][0]["n"] == 12
    assert main(["compare", *places, "--bootstrap", "30", "--seed", "1"]) == 0
    assert main(["compare", *places, "--method", "100 %"]) == 0
    for wrong, code, told in (
        (["--method", "1 %"], 4, "no finding is scored on both sides"),
        (["--method", "a", "--method", "b", "--method", "c"], 2, "expected one or two"),
        (["--bootstrap", "0"], 2, "--bootstrap 0"),
        (["--seed", "-1"], 2, "--seed -1: expected 0 or more"),
    ):
        capsys.readouterr()
        assert main(["compare", *places, *wrong]) == code
        assert told in capsys.readouterr().err
    assert main(["compare", str(tmp_path), "--with", str(first / "out")]) == 4
    assert "cannot be read" in capsys.readouterr().err


def test_a_pair_counts_once(tmp_path, capsys):
    """Named twice it told a spread of 0 between two fits."""
    for seed, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        save_predictions(side(drawn(seed)), tmp_path / name / FILE)
    a, b, c = (str(tmp_path / name) for name in "abc")
    twice = [str(tmp_path / "a" / ".." / "a" / FILE), a, "--with", b, b]
    assert main(["compare", *twice, "--bootstrap", "5"]) == 2
    assert "is named twice" in capsys.readouterr().err
    # one baseline for all seeds are pairs of their own
    assert main(["compare", b, c, "--with", a, a, "--bootstrap", "5"]) == 0


def test_a_comparison_leaves_the_evaluations_as_they_are(tmp_path, capsys):
    path = tmp_path / FILE
    save_predictions(side(drawn(1)), path)
    before = path.read_bytes()
    out = tmp_path / "results.json"
    assert main(["compare", str(tmp_path), "--with", str(tmp_path), "--out", str(out)]) == 0
    assert path.read_bytes() == before and out.is_file()
    assert "+0.000 (no patient on which they differ)" in capsys.readouterr().out


def test_a_finding_s_name_is_no_command_to_the_terminal(tmp_path, capsys):
    """Of a stranger's predictions: it cleared the screen and renamed the window."""
    made = side(drawn(1))
    series = [replace(s, finding=f"\x1b[2J\x1b]0;owned\x07\u202e{s.finding}") for s in made.series]
    save_predictions(replace(made, series=series), tmp_path / FILE)
    assert main(["compare", str(tmp_path), "--with", str(tmp_path), "--bootstrap", "5"]) == 0
    said = capsys.readouterr().out
    assert r"\x1b[2J\x1b]0;owned\x07\u202e" in said
    assert not set(said) & set("\x1b\x07\u202e")


def test_a_file_that_appears_during_a_comparison_stays(tmp_path, capsys, monkeypatch):
    save_predictions(side(drawn(1)), tmp_path / FILE)
    out = tmp_path / "c.json"

    def and_a_file_appears(*given, **settings):
        out.write_text("another's")
        return compare(*given, **settings)

    monkeypatch.setattr("mlip.transfer.measures.compare.compare", and_a_file_appears)
    assert main(["compare", str(tmp_path), "--with", str(tmp_path), "--out", str(out)]) == 2
    assert capsys.readouterr().err.endswith(f"kept in {tmp_path / 'c-2.json'}\n")
    assert out.read_text() == "another's" and is_comparison(tmp_path / "c-2.json")


def test_no_file_of_another_kind_is_replaced_by_a_comparison(tmp_path, capsys):
    save_predictions(side(drawn(0)), tmp_path / FILE)
    results = tmp_path / "results.json"
    results.write_text('{"schema": 3, "kind": "results"}')
    asked = ["compare", str(tmp_path), "--with", str(tmp_path), "--bootstrap", "5", "--out"]
    for out in (tmp_path / FILE, results, tmp_path):
        before = out.read_bytes() if out.is_file() else b""
        assert main([*asked, str(out)]) == 2
        assert f"--out {out}: is there already" in capsys.readouterr().err
        assert not before or out.read_bytes() == before
    for _ in range(2):  # one of its own is
        assert main([*asked, str(tmp_path / "difference.json")]) == 0


def test_the_same_resamples_serve_every_finding(tmp_path: Path):
    # the mean's interval is of one draw for all findings: two equal findings leave it as one
    a, b = drawn(1), drawn(2)
    twice = [np.repeat(s[:, :1], 2, axis=1) for s in (a, b)]
    truth = np.repeat(TRUTH[:, :1], 2, axis=1)
    found = run(side(twice[0], truth=truth), side(twice[1], truth=truth))["methods"][0]
    single = found["findings"][0]["difference"]
    width, own = (d["high"] - d["low"] for d in (found["mean"][0]["difference"], single))
    # but for the widening: two findings' spreads are taken for the word of twice the patients
    assert 0.9 < width / own <= 1.0


def test_two_models_without_an_error_are_not_surely_alike():
    perfect = TRUTH * 1.0
    found = run(side(perfect), side(perfect * 2 + 1, name="two"), resamples=400)
    line = found["methods"][0]["findings"][0]
    carriers = len(np.unique(PATIENTS[TRUTH[:, 0]]))
    assert line["a"]["value"] == line["b"]["value"] == 1.0
    assert line["difference"]["value"] == 0.0
    bound = 1 - 0.025 ** (1 / carriers)
    assert -1.3 * bound < line["difference"]["low"] < -0.5 * bound
    assert 0.5 * bound < line["difference"]["high"] < 1.3 * bound
