"""The model card of an export: true to the run, mute about people and places, safe to render."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from mlip.cli import main
from mlip.knowledge.concept_files import load_concepts
from mlip.model import MLIPModel
from mlip.pretrained import PretrainedError, from_pretrained, open_checkpoint, save_pretrained
from mlip.saved.model_facts import (
    kept_origin,
    knowledge_of,
    origin_of,
    results_beside,
    scores_of,
    sizes_of,
    start_of,
)
from mlip.settings.config import to_dict
from mlip.training import checkpoint
from mlip.training.step import TrainingState
from mlip.transfer.alignment.evaluation import evaluate_run
from mlip.transfer.fingerprint import hash_of, hash_of_vocabulary, hash_of_weights, preprocessing
from mlip.transfer.results_file import save_results
from tests.small_run import small_export, small_results, small_run

MARKDOWN = MarkdownIt("commonmark").enable("table")
HOSTILE = [
    "a|b | c",
    "`code` ``x``",
    "<script>alert(1)</script>",
    "line\n---\nbreak\r\n# heading",
    "[text](http://example.org) www.example.org",
    "\\| \\\\ *bold* _it_ ~no~ &lt;b&gt;",
    "\u202eright to left\u2028\x00",
    "x" * 500,
]


def _write_run(folder: Path, results: dict[str, Any] | None) -> Path:
    """A run folder whose checkpoint of step 7 holds the small run's weights."""
    run = small_run()
    shutil.copytree(run.folder / "run" / "tokenizer", folder / "tokenizer")
    named = {f"model.{name}": p.detach() for name, p in run.model.named_parameters()}
    whole = {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()}
    order = {"manifest_sha256": run.manifest.fingerprint, "rows": 32}
    state = {
        "format": checkpoint.FORMAT,
        "step": 7,
        "pairs_seen": 5600,
        "config": to_dict(run.config),
        "tokenizer": hash_of_vocabulary(run.tokenizer),
        "concept_table": run.table.fingerprint,
        "commit": "abcdef123456",
        "versions": {"torch": "2.13.0+cpu"},
        "world_size": 2,
        "precision": "bf16",
        "loader": {"step": 7, "order": order, "ledger": {"rows": 64}},
        "rng": [{}, {}],
    }
    moments = {key: dict.fromkeys(named, torch.zeros(1)) for key in checkpoint.MOMENTS}
    buffers = {name: tensor for name, tensor in whole.items() if name not in named}
    training = TrainingState(named, moments, buffers, optimizer_steps=7)
    checkpoint.save(folder, training, state, keep=1)
    if results is not None:
        save_results(results, folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_run(tmp_path_factory.mktemp("st-mary") / "run-of-smith", small_results())


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    return _export(run, run.parent / "model")


def _export(checkpoint: Path, out: Path) -> Path:
    assert main(["export", f"checkpoint={checkpoint}", "--out", str(out)]) == 0
    return out


def _card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def _front(card: str) -> dict[str, Any]:
    begin, front, _ = card.split("---\n", 2)
    assert begin == ""
    return yaml.safe_load(front)


def _tokens(card: str) -> list[Token]:
    return MARKDOWN.parse(card.split("---\n", 2)[2])


def _plain(inline: Token) -> str:
    """What a reader sees of a cell or heading."""
    return "".join(t.content for t in inline.children or () if t.type in ("text", "text_special"))


def _headings(card: str) -> list[str]:
    tokens = _tokens(card)
    return [_plain(tokens[i + 1]) for i, t in enumerate(tokens) if t.type == "heading_open"]


def _rows(card: str, under: str) -> list[list[str]]:
    """The cells of every table below a heading, as they are seen."""
    rows: list[list[str]] = []
    heading = ""
    tokens = _tokens(card)
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            heading = _plain(tokens[i + 1])
        elif heading == under and token.type == "tr_open":
            rows.append([])
        elif heading == under and token.type in ("td_open", "th_open"):
            rows[-1].append(_plain(tokens[i + 1]))
    return rows


def _shown(estimate: dict[str, Any], digits: int = 3) -> str:
    if estimate["value"] is None:
        return "n/a" + (f": {estimate['reason']}" if estimate["reason"] else "")
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    inside = "" if low is None else f" ({low:.{digits}f} to {high:.{digits}f})"
    return f"{value:.{digits}f}{inside}"


def _with(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    results = copy.deepcopy({k: v for k, v in small_results().items() if k != "examples"})
    change(results)
    return results


def _save(out: Path, results: dict[str, Any] | None = None, **named: Any) -> Path:
    small = small_run()
    parts = (small.model, small.config, small.tokenizer, small.table)
    return save_pretrained(out, *parts, results=results, **named)


def test_the_front_matter_is_one_that_hubs_read(folder: Path) -> None:
    front = _front(_card(folder))
    assert front["pipeline_tag"] == "zero-shot-image-classification"
    assert front["library_name"] == "mlip-medical"
    assert front["language"] == ["en"]  # generated reports; of others nobody knows it
    assert front["license"] == "other" and front["license_name"]
    assert isinstance(front["tags"], list) and "onnx" not in front["tags"]
    assert "base_model" not in front


def test_the_numbers_are_those_of_the_results(folder: Path) -> None:
    results, card = small_results(), _card(folder)
    zero_shot, heads = results["zero_shot"], ("global", "local", "combined")
    title, *found, mean, worst = _rows(card, "Zero-shot")
    assert title[3:] == list(heads)
    assert found == [
        [row["name"], f"{row['n']}", f"{row['positives']}", *(_shown(row[h]) for h in heads)]
        for row in zero_shot["findings"]
    ]
    assert mean[3:] == [_shown(zero_shot["macro"][h]) for h in heads]
    assert all(
        cell.startswith(_shown(zero_shot["worst"][h]))
        for h, cell in zip(heads, worst[3:], strict=True)
    )
    ranks = _rows(card, "Retrieval")[1:]
    both = [*results["retrieval"]["scores"].values(), results["retrieval"]["oracle"]]
    keys = ("recall@1", "recall@5", "recall@10")
    assert [row[2:5] for row in ranks[:-1]] == [
        [_shown(way[k]) for k in keys] for score in both for way in score.values()
    ]
    assert ranks[-1][2:5] == [f"{results['retrieval']['chance'][k]:.3f}" for k in keys]
    pointing = _rows(card, "Pointing")[1:]
    assert [row[0] for row in pointing] == list(results["grounding"])
    for row, table in zip(pointing, results["grounding"].values(), strict=True):
        of = table["all"]
        fixed = f"{of['prior_with_side']:.3f}"
        assert row[1:4] == [f"{of['n']}", _shown(of["hit"]), f"{of['area']:.3f}"]
        assert row[4:] == [fixed, _shown(of["swapped"]), _shown(of["over_swapped"], 1)]


def test_what_the_run_recorded_stands_there(folder: Path) -> None:
    small, card = small_run(), _card(folder)
    training = dict(_rows(card, "Training"))
    # 50 epochs of 32 rows in batches of 144
    assert training["Steps"] == "7 of 12 planned: not trained to the end"
    assert training["Pairs seen"] == "5,600"
    assert training["Training rows"].startswith("32 ")
    assert training["Manifest (SHA-256)"] == small.manifest.fingerprint
    assert training["First weights, text tower"] == "random"
    provenance = dict(_rows(card, "Provenance"))
    assert provenance["Commit of the training"] == "abcdef123456"
    assert provenance["Versions of the training"] == "torch 2.13.0+cpu"
    assert provenance["Weights (SHA-256)"] == hash_of_weights(small.model)
    contract = _rows(card, "Preprocessing")
    assert [row[1] for row in contract[:-1] if row[1]] == [
        str(v) for v in preprocessing(small.config).values()
    ]
    assert contract[-1][1] == hash_of(preprocessing(small.config))


def test_the_rate_and_the_steps_are_those_that_the_training_has(tmp_path: Path) -> None:
    """train.lr is of lr_reference_pairs; a run that was killed has not come to its last step."""
    small = small_run()
    batch = dataclasses.replace(small.config.batch, global_pairs=576)
    train = dataclasses.replace(small.config.train, lr=1e-4, lr_reference_pairs=144, max_steps=9)
    config = dataclasses.replace(small.config, batch=batch, train=train)
    parts = (small.model, config, small.tokenizer, small.table)

    def training(step: int) -> dict[str, str]:
        return dict(
            _rows(_card(save_pretrained(tmp_path, *parts, facts={"step": step})), "Training")
        )

    assert "learning rate up to 0.0002," in training(9)["Optimiser"]
    assert training(9)["Steps"] == "9" and training(8)["Steps"].startswith("8 of 9 planned")


def test_the_results_of_a_checkpoint_are_its_runs_wherever_it_is_named_from(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(run)
    step = "step_00000007"
    for place, name in (
        (run / "checkpoints", step),
        (run, "."),
        (tmp_path, f"link/checkpoints/{step}"),
    ):
        monkeypatch.chdir(place)
        opened = open_checkpoint(name)
        results = results_beside(opened.facts["checkpoint"])
        assert results["fingerprints"].items() >= small_results()["fingerprints"].items()


@pytest.mark.parametrize("what", ["other weights", "no file", "cut file", "a list", "lacks data"])
def test_scores_that_are_not_of_these_weights_are_left_out(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes: dict[str, Any] = {
        "other weights": lambda r: r["fingerprints"].update(weights="0" * 64),
        "lacks data": lambda r: r.pop("data"),
    }
    results = None if what == "no file" else _with(changes.get(what, lambda r: None))
    run = _write_run(tmp_path / "run", results)
    if what in ("cut file", "a list"):
        path = run / "results.json"
        path.write_text(path.read_text()[:100] if what == "cut file" else "[1]")
    out = _export(run, tmp_path / "model")
    assert json.loads((out / "config.json").read_text())["evaluation"] is None
    said = [message.startswith(("results.json", str(run))) for message in caplog.messages]
    assert said == [True] * (what != "no file")
    headings = _headings(_card(out))
    assert "Evaluation" in headings and "Zero-shot" not in headings
    assert f"{small_results()['zero_shot']['macro']['global']['value']:.3f}" not in _card(out)


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: r["retrieval"]["chance"].pop("recall@5"),
        lambda r: r["retrieval"]["chance"].update({"recall@1": float("nan")}),
        lambda r: r["zero_shot"]["worst"].pop("local"),
        lambda r: r["zero_shot"]["macro"]["global"].update(high=None),
        lambda r: r["data"].update(images=[]),
    ],
)
def test_scores_that_a_page_cannot_show_cost_the_scores_and_not_the_export(
    damage: Callable[[dict[str, Any]], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = _save(tmp_path / "model", _with(damage))
    assert json.loads((out / "config.json").read_text())["evaluation"] is None
    assert any("is not that of an evaluation" in message for message in caplog.messages)


def test_no_place_no_patient_and_no_report_is_told(folder: Path, run: Path) -> None:
    small, card = small_run(), _card(folder)
    told = card + (folder / "config.json").read_text()
    for place in (run, run.parent.name, run.name, small.folder, small.config.data.manifest):
        assert str(place) not in told
    rows = range(len(small.manifest))
    assert not [row for row in rows if small.manifest.image_path(row) in told]
    assert not [row for row in rows if small.manifest.text(row) in told]


def test_the_same_run_gives_the_same_bytes(folder: Path, run: Path, tmp_path: Path) -> None:
    again = _export(run, tmp_path / "again")
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert Path("README.md") in files
    assert not [f for f in files if (folder / f).read_bytes() != (again / f).read_bytes()]


def test_the_card_tells_what_auto_came_to_and_no_other_word(folder: Path) -> None:
    assert dict(_rows(_card(folder), "Model details"))["Precision"].startswith("trained in bf16;")
    config = small_run().config
    told = {word: kept_origin({"precision": word}, config)["precision"] for word in ("fp32", "Doe")}
    assert told == {"fp32": "fp32", "Doe": None}


def test_an_export_of_an_export_has_the_card_of_the_first(folder: Path, tmp_path: Path) -> None:
    again = _export(folder, tmp_path / "again")
    for name in ("README.md", "config.json"):
        assert (again / name).read_text() == (folder / name).read_text()
    card = folder.parent / "edited"
    shutil.copytree(folder, card)
    described = json.loads((card / "config.json").read_text())
    described["origin"] = ["nothing", "known"]
    described["evaluation"]["zero_shot"] = "none"
    (card / "config.json").write_text(json.dumps(described))
    _list_again(card)
    out = _export(card, tmp_path / "of_a_stranger")
    assert dict(_rows(_card(out), "Training"))["Training rows"].startswith("not recorded")
    assert "Zero-shot" not in _headings(_card(out))


def _list_again(folder: Path) -> None:
    import hashlib

    names = [line.partition("  ")[2] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    hashes = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]
    lines = [f"{digest}  {name}\n" for digest, name in zip(hashes, names, strict=True)]
    (folder / "SHA256SUMS").write_text("".join(lines))


def test_an_earlier_export_is_replaced_and_a_card_that_was_gone_on_with_is_not(
    tmp_path: Path,
) -> None:
    out = Path(shutil.copytree(small_export(), tmp_path / "model"))
    (out / "README.md").unlink()
    _list_again_without_card(out)
    assert from_pretrained(out).facts  # as an earlier version left it
    assert (_save(out) / "README.md").is_file()
    _save(out)
    (out / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    with pytest.raises(PretrainedError, match=r"README\.md: was changed after the export"):
        _save(out)
    assert _card(out).endswith("Mine.\n")
    assert from_pretrained(out).facts == {"checkpoint": str(out)}
    (out / "README.md").unlink()
    assert from_pretrained(out).facts == {"checkpoint": str(out)}
    _save(out)


def _list_again_without_card(folder: Path) -> None:
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(x for x in lines if "README.md" not in x))


def test_a_foreign_page_beside_an_earlier_export_stays(tmp_path: Path) -> None:
    out = Path(shutil.copytree(small_export(), tmp_path / "model"))
    _list_again_without_card(out)
    (out / "README.md").write_text("precious")
    with pytest.raises(PretrainedError, match=r"other files .*README\.md"):
        _save(out)
    assert _card(out) == "precious"


def test_scores_that_no_loss_trained_are_called_a_control(tmp_path: Path) -> None:
    told = "No loss trained the local score"
    for is_trained, name in ((False, "clip"), (True, "mlip"), (None, "earlier")):

        def change(results: dict[str, Any], value: bool | None = is_trained) -> None:
            results["run"].pop("is_local_trained", None)
            if value is not None:
                results["run"]["is_local_trained"] = value

        card = _card(_save(tmp_path / name, _with(change)))
        assert (told in card) == (is_trained is False)


def test_names_of_users_are_shown_as_they_are_and_do_nothing(tmp_path: Path) -> None:
    def change(results: dict[str, Any]) -> None:
        rows = results["zero_shot"]["findings"]
        rows += [copy.deepcopy(rows[0]) for _ in range(len(HOSTILE) - len(rows))]
        for row, name in zip(rows, HOSTILE, strict=True):
            row["name"] = row["finding"] = name
        results["zero_shot"]["worst"]["local"]["finding"] = HOSTILE[0]
        results["zero_shot"]["subgroups"] = _subgroups(HOSTILE)
        results["run"]["split"] = "\n---\n<b>`|"
        results["grounding"] = {"reason": "<i>|\n\n# no"}

    origin = {"commit": "<b>|`\n---", "versions": {"a|b": "<b>"}, "start": {"image": {"kind": 1}}}
    card = _card(_save(tmp_path / "model", _with(change), origin=origin))
    _front(card)
    wanted = [_collapsed(name) for name in HOSTILE]
    found = _rows(card, "Zero-shot")
    assert [row[0] for row in found[1:-2]] == wanted and {len(row) for row in found} == {6}
    groups = _rows(card, "By subgroup")
    assert [row[0] for row in groups[1:]] == wanted and {len(row) for row in groups} == {10}
    assert _headings(card) == _headings(_card(_save(tmp_path / "plain", _with(lambda r: None))))
    inside = [child for token in _tokens(card) for child in token.children or ()]
    kinds = {token.type for token in [*_tokens(card), *inside]}
    assert not kinds & {"html_block", "html_inline", "hr", "em_open", "image"}
    links = [t.attrs["href"] for t in inside if t.type == "link_open"]
    assert all(str(link).startswith(("#", "https://arxiv.org/")) for link in links)
    assert not re.search(r"www\.example", card)


def _collapsed(name: str) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return text if len(text) <= 80 else text[:77] + "..."


def _subgroups(names: list[str]) -> list[dict[str, Any]]:
    def mean(value: float) -> dict[str, Any]:
        inside = {"value": value, "low": value - 0.1, "high": value + 0.1}
        return {**inside, "n": 8, "reason": None, "classes": 7, "classes_asked": 8}

    heads = ("global", "local", "combined", "global_sensitivity")
    groups = [
        {
            "name": name,
            "images": 28 + k,
            "patients": 14 + k,
            "macro": {h: mean(0.75) for h in heads},
            "difference": {h: mean(-0.05) for h in heads},
            "classes": [],
        }
        for k, name in enumerate(names)
    ]
    small = {"groups": 2, "images": 9, "patients": 4}
    return [{"column": "sex", "groups": groups, "small_groups": small, "not_stated": 3}]


def test_subgroups_stand_in_a_table_and_few_patients_are_no_group(tmp_path: Path) -> None:
    subgroups = _subgroups(["F", "M", "Smith"])
    subgroups[0]["groups"][0]["patients"] = 10
    subgroups[0]["groups"][2]["patients"] = 9
    # what no row of a group can give is not among its scores
    del (
        subgroups[0]["groups"][1]["macro"]["local"],
        subgroups[0]["groups"][1]["difference"]["local"],
    )
    results = _with(lambda r: r["zero_shot"].update(subgroups=subgroups))
    out = _save(tmp_path / "model", results)
    rows = _rows(_card(out), "By subgroup")
    shown = ["0.750 (0.650 to 0.850)", "-0.050 (-0.150 to +0.050)"]
    assert rows[1] == ["F", "28", "10", "7", *shown * 3]
    assert rows[2][:6] == ["M", "29", "15", "7", *shown] and rows[2][6].startswith("n/a")
    assert len(rows) == 3
    assert "Smith" not in _card(out) + (out / "config.json").read_text()
    described = json.loads((out / "config.json").read_text())
    weights = described["fingerprints"]["weights"]
    assert scores_of(described["evaluation"], weights, small_run().table) == described["evaluation"]
    assert _rows(_card(_save(tmp_path / "none", _with(lambda r: None))), "By subgroup") == []


def test_subgroups_are_those_that_an_evaluation_gives(tmp_path: Path) -> None:
    small = small_run()
    config = dataclasses.replace(
        small.config,
        evaluate=dataclasses.replace(
            small.config.evaluate, subgroups={"view": []}, thresholds=False
        ),
    )
    results = evaluate_run(small, config, small.manifest)
    (found,) = results["zero_shot"]["subgroups"]
    rows = _rows(_card(_save(tmp_path / "model", results)), "By subgroup")[1:]
    assert found["groups"] and [row[:3] for row in rows] == [
        [group["name"], str(group["images"]), str(group["patients"])] for group in found["groups"]
    ]
    assert [row[4] for row in rows] == [_shown(g["macro"]["global"]) for g in found["groups"]]


def test_a_label_that_one_patient_alone_may_have_is_not_named(tmp_path: Path) -> None:
    """A label may be in words of its own ("nodule of Mrs Smith") as long as it names a concept."""
    names = ["Nodule of Mrs Smith", "Lung nodule", "Nodule of a common kind"]

    def change(results: dict[str, Any]) -> None:
        results["data"] |= {"is_phantom": False, "images": 32, "patients": 28}
        rows = results["zero_shot"]["findings"] = results["zero_shot"]["findings"][:3]
        # one patient has at most 32 - 28 + 1 images
        for row, name, count in zip(rows, names, (5, 1, 6), strict=True):
            row |= {"finding": name, "name": name, "positives": count}
        for worst in results["zero_shot"]["worst"].values():
            worst["finding"] = names[0]

    out = _save(tmp_path / "model", _with(change))
    assert "Smith" not in _card(out) + (out / "config.json").read_text()
    assert [row[0] for row in _rows(_card(out), "Zero-shot")[2:4]] == names[1:]
    described = json.loads((out / "config.json").read_text())
    again = scores_of(
        described["evaluation"], described["fingerprints"]["weights"], small_run().table
    )
    assert again == described["evaluation"]


def _blocks(card: str, kind: str) -> list[str]:
    return [t.content for t in _tokens(card) if t.type == "fence" and t.info == kind]


def test_the_commands_that_the_card_prints_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = small_run()
    shutil.copytree(folder, tmp_path / "model")
    cv2.imwrite(str(tmp_path / "film.png"), np.full((130, 120), 128, np.uint8))
    monkeypatch.chdir(tmp_path)
    (code,) = _blocks(_card(folder), "python")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["scores"].shape == (1, 2) and names["heat"].shape[:2] == (1, 2)
    (command,) = _blocks(_card(folder), "bash")
    program, *words = shlex.split(command)
    assert program == "mlip"
    place = f"data.manifest={small.config.data.manifest}"
    few = ["evaluate.max_studies=8", "evaluate.bootstrap=4", "data.pipeline=torch"]
    words = [place if w.startswith("data.manifest=") else w for w in words]
    assert main([*words, *few, "--device", "cpu"]) == 0
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert results["fingerprints"]["weights"] == hash_of_weights(small.model)


def test_a_model_without_a_run_has_a_card_that_claims_nothing(tmp_path: Path) -> None:
    card = _card(_save(tmp_path / "model"))
    assert "language" not in _front(card)
    training = dict(_rows(card, "Training"))
    for row in ("Steps", "Pairs seen", "First weights, image tower", "Manifest (SHA-256)"):
        assert training[row] == "not recorded"
    assert "Zero-shot" not in _headings(card)


def test_data_that_the_project_did_not_generate_are_taken_for_patients(tmp_path: Path) -> None:
    origin = {"manifest": small_run().manifest.fingerprint, "rows": 32}

    def short(results: dict[str, Any] | None, **more: Any) -> str:
        out = _save(tmp_path / "model", results, origin=origin | more)
        return next(row[1] for row in _rows(_card(out), TITLE) if row[0] == "Trained on")

    generated = short(None, is_generated=True)
    assert short(_with(lambda r: None)) == generated  # the evaluation saw the same manifest
    real = short(_with(lambda r: r["data"].update(is_phantom=False)))
    unknown = short(_with(lambda r: r["fingerprints"].update(manifest="0" * 64)))
    assert len({generated, real, unknown, short(None)}) == 3
    assert "patient" in real and unknown == short(None)


TITLE = "A language-image model of chest radiographs"


def test_a_foreign_concept_table_is_asked_for_and_said_to_be_licensed(tmp_path: Path) -> None:
    lexicon = tmp_path / "own.yaml"
    lexicon.write_text("category: x\nsemantic_type: finding\nconcepts:\n  xyz: {name: xyz}\n")
    small, table = small_run(), load_concepts(str(lexicon))
    knowledge = dataclasses.replace(small.config.knowledge, lexicon=str(lexicon))
    config = dataclasses.replace(small.config, knowledge=knowledge)
    vectors = torch.zeros(len(table), 16)
    model = MLIPModel(config, vocab_size=small.tokenizer.vocab_size, concept_vectors=vectors)
    parts = (model, config, small.tokenizer, table)
    without = _card(save_pretrained(tmp_path / "without", *parts))
    included = _card(save_pretrained(tmp_path / "with", *parts, include_concepts=True))
    assert "lexicon=" in _blocks(without, "python")[0] + _blocks(without, "bash")[0]
    assert "lexicon=" not in _blocks(included, "python")[0] + _blocks(included, "bash")[0]
    umls = [dataclasses.replace(concept, source="umls") for concept in table]
    licensed = type(table)(umls, table.provenance)
    out = save_pretrained(tmp_path / "umls", *parts[:3], licensed, include_concepts=True)
    assert json.loads((out / "config.json").read_text())["knowledge"]["is_licensed"]
    assert "UMLS" in _card(out) and "UMLS" not in included
    merged = type(table)(list(table), {**table.provenance, "licensed": True})
    assert knowledge_of(merged, is_own=False, is_included=False)["is_licensed"]


def test_only_studies_that_training_makes_itself_are_told_to_be_generated() -> None:
    config = small_run().config

    def is_generated(manifest: str, studies: int) -> Any:
        phantom = dataclasses.replace(config.data.phantom, studies=studies)
        data = dataclasses.replace(config.data, manifest=manifest, phantom=phantom)
        return origin_of({}, dataclasses.replace(config, data=data))["is_generated"]

    assert is_generated("generated/manifest.csv", 1) is True
    assert is_generated("own/films.csv", 1) is None and is_generated("own/manifest.csv", 0) is None


def test_the_name_of_a_users_subset_is_not_handed_on() -> None:
    results = _with(lambda r: r["config"]["evaluate"].update(subset="ward of Dr Smith"))
    small = small_run()
    kept = scores_of(results, hash_of_weights(small.model), small.table)
    assert kept is not None and kept["config"]["evaluate"]["subset"] == "set"


def test_first_weights_are_named_without_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_run().config
    (tmp_path / "resnet-50").mkdir()
    vision = dataclasses.replace(config.model.vision, source=str(tmp_path / "resnet-50"))
    text = dataclasses.replace(config.model.text, source="google/bert_x")
    towers = dataclasses.replace(config.model, vision=vision, text=text)
    named = dataclasses.replace(config, model=towers)
    found = start_of(named)
    assert found["image"] == {"kind": "folder", "name": "resnet-50"}
    assert found["text"] == {"kind": "hub", "name": "google/bert_x"}
    # the settings of an export name no source any more: what was known is kept
    assert kept_origin({"start": found}, config)["start"] == found
    assert kept_origin(None, named)["start"] == found
    placed = {"text": {"kind": "folder", "name": "/home/smith/bert"}}
    kept = kept_origin({"start": placed}, config)["start"]
    assert kept == {"image": None, "text": {"kind": "folder", "name": "bert"}}
    (tmp_path / "google" / "bert_x").mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.chdir(tmp_path)
        assert start_of(named)["text"] == {"kind": "folder", "name": "bert_x"}
    card = _card(_save(tmp_path / "model", origin={"start": found}))
    assert _front(card)["base_model"] == ["google/bert_x"]
    assert str(tmp_path) not in card
    hostile = {"text": {"kind": "hub", "name": "x\n---\n"}, "image": {"kind": "folder"}}
    assert "base_model" not in _front(_card(_save(tmp_path / "x", origin={"start": hostile})))


def test_stages_that_are_cut_off_are_not_described() -> None:
    small = small_run()
    assert sizes_of(small.model)["image"]["hidden_sizes"] == [8, 16]
    vision = dataclasses.replace(small.config.model.vision, patch_stage=0)
    config = dataclasses.replace(
        small.config, model=dataclasses.replace(small.config.model, vision=vision)
    )
    vectors = small.model.concept_vectors
    model = MLIPModel(config, vocab_size=small.tokenizer.vocab_size, concept_vectors=vectors)
    sizes = sizes_of(model)
    assert (sizes["image"]["hidden_sizes"], sizes["image"]["depths"]) == ([8], [1])
    assert sizes["parameters"] == sum(p.numel() for p in model.parameters())
