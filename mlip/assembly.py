"""From settings to a training's parts: manifest, tokenizer, concepts, linker, model, objective.

Commands take the parts of a trained one from what it kept (pretrained.open_checkpoint).
"""

from __future__ import annotations

import dataclasses
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlip.batch import PRESENT, STATES
from mlip.dataloading.images.image_file import is_too_dark
from mlip.dataloading.ledger import BadSample
from mlip.dataloading.loader import Loader, build_loader
from mlip.dataloading.manifest import Manifest, ManifestError, load_manifest
from mlip.dataloading.phantom import dataset as phantom_dataset
from mlip.dataloading.pipelines.samples import SampleReader
from mlip.dataloading.reports.text import clean_report
from mlip.dataloading.reports.tokenizer import ReportTokenizer
from mlip.dataloading.splits import SPLITS
from mlip.encoders.text import TextEncoder, token_states
from mlip.knowledge.categories import category_index, prototype_init, report_category
from mlip.knowledge.concept_files import KEPT, load_concepts, load_concepts_of_run, write_table
from mlip.knowledge.concepts import ConceptTable
from mlip.knowledge.linker import FEW_KNOWN_WORDS, Linker, few_known_words, linker_of
from mlip.knowledge.vectors import knowledge_vectors
from mlip.model import MLIPModel
from mlip.objective import Objective
from mlip.ranks import distributed, process_group
from mlip.saved.pretrained_model import Pretrained
from mlip.saved.resumed_run import Resumed
from mlip.saved.run_vocabulary import open_tokenizer
from mlip.saved.starting_point import started_model
from mlip.settings.config import Config, ConfigError, Knowledge
from mlip.system.folder_lock import is_seen
from mlip.system.machine import limit_reached
from mlip.training.checkpoint import checkpoints_of
from mlip.transfer.readiness import check_evaluation, check_sentences
from mlip.unit_length import unit_length

logger = logging.getLogger("mlip")

# share of linked reports under which the knowledge level has nearly nothing to learn
_FEW_LINKED = 0.1
# reports linked to start the prototypes: k-means over more changes the centres little
_PROTOTYPE_REPORTS = 20_000
_FILMS = 32  # looked at for their brightness, evenly spaced
_LANGUAGE_REPORTS = 1_000  # looked at for their language, evenly spaced
_OTHER_LANGUAGE = (
    0.1  # share of them from which a run warns; of 3,955 English ones none has few known words
)
_MANY_CONCEPTS = 100_000  # their linker takes seconds, that of a whole UMLS a minute
_DEFINITIONS_AT_ONCE = 64


@dataclass(frozen=True)
class Corpus:
    """What a run reads: rows, and how their text becomes tokens and mentions."""

    manifest: Manifest
    tokenizer: ReportTokenizer
    table: ConceptTable
    linker: Linker


def provide_phantoms(config: Config) -> None:
    """Generate the studies that data.phantom asks for, once, on rank 0; a collective call.

    Raises:  ConfigError where their folder cannot be written, or is not there on another node.
    """
    wanted = config.data.phantom
    if wanted.studies == 0:
        return
    folder = Path(config.data.manifest).parent

    def generate() -> None:
        try:
            phantom_dataset.write_dataset(folder, wanted)
        except ValueError as error:
            # as the settings of a run over phantoms do, laid over by one's own manifest
            raise ConfigError(
                f"{error} (data.phantom.studies={wanted.studies} asks for generated ones there: "
                "set it to 0 for a manifest of your own)"
            ) from None
        except OSError as error:
            if limit_reached(error):
                raise
            raise ConfigError(
                f"{folder}: data.phantom.studies={wanted.studies} cannot be generated there: "
                f"{error.strerror}; name another place with data.manifest=..., or set "
                "data.phantom.studies=0 for a manifest of your own"
            ) from error

    process_group.main_first(generate)
    mark = phantom_dataset.fingerprint(wanted)
    if not is_seen(lambda: phantom_dataset.is_complete(folder, mark), config.run.timeout_s):
        raise ConfigError(
            f"{folder}: rank 0 has generated the studies of data.phantom there, and rank "
            f"{distributed.rank()} on {socket.gethostname()} does not see them: set data.manifest "
            "to a disk that all nodes share"
        )


def open_corpus(config: Config, start: Pretrained | None = None) -> Corpus:
    """Read the manifest and concepts; train the vocabulary on the training split where needed.

    A collective call: rank 0 trains, the others wait and read. Vocabulary and concepts are those of
    `start` (open_start), where there is one.
    Raises:  ManifestError, also where no two training reports differ, or a run that is evaluated
             after its training has no rows for that; LexiconError; ValueError for a tokenizer that
             is not there, or sentences of that evaluation which data.max_tokens does not hold
    """
    manifest = load_manifest(config.data)
    # before the vocabulary: what a refused run leaves must not be taken up by the next one
    _check_pairs(manifest)
    table = _open_concepts(config) if start is None else start.table
    if distributed.is_main():
        _warn_of_dark(config, manifest)
        if table.cues is None:
            _warn_of_language(manifest)
    if len(table) > _MANY_CONCEPTS:
        logger.info("knowledge: building the linker of %d concepts", len(table))
    linker = linker_of(table)
    sentences = _check_evaluation(config, manifest, linker, table)
    tokenizer = open_tokenizer(config, manifest, start)
    check_sentences(sentences, config, tokenizer, linker, table)
    return Corpus(manifest, tokenizer, table, linker)


def open_loader(config: Config, corpus: Corpus, *, rank: int = 0, world_size: int = 1) -> Loader:
    """The loader of one rank over the training split."""
    return build_loader(
        config,
        corpus.manifest,
        split="train",
        train=True,
        rank=rank,
        world_size=world_size,
        tokenizer=corpus.tokenizer,
        linker=corpus.linker,
        table=corpus.table,
    )


def _open_concepts(config: Config) -> ConceptTable:
    """The table of knowledge.lexicon, or the one that a run which is resumed has kept."""
    if checkpoints_of(config.run.dir):
        return load_concepts_of_run(config.run.dir, config.knowledge.lexicon)
    return load_concepts(config.knowledge.lexicon)


def keep_concepts(config: Config, table: ConceptTable) -> None:
    """The project's own table into the run, on rank 0: a later version's may be another.

    Another table stays where it is: its licence may forbid a copy. Call it when the resumed
    checkpoint is known to be of this table.
    Raises:  LexiconError where it cannot be written.
    """
    if config.knowledge.lexicon is None and distributed.is_main():
        write_table(table, Path(config.run.dir) / KEPT)


def _check_pairs(manifest: Manifest) -> None:
    """What would never be found out: equal texts have no negatives."""
    rows = manifest.rows("train")
    if len(rows) > 1 and (manifest.pair_id[rows] == manifest.pair_id[rows[0]]).all():
        raise ManifestError(
            f"manifest {manifest.path}: all {len(rows)} training rows have the same report or "
            "study, so there is nothing to tell apart: check data.columns.report and "
            "data.columns.study_id"
        )


def _warn_of_dark(config: Config, manifest: Manifest) -> None:
    """Films that an evaluation leaves out as too dark: a training would learn of black pictures.

    Some rows are looked at, and of them pictures of more than 8 bits are decoded, but no DICOM
    files: what is white in those their header says.
    """
    rows = manifest.rows("train")
    rows = rows[:: -(-len(rows) // _FILMS) or 1]
    reader = SampleReader(manifest, dataclasses.replace(config.data, verify="none"))
    dark = 0
    for row in rows.tolist():
        try:
            content, header = reader.read(row, 0)
            if header.bits > 8 and header.kind != "dicom":
                dark += is_too_dark(reader.decode(content, header))
        except BadSample:
            continue  # the training tells it, film by film
    if dark:
        logger.warning(
            "images: %d of %d training films looked at are nearly black, as 12-bit values in "
            "16-bit files are; a training takes such films, evaluations leave them out: prepare "
            "them with --png-white 4095 or own, see docs/datasets.md",
            dark,
            len(rows),
        )


def _warn_of_language(manifest: Manifest) -> None:
    """Findings denied in another language count as present: "kein Pneumothorax"."""
    rows = manifest.rows("train")
    rows = rows[:: -(-len(rows) // _LANGUAGE_REPORTS) or 1]
    few = few_known_words(manifest.text(int(row)) for row in rows)
    if few > _OTHER_LANGUAGE * len(rows):
        logger.warning(
            "reports: in %d of %d training reports looked at, less than %.0f %% of the words are "
            "of the English lexicon; in another language most findings are missed, and denied "
            "ones whose word is the same ('kein Pneumothorax') count as present: translate the "
            "reports, or give a lexicon and cues of their language, see docs/knowledge.md",
            few,
            len(rows),
            100 * FEW_KNOWN_WORDS,
        )


def _check_evaluation(
    config: Config, manifest: Manifest, linker: Linker, table: ConceptTable
) -> list[str]:
    """What would be found out hours later, when the training is over; what check_evaluation
    gives."""
    if not config.evaluate.after_training:
        return []
    # rows without a report count: their labels and boxes are evaluated
    counts = {s: int((manifest.split == code).sum()) for code, s in enumerate(SPLITS)}
    split = config.evaluate.split
    if counts[split] == 0:
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ManifestError(
            f"manifest {manifest.path}: split {split!r} (evaluate.split) has no rows to evaluate "
            f"after the training; rows by split: {found}. Set evaluate.split to one that has rows, "
            "or data.columns.split=null to split by patient, or evaluate.after_training=false to "
            "train without an evaluation"
        )
    return check_evaluation(config, manifest, linker, table)


def build_model(
    config: Config,
    corpus: Corpus,
    start: Pretrained | None = None,
    resumed: Resumed | None = None,
) -> MLIPModel:
    """The model with random or pretrained towers, keyed by run.seed, or that of a start.

    resumed  of a run that goes on: its weights are filled from its checkpoint, by the engine
    A collective call.
    """
    torch.manual_seed(config.run.seed)
    if resumed is not None:
        words, concepts = corpus.tokenizer.vocab_size, len(corpus.table)
        return resumed.build_model(words=words, concepts=concepts)
    if start is not None:
        return started_model(config, start)
    vectors = _concept_vectors(config, corpus)
    return MLIPModel(config, vocab_size=corpus.tokenizer.vocab_size, concept_vectors=vectors)


def build_objective(
    config: Config,
    corpus: Corpus,
    start: Pretrained | None = None,
    resumed: Resumed | None = None,
) -> Objective:
    """Model and losses, the prototypes started from the training reports' present entities.

    Plain prototypes (loss.category.knowledge_terms false) keep their random start; those of a run
    that goes on are its checkpoint's. A collective call: rank 0 makes the concept vectors.
    """
    objective = Objective(config, build_model(config, corpus, start, resumed))
    category = config.loss.category
    if "category" in objective.losses and category.knowledge_terms and resumed is None:
        vectors, groups = _report_vectors(config, corpus, objective.model)
        first = prototype_init(vectors, groups, category.prototypes, config.run.seed)
        prototypes: Any = objective.losses["category"]
        prototypes.initialise(first)
    return objective


def _concept_vectors(config: Config, corpus: Corpus) -> Tensor:
    """Rank 0's on every rank: of a large table each would need its memory and time."""
    settings: Knowledge = config.knowledge
    # a tower from random weights takes them on every rank: all go on with the same numbers
    encode = _definition_encoder(config, corpus) if settings.vectors == "text_tower" else None
    made: list[Tensor] = []
    process_group.main_first(lambda: made.append(knowledge_vectors(corpus.table, settings, encode)))
    shape = distributed.broadcast_object([tuple(vectors.shape) for vectors in made])[0]
    vectors = made[0] if made else torch.empty(shape)
    distributed.broadcast_([vectors])
    return vectors


def _definition_encoder(config: Config, corpus: Corpus) -> Callable[[list[str]], Tensor]:
    """Texts -> the mean of their tokens by the text tower as it is before training."""
    tower = TextEncoder(
        config.model.text,
        vocab_size=corpus.tokenizer.vocab_size,
        max_tokens=config.data.max_tokens,
        attention=config.model.attention,
        offline=config.run.offline,
    ).eval()

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        tokenizer, room = corpus.tokenizer, config.data.max_tokens - 2
        parts = []
        for start in range(0, len(texts), _DEFINITIONS_AT_ONCE):
            pieces = tokenizer.encode_batch(texts[start : start + _DEFINITIONS_AT_ONCE])
            rows = [[tokenizer.cls_id, *p.ids[:room], tokenizer.sep_id] for p in pieces]
            ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_id)
            for index, row in enumerate(rows):
                ids[index, : len(row)] = torch.tensor(row)
            lengths = torch.tensor([len(row) for row in rows])
            mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
            parts.append(token_states(tower, ids, mask))
        return torch.cat(parts)

    return encode


@torch.no_grad()
def _report_vectors(config: Config, corpus: Corpus, model: MLIPModel) -> tuple[Tensor, Tensor]:
    """Projected present-entity means of training reports [R, D] and their categories [R]."""
    rows = corpus.manifest.rows("train")
    if len(rows) > _PROTOTYPE_REPORTS:
        generator = np.random.Generator(np.random.Philox(config.run.seed))
        rows = np.sort(generator.choice(rows, _PROTOTYPE_REPORTS, replace=False))
    categories = category_index(corpus.table)
    is_finding = torch.tensor([c.semantic_type != "anatomy" for c in corpus.table])
    projected = model.knowledge_projection(
        model.concept_vectors + model.state_embedding.weight[PRESENT]
    )
    is_known = (model.concept_vectors != 0).any(dim=1).tolist()
    vectors, groups = [], []
    linked = 0
    for row in rows:
        mentions = corpus.linker.link(clean_report(corpus.manifest.text(int(row))))
        linked += bool(mentions)
        found = {corpus.table.index[m.concept_id] for m in mentions if m.state == STATES[PRESENT]}
        present = sorted(row for row in found if is_known[row])
        if present:
            vectors.append(projected[present].sum(dim=0))
            groups.append(report_category(present, categories, is_finding))
    if linked < _FEW_LINKED * len(rows):
        logger.warning(
            "knowledge: %d of %d training reports name a concept of the lexicon (the project's "
            "own is English): set knowledge.lexicon to a table in the reports' language",
            linked,
            len(rows),
        )
    if not vectors:
        return projected.new_zeros(0, projected.shape[1]), torch.zeros(0, dtype=torch.int64)
    return unit_length(torch.stack(vectors)), torch.tensor(groups)
