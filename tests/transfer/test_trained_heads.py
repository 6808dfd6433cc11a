"""A CLIP-style run has a local score that no loss reached: commands on films do not answer by it,
evaluations say what it is.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from mlip.cli import main
from mlip.pages.run_page import render
from mlip.pretrained import open_checkpoint, save_pretrained
from mlip.settings.config import load
from mlip.settings.typed_tree import ConfigError
from mlip.transfer.films.classify import default_head
from mlip.transfer.summary import summary_lines
from mlip.transfer.trained_heads import (
    began_as_one,
    is_local_trained,
    learns_local,
    untrained_text,
)
from tests.small_run import small_results, small_run
from tests.temporary import shared_folder
from tests.transfer.small_manifest import pictures, write

CLIP = ("loss.local_alignment.weight=0", "loss.swapping.weight=0")
TOLD = "no loss trained the local score (loss.local_alignment.weight=0)"


@cache
def clip_export(*settings: str) -> Path:
    """The small run's model as one that was trained without local losses."""
    run = small_run()
    config = load([], [*run.settings, *CLIP, *settings])
    out = shared_folder("clip-style") / f"export{len(settings)}"
    return save_pretrained(out, run.model, config, run.tokenizer, run.table)


@pytest.mark.parametrize(
    ("settings", "is_trained"),
    [
        ([], True),
        (CLIP, False),
        (CLIP[:1], True),  # swapping takes part of its similarity from it
        ([CLIP[0], "loss.swapping.local_share=0"], False),
        (CLIP[1:], True),
    ],
)
def test_the_local_score_is_trained_by_its_loss_or_by_swapping(
    settings: list[str], is_trained: bool
) -> None:
    assert learns_local(load([], settings).loss) == is_trained


def test_an_export_of_a_run_that_began_with_a_model_has_what_that_one_learned() -> None:
    """The export keeps no train.start, a place: ground, rerank and local scores were refused."""
    opened = open_checkpoint(clip_export("train.start=runs/mlip"))
    assert opened.config.train.start is None
    assert is_local_trained(opened) and default_head(opened) == "combined"
    assert opened.classify(opened.encode_images([pictures() / "3.png"]), ["edema"]).size == 1
    clip = open_checkpoint(clip_export())
    assert not is_local_trained(clip) and default_head(clip) == "global"


@pytest.mark.parametrize(
    ("image", "text", "is_one"),
    [
        ({"kind": "folder", "name": "mlip"}, {"kind": "folder", "name": "mlip"}, True),
        ({"kind": "folder", "name": "vit"}, {"kind": "folder", "name": "bert"}, False),
        ({"kind": "folder", "name": "vit"}, None, False),
        ({"kind": "random"}, {"kind": "random"}, False),
        ({"kind": "hub", "name": "a/b"}, {"kind": "hub", "name": "a/b"}, False),
        (None, None, False),
    ],
)
def test_two_towers_of_other_origins_bring_no_local_score(
    image: dict[str, str] | None, text: dict[str, str] | None, is_one: bool
) -> None:
    assert began_as_one({"image": image, "text": text}) == is_one
    assert not began_as_one(None)


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
    by_default = opened.classify(images, ["edema"])
    assert by_default.shape == (1, 1)
    assert (by_default == opened.classify(images, ["edema"], "global")).all()
    with pytest.raises(ConfigError, match="ask by 'global'"):
        opened.classify(images, ["edema"], "combined")


def test_terminal_and_page_say_what_the_local_numbers_are(tmp_path: Path) -> None:
    results = small_results()
    assert results["run"]["is_local_trained"]
    assert untrained_text({}) == ""  # of an earlier version, which does not tell
    clip = {**results, "run": {**results["run"], "is_local_trained": False}}
    for show in (lambda r: "\n".join(summary_lines(r)), lambda r: render(tmp_path, r)):
        assert TOLD in show(clip) and TOLD not in show(results)


def test_an_evaluation_says_of_the_checkpoint_what_trained_it_and_not_of_its_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """train.start and losses of the command's settings are another run's."""
    whole = (*small_run().settings, "evaluate.bootstrap=5")
    began = clip_export("train.start=runs/mlip")
    for checkpoint, settings, told in (
        (clip_export(), ["train.start=runs/mlip"], True),
        (began, CLIP, False),
    ):
        out = ["--out", str(tmp_path / checkpoint.name)]
        assert main(["evaluate", *whole, *settings, f"checkpoint={checkpoint}", *out]) == 0
        assert (TOLD in capsys.readouterr().out) == told
