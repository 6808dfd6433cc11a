"""A model with everything it needs beside it: the writing of an export's folder, and for code of
one's own all that opens one again (saved/trained_model.py).

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
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mlip.dataloading.reports.tokenizer import ReportTokenizer
from mlip.knowledge.concept_files import KEPT, write_table
from mlip.knowledge.concepts import ConceptTable
from mlip.model import MLIPModel
from mlip.saved.export_folder import (
    CARD,
    CONTRACT,
    FORMAT,
    SETTINGS,
    WEIGHTS,
    require_free,
    write_sums,
)
from mlip.saved.model_card import model_card
from mlip.saved.model_facts import kept_origin, knowledge_of, scores_of, sizes_of
from mlip.saved.onnx_graphs import write_onnx
from mlip.saved.pretrained_model import Pretrained
from mlip.saved.tower_shapes import by_shape, shapes_of
from mlip.saved.trained_model import from_pretrained, open_checkpoint
from mlip.saved.transformers_folders import write_towers
from mlip.saved.weights import PretrainedError
from mlip.settings import config as configuration
from mlip.settings.config import Config
from mlip.system.output_file import only_writer, require_renames, sync_all
from mlip.transfer.fingerprint import hash_of, hash_of_vocabulary, hash_of_weights, preprocessing

__all__ = ["open_checkpoint", "from_pretrained", "save_pretrained", "Pretrained", "PretrainedError"]


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
             another process writes it, or a mounted bucket would lose it; see write_onnx and
             write_towers
    """
    folder = Path(folder).resolve()  # a link stays, what it leads to is written
    require_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    require_renames(folder.parent)
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
            sync_all(partial)  # the export of before is about to go
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
