"""A model with what belongs to it, as mlip.pretrained opens one; for code of one's own.

from mlip.pretrained import open_checkpoint

mlip = open_checkpoint("runs/mine")  # or a folder of `mlip export`
images = mlip.encode_images(["film.dcm", "film.png"])
texts = mlip.encode_texts(["left pleural effusion", "no pneumothorax"])
scores = mlip.similarity(images, texts)  # [2, 2], high = match
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mlip.batch import ImageFeatures
from mlip.dataloading.reports.tokenizer import ReportTokenizer
from mlip.knowledge.concepts import ConceptTable
from mlip.knowledge.linker import Linker
from mlip.model import MLIPModel
from mlip.settings.config import Config
from mlip.transfer.array import Array
from mlip.transfer.features import TextBank
from mlip.transfer.films import classify, own_inputs
from mlip.transfer.films.outliers import Reference, load_reference


@dataclass(frozen=True)
class Pretrained:
    """A model and what belongs to it; the methods prepare files and texts as in training."""

    model: MLIPModel
    config: Config
    tokenizer: ReportTokenizer
    table: ConceptTable
    linker: Linker
    facts: dict[str, Any]  # step, pairs_seen, checkpoint, weights: what is known of its training
    prototypes: Tensor | None = None  # [C, D] of the category level; a training checkpoint's only
    origin: dict[str, Any] = field(default_factory=dict)  # of the training: model_facts.origin_of

    def encode_images(self, paths: Iterable[str | Path]) -> ImageFeatures:
        """mlip.transfer.films.own_inputs.encode_images: of JPEG, PNG or DICOM files."""
        return own_inputs.encode_images(self, paths)

    def encode_texts(self, texts: Iterable[str]) -> TextBank:
        """mlip.transfer.films.own_inputs.encode_texts: of phrases."""
        return own_inputs.encode_texts(self, texts)

    def encode_reports(self, reports: Iterable[str]) -> TextBank:
        """mlip.transfer.films.own_inputs.encode_reports: of reports, as training reads them."""
        return own_inputs.encode_reports(self, reports)

    def similarity(
        self, images: ImageFeatures, texts: TextBank, head: own_inputs.Head = "global"
    ) -> Array:
        """mlip.transfer.films.own_inputs.similarity: every image with every text, [N, M]."""
        return own_inputs.similarity(self, images, texts, head)

    def heat_maps(self, images: ImageFeatures, texts: TextBank) -> Array:
        """mlip.transfer.films.own_inputs.heat_maps: where, [N, M, rows, columns] of patches."""
        return own_inputs.heat_maps(self, images, texts)

    def classify(
        self,
        images: ImageFeatures,
        findings: Iterable[str],
        head: classify.ScoreHead | None = None,
    ) -> Array:
        """Scores of findings that the lexicon knows by name, [N, findings]; high = there.

        As mlip.transfer.films.classify.scores, asked in the sentences of evaluate.positive_prompts.
        head  None: combined, or global where no loss trained the local score
        Raises:  QuestionError for a name that the lexicon does not know
        """
        question = classify.ask_names(findings, self, self.config.evaluate)
        texts = classify.encode_question(self, question)
        asked = head or classify.default_head(self)
        return classify.scores(self, images, question, texts, asked)

    def open_reference(self, path: str | Path) -> Reference:
        """mlip.transfer.films.outliers.load_reference: .p_values(images) tell the unlike ones."""
        return load_reference(path, self)
