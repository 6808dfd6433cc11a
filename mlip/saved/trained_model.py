"""A trained model of whatever folder it lies in: of an export, a training checkpoint or a run.

What does not live here: the writing of an export (mlip/pretrained.py), and how a run's folder is
read (trained_run.py).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mlip.dataloading.reports.tokenizer import ReportTokenizer, load_tokenizer
from mlip.knowledge.concept_files import KEPT, load_concepts
from mlip.knowledge.concepts import ConceptTable
from mlip.knowledge.linker import linker_of
from mlip.saved.agreement import check_concepts, read_config
from mlip.saved.export_folder import FORMAT, SETTINGS, WEIGHTS, check_sums
from mlip.saved.model_facts import kept_origin
from mlip.saved.pretrained_model import Pretrained
from mlip.saved.trained_run import open_run
from mlip.saved.weights import PretrainedError, model_with
from mlip.settings.config import Config


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
