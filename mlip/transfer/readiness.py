"""What evaluate_run would refuse in its data, found before hours of training instead of after."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mlip.dataloading.manifest import Manifest
from mlip.dataloading.tables.table import ManifestError
from mlip.settings.config import Config, ConfigError
from mlip.transfer.alignment.chosen_rows import choose_rows
from mlip.transfer.alignment.label_prompts import lexicon_prompts, phantom_prompts
from mlip.transfer.alignment.prompts import TextError, make_text_batch, phrase_encoder
from mlip.transfer.alignment.queries import box_phrases
from mlip.transfer.alignment.zero_shot import Prompts, prompt_texts
from mlip.transfer.measures.subgroups import read_groupings
from mlip.transfer.trained_on import find_seen
from mlip.transfer.truth.annotations import Annotations
from mlip.transfer.truth.box_file import box_file, read_box_file
from mlip.transfer.truth.finding_boxes import Box, load_boxes
from mlip.transfer.truth.generated import phantom_size
from mlip.transfer.truth.labels import label_names

logger = logging.getLogger("mlip")
# rows whose boxes are laid on their images: each opens a file
_SIZED_ROWS = 512


def check_evaluation(config: Config, manifest: Manifest, linker: Any, table: Any) -> list[str]:
    """Reads what evaluation reads beside images and reports: columns, the subset, boxes.csv, tables
    of evaluate.trained_on.

    Warns where labels are there and none names a concept: zero-shot would have nothing to score.
    Returns: the sentences that evaluate_run refuses where data.max_tokens does not hold them, for
             check_sentences
    Raises:  ManifestError or ValueError as evaluate_run, which does all of it again; ManifestError
             too for a boxes.csv of other images, which evaluate_run takes for none.
    """
    # as there: rows without a usable report count
    manifest = dataclasses.replace(manifest, keep_without_report=True)
    annotations = Annotations(config, manifest)
    chosen = choose_rows(config, manifest)
    boxes = _boxes_of_some(config, annotations, chosen.tolist())
    read_groupings(config, manifest, chosen)
    find_seen(config, manifest, [])
    is_phantom = phantom_size(manifest) is not None
    prompts: list[Prompts] = []
    if manifest.label_column is not None and is_phantom:
        prompts = phantom_prompts(linker, table, config.evaluate)[0]
    elif manifest.label_column is not None:
        names = label_names(manifest, chosen)
        # thresholds are chosen on val; a finding stated in two ways is refused
        for looked_at in (chosen, manifest.rows("val", with_report=False)):
            annotations.states(looked_at, names)
        prompts = lexicon_prompts(names, linker, table, config.evaluate)[0]
        if names and not prompts:
            logger.warning(
                "none of the %d labels of split %s (data.columns.labels) names a concept of the "
                "table: the evaluation will have no zero-shot scores",
                len(names),
                config.evaluate.split,
            )
    # names that are asked beside words of a report are cut like those
    is_cut = any(box.phrase for own in boxes.values() for box in own)
    return prompt_texts(prompts) + ([] if is_cut else box_phrases(boxes, table, is_phantom))


def check_sentences(
    sentences: Sequence[str], config: Config, tokenizer: Any, linker: Any, table: Any
) -> None:
    """Raises:  ConfigError for one that data.max_tokens does not hold in the run's vocabulary."""
    if not sentences:
        return
    try:
        make_text_batch(sentences, phrase_encoder(config, tokenizer, linker, table))
    except TextError as error:
        raise ConfigError(
            f"data.max_tokens={config.data.max_tokens}: the evaluation after the training asks by "
            f"sentences, and {error} (evaluate.positive_prompts, negative_prompts), raise "
            "data.max_tokens, or set evaluate.after_training=false"
        ) from error


def _boxes_of_some(
    config: Config, annotations: Annotations, rows: list[int]
) -> dict[int, list[Box]]:
    """load_boxes of the first rows of these that have any."""
    columns, manifest = config.transfer.columns, annotations.manifest
    if columns.boxes is not None:
        drawn = [row for row in rows if annotations.boxes(row).names]
    elif columns.mask is not None:
        drawn = [row for row in rows if annotations.has_mask(row)]
    else:
        drawn = _in_box_file(manifest, rows)
    return load_boxes(config, manifest, drawn[:_SIZED_ROWS])


def _in_box_file(manifest: Manifest, rows: list[int]) -> list[int]:
    drawn = read_box_file(manifest.path)
    if not drawn:
        return []
    paths = pa.array(list(drawn), type=manifest.image.type)
    if not pc.any(pc.is_in(manifest.image, value_set=paths)).as_py():
        raise ManifestError(
            f"{box_file(manifest.path)}: none of its {len(drawn)} paths is an image of the "
            "manifest beside it: write them as the manifest does, or remove the file; of a set "
            "that `mlip prepare` made take the boxes from transfer.columns.boxes"
        )
    return [row for row in rows if manifest.image_path(row) in drawn]
