"""What config.json of an export says beside its settings: origin, sizes, knowledge and scores.

It is handed on with the weights, so nothing in it names a place of a machine, a text of a report or
a patient. mlip/saved/model_card.py makes a page of it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlip.knowledge.concepts import ConceptTable
from mlip.knowledge.merging import LICENSED_SOURCES, open_part
from mlip.model import MLIPModel
from mlip.saved.export_folder import SETTINGS
from mlip.settings.config import Config
from mlip.training.checkpoint import STATE
from mlip.transfer.alignment.grounding import KINDS
from mlip.transfer.alignment.retrieval import CUTS, DIRECTIONS
from mlip.transfer.measures.interval import not_available
from mlip.transfer.measures.predictions import RESULTS
from mlip.transfer.measures.subgroups import FEWEST_PATIENTS, TOO_FEW
from mlip.transfer.summary import HEADS

logger = logging.getLogger("mlip")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_SHAPE = ("hidden_sizes", "depths", "layer_type", "patch_size", "num_hidden_layers", "hidden_size")
_RECALLS = tuple(f"recall@{k}" for k in CUTS)
_RANKS = (*_RECALLS, "median_rank")
_ORIGIN: dict[str, type] = {
    **dict.fromkeys(("commit", "manifest", "precision"), str),
    **dict.fromkeys(("world_size", "rows", "manifest_rows"), int),
    **{"versions": dict, "is_generated": bool, "is_best_on_val": bool, "start": dict},
}
_FAULTS = (ArithmeticError, AttributeError, KeyError, TypeError, ValueError)


def origin_of(
    state: Mapping[str, Any], config: Config, *, is_best: bool | None = None
) -> dict[str, Any]:
    """What a checkpoint's state.json tells of its training; None for what it does not know.

    is_best  whether val chose it (train.monitor), which later checkpoints know
    Returns: "is_generated" is true only where train.py has made the studies of data.phantom itself;
             "rows" are those that training visits, "manifest" its SHA-256; "precision" is what
             train.precision came to where it was trained
    """
    loader = state.get("loader") or {}
    order, ledger = loader.get("order") or {}, loader.get("ledger") or {}
    made = config.data.phantom.studies > 0 and Path(config.data.manifest).name == "manifest.csv"
    return {
        "commit": state.get("commit"),
        "versions": state.get("versions") or {},
        "world_size": state.get("world_size"),
        "precision": state.get("precision"),
        "manifest": order.get("manifest_sha256"),
        "rows": order.get("rows"),
        "manifest_rows": ledger.get("rows"),
        "is_generated": made or None,
        "is_best_on_val": is_best,
        # a folder that is gone could be a name on the Hub
        "start": state.get("start") or start_of(config),
    }


def kept_origin(origin: Any, config: Config) -> dict[str, Any]:
    """An origin with every entry of its kind, None for what is not known or of another kind.

    config  the settings of the model; a tower's source goes before what `origin` says of it
    """
    origin = origin if isinstance(origin, Mapping) else {}
    kept: dict[str, Any] = {
        key: v if type(v := origin.get(key)) is kind else None for key, kind in _ORIGIN.items()
    }
    if kept["precision"] not in ("fp32", "bf16"):  # words of a file: the card shows no others
        kept["precision"] = None
    versions = kept["versions"] or {}
    kept["versions"] = {str(name): str(version) for name, version in versions.items()}
    started = kept["start"] or {}
    kept["start"] = {tower: _kept_start(started.get(tower)) for tower in ("image", "text")}
    named = start_of(config).items()
    kept["start"] |= {tower: start for tower, start in named if start["kind"] != "random"}
    return kept


def _kept_start(found: Any) -> dict[str, str] | None:
    if found == {"kind": "random"}:
        return {"kind": "random"}
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    if found.get("kind") == "hub" and _HUB_ID.fullmatch(found["name"]):
        return {"kind": "hub", "name": found["name"]}
    return {"kind": "folder", "name": Path(found["name"]).name}


def start_of(config: Config) -> dict[str, dict[str, str]]:
    """Where each tower's first weights came from; of a folder its last name alone."""
    if config.train.start is not None:  # a place, and no name on the Hub when it is gone
        start = {"kind": "folder", "name": Path(config.train.start).name}
        return {tower: dict(start) for tower in ("image", "text")}
    towers = {"image": config.model.vision.source, "text": config.model.text.source}
    return {tower: _start(source) for tower, source in towers.items()}


def _start(source: str | None) -> dict[str, str]:
    if source is None:
        return {"kind": "random"}
    if not os.path.isdir(source) and _HUB_ID.fullmatch(source):
        return {"kind": "hub", "name": source}
    return {"kind": "folder", "name": Path(source).name}


def sizes_of(model: MLIPModel) -> dict[str, Any]:
    """Shapes of both towers and numbers of parameters."""
    found: dict[str, Any] = {"parameters": _parameters(model)}
    towers: dict[str, Any] = {"image": model.vision.tower.backbone, "text": model.text.backbone}
    for name, tower in towers.items():
        shape = {k: v for k in _SHAPE if (v := getattr(tower.config, k, None)) is not None}
        if "depths" in shape:  # stages behind the one that gives the patches are cut off
            kept = len(tower.encoder.stages)
            shape |= {k: list(shape[k])[:kept] for k in ("hidden_sizes", "depths")}
        found[name] = {"kind": str(tower.config.model_type), **shape}
    found["image"]["parameters"] = _parameters(model.vision)
    found["text"]["parameters"] = _parameters(model.text)
    return found


def _parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def knowledge_of(table: ConceptTable, *, is_own: bool, is_included: bool) -> dict[str, Any]:
    """The concept table in numbers, and whose it is; no name of another's concept.

    is_own       it is the project's own lexicon
    is_included  it lies in the folder
    """
    licensed = table.provenance.get("licensed") or any(c.source in LICENSED_SOURCES for c in table)
    return {
        "concepts": len(table),
        "is_own": is_own,
        "is_included": is_included,
        "is_licensed": bool(licensed),
        "has_own_cues": table.cues is not None,
    }


def results_beside(checkpoint: str | Path) -> Any:
    """results.json of a checkpoint's run, or the scores that an export holds; None without any.

    One that cannot be read costs the scores of the card, not the export, and is warned of.
    """
    folder = Path(checkpoint)
    if (folder / STATE).is_file():
        # the folder of checkpoints may be a link to another disk
        runs = (folder.absolute().parents[1], folder.resolve().parents[1])
        places = [run / RESULTS for run in runs]
    else:
        places = [folder / SETTINGS]
    for path in places:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("%s: cannot be read, the card goes without scores: %s", path, error)
            return None
        return found if path.name == RESULTS else found.get("evaluation")
    return None


def scores_of(results: Any, weights: str, table: ConceptTable) -> dict[str, Any] | None:
    """The part of an evaluation that a card shows, in the form of results.json; None if it is of
    other weights.

    weights  mlip.transfer.fingerprint.hash_of_weights of the model that is described
    Names of findings and groups stay only where they cannot be of one patient alone.
    """
    try:
        if results is None:
            return None
        if results["fingerprints"]["weights"] != weights:
            logger.warning(
                "results.json is of other weights, so the card says that these were not evaluated; "
                "evaluate them (evaluate.weights, the newest checkpoint), then export again"
            )
            return None
        return _scores(results, _public_names(table))
    except _FAULTS as error:
        logger.warning(
            "results.json: is not that of an evaluation, the card goes without scores: %s",
            type(error).__name__,  # its text may be a cell's
        )
        return None


def _scores(results: Mapping[str, Any], public: frozenset[str]) -> dict[str, Any]:
    run, data = results["run"], results["data"]
    kept = {
        "run": {key: run.get(key) for key in ("split", "seed", "commit")},
        "data": {k: int(data[k]) for k in ("rows_asked", "images", "reports", "patients")},
        "fingerprints": {k: str(results["fingerprints"][k]) for k in ("weights", "manifest")},
        "retrieval": _retrieval(results["retrieval"]),
        "grounding": _grounding(results["grounding"]),
    }
    if run.get("is_local_trained") is False:
        kept["run"]["is_local_trained"] = False
    kept["data"]["is_phantom"] = bool(data["is_phantom"])
    if (seen := data.get("trained_on") or {}).get("manifests"):
        told = ("films", "patients", "films_by_picture", "patients_by_picture")
        kept["data"]["trained_on"] = {k: int(seen[k]) for k in told if k in seen}
    if "rows_in_split" in data:  # not in results of earlier versions
        kept["data"]["rows_in_split"] = int(data["rows_in_split"])
    evaluate = results["config"]["evaluate"]
    kept["config"] = {
        "evaluate": {
            "bootstrap": int(evaluate["bootstrap"]),
            "subset": None if evaluate.get("subset") is None else "set",  # a name of the user's
        }
    }
    # all images of one patient, where every other one has a single image
    most_of_one = kept["data"]["images"] - kept["data"]["patients"] + 1

    def may_be_named(row: Mapping[str, Any]) -> bool:
        is_public = kept["data"]["is_phantom"] or str(row["name"]).lower() in public
        return row["name"] is not None and (is_public or int(row["positives"]) > most_of_one)

    kept["zero_shot"] = _zero_shot(results["zero_shot"], may_be_named)
    return kept


def _public_names(table: ConceptTable) -> frozenset[str]:
    """Names that a label may have without telling of a patient: those of concepts."""
    forms = {form for concept in open_part(table) for form in concept.surface_forms}
    chexpert = {n.lower() for concept in table for n in concept.mappings.get("chexpert", ())}
    return frozenset(forms | chexpert)


def _zero_shot(found: Mapping[str, Any], may_be_named: Any) -> dict[str, Any]:
    if "reason" in found:
        return {"reason": str(found["reason"])}
    heads = [head for head in HEADS if head in found["macro"]]
    names = {row["finding"]: row["name"] for row in found["findings"] if may_be_named(row)}
    kept = {
        "findings": [
            {
                "finding": names.get(row["finding"]),
                "name": names.get(row["finding"]),
                "positives": int(row["positives"]),
                "n": int(row["n"]),
                **_estimates(row, heads),
            }
            for row in found["findings"]
        ],
        "macro": _estimates(found["macro"], heads),
        "worst": {
            head: {**_estimate(found["worst"][head]), "finding": names.get(name)}
            for head, name in ((head, found["worst"][head]["finding"]) for head in heads)
        },
    }
    if found.get("subgroups"):
        kept["subgroups"] = [_subgroup(column, heads) for column in found["subgroups"]]
    return kept


def _subgroup(found: Mapping[str, Any], heads: list[str]) -> dict[str, Any]:
    groups = [
        {
            "name": str(group["name"]),
            **{key: int(group[key]) for key in ("images", "patients")},
            "macro": {head: _mean(group["macro"].get(head)) for head in heads},
            "difference": {head: _mean(group["difference"].get(head)) for head in heads},
        }
        for group in found["groups"]
        if int(group["patients"]) >= FEWEST_PATIENTS
    ]
    small = {key: int(found["small_groups"][key]) for key in ("groups", "images", "patients")}
    stated = {"column": str(found["column"]), "not_stated": int(found["not_stated"])}
    return {**stated, "groups": groups, "small_groups": small}


def _mean(found: Mapping[str, Any] | None) -> dict[str, Any]:
    """An estimate over as many findings as it says; no rows gave one where there is none."""
    told: Mapping[str, Any] = found or not_available(TOO_FEW)
    counted = {key: int(told[key]) for key in ("classes", "classes_asked") if key in told}
    return {**_estimate(told), **counted}


def _retrieval(found: Mapping[str, Any]) -> dict[str, Any]:
    if not found.get("scores"):
        return {"scores": {}}
    scores = {head: found["scores"][head] for head in HEADS if head in found["scores"]}
    kept = {
        "pool": int(found["pool"]),
        "n": int(found["n"]),
        "chance": {k: _number(found["chance"][k]) for k in _RECALLS},
        "scores": {head: _directions(both) for head, both in scores.items()},
    }
    if found.get("oracle"):
        kept["oracle"] = _directions(found["oracle"])
    return kept


def _directions(both: Mapping[str, Any]) -> dict[str, Any]:
    return {way: _estimates(both[way], _RANKS) for way in DIRECTIONS if way in both}


def _grounding(found: Mapping[str, Any]) -> dict[str, Any]:
    if "reason" in found:
        return {"reason": str(found["reason"])}
    plain = ("area", "prior", "prior_with_side")
    return {
        kind: {
            "all": {
                "n": int(found[kind]["all"]["n"]),
                **{k: _number(found[kind]["all"][k]) for k in plain},
                **_estimates(found[kind]["all"], ("hit", "swapped", "over_swapped")),
            },
            "num_findings": int(found[kind]["num_findings"]),
        }
        for kind in KINDS
        if kind in found
    }


def _estimates(found: Mapping[str, Any], keys: Any) -> dict[str, Any]:
    return {key: _estimate(found[key]) for key in keys}


def _estimate(found: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {key: _number(found[key]) for key in ("value", "low", "high")}
    if (numbers["low"] is None) != (numbers["high"] is None):
        raise ValueError("expected both ends of an interval, or none")
    reason = found["reason"]
    return {**numbers, "n": int(found["n"]), "reason": None if reason is None else str(reason)}


def _number(value: Any) -> float | None:
    if value is not None and not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value}")
    return None if value is None else float(value)
