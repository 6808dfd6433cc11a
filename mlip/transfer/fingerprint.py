"""What numbers depend on, as hashes and versions: kept in every results file."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mlip.dataloading.manifest import Manifest
from mlip.dataloading.splits import SPLITS
from mlip.settings.config import Config, ConfigError, Run, to_dict
from mlip.system.packages import version_of
from mlip.transfer.array import Array
from mlip.transfer.draws import splits_hash

PACKAGES = ("torch", "numpy", "transformers", "scikit-learn", "deepspeed", "nvidia-dali-cuda130")


def preprocessing(config: Config) -> dict[str, Any]:
    """Everything that decides which pixels and tokens a model sees at inference."""
    data = config.data
    return {
        "resize_px": data.resize_px,
        "crop_px": data.crop_px,
        "channels": data.channels,
        "mean": data.mean,
        "std": data.std,
        "max_tokens": data.max_tokens,
        "max_entities": data.max_entities,
        "sections": data.sections,
    }


def image_preprocessing(config: Config) -> dict[str, Any]:
    """The part of `preprocessing` that decides pixels: all that a task without text depends on."""
    return {
        key: value
        for key, value in preprocessing(config).items()
        if key in ("resize_px", "crop_px", "channels", "mean", "std")
    }


def run_name(config: Config) -> str:
    """What results and pages call an evaluation: its run folder, or the checkpoint where none is
    named."""
    named, checkpoint = config.run.dir, config.evaluate.checkpoint
    return Path(checkpoint if checkpoint and named == Run().dir else named).name


def hash_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_of_parts(parts: Iterable[bytes]) -> str:
    """SHA-256 (hex) over bytes and where each part ends."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def hash_of_weights(model: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of every parameter and buffer that is saved."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def hash_of_shapes(model: torch.nn.Module) -> str:
    """SHA-256 over names and shapes of every parameter and buffer that is saved."""
    return hash_of([[name, *tensor.shape] for name, tensor in sorted(model.state_dict().items())])


def made_with(opened: Any) -> dict[str, str]:
    """What embeddings depend on of an open model: weights, and how pixels and words reach it."""
    return {
        "weights": hash_of_weights(opened.model),
        "preprocessing": hash_of(preprocessing(opened.config)),
    }


def hash_of_source(*below: str) -> str:
    """SHA-256 over this installation's own modules: no commit tells of changes in a checkout.

    below  folders of it, whose modules alone are meant; none = all
    """
    digest = hashlib.sha256()
    top = Path(__file__).resolve().parents[1]
    # kernels and dataloading are links in a checkout
    folders = sorted(found for b in below or ("",) for found in os.walk(top / b, followlinks=True))
    for path in (Path(folder, name) for folder, _, names in folders for name in sorted(names)):
        if path.suffix == ".py":
            digest.update(f"{path.relative_to(top)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def hash_of_vocabulary(tokenizer: Any) -> str:
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    return hash_of(sorted(vocabulary.items(), key=lambda item: item[1]))


def fingerprints(
    model: torch.nn.Module,
    config: Config,
    manifest: Manifest,
    tokenizer: Any,
    table: Any,
    rows: Array,
) -> dict[str, str]:
    """SHA-256 of all that an evaluation without training depends on.

    rows     the rows that were scored
    Returns: "splits" as a trained task has it (images of train, val and test, whether scored or
             not); "rows" of the scored images alone: equal = the same patients, so comparable
    """
    of_split = {name: manifest.rows(name, with_report=False) for name in SPLITS}
    return {
        "weights": hash_of_weights(model),
        "splits": splits_hash(manifest, of_split),
        "rows": hash_of(sorted(manifest.image_path(row) for row in rows.tolist())),
        "settings": hash_of(to_dict(config)),
        "manifest": manifest.fingerprint,
        "preprocessing": hash_of(preprocessing(config)),
        "vocabulary": hash_of_vocabulary(tokenizer),
        "concept_table": table.fingerprint,
    }


def versions() -> dict[str, str]:
    """Of Python and those of PACKAGES that are here, and "machine": system and processor kind."""
    found = {"python": platform.python_version()}
    found |= {name: version for name in PACKAGES if (version := version_of(name)) is not None}
    found["machine"] = f"{platform.system()} {platform.machine()}"
    return found


def source_commit() -> str | None:
    """Commit of the checkout this file lies in, '+' = with changes; None where there is none.

    MLIP_COMMIT tells that of a copy without history, such as an image's, as to the benchmarks.
    Raises:  ConfigError where it is no commit.
    """
    if told := os.environ.get("MLIP_COMMIT"):
        if not re.fullmatch(r"[0-9a-f]{7,40}\+?", told):
            raise ConfigError(
                "MLIP_COMMIT: expected 7 to 40 hexadecimal digits of a commit ('+' behind them = "
                f"with changes), got {told!r}; set it to them, or unset it"
            )
        return told
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            # a status takes the index's lock otherwise, which stays behind when a run is killed
            ["git", "--no-optional-locks", "-C", str(root), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # a file's name may be of any encoding
            timeout=20,
            check=True,
        ).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
