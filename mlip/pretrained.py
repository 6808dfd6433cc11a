"""A model with everything it needs beside it: save_pretrained, from_pretrained, open_checkpoint.

<folder>/
  model.safetensors     every weight and buffer by name
  config.json           format, settings, tower sizes, fingerprints
  preprocessing.json    what pixels and tokens the model expects, for people and other programs
  tokenizer/            vocabulary
  concepts.jsonl        concept table: the project's own lexicon, another only where asked for
  README.md             model card (saved/model_card.py)
  image.onnx, text.onnx  both towers for other runtimes, where asked for (saved/onnx_graphs.py)
  image_tower/, text_tower/  both for transformers, where asked for (saved/transformers_folders.py)
  SHA256SUMS            of the files above; checked when the folder is read

No pickle anywhere: reading a folder from a stranger runs no code of theirs.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mlip.dataloading.reports.tokenizer import ReportTokenizer, load_tokenizer
from mlip.knowledge.concept_files import KEPT, load_concepts, write_table
from mlip.knowledge.concepts import ConceptTable
from mlip.knowledge.linker import linker_of
from mlip.model import MLIPModel
from mlip.saved.agreement import check_concepts, read_config
from mlip.saved.export_folder import (
    CARD,
    CONTRACT,
    SETTINGS,
    WEIGHTS,
    check_sums,
    require_free,
    write_sums,
)
from mlip.saved.model_card import model_card
from mlip.saved.model_facts import kept_origin, knowledge_of, scores_of, sizes_of
from mlip.saved.onnx_graphs import write_onnx
from mlip.saved.pretrained_model import Pretrained
from mlip.saved.tower_shapes import by_shape, shapes_of
from mlip.saved.trained_run import open_run
from mlip.saved.transformers_folders import write_towers
from mlip.saved.weights import PretrainedError as PretrainedError
from mlip.saved.weights import model_with
from mlip.settings import config as configuration
from mlip.settings.config import Config
from mlip.system.output_file import only_writer
from mlip.transfer.fingerprint import hash_of, hash_of_vocabulary, hash_of_weights, preprocessing

logger = logging.getLogger("mlip")
FORMAT = 1


def save_pretrained(
    folder: str | Path,
    model: MLIPModel,
    config: Config,
    tokenizer: ReportTokenizer,
    table: ConceptTable,
    *,
    facts: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    include_concepts: bool = False,
    onnx: bool = False,
    transformers: bool = False,
) -> Path:
    """Write the model's folder; it appears whole or not at all.

    origin            Pretrained.origin, for the model card
    results           an evaluation, for the card too: left out unless it is of these weights
    include_concepts  write a table of other sources too: its licences are the caller's to keep.
                      Without it such a folder holds no text of theirs, and its reader needs the
                      table beside it.
    onnx              write both towers as ONNX files too (mlip.saved.onnx_graphs)
    transformers      write both towers as folders of transformers too
                      (mlip.saved.transformers_folders)
    Raises:  PretrainedError if the folder exists and holds something else; ConfigError where
             another process writes it; see write_onnx and write_towers
    """
    folder = Path(folder).resolve()  # a link stays, what it leads to is written
    require_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(folder.with_name(f".{folder.name}.lock"), folder):
        partial, previous = (
            folder.with_name(f".{folder.name}.{x}") for x in ("partial", "previous")
        )
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            known = {"facts": dict(facts or {}), "origin": origin, "results": results}
            parts = (model, config, tokenizer, table)
            _fill(partial, *parts, known, include_concepts, onnx, transformers)
            if folder.exists():  # moved, not deleted: a kill between the two leaves both
                shutil.rmtree(previous, ignore_errors=True)
                folder.rename(previous)
            partial.rename(folder)
        finally:
            if previous.exists() and not folder.exists():
                previous.rename(folder)
            shutil.rmtree(previous, ignore_errors=True)
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _fill(
    folder: Path,
    model: MLIPModel,
    config: Config,
    tokenizer: ReportTokenizer,
    table: ConceptTable,
    known: Mapping[str, Any],
    include_concepts: bool,
    onnx: bool,
    transformers: bool,
) -> None:
    state = {name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    contract = preprocessing(config)
    own_lexicon = table.provenance.get("source") == "lexicon" and config.knowledge.lexicon is None
    (folder / CONTRACT).write_text(json.dumps(contract, indent=1) + "\n", encoding="utf-8")
    tokenizer.save(folder / "tokenizer")
    is_included = own_lexicon or include_concepts
    if is_included:
        write_table(table, folder / KEPT)
    weights = hash_of_weights(model)
    standalone = _standalone(config, model)
    described = {
        "model_type": "mlip",
        "format": FORMAT,
        "vocab_size": int(model.text.backbone.config.vocab_size),
        "facts": {k: v for k, v in known["facts"].items() if k != "checkpoint"},  # a path
        "origin": kept_origin(known["origin"], config),
        "sizes": sizes_of(model),
        "knowledge": knowledge_of(table, is_own=own_lexicon, is_included=is_included),
        "evaluation": scores_of(known["results"], weights, table),
        "fingerprints": {
            "weights": weights,
            "preprocessing": hash_of(contract),
            "vocabulary": hash_of_vocabulary(tokenizer),
            "concept_table": table.fingerprint,
        },
        "config": configuration.to_dict(standalone),
    }
    if transformers:  # first: a tower that it has not is refused at once, ONNX takes a minute
        described["transformers"] = write_towers(folder, model, standalone, tokenizer)
    if onnx:
        described["onnx"] = write_onnx(folder, model, standalone)
    (folder / SETTINGS).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    (folder / CARD).write_text(model_card(described, contract), encoding="utf-8")
    write_sums(folder)


def _standalone(config: Config, model: MLIPModel) -> Config:
    """The settings with towers described by size instead of by where they came from.

    Without places of this machine, but that of a lexicon: it says which table the reader needs.
    """
    config = by_shape(config, shapes_of(config.model, model))
    # the folder's own vocabulary is meant, wherever the folder lies
    text = dataclasses.replace(config.model.text, tokenizer=None)
    towers = dataclasses.replace(config.model, text=text)
    return dataclasses.replace(
        config,
        model=towers,
        run=dataclasses.replace(config.run, dir=configuration.Run().dir),
        data=dataclasses.replace(config.data, manifest="", root=None),
        knowledge=dataclasses.replace(
            config.knowledge, vectors=Path(config.knowledge.vectors).name, cache_dir=None
        ),
        train=dataclasses.replace(config.train, start=None),
        evaluate=dataclasses.replace(config.evaluate, checkpoint=None, trained_on=()),
    )


def from_pretrained(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    lexicon: str | None = None,
) -> Pretrained:
    """The model of a folder that save_pretrained wrote, in eval mode.

    lexicon  the concept table, where the folder holds none (licensed ontologies)
    Raises:  PretrainedError naming the file: missing, damaged, of another format, or a concept
             table that is not the one the model was trained with; LexiconError where that of
             `lexicon` cannot be read
    """
    folder = Path(folder)
    read_settings(folder)  # what is none of our folders is told so, not that it lacks a list
    check_sums(folder)
    described, config, tokenizer, table = open_inputs(folder, lexicon=lexicon)
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise PretrainedError(f"{folder / WEIGHTS}: cannot be read: {error}") from error
    model = model_with(config, described["vocab_size"], weights, str(folder / WEIGHTS)).to(device)
    facts = {**described["facts"], "checkpoint": str(folder)}
    origin = kept_origin(described.get("origin"), config)
    return Pretrained(model, config, tokenizer, table, linker_of(table), facts, origin=origin)


def open_inputs(
    folder: Path, *, lexicon: str | None
) -> tuple[dict[str, Any], Config, ReportTokenizer, ConceptTable]:
    """What a folder holds beside weights: content of config.json, settings, vocabulary, concepts.

    Raises:  as from_pretrained, but no file is held against SHA256SUMS
    """
    described = read_settings(folder)
    config = read_config(described["config"], folder / SETTINGS)
    # settings of a stranger: they name no source here, and must not open the network for one
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, offline=True))
    own = folder / KEPT
    given = lexicon or (str(own) if own.is_file() else config.knowledge.lexicon)
    table = load_concepts(given)
    check_concepts(folder, table, described["fingerprints"].get("concept_table"), given)
    return described, config, load_tokenizer(folder / "tokenizer"), table


def read_settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PretrainedError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PretrainedError(f"{path}: not JSON: {error}") from error
    if not isinstance(described, dict) or described.get("model_type") != "mlip":
        raise PretrainedError(f"{path}: expected model_type 'mlip'; this is another kind of model")
    if described.get("format") != FORMAT:
        raise PretrainedError(
            f"{path}: format {described.get('format')!r}, this version reads format {FORMAT}"
        )
    kinds = {"config": dict, "vocab_size": int, "fingerprints": dict, "facts": dict}
    lacking = [name for name, kind in kinds.items() if not isinstance(described.get(name), kind)]
    if lacking:
        raise PretrainedError(f"{path}: lacks {lacking}; copy the whole folder again")
    return described


def open_checkpoint(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    lexicon: str | None = None,
    weights_of: str = "trained",
) -> Pretrained:
    """The model of an export, of a training checkpoint, or of a run folder.

    Of a run the best on val where it was watched (train.monitor), else the newest.

    weights_of  "trained", or "ema" for the average that train.ema_decay keeps
    Raises:  PretrainedError if the path is none of these, holds no average where one is asked for,
             or has other vocabulary or concepts than its training; LexiconError for a table that
             cannot be read; CheckpointError if it, or each of a run, is damaged (of a run a
             damaged one is passed over with a warning)
    """
    if weights_of not in ("trained", "ema"):
        raise PretrainedError(f"weights_of: expected 'trained' or 'ema', got {weights_of!r}")
    path = Path(path)
    if (path / SETTINGS).is_file() and (path / WEIGHTS).is_file():
        exported = from_pretrained(path, device=device, lexicon=lexicon)
        if weights_of == "ema" and exported.facts.get("weights") != "ema":
            raise PretrainedError(
                f"{path}: was exported without the average of the weights; export the run again "
                "with evaluate.weights=ema"
            )
        return exported
    return open_run(path, device=device, lexicon=lexicon, weights_of=weights_of)
