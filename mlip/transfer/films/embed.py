"""`mlip embed`: embeddings of a split in parts of safetensors or Parquet; run again to go on.

<out>/index.json              what the parts depend on; of each its SHA-256, its rows, and the rows
                              whose image could not be read, with the reason
<out>/part-00000.safetensors  row_index, image, report, has_report, knowledge, has_knowledge,
                              and patches where asked for
<out>/part-00000.parquet      the same columns: a vector is a list of fixed length of float32,
                              patches are one list of patches x dimensions, row by row
Of images alone (images_only) a part holds row_index, image and, where asked for, patches.
Rows are numbers of manifest rows, from 0: the join to files and patients stays in the manifest.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from safetensors.torch import save_file

from mlip.dataloading.ledger import BadSample, DataError, listed, most_bad
from mlip.dataloading.loader import Loader
from mlip.dataloading.manifest import Manifest, ManifestError
from mlip.dataloading.pipelines.samples import SampleReader
from mlip.dataloading.progress import Progress
from mlip.dataloading.reports.column import RULES
from mlip.settings.config import Columns
from mlip.system.output_file import file_sha256, only_writer, whole_file
from mlip.transfer.features import ImageBank, encoded, encoded_images, require_finite, row_loader
from mlip.transfer.films.row_images import of_split
from mlip.transfer.fingerprint import hash_of, hash_of_source, hash_of_weights, preprocessing

PART_ROWS = 2048
_PART_NAME = re.compile(r"part-\d+\.(safetensors|parquet)")
_READS_REPORTS = ("knowledge", "dataloading/reports")  # modules by which words become mentions


class EmbedError(ValueError):
    """A folder of embeddings that cannot be continued."""

    exit_code = 4


@dataclass(frozen=True)
class Embedded:
    """What a folder of embeddings holds of a split."""

    rows: int
    asked: int  # rows of the split that no rule leaves out
    missing: Mapping[str, int]  # reason -> rows whose image could not be read

    def __str__(self) -> str:
        return f"{self.rows} of {self.asked} rows" + (
            f" ({listed(self.missing)})" if self.missing else ""
        )


def write_embeddings(
    opened: Any,
    manifest: Manifest,
    out: Path,
    *,
    split: str,
    with_patches: bool,
    images_only: bool = False,
    form: str = "safetensors",
    part_rows: int = PART_ROWS,
    say: Callable[[str], None] = lambda line: None,
) -> Embedded:
    """Embed what is not there yet: parts that are whole are kept.

    A part that lacks rows is made again as soon as one of their images can be read.

    split    a split, or "all": of every split and of none
    form     safetensors or parquet, the same numbers in both
    Raises:  EmbedError if `out` holds embeddings of another model, data, linker or choice;
             ConfigError where another process writes there; ManifestError for a split without rows;
             DataError where more than data.bad_share of the images, or all of them, cannot be read.
    """
    config = opened.config
    asked, split, manifest = split, *of_split(manifest, split)
    rows = manifest.rows(split, with_report=False)
    left_out = _left_out(manifest, split)
    if len(rows) == 0:
        raise ManifestError(
            f"{manifest.path}: split {asked!r} has no usable rows of {len(manifest)} "
            f"({left_out or 'none at all'}): choose another --split"
        )
    if left_out:
        say(f"left out: {left_out}")
    out.mkdir(parents=True, exist_ok=True)
    index = {
        "weights": hash_of_weights(opened.model),
        "manifest": manifest.fingerprint,
        "preprocessing": hash_of(preprocessing(config)),
        "split": asked,
        "rows": len(rows),
        # of one manifest: another column of splits chooses others, perhaps as many
        "row_index": hash_of(rows.tolist()),
        "columns": _columns(config.data.columns, images_only),
        # a run keeps its lexicon, but not the rules that look for it
        "concept_table": None if images_only else opened.table.fingerprint,
        "linker": None if images_only else hash_of_source(*_READS_REPORTS),
        "part_rows": part_rows,
        "with_patches": with_patches,
        "images_only": images_only,
        "embed_dim": config.model.embed_dim,
        "form": form,
    }
    with only_writer(out / ".lock", out):
        done = _read_index(out / "index.json", index)
        reader = SampleReader(manifest, config.data, refuses_dark=True)
        missing: dict[int, str] = {}
        told = Progress("parts, whole already")
        parts = [rows[i : i + part_rows] for i in range(0, len(rows), part_rows)]
        for number, chosen in enumerate(parts):
            path = out / f"part-{number:05d}.{form}"
            known = done.get(path.name)
            found = file_sha256(path) if path.is_file() else None
            if known is None or known["sha256"] != found or _is_mended(reader, known):
                loader = row_loader(opened, manifest, split, chosen)
                encode = _encode_images if images_only else _encode
                tensors, bad = encode(opened, loader, with_patches)
                known = done[path.name] = {
                    "sha256": _write_part(tensors, path),
                    "rows": len(chosen) - len(bad),
                    "missing": {str(row): reason for row, reason in sorted(bad.items())},
                }
                _write_index(out / "index.json", {**index, "parts": done})
                say(f"part {number + 1} of {len(parts)}: {known['rows']} of {len(chosen)} rows")
            else:
                told(number + 1, len(parts))
            missing |= {int(row): reason for row, reason in known["missing"].items()}
            _check_share(missing, len(rows), config.data.bad_share)
    return Embedded(len(rows) - len(missing), len(rows), Counter(missing.values()))


def _columns(columns: Columns, images_only: bool) -> dict[str, str | None]:
    """The manifest's columns that are embedded, by what they hold."""
    return {"image": columns.image, **({} if images_only else {"report": columns.report})}


def _left_out(manifest: Manifest, split: str) -> str:
    """Rows of the split that a rule leaves out, by rule; "" where none is."""
    counts = manifest.excluded(split, with_report=False)
    by_rule = {rule: n for rule, n in counts.items() if rule in RULES and rule != "no_split"}
    hint = "; data.empty_report=image_only embeds them without a report"
    return listed(by_rule) + hint if by_rule else ""


def _check_share(missing: Mapping[int, str], rows: int, bad_share: float) -> None:
    """As in training: a folder that is not mounted is told after the first part, not at the end."""
    allowed = most_bad(bad_share, rows)
    if len(missing) > allowed or len(missing) == rows:
        raise DataError(
            f"{len(missing)} of {rows} rows have a bad image "
            f"({listed(Counter(missing.values()))}); data.bad_share={bad_share} allows "
            f"{allowed}: repair the files, check data.root, or raise it; finished parts are kept, "
            "run again to go on"
        )


def _is_mended(reader: SampleReader, known: Mapping[str, Any]) -> bool:
    """Whether an image that the part lacks can be read by now."""
    for row in known["missing"]:
        try:
            reader.pixels(int(row), 0)
        except BadSample:
            continue
        return True
    return False


def _write_part(tensors: dict[str, torch.Tensor], path: Path) -> str | None:
    """SHA-256 of the part's file; None where no row has an image, and there is no file."""
    for left in path.parent.glob(f".{path.name}.*"):  # of a run that was killed while it wrote
        is_folder = left.is_dir() and not left.is_symlink()
        shutil.rmtree(left) if is_folder else left.unlink()
    if not tensors:
        path.unlink(missing_ok=True)
        return None
    with whole_file(path, is_private=True) as partial:
        if path.suffix == ".parquet":
            pa.parquet.write_table(as_table(tensors), partial)
        else:
            # beside what it writes it has a file .tmpXXXXXX first, as other programs have: in a
            # folder of this name a kill leaves it as ours. save() would hold the part twice more
            with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as own:
                save_file(tensors, Path(own, path.name))
                Path(own, path.name).replace(partial)
        return file_sha256(partial)


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


def _read_index(path: Path, index: dict[str, Any]) -> dict[str, Any]:
    """What is known of the parts by their names, {} in a new folder.

    Raises:  EmbedError as _known_parts, and where parts lie there without an index
    """
    if path.is_file():
        return _known_parts(path, index)
    # Spark gives its own such names; and parts of a lost index may be of any model
    there = sorted(p.name for p in path.parent.iterdir() if _PART_NAME.fullmatch(p.name))
    if there:
        raise EmbedError(
            f"{path.parent} holds {there[0]} and no {path.name}: what made it is not known, and it "
            "would be replaced; name another folder, or move such files away"
        )
    _write_index(path, index)
    return {}


def _known_parts(path: Path, index: dict[str, Any]) -> dict[str, Any]:
    """What an index tells of the parts, by their names.

    Raises:  EmbedError where it is damaged, another program's, or of other embeddings than `index`
             asks for
    """
    try:
        # folders of earlier versions know one form and do not name it, hold reports, and do not
        # tell of which rows and columns they are; nor by which lexicon and linker, which makes
        # one with reports different
        old = {
            "form": "safetensors",
            "images_only": False,
            **{name: index[name] for name in ("row_index", "columns")},
            **(found := json.loads(path.read_text(encoding="utf-8"))),
        }
        # earlier versions kept none: theirs are made again, as is one that is not ours
        parts = {n: part for n, part in old.get("parts", {}).items() if _is_record(part)}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise EmbedError(
            f"{path}: damaged: what its parts hold is not known; name another folder, or "
            "delete this one if `mlip embed` made it"
        ) from None
    if not found.keys() >= {"weights", "manifest", "preprocessing"}:
        raise EmbedError(f"{path}: was not written by `mlip embed`: name another folder")
    different = sorted(k for k in index if old.get(k) != index[k])
    if different:
        raise EmbedError(
            f"{path.parent} holds embeddings that differ in {', '.join(different)}: name "
            "another folder, or delete this one"
        )
    return parts


def _is_record(part: Any) -> bool:
    """Whether it says of a part what write_embeddings does."""
    return (
        isinstance(part, dict)
        and isinstance(part.get("rows"), int)
        and isinstance(part.get("missing"), dict)
        and all(row.isdecimal() and isinstance(why, str) for row, why in part["missing"].items())
        and "sha256" in part
    )


def _write_index(path: Path, index: dict[str, Any]) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _encode(
    opened: Any, loader: Loader, with_patches: bool
) -> tuple[dict[str, torch.Tensor], dict[int, str]]:
    """(tensors of the rows whose image can be read, {} where none can; row -> reason of others)"""
    parts: list[dict[str, torch.Tensor]] = []
    # of a batch what goes into the part: patches and tokens of 2,048 rows would be gigabytes
    for _, image, text in encoded(opened.model, loader, opened.config.data):
        require_finite(image, text)
        parts.append(
            {
                **_of_images(image, with_patches),
                "report": text.text.embedding,
                "has_report": text.content_mask.any(dim=1),
                "knowledge": text.knowledge.present_mean,
                "has_knowledge": text.knowledge.has_present,
            }
        )
    return _joined(parts), loader.ledger.bad


def _encode_images(
    opened: Any, loader: Loader, with_patches: bool
) -> tuple[dict[str, torch.Tensor], dict[int, str]]:
    """As _encode, of the images alone."""
    parts = []
    for image in encoded_images(opened.model, loader, opened.config.data):
        require_finite(image)
        parts.append(_of_images(image, with_patches))
    return _joined(parts), loader.ledger.bad


def _of_images(image: ImageBank, with_patches: bool) -> dict[str, torch.Tensor]:
    own = {
        "row_index": torch.from_numpy(image.row_index.astype(np.int64)),
        "image": image.features.embedding,
    }
    return {**own, "patches": image.features.patches} if with_patches else own


def _joined(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    if not parts:
        return {}
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
