"""The report's pictures: phrases over radiographs, words over radiographs, retrieved answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from mlip.pages.pictures import crosshair, decode_png, heat_uri, outline, picture_uri
from mlip.transfer.alignment.grounding import is_inside

KINDS = {
    "keyword": "Name of the finding",
    "sentence": "Sentence that states it",
    "swapped": "Same words, image without it",
}
NO_TEXT = "report {study}"


def example_context(results: Mapping[str, Any]) -> dict[str, Any]:
    """Template values from results["examples"]; empty lists where there are none."""
    examples = results.get("examples") or {}
    return {
        "maps": [_map_row(e) for e in examples.get("grounding", [])],
        "word_maps": [_word_row(e) for e in examples.get("words", [])],
        "found_texts": [_found(e) for e in examples.get("image_to_text", [])],
        "found_images": [_found(e) for e in examples.get("text_to_image", [])],
        "shows_text": examples.get("shows_text", False),
    }


def _map_row(example: Mapping[str, Any]) -> dict[str, Any]:
    image = decode_png(example["image"])
    size, boxes = image.shape, example["boxes"]
    box = "true box" if len(boxes) == 1 else "true boxes"
    shown = [np.asarray(m["map"]) for m in example["maps"]]
    low = float(min(m.min() for m in shown))
    high = float(max(m.max() for m in shown))
    pictures = [
        {
            "uri": picture_uri(image),
            "layers": outline(boxes, size),
            "kind": "Radiograph",
            "alt": f"Radiograph with the {box} of the finding",
            "caption": "",
        }
    ]
    for entry, heat in zip(example["maps"], shown, strict=True):
        swapped = entry.get("image")
        under = decode_png(swapped) if swapped else image
        layers, alt = crosshair(entry["point"], size), "Map over another radiograph"
        if not swapped:
            where = "in" if is_inside(np.asarray(entry["point"]), np.asarray(boxes)) else "out"
            alt = f"Map over the radiograph, the hottest point {where}side the {box}"
            layers = Markup(outline(boxes, size) + layers)
        pictures.append(
            {
                "uri": heat_uri(under, heat, low, high),
                "layers": layers,
                "kind": KINDS[entry["kind"]],
                "alt": alt,
                "caption": entry["phrase"],
            }
        )
    return {"name": example["name"], "study": example["study"], "pictures": pictures}


def _word_row(example: Mapping[str, Any]) -> dict[str, Any]:
    image = decode_png(example["image"])
    size = image.shape
    maps = [np.asarray(m["map"]) for m in example["maps"]]
    low, high = float(min(m.min() for m in maps)), float(max(m.max() for m in maps))
    pictures = [
        {
            "uri": picture_uri(image, least_px=192),
            "layers": outline(example["boxes"], size),
            "alt": "Radiograph with the true boxes",
            "caption": "radiograph",
        }
    ]
    for entry, heat in zip(example["maps"], maps, strict=True):
        pictures.append(
            {
                "uri": heat_uri(image, heat, low, high, least_px=192),
                "layers": outline(example["boxes"], size),
                "alt": "Map of one word over the radiograph",
                "caption": entry["word"],
            }
        )
    return {"study": example["study"], "text": example["text"], "pictures": pictures}


def _found(example: Mapping[str, Any]) -> dict[str, Any]:
    answers = []
    for place, answer in enumerate(example["answers"], start=1):
        shown = {**answer, "place": place}
        if answer.get("image"):
            shown["uri"] = picture_uri(decode_png(answer["image"]), least_px=192)
        shown["text"] = answer.get("text") or NO_TEXT.format(study=answer["study"])
        answers.append(shown)
    found = {**example, "answers": answers}
    if example.get("image"):
        found["uri"] = picture_uri(decode_png(example["image"]), least_px=256)
    found["text"] = example.get("text") or NO_TEXT.format(study=example["study"])
    return found
