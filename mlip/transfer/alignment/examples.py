"""Pictures for the page: phrases over images, words over images, retrieved answers.

Examples are taken in the order of the split, never by score. Text and identifiers leave here only
where the caller allows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlip.dataloading.manifest import Manifest
from mlip.settings.config import Config
from mlip.transfer.alignment.encoded_split import EncodedSplit
from mlip.transfer.alignment.grounding import Query
from mlip.transfer.alignment.patch_maps import PhraseMaps, Upsampler, pointed_pixel, token_maps
from mlip.transfer.alignment.prompts import make_text_batch, phrase_encoder
from mlip.transfer.alignment.retrieval import first_right_rank, make_pools
from mlip.transfer.features import ImageBank, global_scores
from mlip.transfer.png_text import png_text
from mlip.transfer.truth.finding_boxes import Box

WORDS_SHOWN = 15
TEXT_ANSWERS, IMAGE_ANSWERS = 4, 6


def study_name(manifest: Manifest, row: int, shows_id: bool) -> str:
    """The file's stem for generated studies, a salted hash for real ones."""
    return Path(manifest.image_path(row)).stem if shows_id else manifest.image_hash(row)


def collect_examples(
    opened: Any,
    manifest: Manifest,
    split: EncodedSplit,
    *,
    queries: Sequence[Query],
    phrases: Sequence[str],
    maps: PhraseMaps | None,
    boxes: Mapping[int, Sequence[Box]],
    names: Mapping[str, str],
    is_phantom: bool,
) -> dict[str, Any]:
    """What mlip/pages/examples.py draws; every list may be empty.

    is_phantom  generated studies show text and file names, others by evaluate.show_text alone
    """
    images, settings = split.images, opened.config.evaluate
    shows_text = is_phantom or settings.show_text

    def study(i: int) -> str:
        return study_name(manifest, int(images.row_index[i]), is_phantom)

    found: dict[str, Any] = {"shows_text": shows_text}
    found["grounding"] = (
        _grounding(images, queries, phrases, maps, names, study) if maps is not None else []
    )
    found["words"] = (
        _words(opened, manifest, split, boxes, study) if shows_text and settings.examples else []
    )
    return {**found, **_retrieved(opened.config, manifest, split, study, shows_text)}


def _grounding(
    images: ImageBank,
    queries: Sequence[Query],
    phrases: Sequence[str],
    maps: PhraseMaps,
    names: Mapping[str, str],
    study: Any,
) -> list[dict[str, Any]]:
    """Per finding the first image with it on one side: name, sentence, and the swapped image."""
    grid = images.features.grid
    upsample = Upsampler(grid, images.pixels.shape[1:])
    examples = []
    for finding in dict.fromkeys(q.finding for q in queries):
        own = [q for q in queries if q.finding == finding]
        first = next((q for q in own if q.kind == "keyword" and len(q.boxes) == 1), own[0])
        same = [q for q in own if q.image == first.image]
        by_name = next((q for q in same if q.kind == "keyword"), None)
        by_sentence = next((q for q in same if q.kind == "sentence"), None)
        asked = [(q.kind, q, q.image) for q in (by_name, by_sentence) if q is not None]
        if by_name is not None and by_name.swapped is not None:
            asked.append(("swapped", by_name, by_name.swapped))
        shown = []
        for kind, query, at in asked:
            heat = maps[query.phrase, at]
            entry = {
                "kind": kind,
                "phrase": phrases[query.phrase],
                "map": heat.reshape(grid).round(4).tolist(),
                "point": pointed_pixel(upsample(heat), grid).tolist(),
            }
            if kind == "swapped":
                entry["image"] = png_text(images.pixels[at])
            shown.append(entry)
        examples.append(
            {
                "name": names.get(finding, finding),
                "study": study(first.image),
                "image": png_text(images.pixels[first.image]),
                "boxes": first.boxes.round(2).tolist(),
                "maps": shown,
            }
        )
    return sorted(examples, key=lambda e: str(e["name"]))


def _words(
    opened: Any,
    manifest: Manifest,
    split: EncodedSplit,
    boxes: Mapping[int, Sequence[Box]],
    study: Any,
) -> list[dict[str, Any]]:
    """One study with two findings or more, its report word by word."""
    images, tokenizer = split.images, opened.tokenizer
    several = [
        i
        for i in split.with_text.tolist()
        if len({b.finding for b in boxes.get(int(images.row_index[i]), ())}) >= 2
    ]
    if not several:
        return []
    i = several[0]
    row = int(images.row_index[i])
    text = manifest.text(row)
    encoder = phrase_encoder(opened.config, tokenizer, None, None)
    ids = make_text_batch([text], encoder, cut=True).token_ids[0]
    bank = split.reports.rows(np.array([i]))
    patches = images.features.patches[torch.tensor([i])]
    heat = token_maps(opened.model, patches, bank)[0].numpy()
    shown: list[dict[str, Any]] = []
    seen: set[str] = set()
    for position, token in enumerate(ids.tolist()):
        word = tokenizer.token(token)
        if len(word) < 4 or not word.isalpha() or word in seen or position >= heat.shape[0]:
            continue
        seen.add(word)
        grid_map = heat[position].reshape(images.features.grid)
        shown.append({"word": word, "map": grid_map.round(4).tolist()})
        if len(shown) == WORDS_SHOWN:
            break
    return [
        {
            "study": study(i),
            "text": text,
            "image": png_text(images.pixels[i]),
            "boxes": [list(b.corners) for b in boxes[row]],
            "maps": shown,
        }
    ]


def _retrieved(
    config: Config, manifest: Manifest, split: EncodedSplit, study: Any, shows_text: bool
) -> dict[str, Any]:
    images, with_text, count = split.images, split.with_text, config.evaluate.examples
    pools = make_pools(len(with_text), config.evaluate.retrieval_pool, config.run.seed)
    if not pools or len(pools[0]) < 2 or count == 0:
        return {"image_to_text": [], "text_to_image": []}
    rows = with_text[pools[0]]
    image = images.features.embedding[torch.as_tensor(rows)]
    scores = global_scores(image, split.reports.rows(rows))
    pairs = split.pair_id[rows]
    ranks = first_right_rank(scores, pairs, pairs), first_right_rank(scores.T, pairs, pairs)

    def text(position: int) -> str | None:
        return manifest.text(int(images.row_index[rows[position]])) if shows_text else None

    def picture(position: int) -> str:
        return png_text(images.pixels[rows[position]])

    asked, images_asked = range(min(count, len(rows))), -(-count // 2)
    by_image, by_text = [], []
    for q in asked[:images_asked]:
        best = np.argsort(-scores[q], kind="stable")[:TEXT_ANSWERS].tolist()
        right = (pairs[best] == pairs[q]).tolist()
        by_image.append(
            {
                "study": study(rows[q]),
                "image": picture(q),
                "rank": int(ranks[0][q]),
                "own": None if any(right) else text(q),
                "answers": [
                    {"study": study(rows[a]), "text": text(a), "right": is_right}
                    for a, is_right in zip(best, right, strict=True)
                ],
            }
        )
    for q in asked[images_asked:]:
        best = np.argsort(-scores[:, q], kind="stable")[:IMAGE_ANSWERS].tolist()
        right = (pairs[best] == pairs[q]).tolist()
        by_text.append(
            {
                "study": study(rows[q]),
                "text": text(q),
                "rank": int(ranks[1][q]),
                "answers": [
                    {"study": study(rows[a]), "image": picture(a), "right": is_right}
                    for a, is_right in zip(best, right, strict=True)
                ],
            }
        )
    return {"image_to_text": by_image, "text_to_image": by_text}
