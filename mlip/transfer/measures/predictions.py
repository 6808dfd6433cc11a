"""Scores of every scored image beside results.json, for `mlip compare` and statistics of one's own.

predictions.parquet, a line an image, finding and fit:
  row_index  of the manifest, from 0
  patient    the first row of the manifest that is of the same patient
  method     head of zero-shot and retrieval, kind of the pointing phrases, or share of the labels
             that a fit had ("10 %")
  seed       of the fit; null of zero-shot
  finding    name; of retrieval its direction and how many candidates there were
  measure    what makes one score of the lines (MEASURES)
  truth      1, 0, or null where nothing is known, or the score is no answer but a mark itself
  score      high = there; of all measures but "auroc" the image's own mark
No image, report or identifier is in it; joined with the manifest it is as much as the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from mlip.dataloading.manifest import Manifest
from mlip.settings.config import Config
from mlip.system.output_file import file_sha256
from mlip.transfer.array import Array
from mlip.transfer.fingerprint import run_name

FILE = "predictions.parquet"
RESULTS = "results.json"  # beside it
FINGERPRINT = "predictions"  # in whose fingerprints the file's SHA-256 stands; None = no file
# what joins the lines of a finding: AUROC of score against truth, else the mean of the scores
MEASURES = (
    *("auroc", "accuracy", "dice", "dice_positive"),
    *("recall@1", "recall@5", "recall@10", "hit", "miou"),
)
UNKNOWN = -1
# takes a method, what was asked, a measure, places [n] of what was asked, and marks [n] in [0, 1]
KeepMarks = Callable[[str, str, str, Array, Array], None]
_FORMAT = 1
_TYPES = {
    "row_index": pa.int32(),
    "patient": pa.int32(),
    "method": pa.dictionary(pa.int32(), pa.string()),
    "seed": pa.int64(),
    "finding": pa.dictionary(pa.int32(), pa.string()),
    "measure": pa.dictionary(pa.int32(), pa.string()),
    "truth": pa.int8(),
    "score": pa.float64(),
}


class PredictionsError(ValueError):
    """A file of predictions that cannot be read or compared; says what to do."""

    exit_code = 4


@dataclass(frozen=True)
class Series:
    """What one fit, or one head, gives of one finding for some images.

    Shapes:  rows [n] of the manifest; truth [n] int8 of 1, 0, UNKNOWN; scores [n] float64
    """

    method: str
    seed: int | None
    finding: str
    measure: str
    rows: Array
    truth: Array
    scores: Array

    @property
    def key(self) -> tuple[str, str]:
        return self.finding, self.measure


@dataclass(frozen=True)
class Predictions:
    """All series of one evaluation.

    patients  row -> first row of the manifest that is of the same patient: no identifier, and the
              same in every evaluation on the manifest
    facts     name, split, manifest: what the evaluation was of; precision: what it was computed in
              (not in files of earlier versions)
    """

    series: Sequence[Series]
    patients: Mapping[int, int]
    facts: Mapping[str, Any]

    def named(self, name: str) -> Predictions:
        """The same, called by another name than the run's."""
        return replace(self, facts={**self.facts, "name": name})


def of_findings(
    method: str,
    seed: int | None,
    findings: Sequence[str],
    rows: Array,
    truth: Array,
    scores: Array,
) -> list[Series]:
    """A series a finding.  Shapes:  rows [n]; truth, scores [n, findings]"""
    return [
        Series(method, seed, name, "auroc", rows, truth[:, f], scores[:, f].astype(np.float64))
        for f, name in enumerate(findings)
    ]


def of_marks(
    method: str, seed: int | None, finding: str, measure: str, rows: Array, marks: Array
) -> Series:
    """A series of images' own marks, as their Dice.  Shapes:  rows, marks [n]"""
    unknown = np.full(len(rows), UNKNOWN, dtype=np.int8)
    return Series(method, seed, finding, measure, rows, unknown, marks.astype(np.float64))


def predictions_of(
    series: Sequence[Series],
    config: Config,
    manifest: Manifest,
    split: str,
    rows: Array,
    *,
    precision: str,
) -> Predictions | None:
    """The series of an evaluation of these rows of a split; None where there is none.

    precision  "fp32" or "bf16", what the scores were computed in
    """
    if not series:
        return None
    _, first, patient = np.unique(manifest.patient_key, return_index=True, return_inverse=True)
    facts = {
        "name": run_name(config),
        "split": split,
        "manifest": manifest.fingerprint,
        "precision": precision,
    }
    patients = dict(zip(rows.tolist(), first[patient[rows]].tolist(), strict=True))
    return Predictions(series, patients, facts)


def save_predictions(predictions: Predictions, path: Path) -> None:
    """Write the file, for its owner alone (results_file.py puts it in its place)."""
    series = predictions.series
    lengths = [len(s.rows) for s in series]
    rows = np.concatenate([s.rows for s in series])
    truth = np.concatenate([s.truth for s in series])
    own, place = np.unique(rows, return_inverse=True)
    number = np.array([predictions.patients[row] for row in own.tolist()], dtype=np.int32)

    def named(values: Sequence[str]) -> pa.Array:
        names, codes = np.unique(np.array(values, dtype=object), return_inverse=True)
        at = pa.array(np.repeat(codes, lengths).astype(np.int32))
        return pa.DictionaryArray.from_arrays(at, pa.array(names.tolist(), pa.string()))

    seeds = np.repeat([-1 if s.seed is None else s.seed for s in series], lengths)
    has_seed = np.repeat([s.seed is not None for s in series], lengths)
    columns = {
        "row_index": pa.array(rows.astype(np.int32)),
        "patient": pa.array(number[place]),
        "method": named([s.method for s in series]),
        "seed": pa.array(seeds.astype(np.int64), mask=~has_seed),
        "finding": named([s.finding for s in series]),
        "measure": named([s.measure for s in series]),
        "truth": pa.array(truth.astype(np.int8), mask=truth == UNKNOWN),
        "score": pa.array(np.concatenate([s.scores for s in series])),
    }
    facts = json.dumps({"format": _FORMAT, **predictions.facts})
    schema = pa.schema(list(_TYPES.items()), metadata={"mlip": facts})
    path.touch(mode=0o600)
    pa.parquet.write_table(pa.table(columns, schema=schema), path, compression="zstd")


def _require_own_results(path: Path) -> None:
    """Two files are renamed one after the other: a kill between leaves them of two evaluations.

    A copy under another name is of whatever evaluation it was taken from.
    """
    results = path.with_name(RESULTS)
    if path.name != FILE:
        return
    try:
        told = json.loads(results.read_text(encoding="utf-8"))["fingerprints"][FINGERPRINT]
        own = file_sha256(path)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # no results of an evaluation, those of an earlier version, or nothing to compare
    if told != own:
        raise PredictionsError(
            f"{path}: is not of the evaluation of {results}, which tells of another file, or of "
            "none: one of the two was replaced alone, as by a kill at the end of `mlip evaluate`; "
            "evaluate again"
        )


def file_of(path: Path) -> Path:
    """The file of predictions that a folder of results, or the file itself, stands for."""
    return path / FILE if path.is_dir() else path


def _read_table(path: Path) -> tuple[pa.Table, dict[str, str]]:
    """(the lines in _TYPES without gaps, what the evaluation was of)

    Raises:  PredictionsError where the file cannot be read, or is another one
    """
    expected = "expected predictions.parquet of `mlip evaluate`, or its folder"
    try:
        table = pa.parquet.read_table(path)
        facts = dict(json.loads((table.schema.metadata or {})[b"mlip"]))
        is_known = facts.pop("format") == _FORMAT and table.schema.names == list(_TYPES)
        if is_known:  # of other types, or with gaps, it would break what compares it
            table = table.cast(pa.schema(list(_TYPES.items())))
            gaps = (table[name].null_count for name in _TYPES if name not in ("seed", "truth"))
            if any(gaps) or not all(isinstance(fact, str) for fact in facts.values()):
                raise ValueError
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError)  # Arrow's has no text of its own
        reason = "there is none" if is_missing else error.strerror or "damaged"
        raise PredictionsError(
            f"{path}: cannot be read: {reason}; {expected} (earlier versions wrote none: evaluate "
            "again)"
        ) from error
    except (pa.ArrowException, KeyError, ValueError, TypeError, RecursionError) as error:
        raise PredictionsError(f"{path}: is no file of predictions: {expected}") from error
    if not is_known:
        raise PredictionsError(f"{path}: is of another version: evaluate again")
    return table, facts


def load_predictions(path: Path) -> Predictions:
    """What save_predictions wrote: a file, or the folder that it lies in.

    Raises:  PredictionsError naming the file; also where the results.json beside
             predictions.parquet is of another evaluation
    """
    path = file_of(path)
    _require_own_results(path)
    table, facts = _read_table(path)
    rows, patient = (table[name].to_numpy() for name in ("row_index", "patient"))
    truth = table["truth"].fill_null(UNKNOWN).to_numpy().astype(np.int8)
    scores = table["score"].to_numpy()
    if len(rows) == 0 or not np.isfinite(scores).all():
        raise PredictionsError(f"{path}: holds no scores, or some that are no numbers")
    keys = ["method", "seed", "finding", "measure"]
    plain = table.select(keys).append_column("place", pa.array(np.arange(len(rows))))
    groups = plain.group_by(keys, use_threads=False).aggregate([("place", "list")])
    series = []
    for group in groups.to_pylist():
        at = np.array(group["place_list"])
        method, seed, finding, measure = (group[key] for key in keys)
        series.append(Series(method, seed, finding, measure, rows[at], truth[at], scores[at]))
    if other := sorted({s.measure for s in series} - set(MEASURES)):
        raise PredictionsError(
            f"{path}: measure {other[0]!r}: expected one of {', '.join(MEASURES)}: evaluate again"
        )
    own, first = np.unique(rows, return_index=True)
    return Predictions(series, dict(zip(own.tolist(), patient[first].tolist(), strict=True)), facts)
