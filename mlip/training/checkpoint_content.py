"""What the files of a checkpoint may hold: hashes tell of damage, not of what wrote them.

Where they lie and how they are written is checkpoint.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mlip.ranks import distributed
from mlip.settings.bounds import BOUNDS, FROM_0
from mlip.training.lifecycle import CheckpointError

# facts of a run that a resumed one must share: they are content, which no setting shows
_IDENTITY = ("concept_table", "tokenizer")
# entries of state.json -> their kinds; a state has the needed ones at least
_NEEDED: dict[str, type] = {"step": int, "config": dict, "optimizer_steps": int}
_COUNTS = ("world_size", "threads", "skipped_steps", "skipped_in_a_row", "ema_updates")
_KINDS: dict[str, type] = {
    **_NEEDED,
    **dict.fromkeys(_COUNTS, int),
    **dict.fromkeys(("tokenizer", "concept_table"), str),  # hashes
    **{"loader": dict, "rng": list, "validation": dict, "towers": dict, "start": dict},
}
_MAY_BE_NULL = ("ema_updates", "tokenizer", "concept_table")  # no average, no hash was kept


def refuse_constant(name: str) -> float:
    """For json.loads: NaN and Infinity are no JSON, and the next save would fail of them."""
    raise ValueError(f"state.json holds {name}")


def require_state(state: Mapping[str, Any]) -> None:
    """Whether state.json is one that a save writes, as far as a resume takes from it.

    Raises:  KeyError, TypeError for an entry that is missing or of another kind, a count below 0,
             more threads than torch takes, or a loader at another step than the weights.
    """
    for name, kind in _KINDS.items():
        value = state[name] if name in _NEEDED else state.get(name)
        if name not in state or (name in _MAY_BE_NULL and value is None):
            continue
        allowed = BOUNDS["run.threads"] if name == "threads" else FROM_0
        is_outside = isinstance(value, int) and not allowed.holds(value)
        if type(value) is not kind or is_outside:
            expected = f"a whole number of {allowed}" if kind is int else kind.__name__
            raise TypeError(f"{name}: expected {expected}, got {value!r:.40}")
    saved = len(state.get("rng", ()))
    if "rng" in state and saved != state.get("world_size", max(1, saved)):
        raise TypeError(f"rng: expected an entry for each rank, got {saved}")
    step, of_loader = state["step"], state.get("loader", {}).get("step")
    if of_loader not in (None, step):
        raise TypeError(f"loader.step: expected {step}, the state's step, got {of_loader!r:.40}")


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity; both pass through least and largest.

    One pass over memory, a 17th of the time of isfinite and all.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    least, largest = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(least) & torch.isfinite(largest))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU.

    Raises:  ValueError for what no save writes: training on from it would break steps later.
    """
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if path.stem != "buffers" and tensor.dtype != torch.float32:
            raise ValueError(f"{path.name}: {name}: expected torch.float32, got {tensor.dtype}")
        if not is_finite(tensor):
            raise ValueError(f"{path.name}: {name} holds a number that is not finite")
    return tensors


def require_shapes(own: Mapping[str, torch.Size], saved: Mapping[str, Tensor]) -> None:
    """Raises:  ValueError naming the first tensor of another shape, which no resume can use."""
    for name, shape in own.items():
        found = list(saved[name].shape) if name in saved else "none"
        if found != list(shape):
            raise ValueError(
                f"{name}: expected {list(shape)} from the settings, the checkpoint has {found}; "
                "restore the settings or choose another run.dir"
            )


def require_same_identity(
    folder: Path, state: Mapping[str, Any], facts: Mapping[str, Any], *, allow_mismatch: bool
) -> None:
    """Raises:  CheckpointError where vocabulary or concepts are not those of the checkpoint."""
    different = [
        f"{key} (saved {state[key][:12]}, now {facts[key][:12]})"
        for key in _IDENTITY
        if key in state and key in facts and state[key] != facts[key]
    ]
    if not different:
        return
    text = f"{folder} was trained with other content: {', '.join(different)}"
    if not allow_mismatch:
        raise CheckpointError(
            f"{text}; restore it (docs/reliability.md, Another version), choose another "
            "run.dir, or pass --allow-mismatch"
        )
    distributed.log_once(f"resuming although {text}", logging.WARNING)
