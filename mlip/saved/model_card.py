"""README.md of an export: a model card as model hubs read it, made of what config.json holds.

Nothing is looked up, so the same config.json gives the same bytes. Whatever the page shows is
escaped unless this module made it: names of findings and groups are users' own. Its text lives in
mlip/pages/templates.
Source:  Mitchell et al., Model Cards for Model Reporting, 2019 (arXiv 1810.03993): its sections.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from mlip.pages.page import TEMPLATES
from mlip.pages.tables import DIRECTIONS, SCORES
from mlip.settings.config import Config, from_dict
from mlip.training.schedule import peak_lr, total_steps

TAGS = (
    *("chest-x-ray", "radiology", "medical-imaging", "vision-language", "contrastive-learning"),
    "research-only",
)
_KINDS = {"resnet": "ResNet", "vit": "ViT", "bert": "BERT"}
_SHAPE = {
    "hidden_sizes": "channels by stage",
    "depths": "blocks by stage",
    "layer_type": "kind of block",
    "patch_size": "patch side in px",
    "num_hidden_layers": "layers",
    "hidden_size": "width",
}
_NOT_RECORDED = Markup("not recorded")
_FURTHER = Markup(": trained further in transformers; the settings here are its first weights'")
_MOST_CHARACTERS = 80  # of a name: twice the longest of a public data set
# a reference shows the character and begins neither Markdown, HTML nor a link
_MARKS = re.compile(r"(?<=www)\.|[^\w ,()%.+-]|_")


def model_card(described: Mapping[str, Any], contract: Mapping[str, Any]) -> str:
    """The page as text.

    described  what config.json of the export holds
    contract   what preprocessing.json holds
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else escaped(value),
    )
    environment.filters |= {
        "count": _count,
        "estimate": _estimate,
        "finding": lambda row: "(not named)" if row["name"] is None else row["name"],
        "known": lambda value: _NOT_RECORDED if value is None else value,
        "number": _number,
        "short": lambda value: Markup(f"{value:g}"),
        "signed": lambda estimate: _estimate(estimate, form="+.3f"),
    }
    return environment.get_template("model_card.jinja").render(_context(described, contract))


def escaped(value: Any) -> Markup:
    """A text on one line that is shown as it is, also in a cell of a table."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    text = " ".join(text.split())
    if len(text) > _MOST_CHARACTERS:
        text = text[: _MOST_CHARACTERS - 3] + "..."
    return Markup(_MARKS.sub(lambda mark: f"&#{ord(mark[0])};", text))


def _context(described: Mapping[str, Any], contract: Mapping[str, Any]) -> dict[str, Any]:
    config, origin, sizes = described["config"], described["origin"], described["sizes"]
    scores, facts = described["evaluation"], described["facts"]
    is_generated = _is_generated(origin, scores)
    zero_shot = (scores or {}).get("zero_shot", {})
    heads = list(zero_shot.get("macro", ()))
    onnx = described.get("onnx")
    settings = from_dict(config)
    return {
        **{key: described[key] for key in ("vocab_size", "knowledge", "fingerprints")},
        **{"config": config, "contract": contract, "scores": scores, "sizes": sizes, "onnx": onnx},
        "origin": origin,
        "has_folders": "transformers" in described,
        "front_matter": Markup(
            yaml.safe_dump(_front_matter(described, is_generated), sort_keys=False)
        ),
        "facts": {key: facts.get(key) for key in ("step", "pairs_seen")},
        "unfinished": _FURTHER
        if facts.get("further") == "transformers"
        else _unfinished(facts.get("step"), settings, origin),
        "peak_lr": peak_lr(settings),
        "average": ", here their average over the training"
        if facts.get("weights") == "ema"
        else "",
        "towers": {name: _tower(sizes[name]) for name in ("image", "text")},
        "losses": Markup(
            ", ".join(
                f"{name.replace('_', ' ')} ({settings['weight']:g})"
                for name, settings in config["loss"].items()
                if settings["weight"] > 0
            )
        ),
        "start": {name: _start(start) for name, start in origin["start"].items()},
        "versions": _listed(origin["versions"]),
        "onnx_versions": _listed((onnx or {}).get("versions", {})),
        "knowledge_text": _knowledge(described["knowledge"]),
        "overrides": _overrides(contract, described["knowledge"]),
        "code": lambda text: Markup(f"`{text}`"),
        "plural": lambda count: "" if count == 1 else "s",
        **_of_data(origin, is_generated),
        "evaluated_short": _evaluated(scores, heads),
        "scored_on": _scored_on(scores, origin),
        "heads": heads,
        "worst": {head: _worst(zero_shot["worst"][head]) for head in heads},
        "hidden": sum(row["name"] is None for row in zero_shot.get("findings", ())),
        "ranks": _ranks((scores or {}).get("retrieval", {})),
    }


def _front_matter(described: Mapping[str, Any], is_generated: bool | None) -> dict[str, Any]:
    """What a hub reads; a field of which nothing is known is left out."""
    starts = [start for start in described["origin"]["start"].values() if start is not None]
    hub_ids = [start["name"] for start in starts if start["kind"] == "hub"]
    return {
        "library_name": "mlip-medical",  # "mlip" is another project's
        "pipeline_tag": "zero-shot-image-classification",
        **({"language": ["en"]} if is_generated else {}),
        "license": "other",
        "license_name": "not-stated",
        **({"base_model": hub_ids} if hub_ids else {}),
        "tags": [*TAGS, *(["onnx"] if "onnx" in described else [])],
    }


def _is_generated(origin: Mapping[str, Any], scores: Mapping[str, Any] | None) -> bool | None:
    """Whether training saw the project's generated studies alone; None where nothing tells."""
    if origin["is_generated"]:
        return True
    if scores is None or scores["fingerprints"]["manifest"] != origin["manifest"]:
        return None
    return bool(scores["data"]["is_phantom"])


def _unfinished(step: Any, config: Config, origin: Mapping[str, Any]) -> Markup:
    """How many steps were meant, where these are not the weights of the training's end."""
    planned = total_steps(config, origin["rows"] or 0)
    if type(step) is not int or step >= planned:
        return Markup("")
    if origin["is_best_on_val"]:
        watched = f"train.monitor={config.train.monitor}"
        return Markup(f" of {planned:,} planned: the best on val of its checkpoints ({watched})")
    return Markup(f" of {planned:,} planned: not trained to the end")


def _of_data(origin: Mapping[str, Any], is_generated: bool | None) -> dict[str, str]:
    kinds = {start["kind"] for start in origin["start"].values() if start is not None}
    earlier = ""
    if kinds - {"random"}:
        earlier = " What the first weights were trained on comes on top of it."
    if is_generated:
        short = "generated chest phantoms and generated reports: no patient, no radiograph"
        long = "Images and reports were generated by the project (docs/phantoms.md)."
        limit = (
            "Trained here on generated images alone: what it does on radiographs of patients is "
            "not known."
        )
    elif is_generated is False:
        short = "images and reports that nothing marks as generated: take them as patients'"
        long = "Nothing marks images and reports as generated by the project."
        limit = (
            "Trained on the rows of one manifest: hospitals, devices and people beyond it were not "
            "looked at."
        )
    else:
        short = "not recorded: take it as images and reports of patients"
        long = "Nothing in the run tells whether images and reports are of patients."
        limit = "What it was trained on is not recorded, so nobody can say whom it may serve."
    return {
        "data_short": Markup(short),
        "data_long": Markup(long + earlier),
        "limit_of_data": Markup(limit + earlier),
    }


def _evaluated(scores: Mapping[str, Any] | None, heads: list[str]) -> Markup:
    if scores is None:
        return Markup("not evaluated")
    data, kind = scores["data"], "generated " if scores["data"]["is_phantom"] else ""
    text = f"on {data['images']:,} {kind}images of {data['patients']:,} {kind}patients"
    # always this head: the best of several, chosen by these very scores, would flatter
    if "global" in heads:
        macro = _estimate(scores["zero_shot"]["macro"]["global"])
        text += f"; mean zero-shot AUROC of the global score {macro}, chance 0.5"
    return Markup(text)


def _scored_on(scores: Mapping[str, Any] | None, origin: Mapping[str, Any]) -> Markup:
    if scores is None:
        return Markup("")
    is_generated = scores["data"]["is_phantom"]
    kind = "generated studies" if is_generated else "images that nothing marks as generated"
    if scores["fingerprints"]["manifest"] != origin["manifest"]:
        return Markup(
            f"{kind}, of another manifest than that of the training; whether its patients were "
            "trained on is not known."
        )
    if scores["run"]["split"] == "train":
        return Markup(f"{kind}, **images that it was trained on: of others this says nothing**.")
    return Markup(f"{kind}, of the training's own manifest; no patient is in two splits of it.")


def _ranks(found: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    scores = {SCORES[head]: both for head, both in found.get("scores", {}).items()}
    if "oracle" in found:
        scores["Oracle that reads the truth"] = found["oracle"]
    return [(s, DIRECTIONS[way], row) for s, both in scores.items() for way, row in both.items()]


def _worst(estimate: Mapping[str, Any]) -> str:
    return "" if estimate["finding"] is None else f", {estimate['finding']}"


def _tower(sizes: Mapping[str, Any]) -> Markup:
    parts = [escaped(_KINDS.get(sizes["kind"], sizes["kind"]))]
    for key, name in _SHAPE.items():
        if key in sizes:
            value = sizes[key]
            shown = " and ".join(map(str, value)) if isinstance(value, list) else value
            parts.append(escaped(f"{name} {shown}"))
    return Markup("; ").join(parts)


def _start(start: Mapping[str, str] | None) -> str | Markup:
    if start is None:
        return _NOT_RECORDED
    if start["kind"] == "hub":
        return Markup("pre-trained, model id ") + escaped(start["name"])
    if start["kind"] == "folder":
        return Markup("pre-trained, from a folder named ") + escaped(start["name"])
    return "random"


def _knowledge(knowledge: Mapping[str, Any]) -> Markup:
    if knowledge["is_own"]:
        return Markup("the project's own lexicon (Apache-2.0), `concepts.jsonl` in this folder")
    text = "a table of other sources"
    if knowledge["is_licensed"]:
        text += ", some of it the UMLS's, for which every reader needs a licence"
    if knowledge["is_included"]:
        return Markup(f"{text}, `concepts.jsonl` in this folder: its licences go with it")
    return Markup(f"{text}, not in this folder; vectors made of its texts are among the weights")


def _overrides(contract: Mapping[str, Any], knowledge: Mapping[str, Any]) -> Markup:
    settings = [f"data.{key}={value}" for key, value in contract.items()]
    if not knowledge["is_included"]:
        settings.append("knowledge.lexicon=concepts.jsonl")
    return Markup(" ".join(settings))


def _listed(versions: Mapping[str, str]) -> str | Markup:
    parts = [escaped(f"{name} {version}") for name, version in versions.items()]
    return Markup(", ").join(parts) if parts else _NOT_RECORDED


def _count(value: Any) -> Markup:
    return _NOT_RECORDED if type(value) is not int else Markup(f"{value:,}")


def _number(value: float | None, digits: int = 3) -> Markup:
    return Markup("n/a") if value is None else Markup(f"{value:.{digits}f}")


def _estimate(found: Mapping[str, Any], digits: int = 3, form: str = "") -> Markup:
    form = form or f".{digits}f"
    if found["value"] is None:
        return Markup("n/a") + (Markup(": ") + escaped(found["reason"]) if found["reason"] else "")
    shown = Markup(f"{found['value']:{form}}")
    if found["low"] is None:
        return shown
    return shown + Markup(f" ({found['low']:{form}} to {found['high']:{form}})")
