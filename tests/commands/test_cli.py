"""The `mlip` command: each sub-command on a small model, and its errors as one line and a code."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import train
from mlip.cli import FOREIGN, build_parser, main
from mlip.commands import options_once
from mlip.commands.options_once import Parser
from mlip.settings.typed_tree import ConfigError
from tests.small_run import small_export, small_run


@pytest.fixture(scope="module")
def model() -> Path:
    return small_export()


def test_ground_writes_a_picture_of_the_whole_image(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run()
    image = Path(run.manifest.root) / run.manifest.image_path(0)
    out = tmp_path / "map.png"
    code = main(
        ["ground", str(image), "no left pleural effusion", "--checkpoint", str(model)]
        + ["--out", str(out)]
    )
    assert code == 0
    said = capsys.readouterr().out
    assert "of 112 x 112 px" in said and "pleural effusion (absent)" in said
    assert "Not for clinical use" in said
    picture = cv2.imread(str(out))
    assert picture.shape == (448, 448 + 4 + 448, 3)  # enlarged fourfold, a gap between
    left = picture[:, :448].astype(int)
    assert np.ptp(left, axis=2).max() == 0  # the radiograph as it is, grey


def test_ground_maps_a_wide_image_back_onto_its_own_pixels(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "wide.png"
    cv2.imwrite(str(image), np.random.default_rng(0).integers(0, 255, (150, 300)).astype(np.uint8))
    out = tmp_path / "map.png"
    assert (
        main(["ground", str(image), "nodule", "--checkpoint", str(model), "--out", str(out)]) == 0
    )
    words = capsys.readouterr().out.split()
    x, y = (float(w[2:]) for w in words if w.startswith(("x=", "y=")))
    assert 0 <= x <= 300 and 0 <= y <= 150
    assert cv2.imread(str(out)).shape[:2] == (300, 600 + 6 + 600)


def test_a_broken_image_is_one_line_and_code_3(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    assert main(["ground", str(broken), "nodule", "--checkpoint", str(model)]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "broken.png" in error


def test_an_empty_phrase_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run()
    image = Path(run.manifest.root) / run.manifest.image_path(0)
    assert main(["ground", str(image), "  ", "--checkpoint", str(model)]) == 2
    assert "is empty: expected words" in capsys.readouterr().err


def test_a_phrase_of_unknown_characters_points_nowhere(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every such phrase was the same three unknown tokens, and got a map and a point."""
    run = small_run()
    image = str(Path(run.manifest.root) / run.manifest.image_path(0))
    out = tmp_path / "map.png"
    asked = ["ground", image, "\u80f8\u6c34", "--checkpoint", str(model), "--out", str(out)]
    assert main(asked) == 2
    assert "the checkpoint's vocabulary knows" in capsys.readouterr().err and not out.exists()


def _embed_in_parts_of(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlip.transfer.films.embed import write_embeddings

    defaults = {**write_embeddings.__kwdefaults__, "part_rows": rows}
    monkeypatch.setattr(write_embeddings, "__kwdefaults__", defaults)


def test_embed_goes_on_where_it_stopped_and_refuses_another_choice(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _embed_in_parts_of(12, monkeypatch)
    run = small_run()
    out = tmp_path / "embeddings"
    command = ["embed", *run.settings, f"checkpoint={model}", "--out", str(out), "--patches"]
    assert main(command) == 0
    parts = sorted(out.glob("part-*.safetensors"))
    assert len(parts) == 3
    tensors = load_file(parts[1])
    rows = run.manifest.rows("test")[12:24]
    np.testing.assert_array_equal(tensors["row_index"].numpy(), rows)
    torch.testing.assert_close(tensors["image"].norm(dim=1), torch.ones(12))
    assert tensors["patches"].shape[0] == 12
    before = {p: p.read_bytes() for p in parts}
    parts[1].write_bytes(before[parts[1]][:100])  # cut off by a kill
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "part 2 of 3" in said and "part 1 of 3" not in said
    assert {p: p.read_bytes() for p in parts} == before
    assert main([*command[:-1]]) == 4  # without --patches: another choice
    assert "differ in with_patches" in capsys.readouterr().err


def test_parquet_embeddings_are_the_safetensors_ones_and_go_on_the_same_way(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the safetensors parts of the same model and split, read by pyarrow alone."""
    _embed_in_parts_of(20, monkeypatch)
    command = ["embed", *small_run().settings, f"checkpoint={model}", "--patches", "--out"]
    assert main([*command, str(tmp_path / "s")]) == 0
    parquet = [*command, str(tmp_path / "p"), "--format", "parquet"]
    assert main(parquet) == 0
    parts = sorted((tmp_path / "p").glob("part-*.parquet"))
    assert len(parts) == 2
    table, wanted = pq.read_table(parts[0]), load_file(tmp_path / "s" / "part-00000.safetensors")
    assert set(table.column_names) == wanted.keys()
    for name, tensor in wanted.items():
        column = table[name].combine_chunks()
        flat = column.flatten() if tensor.dim() > 1 else column
        shape = table.schema.field(name).metadata
        if tensor.dim() > 2:
            assert json.loads(shape[b"shape"]) == list(tensor.shape[1:])
        found = flat.to_numpy(zero_copy_only=False).reshape(tensor.shape)
        np.testing.assert_array_equal(found, tensor.numpy())
    parts[0].write_bytes(parts[0].read_bytes()[:100])  # cut off by a kill
    capsys.readouterr()
    assert main(parquet) == 0
    said = capsys.readouterr().out
    assert "part 1 of 2" in said and "part 2 of 2" not in said
    assert pq.read_table(parts[0]).equals(table)
    assert main([*command, str(tmp_path / "p")]) == 4  # the same folder in another form
    assert "differ in form" in capsys.readouterr().err


def test_evaluate_writes_results_and_a_page_and_refuses_another_preprocessing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run()
    command = ["evaluate", *run.settings, f"checkpoint={model}", "--out", str(tmp_path)]
    assert main([*command, "evaluate.max_studies=20", "--device", "cpu"]) == 0
    assert "zero-shot AUROC" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["data"]["images"] == 20
    assert results["run"]["checkpoint"] == str(model)
    assert (tmp_path / "report.html").is_file()
    assert main([*command, "data.mean=0.4"]) == 4
    error = capsys.readouterr().err
    assert "data.mean (trained with 0.5, asked 0.4)" in error


def test_home_behind_an_equals_sign_is_the_home_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves --out=~/x as it is: a folder named ~ came of it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert main(["export", f"checkpoint={model}", "--out=~/model"]) == 0
    assert (tmp_path / "home" / "model" / "config.json").is_file()
    assert not (tmp_path / "~").exists()


def test_export_makes_a_folder_that_opens(model: Path, tmp_path: Path) -> None:
    from mlip.pretrained import from_pretrained

    out = tmp_path / "again"
    # nothing is prepared: the settings of the training need not be repeated
    assert main(["export", f"checkpoint={model}", "--out", str(out)]) == 0
    assert from_pretrained(out).table.fingerprint == small_run().table.fingerprint


def test_phantoms_are_generated_and_a_forgotten_number_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["phantoms", "--out", str(tmp_path / "p")]) == 2
    assert "data.phantom.studies is 0" in capsys.readouterr().err
    asked = ["data.phantom.studies=8", "data.phantom.val_studies=0", "data.phantom.test_studies=8"]
    assert main(["phantoms", "--out", str(tmp_path / "p"), "--workers", "-1", *asked]) == 2
    assert "--workers -1: expected 1 or more" in capsys.readouterr().err
    assert main(["phantoms", "--out", str(tmp_path / "p"), "--workers", "1", *asked]) == 0
    assert Path(capsys.readouterr().out.strip()).read_text().count("\n") == 17


def test_a_command_that_is_interrupted_ends_with_the_code_of_an_interrupt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlip.commands.arguments.run_doctor", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "mlip: interrupted\n"


def test_a_broken_import_keeps_its_traceback_and_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[Exception] = [ConfigError("one\n  line"), ImportError("libGL.so.1: cannot open")]

    def failing(options: object) -> int:
        raise errors.pop(0)

    monkeypatch.setattr("mlip.commands.arguments.run_doctor", failing)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "mlip doctor: one line\n"
    with pytest.raises(ImportError, match="libGL"):
        main(["doctor"])
    picture = ["ground", "a.png", "nodule", "--checkpoint", "c", "--out", "map.jpg"]
    assert main(picture) == 2 and "a PNG or DICOM file" in capsys.readouterr().err
    assert main(["evaluate", "--device", "gpu"]) == 2
    assert "--device gpu: torch has no such device here" in capsys.readouterr().err
    assert main(["prepare", "manifest", "--out="]) == 2  # "--out=$OUT" where OUT is not set
    assert "--out= is empty" in capsys.readouterr().err
    assert main(["search", "--in", "", "--phrase", "edema"]) == 2  # the option as it was given
    assert "--in is empty: expected the name" in capsys.readouterr().err
    assert main(["compare", "a", "", "--with", "b"]) == 2
    assert "a folder of mlip compare is empty: expected" in capsys.readouterr().err
    assert main(["compare", "a", "--with", ""]) == 2
    assert "--with is empty: expected the name" in capsys.readouterr().err


def test_a_misspelt_setting_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "data.crop_pix=96"]) == 2
    assert "data.crop_px" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["evaluate"], ["embed", "--out", "e"], ["export", "--out", "e"]]
)
def test_an_empty_checkpoint_is_not_taken_for_the_newest_of_the_run(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    # what `checkpoint=$DIR` is where DIR is not set
    assert main([*command, "checkpoint="]) == 2
    assert "checkpoint= is empty: expected" in capsys.readouterr().err


def test_unknown_options_are_errors_and_foreign_commands_get_theirs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--run.seed=2"])
    assert stopped.value.code == 2
    assert "--run.seed=2; a setting is key=value" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", "--help"])
    assert stopped.value.code == 0
    assert "usage: mlip prepare" in capsys.readouterr().out


def test_every_command_and_option_says_what_it_is_for() -> None:
    """`mlip ground --help` began with nothing but the usage, and --device had no word."""
    parser = build_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    assert all(choice.help for choice in commands._choices_actions)
    for name, command in commands.choices.items():
        if name not in FOREIGN:
            assert command.description, name
            assert [action.dest for action in command._actions if not action.help] == [], name


def test_no_option_of_several_values_loses_those_given_first() -> None:
    parsers = [build_parser(), *(argparse.ArgumentParser() for _ in FOREIGN)]
    for parser, (module, _) in zip(parsers[1:], FOREIGN.values(), strict=True):
        importlib.import_module(module).add_arguments(parser)
    seen = set()
    for parser in parsers:  # grows by the sub-commands
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            elif action.option_strings and action.nargs == "+":
                assert isinstance(action, argparse._ExtendAction), action.option_strings
                assert not action.default, action.option_strings  # it would be added to
                seen.add(action.option_strings[0])
    assert {"--with", "--plan", "--obo", "--languages", "--findings"} <= seen
    options = build_parser().parse_args(["compare", "a", "--with", "b", "--with", "c", "d"])
    assert options.against == ["b", "c", "d"]


def test_an_option_of_one_value_refuses_another_one(capsys: pytest.CaptureFixture[str]) -> None:
    """`mlip search --wordings a --wordings b` took b, and nobody was told of a."""
    parsers: list[argparse.ArgumentParser] = [build_parser()]
    for module, _ in FOREIGN.values():
        parsers.append(Parser(prog=module))
        importlib.import_module(module).add_arguments(parsers[-1])
    checked = 0
    for parser in parsers:  # grows by the sub-commands
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            elif action.option_strings and action.nargs is None:
                several = isinstance(action, argparse._AppendAction)
                assert several or isinstance(action, options_once._Once), action.option_strings
                checked += not several
    assert checked > 60
    for command, named in (
        (["search", "--in", "e", "--wordings", "a", "--wordings=b"], "--wordings: given as a and"),
        (["classify", "--finding", "a", "--out", "a", "--out", "b"], "--out: given as a and as b"),
        (["outliers", "--fit", "a", "--fit", "b"], "--fit: given as a and as b"),
        (["doctor", "--plan", "a", "--ranks", "1", "--ranks", "2"], "--ranks: given as 1 and as"),
        (["prepare", "folder", "--root", "a", "--root", "b"], "--root: given as a and as b"),
        (["knowledge", "link", "--lexicon", "a", "f", "--lexicon", "b"], "--lexicon: given as a"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 2
        assert f"mlip {command[0]}" in (said := capsys.readouterr().err)
        assert f"{named}" in said and "expected one of them" in said
    with pytest.raises(SystemExit):
        train.parse(["run.seed=2", "--deepspeed_config", "a", "train.lr=1", "--deepspeed_config=b"])
    assert "--deepspeed_config: given as a and as b" in capsys.readouterr().err
    options, _ = train.parse(["--local_rank=1", "run.seed=2", "--local_rank", "1"])  # launchers
    assert options.local_rank == 1
    twice = build_parser().parse_args(["search", "--in", "e", "--top", "5", "--top", "05"])
    assert twice.top == 5  # the same is one
    repeated = ["--row", "1", "--row", "2", "--phrase", "a", "--phrase", "b"]
    found = build_parser().parse_args(["search", "--in", "e", *repeated])
    assert (found.row, found.phrase) == ([1, 2], ["a", "b"])


def _make_phantoms(out: Path, stdout: int, **environment: str) -> subprocess.CompletedProcess[str]:
    command = "mlip.cli phantoms data.phantom.studies=3 data.phantom.val_studies=0"
    command += " data.phantom.test_studies=0 data.phantom.image_px=96"
    return subprocess.run(
        [sys.executable, "-u", "-m", *command.split(), "--out", str(out)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_a_command_whose_lines_found_no_room_says_so() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "mlip.cli", "prepare", "--list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert ended.returncode == 2 and ended.stderr.startswith("mlip: the lines of this command were")


def test_a_command_whose_reader_left_does_its_work_and_says_so(tmp_path: Path) -> None:
    """`mlip prepare ... | head -1` prepared nothing and said 0."""
    readable, writable = os.pipe()
    os.close(readable)
    ended = _make_phantoms(tmp_path / "out", writable)
    os.close(writable)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "out" / "manifest.csv").is_file()


def test_a_letter_that_the_terminal_lacks_is_escaped(tmp_path: Path) -> None:
    """A training that was over ended as a settings error: 'ascii' codec can't encode."""
    ended = _make_phantoms(tmp_path / "\u00e9", subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.endswith("/\\xe9/manifest.csv\n")


def test_python_m_mlip_is_the_command() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "mlip", "export"], capture_output=True, text=True, check=False
    )
    assert said.returncode == 2 and "mlip export: " in said.stderr
