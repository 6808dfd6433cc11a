"""What an evaluation writes: results.json, and the scores of every image beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlip.output_file import whole_file
from mlip.transfer.measures.predictions import FILE, save_predictions

_NO_JSON = ("examples", "pictures", "predictions")  # pictures are the page's


def save_results(results: Mapping[str, Any], path: str | Path) -> Path:
    """The results as JSON and predictions.parquet beside it, each written whole or not at all.

    Neither is replaced before both can be written: they stay of one evaluation on a full disk too.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {key: value for key, value in results.items() if key not in _NO_JSON}
    with whole_file(path) as partial:
        _write_json(plain, partial)
        save_predictions(results.get("predictions"), path.with_name(FILE))
    return path


def save_json(values: Mapping[str, Any], path: Path) -> Path:
    """Plain values as JSON.  Raises:  ValueError for NaN, which JSON has not"""
    with whole_file(path) as partial:
        _write_json(values, partial)
    return path


def _write_json(values: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(values, indent=1, allow_nan=False), encoding="utf-8")
