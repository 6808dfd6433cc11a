"""A CLIP-style run has a local score that no loss reached: commands on films do not answer by it,
evaluations say what it is.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from mlip.cli import main
from mlip.config import load, to_dict
from mlip.pretrained import open_checkpoint, save_pretrained
from mlip.report.run_page import render
from mlip.transfer.summary import summary_lines
from mlip.transfer.trained_heads import is_local_trained
from mlip.typed_tree import ConfigError
from tests.small_run import small_results, small_run
from tests.temporary import shared_folder
from tests.transfer.small_manifest import pictures, write

CLIP = ("loss.local_alignment.weight=0", "loss.swapping.weight=0")
TOLD = "no loss trained the local score (loss.local_alignment.weight=0)"


@cache
def clip_export() -> Path:
    """The small run's model as one that was trained without local losses."""
    run = small_run()
    config = load([], [*run.settings, *CLIP])
    out = shared_folder("clip-style") / "export"
    return save_pretrained(out, run.model, config, run.tokenizer, run.table)


@pytest.mark.parametrize(
    ("settings", "is_trained"),
    [
        ([], True),
        (CLIP, False),
        (CLIP[:1], True),  # swapping takes part of its similarity from it
        ([CLIP[0], "loss.swapping.local_share=0"], False),
        (CLIP[1:], True),
        ([*CLIP, "train.start=runs/mlip"], True),
    ],
)
def test_the_local_score_is_trained_by_its_loss_by_swapping_or_by_an_earlier_run(
    settings: list[str], is_trained: bool
) -> None:
    assert is_local_trained(to_dict(load([], settings))) == is_trained


def test_commands_on_films_do_not_answer_by_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`mlip classify` added its noise to the global score by default."""
    settings = [*write(tmp_path), f"checkpoint={clip_export()}"]
    film, archive = str(pictures() / "3.png"), str(tmp_path / "archive")
    classify = ["classify", *settings, "--finding", "edema", "--out", str(tmp_path / "f.csv")]
    assert main(["embed", *settings, "--images", "--out", archive]) == 0
    search = ["search", *settings, "--in", archive, "--phrase", "edema"]
    search += ["--top", "2", "--out", str(tmp_path / "s.csv")]
    ground = ["ground", film, "edema", "--checkpoint", str(clip_export())]
    for refused in (
        [*classify, "--head", "combined"],
        [*classify, "--head", "local"],
        [*search, "--rerank", "3"],
        [*ground, "--out", str(tmp_path / "map.png")],
    ):
        capsys.readouterr()
        assert main(refused) == 2
        assert TOLD in capsys.readouterr().err
    assert not [*tmp_path.glob("*.csv"), *tmp_path.glob("*.png")][1:]  # the manifest alone
    assert main([*classify, "--head", "global"]) == 0 and main(search) == 0
    capsys.readouterr()
    assert main(classify) == 0 and "by the global score" in capsys.readouterr().out
    opened = open_checkpoint(clip_export())
    images = opened.encode_images([film])
    assert opened.classify(images, ["edema"], "global").shape == (1, 1)
    with pytest.raises(ConfigError, match="ask by 'global'"):
        opened.classify(images, ["edema"])


def test_terminal_and_page_say_what_the_local_numbers_are(tmp_path: Path) -> None:
    results = small_results()
    clip = {**results, "config": to_dict(load([], [*small_run().settings, *CLIP]))}
    for show in (lambda r: "\n".join(summary_lines(r)), lambda r: render(tmp_path, r)):
        assert TOLD in show(clip) and TOLD not in show(results)
