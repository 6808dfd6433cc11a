"""The files beside the manifest of generated studies: meta.json, and truth.jsonl's errors.

What they hold is dataloading/phantom/dataset.py's; here is what a damaged one is told as.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlip.dataloading.manifest import Manifest
from mlip.dataloading.phantom import oracle as phantom_oracle
from mlip.dataloading.phantom.dataset import MARK
from mlip.dataloading.tables.table import ManifestError
from mlip.transfer.array import Array

_AGAIN = "restore it, or generate the studies again"


def phantom_size(manifest: Manifest) -> tuple[int, int] | None:
    """(height, width) of generated studies, whose meta.json lies beside the manifest; None of real
    ones.

    Raises:  ManifestError where it is damaged: such studies would be scored as real ones.
    """
    folder = Path(manifest.path).parent
    meta: Any = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if isinstance(meta, dict) and meta.get("kind") == MARK:
        settings = meta.get("settings")
        side = settings.get("image_px") if isinstance(settings, dict) else None
        if isinstance(side, int):
            return side, side
    elif not (folder / "truth.jsonl").is_file():
        return None  # none, or that of another program
    raise ManifestError(f"{folder / 'meta.json'}: is damaged or not that of the studies: {_AGAIN}")


@contextlib.contextmanager
def truth_of(manifest: Manifest) -> Iterator[Path]:
    """The folder of the studies, to read its truth.jsonl from.

    Raises:  ManifestError naming the file where that cannot be done.
    """
    folder = Path(manifest.path).parent
    try:
        yield folder
    except ManifestError:
        raise
    except OSError as error:
        raise ManifestError(
            f"{folder / 'truth.jsonl'}: cannot be read: {error.strerror}; {_AGAIN}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError(
            f"{folder / 'truth.jsonl'}: is damaged ({type(error).__name__}: {error}): {_AGAIN}"
        ) from None


def oracle(manifest: Manifest, rows: Array) -> Callable[[Array], Array]:
    """How well reports fit the truth of images of generated studies: [n, n] for n of `rows`.

    The function takes places in `rows`. Ties are broken at random (keyed by n): this reader cannot
    tell the studies apart, and the ceiling is what guessing among them reaches.
    """
    names = [Path(manifest.image_path(row)).stem for row in rows.tolist()]
    with truth_of(manifest) as folder:
        truths = phantom_oracle.read_truths(folder, names)

    def scores_of(members: Array) -> Array:
        scores = phantom_oracle.oracle_scores([truths[i] for i in members.tolist()])
        generator = np.random.default_rng(len(members))
        # where information differs it does by far more: this only decides ties
        return scores + 1e-7 * generator.random(scores.shape)

    return scores_of
