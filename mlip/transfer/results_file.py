"""What an evaluation writes: results.json, and the scores of every image beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlip.system.output_file import file_sha256, whole_file
from mlip.transfer.measures.predictions import FILE, FINGERPRINT, RESULTS, save_predictions

PAGE = "report.html"
_NO_JSON = ("examples", "pictures", "predictions")  # pictures are the page's


def save_results(results: Mapping[str, Any], folder: Path) -> Path:
    """results.json and predictions.parquet of the folder, each written whole or not at all.

    Neither is replaced before both are written: they stay of one evaluation on a full disk too. The
    results hold the SHA-256 of the predictions, so that a kill between the two is found out. The
    page of the results before goes with them: a kill leaves none, never that of other numbers.
    Returns: the path of results.json
    """
    path, beside, page = (folder / name for name in (RESULTS, FILE, PAGE))
    folder.mkdir(parents=True, exist_ok=True)
    plain = {key: value for key, value in results.items() if key not in _NO_JSON}
    predictions = results.get("predictions")
    with whole_file(path) as partial:
        if predictions is None:
            _write_json(_with_hash(plain, None), partial)
            page.unlink(missing_ok=True)
            beside.unlink(missing_ok=True)
        else:
            with whole_file(beside, is_private=True) as rows:
                save_predictions(predictions, rows)
                _write_json(_with_hash(plain, file_sha256(rows)), partial)
                page.unlink(missing_ok=True)
    return path


def _with_hash(plain: Mapping[str, Any], digest: str | None) -> dict[str, Any]:
    return {**plain, "fingerprints": {**plain.get("fingerprints", {}), FINGERPRINT: digest}}


def save_json(
    values: Mapping[str, Any], path: Path, *, require_own: Callable[[Path], None] | None = None
) -> Path:
    """Plain values as JSON; require_own as of whole_file.

    Raises:  ValueError for NaN, which JSON has not
    """
    with whole_file(path, require_own=require_own) as partial:
        _write_json(values, partial)
    return path


def _write_json(values: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(values, indent=1, allow_nan=False), encoding="utf-8")
