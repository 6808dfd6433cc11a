"""train.py from its command line to its page: in this process, and on two ranks under DeepSpeed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from mlip import cli
from mlip.knowledge import concept_files
from mlip.settings.typed_tree import ConfigError
from mlip.training import checkpoint
from mlip.training.validation import Validation
from mlip.transfer.summary import mean_scores
from tests.own_process import leave_the_process_as_it_was  # noqa: F401
from tests.rank_farm import free_port
from tests.small_run import small_run, with_val

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "batch.global_pairs=8",
    "train.max_steps=4",
    "train.checkpoint_steps=2",
    "train.warmup_steps=1",
    "train.log_steps=1",
    "run.threads=1",
    "loss.category.prototypes=8",
)


def _overrides(folder: Path, *more: str) -> list[str]:
    settings = [s for s in small_run().settings if not s.startswith("run.dir")]
    return [*settings, *TINY, f"run.dir={folder}", *more]


def _losses(folder: Path) -> dict[int, tuple[float, ...]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {e["step"]: (e["total"], e["grad_norm"], *e["terms"].values()) for e in lines}


def test_overrides_may_stand_on_either_side_of_the_files(tmp_path):
    for name, seed in (("a.yaml", 5), ("b.yaml", 6)):
        (tmp_path / name).write_text(f"run: {{seed: {seed}}}\ntrain: {{max_steps: {seed}0}}\n")
    files = [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
    _, config = train.parse(["--config", *files, "run.seed=7"])
    assert train.parse([*files, "run.seed=7"])[1] == config
    (tmp_path / "c.yaml").write_text("train: {log_steps: 3}\n")
    _, twice = train.parse(["--config", files[0], "--config", str(tmp_path / "c.yaml")])
    assert (twice.train.max_steps, twice.train.log_steps) == (50, 3)
    assert (config.run.seed, config.train.max_steps) == (7, 60)
    options, config = train.parse(
        ["--local_rank=1", "train.lr=0.5", "--config", files[0], "--allow-mismatch", "run.seed=8"]
    )
    assert (config.run.seed, config.train.lr, config.train.max_steps) == (8, 0.5, 50)
    assert options.allow_mismatch


def test_the_flag_of_deepspeeds_own_scripts_is_its_engine(tmp_path: Path) -> None:
    """--deepspeed was read as the begin of --deepspeed_config, which then had no file."""
    (tmp_path / "a.yaml").write_text("train: {engine: plain}\n")
    given = ["--local-rank=1", "--deepspeed", "--deepspeed_config", "ds.json"]
    for files in ([], ["--config", str(tmp_path / "a.yaml")]):
        options, config = train.parse([*given, *files])
        assert (options.local_rank, options.deepspeed_config) == (1, "ds.json")
        assert config.train.engine == "deepspeed"
        assert train.parse([*given, *files, "train.engine=deepspeed"])[1] == config
    for typed in ("train.engine=plain", "train={engine: auto}"):
        with pytest.raises(ConfigError, match="--deepspeed and train.engine=(plain|auto): name"):
            train.parse([*given, typed])


def test_a_stopped_run_goes_on_bit_for_bit_and_ends_with_a_page(tmp_path, monkeypatch, capsys):
    # oracle: the same command without a stop
    assert train.main(_overrides(tmp_path / "whole")) == 0
    monkeypatch.setenv("FAULT", "term@0:1:forward")
    assert train.main(_overrides(tmp_path / "parts")) == 75
    assert "stopped on request after step 3 of 4; saved" in capsys.readouterr().err
    assert not (tmp_path / "parts" / "report.html").exists()
    assert train.main(_overrides(tmp_path / "parts")) == 0
    # a cluster's log tells the scores without the page
    assert re.search(
        r"zero-shot AUROC .*recall@10 .*\nreport: ", capsys.readouterr().out, re.DOTALL
    )
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    terms = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[0])["terms"]
    expected = {"global_contrastive", "local_alignment", "category", "matching", "swapping"}
    assert expected <= terms.keys()  # every loss is on by default

    folder = tmp_path / "parts"
    page = (folder / "report.html").read_text()
    assert page.startswith("<!") and "http-equiv" not in page
    results = json.loads((folder / "results.json").read_text())
    assert results["run"]["step"] == 4 and results["run"]["pairs_seen"] == 32
    ledger = json.loads((folder / "ledger.json").read_text())
    (epoch,) = ledger["epochs"].values()
    # 32 training rows, 4 steps of 8 pairs, and a stop in between: each row once
    assert epoch["trained"] == 32 and epoch["ahead"] == 0
    assert epoch["trained"] + sum(ledger["excluded"].values()) == ledger["rows"]


def test_trackers_are_given_the_means_that_the_evaluation_ends_with(tmp_path, monkeypatch):
    given: list[tuple[str, float, int]] = []
    writer = types.SimpleNamespace(add_scalar=lambda *point: given.append(point), close=lambda: 0)
    module = types.SimpleNamespace(SummaryWriter=lambda *folder, **more: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert train.main(_overrides(tmp_path, "train.max_steps=2", "train.tensorboard=true")) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    scores = [(f"evaluation/{name}", value, 2) for name, value in mean_scores(results).items()]
    assert given[-len(scores) :] == scores and len(scores) == 11
    assert not any(name.startswith("evaluation/") for name, _, _ in given[: -len(scores)])


def _with_val(folder: Path) -> list[str]:
    return [*with_val(folder, 8), "train.monitor=loss", "train.checkpoint_steps=1"]


def _looks(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / "validation.jsonl").read_text().splitlines()]


def test_a_watched_run_is_scored_by_its_best_checkpoint(tmp_path, monkeypatch):
    real, losses = Validation._scores, [3.0, 1.0, 2.0, 2.0]

    def scores(self: Validation, engine: Any) -> dict[str, float]:
        found.append(real(self, engine))
        return {**found[-1], "total": losses[len(found) - 1]}

    def closes(self: Validation) -> None:
        closed.append(self)
        close(self)

    found: list[dict[str, float]] = []
    closed: list[Validation] = []
    close = Validation.close
    monkeypatch.setattr(Validation, "_scores", scores)
    monkeypatch.setattr(Validation, "close", closes)
    folder = tmp_path / "run"
    assert train.main(_overrides(folder, *_with_val(tmp_path), "train.keep_checkpoints=1")) == 0
    results = json.loads((folder / "results.json").read_text())
    assert results["run"]["step"] == 2 and len(found) == 4 and len(closed) == 1
    assert [c.name for c in checkpoint.checkpoints_of(folder)] == ["step_00000004", "step_00000002"]
    # what is not scripted is measured: finite, of the eight pairs, and it moves
    assert [look["pairs"] for look in _looks(folder)] == [8] * 4
    assert len({look["global_contrastive"] for look in _looks(folder)}) == 4
    assert all(0 < terms["total"] < 20 for terms in found)
    page = (folder / "report.html").read_text()
    assert "On val, at each checkpoint (the best: that of step 2)" in page
    assert "2 steps, the best on val" in page
    # its rows of val are no training rows, and are in nobody's ledger
    ledger = json.loads((folder / "ledger.json").read_text())
    assert sum(epoch["trained"] for epoch in ledger["epochs"].values()) == 4 * 8
    card = save_pretrained_card(folder, tmp_path / "model")
    assert "of 4 planned: the best on val of its checkpoints (train.monitor=loss)" in card


def save_pretrained_card(run: Path, out: Path) -> str:
    """The model card of an export of the run."""
    assert cli.main(["export", f"checkpoint={run}", "--out", str(out)]) == 0
    return (out / "README.md").read_text(encoding="utf-8")


def test_sentences_that_the_evaluation_could_not_read_are_found_before_the_first_step(
    tmp_path, capsys
):
    """The training came to its end, and only then was there no score."""
    assert train.main(_overrides(tmp_path / "run", "data.max_tokens=8")) == 2
    said = capsys.readouterr().err
    assert "data.max_tokens=8: the evaluation after the training asks by sentences, and" in said
    assert "the model reads 6: shorten it" in said and "evaluate.after_training=false" in said
    assert not (tmp_path / "run" / "log.jsonl").exists()
    short = ["data.max_tokens=8", "evaluate.after_training=false", "train.max_steps=1"]
    assert train.main(_overrides(tmp_path / "run", *short)) == 0


def test_a_run_without_val_that_is_to_watch_it_is_refused_before_it_starts(tmp_path, capsys):
    assert train.main(_overrides(tmp_path, "train.monitor=recall")) == 3
    said = capsys.readouterr().err
    assert "train.monitor=recall needs at least 2 rows" in said and "there are 0" in said
    assert not (tmp_path / "log.jsonl").exists()
    by_recall = (*_with_val(tmp_path), "train.monitor=recall")
    assert train.main(_overrides(tmp_path / "run", *by_recall)) == 3
    assert "is recall@10 among 8 pairs" in capsys.readouterr().err


def test_a_bad_image_of_val_is_replaced_and_named_once(tmp_path, capsys):
    settings = _with_val(tmp_path)
    text = (tmp_path / "manifest.csv").read_text(encoding="utf-8").splitlines()
    at = next(i for i, line in enumerate(text) if ",val" in line)
    image = next(cell for cell in text[at].split(",") if cell.endswith((".png", ".dcm")))
    text[at] = text[at].replace(image, "images/gone.png")
    (tmp_path / "manifest.csv").write_text("\n".join(text) + "\n", encoding="utf-8")
    monitored = (*settings, "train.max_steps=3", "evaluate.after_training=false")
    assert train.main(_overrides(tmp_path / "run", *monitored)) == 0
    assert [look["pairs"] for look in _looks(tmp_path / "run")] == [8] * 3
    assert capsys.readouterr().err.count("quarantined image of data row") == 1
    assert json.loads((tmp_path / "run" / "ledger.json").read_text())["quarantined_rows"] == {}


def test_a_stop_while_the_run_is_set_up_ends_it_at_once(tmp_path, monkeypatch, capsys):
    """The first Ctrl-C in minutes of generating or reading was noted, and nothing happened."""

    def read_for_minutes(*given: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5.0)
        raise AssertionError("nothing happened")

    monkeypatch.setattr(train, "open_corpus", read_for_minutes)
    assert train.main(_overrides(tmp_path)) == 75
    assert "stopped on request before training; nothing was trained" in capsys.readouterr().err
    assert not checkpoint.checkpoints_of(tmp_path)


def test_what_ranks_read_is_compared_before_the_first_step(tmp_path, monkeypatch, capsys):
    """Two nodes with manifests of different rows trained until the first save."""

    def require_same(facts: dict[str, Any], remedy: str) -> None:
        raise train.ConfigError(f"compared: {sorted(facts)}; {remedy}")

    monkeypatch.setattr(train.agreement, "require_same", require_same)
    assert train.main(_overrides(tmp_path)) == 2
    said = capsys.readouterr().err
    assert "['concept_table', 'manifest', 'tokenizer', 'training rows', \"weights'" in said
    assert not (tmp_path / "log.jsonl").exists()


def test_nearly_every_parameter_moves_between_two_checkpoints(tmp_path):
    assert train.main(_overrides(tmp_path, "train.lr=0.01")) == 0
    two, one = (checkpoint.read(path).training for path in checkpoint.checkpoints_of(tmp_path))
    moved = [n for n, t in one.parameters.items() if not torch.equal(t, two.parameters[n])]
    assert len(moved) > 0.8 * len(one.parameters), sorted(set(one.parameters) - set(moved))


@pytest.mark.parametrize(
    ("override", "code", "says"),
    [
        ("train.max_stepz=3", 2, "unknown key 'train.max_stepz'; the nearest valid key is"),
        ("train.zero_stage=7", 2, "train.zero_stage: expected one of 0, 1, 2, 3"),
        ("evaluate.checkpoint=runs/other", 2, "train.py evaluates the run it has trained"),
        ("data.columns.report=texts", 3, "texts"),
    ],
)
def test_bad_input_is_one_clear_line_and_its_exit_code(tmp_path, capsys, override, code, says):
    assert train.main(_overrides(tmp_path, override)) == code
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("mlip: ")]
    assert len(lines) == 1 and says in lines[0], lines


def test_a_run_without_held_out_rows_is_refused_at_once_and_trains_when_told_to(tmp_path, capsys):
    # small_run has no val studies
    without = _overrides(tmp_path, "evaluate.split=val", "train.max_steps=1")
    assert train.main(without) == 3
    (said,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("mlip: ")]
    assert "split 'val' (evaluate.split) has no rows" in said
    assert "train 32, val 0, test 32" in said and "evaluate.after_training=false" in said
    # the same folder serves the next try
    assert train.main([*without, "evaluate.after_training=false"]) == 0
    assert f"`mlip evaluate {tmp_path}` does it" in capsys.readouterr().out
    assert len(checkpoint.checkpoints_of(tmp_path)) == 1
    assert not (tmp_path / "report.html").exists()


def test_a_checkpoint_of_other_settings_is_refused_with_4(tmp_path, capsys):
    assert train.main(_overrides(tmp_path, "train.max_steps=2")) == 0
    assert train.main(_overrides(tmp_path, "train.max_steps=3")) == 4
    assert "train.max_steps (saved 2, now 3)" in capsys.readouterr().err
    assert train.main([*_overrides(tmp_path, "train.max_steps=3"), "--allow-mismatch"]) == 0
    assert max(_losses(tmp_path)) == 3


def test_a_run_goes_on_with_its_own_lexicon_when_that_of_the_project_has_changed(
    tmp_path, monkeypatch
):
    shutil.copytree(concept_files.LEXICON_DIR, tmp_path / "lexicon")
    run, more = tmp_path / "run", ("evaluate.after_training=false",)
    monkeypatch.setenv("FAULT", "term@0:1:forward")
    assert train.main(_overrides(run, *more)) == 75
    (tmp_path / "lexicon" / "later.yaml").write_text(
        "category: later\nsemantic_type: finding\nconcepts: {one: {name: one, synonyms: [a one]}}\n"
    )
    monkeypatch.setattr(concept_files, "LEXICON_DIR", tmp_path / "lexicon")
    assert train.main(_overrides(run, *more)) == 0
    (run / "concepts.jsonl").unlink()  # a run of a version that kept none
    assert train.main(_overrides(run, *more)) == 4


def test_three_nan_steps_in_a_row_end_with_5_and_save_nothing_bad(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAULT", ",".join(f"nan@0:{s}:forward" for s in range(3)))
    assert train.main(_overrides(tmp_path)) == 5
    assert "3 in a row" in capsys.readouterr().err
    assert all(
        tensor.isfinite().all()
        for path in checkpoint.checkpoints_of(tmp_path)
        for tensor in checkpoint.read(path).training.parameters.values()
    )


def _two_ranks(folder: Path, *more: str) -> Any:
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
    command += ["--master_port", str(free_port()), "--log_level", "error", "train.py"]
    return subprocess.run(
        [*command, *_overrides(folder, *more)],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.skipif(
    shutil.which("deepspeed", path=str(Path(sys.executable).parent)) is None,
    reason="no deepspeed command beside this Python",
)
def test_two_deepspeed_ranks_give_the_losses_of_one_process(tmp_path):
    # oracle: the plain engine in this process, dropout off, same global batch
    quiet = (
        "model.text.options={hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
        "intermediate_size: 32, hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}"
    )
    smaller = (quiet, *_with_val(tmp_path), "train.max_steps=2", "evaluate.bootstrap=10")
    assert train.main(_overrides(tmp_path / "one", *smaller)) == 0
    done = _two_ranks(tmp_path / "two", *smaller, "train.zero_stage=3")
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((tmp_path / "two" / "meta.json").read_text())["engine"] == "deepspeed"
    one, two = _losses(tmp_path / "one"), _losses(tmp_path / "two")
    for step in one:
        # float32 sums in another order over two steps of AdamW
        torch.testing.assert_close(two[step], one[step], rtol=2e-5, atol=2e-6)
    watched = [_looks(tmp_path / name) for name in ("one", "two")]
    assert len(watched[0]) == 2
    for alone, shared in zip(*watched, strict=True):
        for name in ("total", "global_contrastive", "local_alignment"):
            torch.testing.assert_close(shared[name], alone[name], rtol=2e-5, atol=2e-6)
    assert (tmp_path / "two" / "report.html").is_file()
