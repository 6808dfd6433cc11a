"""`mlip embed`: embeddings of a split in parts of safetensors or Parquet; run again to go on.

<out>/index.json              what the parts depend on, and their rows
<out>/part-00000.safetensors  row_index, image, report, has_report, knowledge, has_knowledge,
                              and patches where asked for
<out>/part-00000.parquet      the same columns: a vector is a list of fixed length of float32,
                              patches are one list of patches x dimensions, row by row
Rows are numbers of manifest rows: the join to files and patients stays in the manifest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mlip.config import Config
from mlip.dataloading.loader import build_loader
from mlip.dataloading.manifest import Manifest, ManifestError
from mlip.transfer.features import (
    encode_images,
    encode_texts,
    join_images,
    join_texts,
    require_finite,
)
from mlip.transfer.fingerprint import hash_of, hash_of_weights, preprocessing
from mlip.transfer.interval import Array

PART_ROWS = 2048
FORMATS = ("safetensors", "parquet")


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
    form: str = "safetensors",
    part_rows: int = PART_ROWS,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Rows embedded in all; parts that are there and intact are kept.

    form     one of FORMATS, the same numbers in both
    Raises:  EmbedError if `out` holds embeddings of another model, data or choice; ManifestError
             for a split without rows; DataError where no image can be read.
    """
    rows = manifest.rows(split, with_report=False)
    if len(rows) == 0:
        raise ManifestError(f"{manifest.path}: split {split!r} has no rows; choose another --split")
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
        "form": form,
    }
    _check_index(out / "index.json", index)
    parts = [rows[i : i + part_rows] for i in range(0, len(rows), part_rows)]
    written = 0
    for number, chosen in enumerate(parts):
        path = out / f"part-{number:05d}.{form}"
        count = _rows_of(path)
        if count is None:
            for left in out.glob(f".{path.name}.*"):
                left.unlink()  # of a run that was killed while it wrote
            tensors = _encode(
                opened, config, manifest, chosen, split, with_patches, torch.device(device)
            )
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            if form == "parquet":
                pa.parquet.write_table(as_table(tensors), partial)
            else:
                save_file(tensors, partial)
            partial.replace(path)
            count = len(tensors["row_index"])
            say(f"part {number + 1} of {len(parts)}: {count} rows")
        written += count
    return written


def as_table(tensors: dict[str, torch.Tensor]) -> pa.Table:
    """A column a tensor: numbers [N] as they are, vectors [N, ...] as lists of fixed length.

    The shape of a vector with more than one dimension stands in its column's metadata.
    """
    fields, columns = [], []
    for name, tensor in tensors.items():
        values = pa.array(tensor.reshape(-1).numpy())
        shape = {"shape": json.dumps(list(tensor.shape[1:]))} if tensor.dim() > 2 else None
        if tensor.dim() > 1:
            values = pa.FixedSizeListArray.from_arrays(values, int(tensor[0].numel()))
        fields.append(pa.field(name, values.type, nullable=False, metadata=shape))
        columns.append(values)
    return pa.table(columns, schema=pa.schema(fields))


def _check_index(path: Path, index: dict[str, Any]) -> None:
    if path.is_file():
        try:
            # folders of earlier versions know one form and do not name it
            old = {"form": "safetensors", **json.loads(path.read_text(encoding="utf-8"))}
        except (ValueError, TypeError):
            raise EmbedError(
                f"{path}: damaged: what its parts hold is not known; delete the folder, or name "
                "another one"
            ) from None
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
        if path.suffix == ".parquet":
            return int(pa.parquet.ParquetFile(path).metadata.num_rows)
        with safe_open(path, framework="pt") as part:
            return int(part.get_slice("row_index").get_shape()[0])
    except (OSError, SafetensorError, pa.ArrowException):
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
    require_finite(joined, reports)
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
