"""An encoder whose features hold NaN ends each command with its code, and nothing is written.

Oracle: the exit codes of mlip/training/lifecycle.py.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch

from mlip.cli import main
from mlip.pretrained import save_pretrained
from tests.small_run import small_run
from tests.transfer.small_manifest import BOXES, LABELS, MASKS, evaluate, pictures, write


@cache
def _broken() -> Path:
    """An export whose image tower holds NaN."""
    run = small_run()
    model = copy.deepcopy(run.model)
    with torch.no_grad():
        next(model.vision.parameters()).fill_(torch.nan)
    return save_pretrained(run.folder / "broken", model, run.config, run.tokenizer, run.table)


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ([], 2),
        (LABELS, 2),
        ([*LABELS, "transfer.encoder=tuned"], 5),
        (MASKS, 5),
        (BOXES, 5),
    ],
    ids=["nothing trained", "probe", "tuned", "masks", "boxes"],
)
def test_nan_features_end_an_evaluation(
    settings: list[str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = write(tmp_path, mask="mask.png", boxes='[[5, 10, 30, 5, "n"]]')
    assert evaluate(tmp_path, [*drawn, *settings], _broken()) == code
    said = capsys.readouterr().err
    assert "features" in said and said.count("\n") == 1
    assert not (tmp_path / "out" / "results.json").exists()


def test_nan_features_are_neither_embedded_nor_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["embed", *write(tmp_path), f"checkpoint={_broken()}", "--out", str(out)]
    assert main(command) == 2
    assert "features hold NaN" in capsys.readouterr().err and not list(out.glob("part*"))
    picture = str(tmp_path / "map.png")
    image = str(pictures() / "0.png")
    assert main(["ground", image, "edema", "--checkpoint", str(_broken()), "--out", picture]) == 2
    assert "features hold NaN" in capsys.readouterr().err and not Path(picture).exists()
