"""Thresholds of val and the rates at them.

Oracle: every threshold tried by scikit-learn's counts; resamples by repeating rows.
"""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, precision_score, recall_score

from mlip.settings.config import ConfigError, load
from mlip.transfer.measures.operating_point import RATES, choose_threshold, rates, weighted_rates

RNG = np.random.default_rng(2)
SCORES, LABELS = RNG.integers(0, 9, 40) / 9.0, RNG.random(40) < 0.4

RULE_ALL = "specificity=1"


def _sensitivity(cut: float) -> float:
    return float(recall_score(LABELS, cut <= SCORES))


def _specificity(cut: float) -> float:
    return float(recall_score(~LABELS, cut > SCORES))


def test_f1_and_youden_take_the_best_of_all_thresholds() -> None:
    cut = choose_threshold(SCORES, LABELS, "f1")
    assert cut is not None
    best = max(f1_score(LABELS, c <= SCORES) for c in np.unique(SCORES))
    assert f1_score(LABELS, cut <= SCORES) == pytest.approx(best)
    cut = choose_threshold(SCORES, LABELS, "youden")
    assert cut is not None
    best = max(_sensitivity(c) + _specificity(c) for c in np.unique(SCORES))
    assert _sensitivity(cut) + _specificity(cut) == pytest.approx(best)


def test_of_equal_thresholds_the_highest_is_taken_and_equal_is_not_a_matter_of_rounding() -> None:
    # both leave sensitivity + specificity - 1 at a third: 1/3 - 0 and, more in binary, 1 - 2/3
    scores = np.array([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    labels = np.array([True, False, False, True, True, False])
    assert choose_threshold(scores, labels, "youden") == 6.0
    # F1 of 2/3 at the first row and at all four
    assert choose_threshold(scores[:4], np.array([True, False, False, True]), "f1") == 6.0


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.95, 1.0])
def test_a_share_asked_for_is_reached_and_no_more_is_given_away(share: float) -> None:
    cuts = np.unique(SCORES)
    cut = choose_threshold(SCORES, LABELS, f"sensitivity={share}")
    assert cut == max(c for c in cuts if _sensitivity(c) >= share)
    cut = choose_threshold(SCORES, LABELS, f"specificity={share}")
    assert cut is not None and _specificity(cut) >= share
    reaching = [c for c in cuts if _specificity(c) >= share]
    assert cut == min(reaching) if reaching else cut > cuts.max()


def test_shares_are_counted_and_not_rounded() -> None:
    labels = np.array([True] * 10 + [False] * 10)
    scores = np.concatenate([np.arange(10.0), np.arange(10.0) - 20])
    # 0.7 * 10 is 7.000000000000001 in binary: eight of ten would be one too many
    assert choose_threshold(scores, labels, "sensitivity=0.7") == 3.0
    assert choose_threshold(scores, labels, "specificity=0.7") == -13.0
    # 9.005 of ten are ten
    assert choose_threshold(scores, labels, "sensitivity=0.9005") == 0.0
    assert choose_threshold(scores, labels, "specificity=0.9005") == 0.0


def test_where_the_highest_score_is_a_negatives_a_threshold_above_all_is_left() -> None:
    cut = choose_threshold(np.array([3.0, 2.0, 1.0]), np.array([False, True, False]), RULE_ALL)
    assert cut is not None and 3.0 < cut < 3.0001


def test_val_without_the_kind_of_rows_that_a_rule_needs_gives_no_threshold() -> None:
    nothing, everything = np.zeros(40, bool), np.ones(40, bool)
    for rule in ("f1", "youden", "sensitivity=0.9"):
        assert choose_threshold(SCORES, nothing, rule) is None
    for rule in ("youden", "specificity=0.9"):
        assert choose_threshold(SCORES, everything, rule) is None
    assert choose_threshold(SCORES, everything, "f1") == SCORES.min()


@pytest.mark.parametrize("rule", ["f1", "youden", "sensitivity=0.5", "specificity=0.5"])
def test_scores_of_val_that_are_no_numbers_give_no_threshold(rule: str) -> None:
    scores = np.array([np.nan, 1.0, 2.0, np.inf])
    with pytest.raises(ValueError, match="2 of 4 scores are NaN or infinite"):
        choose_threshold(scores, np.array([True, False, False, True]), rule)


def test_rates_are_scikit_learns_under_any_resample() -> None:
    called = SCORES >= 0.5
    weights = RNG.integers(0, 3, (7, 40))
    found = weighted_rates(called, LABELS, weights)
    for r, weight in enumerate(weights):
        truth, said = np.repeat(LABELS, weight), np.repeat(called, weight)
        expected = (
            f1_score(truth, said),
            recall_score(truth, said),
            recall_score(~truth, ~said),
            precision_score(truth, said),
            precision_score(~truth, ~said),
        )
        assert [found[name][r] for name in RATES] == pytest.approx(list(expected))
    told = rates(called, LABELS, weights)
    assert told["ppv"][0] == pytest.approx(precision_score(LABELS, called))
    assert told["ppv"][2] == called.sum() and told["specificity"][2] == (~LABELS).sum()
    assert told["npv"][2] == (~called).sum() and told["sensitivity"][2] == LABELS.sum()
    assert told["f1"][2] == 40


def test_a_share_of_nothing_is_undefined() -> None:
    silent = weighted_rates(np.zeros(3, bool), np.array([True, False, False]), np.ones((1, 3)))
    assert np.isnan(silent["ppv"][0]) and silent["sensitivity"][0] == 0.0
    assert silent["f1"][0] == 0.0 and silent["npv"][0] == pytest.approx(2 / 3)
    absent = weighted_rates(np.ones(3, bool), np.zeros(3, bool), np.ones((1, 3)))
    assert np.isnan(absent["sensitivity"][0]) and np.isnan(absent["f1"][0])
    assert absent["ppv"][0] == 0.0 and np.isnan(absent["npv"][0])


@pytest.mark.parametrize(
    "text", ["", "F1", "sensitivity", "sensitivity=0", "specificity=1.2", "ppv=0.5", "youden=0.3"]
)
def test_another_rule_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.threshold_rule"):
        load(overrides=[f"evaluate.threshold_rule='{text}'"])


def test_a_rule_with_a_share_can_be_given_on_the_command_line() -> None:
    config = load(overrides=["evaluate.threshold_rule=sensitivity=0.95"])
    assert config.evaluate.threshold_rule == "sensitivity=0.95"


def test_a_rule_for_thresholds_that_are_turned_off_is_refused() -> None:
    off = ["evaluate.thresholds=false", "evaluate.threshold_rule=youden"]
    with pytest.raises(ConfigError, match=r"evaluate\.thresholds=false turns off"):
        load(overrides=off)
    # a linear probe has thresholds of its own
    load(overrides=[*off, "transfer.task=classification", "transfer.classes={Edema: one}"])
