"""Zero-shot scores of val, on which thresholds are chosen, are those that val itself is given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlip.transfer.alignment.zero_shot import choose_thresholds
from mlip.transfer.measures.predictions import load_predictions
from tests.transfer.small_manifest import evaluate, write

HEADS = ("global", "local")


@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_thresholds_are_chosen_on_the_scores_of_an_evaluation_of_val(
    tmp_path: Path, pipeline: str
) -> None:
    """DALI enlarges and shrinks to other last digits than the twin that val was once read by."""
    if pipeline == "dali":
        pytest.importorskip("nvidia.dali", reason="nvidia.dali is not installed")
    settings = [*write(tmp_path), f"data.pipeline={pipeline}", "evaluate.threshold_rule=f1"]
    out = tmp_path / "out"
    assert evaluate(tmp_path, settings) == 0
    told = json.loads((out / "results.json").read_text())["zero_shot"]["at_thresholds"]["findings"]
    assert evaluate(tmp_path, [*settings, "evaluate.split=val"]) == 0
    on_val = [s for s in load_predictions(out).series if s.finding in told and s.method in HEADS]
    assert len(on_val) == len(told) * len(HEADS) == 4
    for one in on_val:
        assert len(one.rows) == 6  # every fifth of 30
        chosen = choose_thresholds({"": one.scores[:, None]}, one.truth[:, None], "f1")[""]
        assert [told[one.finding][one.method]["threshold"]] == chosen and chosen != [None]
        assert len(np.unique(one.scores)) > 1


def test_films_of_val_that_cannot_be_read_choose_no_threshold(tmp_path: Path) -> None:
    def without(*gone: int) -> dict[str, object]:
        settings = write(tmp_path, image=lambda i: f"{'gone/' * (i in gone)}{i}.png")
        assert evaluate(tmp_path, [*settings, "data.pipeline=torch"]) == 0
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        found: dict[str, object] = results["zero_shot"]["at_thresholds"]
        return found

    assert "findings" in without(2, 7)
    assert "no image of val could be read" in str(without(2, 7, 12, 17, 22, 27)["reason"])
