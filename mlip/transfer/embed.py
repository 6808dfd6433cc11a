"""`mlip embed`: embeddings of a split in parts of safetensors; run again to go on.

<out>/index.json            what the parts depend on, and their rows
<out>/part-00000.safetensors  row_index, image, report, has_report, knowledge, has_knowledge,
                              and patches where asked for
Rows are numbers of manifest rows: the join to files and patients stays in the manifest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mlip.config import Config
from mlip.dataloading.loader import build_loader
from mlip.dataloading.manifest import Manifest
from mlip.transfer.features import encode_images, encode_texts, join_images, join_texts
from mlip.transfer.fingerprint import hash_of, hash_of_weights, preprocessing
from mlip.transfer.interval import Array

PART_ROWS = 2048


class EmbedError(ValueError):
    """A folder of embeddings that cannot be continued."""

    exit_code = 4


def write_embeddings(
    opened: Any,
    config: Config,
    manifest: Manifest,
    out: Path,
    *,
    split: str,
    with_patches: bool,
    device: str,
    part_rows: int = PART_ROWS,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Rows embedded in all; parts that are there and intact are kept.

    Raises:  EmbedError if `out` holds embeddings of another model, data or choice.
    """
    rows = manifest.rows(split, with_report=False)
    out.mkdir(parents=True, exist_ok=True)
    index = {
        "weights": hash_of_weights(opened.model),
        "manifest": manifest.fingerprint,
        "preprocessing": hash_of(preprocessing(config)),
        "split": split,
        "rows": len(rows),
        "part_rows": part_rows,
        "with_patches": with_patches,
        "embed_dim": config.model.embed_dim,
    }
    _check_index(out / "index.json", index)
    parts = [rows[i : i + part_rows] for i in range(0, len(rows), part_rows)]
    written = 0
    for number, chosen in enumerate(parts):
        path = out / f"part-{number:05d}.safetensors"
        count = _rows_of(path)
        if count is None:
            tensors = _encode(
                opened, config, manifest, chosen, split, with_patches, torch.device(device)
            )
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            save_file(tensors, partial)
            partial.replace(path)
            count = len(tensors["row_index"])
            say(f"part {number + 1} of {len(parts)}: {count} rows")
        written += count
    return written


def _check_index(path: Path, index: dict[str, Any]) -> None:
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        different = sorted(k for k in index if old.get(k) != index[k])
        if different:
            raise EmbedError(
                f"{path.parent} holds embeddings that differ in {', '.join(different)}: name "
                "another folder, or delete this one"
            )
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _rows_of(path: Path) -> int | None:
    """Rows of a finished part; None where it is missing or cut off."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as part:
            return int(part.get_slice("row_index").get_shape()[0])
    except (OSError, SafetensorError):
        return None


@torch.no_grad()
def _encode(
    opened: Any,
    config: Config,
    manifest: Manifest,
    rows: Array,
    split: str,
    with_patches: bool,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    loader = build_loader(
        config,
        manifest,
        split=split,
        train=False,
        tokenizer=opened.tokenizer,
        linker=opened.linker,
        table=opened.table,
        with_report=False,
        rows=rows,
        global_pairs=min(128, len(rows)),
    )
    images, texts = [], []
    try:
        for batch in loader:
            if len(batch):
                images.append(
                    encode_images(
                        opened.model,
                        batch,
                        mean=config.data.mean,
                        std=config.data.std,
                        device=device,
                    )
                )
                texts.append(encode_texts(opened.model, batch, device=device))
    finally:
        loader.close()
    joined, reports = join_images(images), join_texts(texts)
    tensors = {
        "row_index": torch.from_numpy(joined.row_index.astype(np.int64)),
        "image": joined.features.embedding,
        "report": reports.text.embedding,
        "has_report": reports.content_mask.any(dim=1),
        "knowledge": reports.knowledge.present_mean,
        "has_knowledge": reports.knowledge.has_present,
    }
    if with_patches:
        tensors["patches"] = joined.features.patches
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
