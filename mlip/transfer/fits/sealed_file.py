"""Arrays with what they were made of, in one file that says whether it is whole.

safetensors checks neither a flipped bit nor what the arrays belong to: the file holds a hash of
all that it says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mlip.system.output_file import whole_file
from mlip.transfer.array import Array

_ENTRY = "fit"  # of a file's metadata; the name is from when fits alone were kept
# what a file that is damaged, or is none of ours, raises on its way through `read_sealed`
UNREADABLE = (
    *(OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError),
    RecursionError,  # of lists within lists
)


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """As they are once written and read: tuples are lists."""
    return dict(json.loads(json.dumps(values)))


def read_sealed(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """(facts, arrays by name)

    Raises:  FileNotFoundError; one of UNREADABLE where the file does not hold what was written
    """
    with safe_open(path, "np") as stored:
        facts = json.loads((stored.metadata() or {})[_ENTRY])
        arrays = {name: stored.get_tensor(name) for name in stored.keys()}
    if facts.pop("sha256") != _digest(facts, arrays):
        raise ValueError("the hash is another one")
    return facts, arrays


def write_sealed(path: Path, facts: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Write the file, whole or not at all, and to the disk; for its owner alone.

    facts    JSON values
    Raises:  OSError, SafetensorError
    """
    told = as_json(facts)
    held = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    entry = json.dumps({**told, "sha256": _digest(told, held)})
    # not save_file: it writes under a name of its own, which nobody would remove after a kill
    content = save(held, {_ENTRY: entry})
    with whole_file(path, is_private=True) as partial:
        partial.write_bytes(content)


def _digest(facts: Mapping[str, Any], arrays: Mapping[str, Array]) -> str:
    """SHA-256 (hex) over all that a file says."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, values in sorted(arrays.items()):
        digest.update(f"\n{name} {values.dtype} {values.shape}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
