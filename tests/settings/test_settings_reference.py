"""`mlip settings` and docs/settings.md say of every setting what the source says of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mlip.cli import main
from mlip.settings import config as configuration
from mlip.settings.bounds import BOUNDS
from mlip.settings.config import Columns, Config
from mlip.settings.given import leaf_names
from mlip.settings.reference import find, sections, words_of
from mlip.settings.text import page
from mlip.settings.typed_tree import nearest_keys

ROOT = Path(__file__).resolve().parents[2]
EVERY = [setting for section in sections() for setting in section.settings]


def _lines(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["settings", *words]) == 0
    return capsys.readouterr().out.splitlines()


def _heads(lines: list[str]) -> list[str]:
    return [line.split()[0] for line in lines if line[:1] not in (" ", "[", "")]


def test_every_setting_has_words_and_every_section_a_sentence() -> None:
    """75 of 197 had none: those of the losses, the rate, the vocabulary's size."""
    assert {setting.name for setting in EVERY} == leaf_names()
    assert len(EVERY) == len(leaf_names()) > 190
    for section in sections():
        assert section.words[-1:] in (".", "?"), section
    for setting in EVERY:
        assert len(setting.words.split()) > 1, f"{setting.name}: write a comment beside the field"
        # one types null and false
        assert not {"None", "False", "True"} & set(setting.words.split()), setting


def test_a_default_typed_as_it_is_shown_is_the_default() -> None:
    """Oracle: the parser of the command line."""
    for setting in EVERY:
        made = configuration.load([], [f"{setting.name}={setting.default}"])
        assert made == Config(), setting


def test_choices_and_ranges_are_those_that_are_held() -> None:
    for setting in EVERY:
        if setting.name in BOUNDS:
            assert setting.kind.endswith(f", {BOUNDS[setting.name]}") or setting.kind.endswith(
                f", each {BOUNDS[setting.name]}"
            ), setting
    kinds = {setting.name: setting.kind for setting in EVERY}
    assert kinds["train.zero_stage"] == "0, 1, 2 or 3"
    assert kinds["run.seed"] == "whole number, 0 to 2^63 - 1"  # and not 9.22337e+18
    assert kinds["batch.global_pairs"] == "whole number, 2 to 10000000"
    assert not any("e+" in kind for kind in kinds.values())
    assert kinds["train.start"] == "text or null"
    assert kinds["train.betas"] == "list of 2 numbers, each 0 to below 1"
    assert kinds["transfer.seeds"].startswith("list of whole numbers, each 0 to ")
    assert kinds["evaluate.subgroups"] == "mapping"
    assert kinds["run.exact"] == "true or false"


SOURCE = '''
from dataclasses import dataclass

@dataclass
class Own:
    """What it is
    of.

    What nobody is told.
    """

    behind: int = 1  # behind it
    bare: int = 2
    # above it, on
    # two lines
    above: int = 3  # and behind
    # of a field
    # of several lines
    long: tuple[int, ...] = (
        1,  # one
    )
    text: str = "# no comment"

@dataclass
class Other:
    above: int = 1
'''


def test_words_are_the_comment_above_or_behind_a_field_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "own_settings.py"
    file.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("own_settings", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_settings"] = module
    try:
        spec.loader.exec_module(module)
        assert words_of(module.Own) == {
            "": "What it is of.",
            "behind": "behind it",
            "bare": "",
            "above": "above it, on two lines and behind",
            "long": "of a field of several lines one",
            "text": "",
        }
        assert words_of(module.Other)["above"] == ""
    finally:
        del sys.modules["own_settings"]


def test_an_installation_of_compiled_files_alone_says_what_it_lacks(tmp_path: Path) -> None:
    for part in ("*.py", "commands/*.py", "settings/*.py", "system/*.py"):
        for source in (ROOT / "mlip").glob(part):
            target = (tmp_path / source.relative_to(ROOT)).with_suffix(".pyc")
            py_compile.compile(str(source), str(target), doraise=True)
    command = [sys.executable, "-m", "mlip", "settings", "crop"]
    ended = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("mlip settings: what settings do stands in the source of mlip.")
    assert len(ended.stderr.splitlines()) == 1


def test_all_settings_are_listed_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _lines(capsys)
    assert _heads(lines) == [setting.name for setting in EVERY]
    assert [line for line in lines if len(line) > 80] == []
    assert lines[0] == "[run] Where a run writes, and how it computes."
    shown = lines.index("data.crop_px  whole number, 1 to 16384; default 224")
    assert lines[shown + 1].startswith("    side of the square")


def test_words_choose_settings_whose_name_or_description_has_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _heads(_lines(capsys, "crop")) == [
        *("data.crop_px", "data.augment.random_crop"),
        "transfer.image_px",  # says 0 = data.crop_px: behind those that are named so
    ]
    named = ["lr" in name for name in _heads(_lines(capsys, "lr"))]
    assert named == sorted(named, reverse=True) and 0 < sum(named) < len(named)
    assert _heads(_lines(capsys, "learning_rate")) == _heads(_lines(capsys, "learning rate"))
    assert "train.lr" in _heads(_lines(capsys, "learning_rate"))
    assert _heads(_lines(capsys, "CROP", "random")) == ["data.augment.random_crop"]
    names = [field.name for field in dataclasses.fields(Columns)]
    assert _heads(_lines(capsys, "data.columns")) == [f"data.columns.{name}" for name in names]
    # names that are there: these, and none that has them in its description
    assert _heads(_lines(capsys, "train.lr", "run.seed")) == ["run.seed", "train.lr"]
    assert main(["settings", "crop", "vocabulary"]) == 2
    assert "no setting has all of these words: crop, vocabulary" in capsys.readouterr().err


@pytest.mark.parametrize(
    "word, near",
    [
        ("train.warmup_stepz", "train.warmup_steps"),
        ("trian.lr", "train.lr"),
        ("data.colums.report", "data.columns.report"),
        ("train.seed", "run.seed, data.phantom.seed"),
        ("globl", "batch.global_pairs, loss.global_contrastive"),
        ("train.lr.x", "train.lr"),
    ],
)
def test_a_name_that_is_slightly_wrong_is_answered_with_the_nearest(
    word: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["settings", word]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"the nearest names: {near}" in said
    # as an unknown key of a file or command line is answered
    assert nearest_keys("train.seed", Config)[0] == "run.seed"


def test_a_value_is_said_with_what_it_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the Config that the same files and overrides load to."""
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(
        "run: {seed: 2}\ntrain: {lr: 1e-3, epochs: 3}\ntransfer: {classes: {A: one}, seeds: [4]}\n"
    )
    second.write_text("train: {lr: 2e-3}\ntransfer: {classes: {B: zero}, seeds: [5, 6]}\n")
    asked = ["run.seed", "train.lr", "train.epochs", "train.start", "transfer.classes"]
    asked += ["transfer.seeds", "evaluate.checkpoint"]
    given = ["--config", str(first), str(second), "train.epochs=4", "checkpoint=runs/a"]
    lines = _lines(capsys, *asked, *given)
    assert all(len(line) <= 80 or str(tmp_path) in line for line in lines)
    said = " ".join(" ".join(lines).split())
    for value in (
        f"= 2 (from {first})",
        f"= 0.002 (from {second})",
        "= 4.0 (typed)",
        "= null (the default)",
        f'= {{"A": "one", "B": "zero"}} (from {first}, then from {second})',
        f"= [5, 6] (from {second})",
        "= runs/a (typed)",
    ):
        assert value in said, value
    loaded = configuration.load([first, second], ["train.epochs=4"])
    assert (loaded.train.epochs, loaded.transfer.seeds) == (4.0, (5, 6))
    # a word behind --config, and a file where other commands take one
    for order in (["--config", str(first), "train.epochs"], [str(first), "train.epochs"]):
        assert f"= 3.0 (from {first})" in " ".join(" ".join(_lines(capsys, *order)).split())
    # an empty mapping takes what stood there before
    lines = _lines(capsys, "transfer.classes", "--config", str(first), "transfer.classes={}")
    assert "    = {} (typed)" in lines
    typed = ["transfer.classes={}", "transfer.classes.C=one"]
    lines = _lines(capsys, "transfer.classes", "--config", str(first), *typed)
    assert '    = {"C": "one"} (typed)' in lines
    # of one setting typed twice the last counts, as in a run
    assert "    = 6 (typed)" in _lines(capsys, "run.seed", "run.seed=5", "run.seed=6")


def test_a_folder_named_as_a_section_is_a_file_only_where_it_holds_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Manifests often lie in ./data: `mlip settings --config a.yaml data` ended with an error."""
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("data: {crop_px: 96}\n")
    Path("data").mkdir()
    Path("other").mkdir()
    lines = _lines(capsys, "--config", "a.yaml", "data")
    assert "    = 96 (from a.yaml)" in lines and _heads(lines)[0] == "data.manifest"
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/config.yaml").write_text("run: {seed: 7, dir: run}\n")
    assert "    = 7 (from run)" in _lines(capsys, "run.seed", "--config", "run")
    Path("train").write_text("train: {lr: 1.0}\n")
    assert "    = 1.0 (from train)" in _lines(capsys, "train.lr", "--config", "train")
    assert main(["settings", "--config", "other"]) == 2
    assert "is a folder without config.yaml" in capsys.readouterr().err


def test_a_runs_folder_and_an_export_stand_for_their_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    tree = {"run": {"seed": 7, "dir": str(tmp_path / "run")}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "export").mkdir()
    described = {"model_type": "mlip", "config": {"run": {"seed": 8}}}
    (tmp_path / "export" / "config.json").write_text(json.dumps(described))
    for name, seed in (("run", 7), ("export", 8)):
        lines = _lines(capsys, "run.seed", "--config", str(tmp_path / name))
        assert f"= {seed} (from {tmp_path / name})" in " ".join(" ".join(lines).split())


@pytest.mark.parametrize(
    "words, told",
    [
        (["--config", "missing.yaml"], "there is no such file"),
        (["run.sead=3"], "unknown key 'run.sead'; the nearest valid key is 'run.seed'"),
        (["data.crop_px=0"], "expected 1 to 16384"),
        (["data.crop_px=512"], "is larger than data.resize_px"),
        (["checkpoint="], "checkpoint= is empty"),
        (["crop", ""], "a word is empty"),
        (["crop", "--out", "settings.md"], "--out writes a page of all settings"),
        (["--out", "mine.md"], "is there already and is no page of mlip settings"),
    ],
)
def test_what_a_run_would_refuse_is_refused(
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.md").write_text("# Mine\n")
    assert main(["settings", *words]) == 2
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.md"]


def test_the_page_is_what_its_command_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    for _ in range(2):  # its own page is replaced
        assert main(["settings", "--out", str(tmp_path / "new" / "settings.md")]) == 0
    made = (tmp_path / "new" / "settings.md").read_text(encoding="utf-8")
    assert made == kept == page(sections()), "run `mlip settings --out docs/settings.md`"
    assert "\n    mlip settings --out docs/settings.md " in kept  # it names the command itself
    rows = [line for line in kept.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [setting.name for setting in EVERY]
    assert {row.replace("\\|", "").count("|") for row in rows} == {5}  # none ends a cell early
    prose = kept[: kept.index("    mlip")] + kept[kept.index("The words about") :]
    assert [x for x in prose.splitlines() if len(x) > 100 and x[0] != "|"] == []


def test_the_list_goes_through_a_pipe_that_ends_early() -> None:
    command = f"set -o pipefail; {sys.executable} -m mlip settings | head -1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("[run] ")


def test_find_without_words_gives_all() -> None:
    assert find([]) == EVERY
