"""What evaluate_run would refuse in its data, found before hours of training instead of after."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mlip.config import Config, ConfigError
from mlip.dataloading.manifest import Manifest
from mlip.dataloading.table import ManifestError
from mlip.transfer.alignment.chosen_rows import choose_rows
from mlip.transfer.alignment.label_prompts import lexicon_prompts, phantom_prompts
from mlip.transfer.alignment.prompts import TextError, make_text_batch, phrase_encoder
from mlip.transfer.alignment.queries import box_phrases
from mlip.transfer.alignment.zero_shot import prompt_texts
from mlip.transfer.measures.subgroups import read_groupings
from mlip.transfer.trained_on import find_seen
from mlip.transfer.truth.annotations import Annotations
from mlip.transfer.truth.box_file import box_file, read_box_file
from mlip.transfer.truth.finding_boxes import Box, load_boxes
from mlip.transfer.truth.generated import phantom_meta
from mlip.transfer.truth.labels import label_names

logger = logging.getLogger("mlip")
# rows whose boxes are laid on their images: each opens a file
_SIZED_ROWS = 512


def check_evaluation(config: Config, manifest: Manifest, linker: Any, table: Any) -> None:
    """Reads what evaluation reads beside images and reports: columns, the subset, boxes.csv, tables
    of evaluate.trained_on.

    Warns where labels are there and none names a concept: zero-shot would have nothing to score.
    Raises:  ManifestError or ValueError as evaluate_run, which does all of it again; ManifestError
             too for a boxes.csv of other images, which evaluate_run takes for none.
    """
    # as there: rows without a usable report count
    manifest = dataclasses.replace(manifest, keep_without_report=True)
    annotations = Annotations(config, manifest)
    chosen = choose_rows(config, manifest)
    rows = chosen.tolist()
    _boxes_of_some(config, annotations, rows)
    read_groupings(config, manifest, chosen)
    find_seen(config, manifest, [])
    if manifest.label_column is not None and phantom_meta(manifest) is None:
        names = label_names(manifest, chosen)
        # thresholds are chosen on val; a finding stated in two ways is refused
        for looked_at in (chosen, manifest.rows("val", with_report=False)):
            annotations.states(looked_at, names)
        if names and not lexicon_prompts(names, linker, table, config.evaluate)[0]:
            logger.warning(
                "none of the %d labels of split %s (data.columns.labels) names a concept of the "
                "table: the evaluation will have no zero-shot scores",
                len(names),
                config.evaluate.split,
            )


def check_phrases(
    config: Config, manifest: Manifest, linker: Any, table: Any, tokenizer: Any
) -> None:
    """Raises:  ConfigError for a sentence of evaluate_run that data.max_tokens does not hold in the
    run's vocabulary. Words of reports are cut there, and are no such sentence.
    """
    manifest = dataclasses.replace(manifest, keep_without_report=True)
    is_phantom = phantom_meta(manifest) is not None
    rows = choose_rows(config, manifest)
    prompts = phantom_prompts(table) if is_phantom else []
    if not is_phantom and manifest.label_column is not None:
        names = label_names(manifest, rows)
        prompts = lexicon_prompts(names, linker, table, config.evaluate)[0]
    boxes = _boxes_of_some(config, Annotations(config, manifest), rows.tolist())
    texts = [*prompt_texts(prompts), *box_phrases(boxes, table, is_phantom)]
    if not texts:
        return
    try:
        make_text_batch(texts, phrase_encoder(config, tokenizer, linker, table))
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
