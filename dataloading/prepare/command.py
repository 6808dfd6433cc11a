"""`mlip prepare`: a public download or your own files -> shards, index and manifest.

mlip prepare <dataset> --root DIR --out DIR      see --list for the data sets
mlip prepare --explain FILE                      each step of reading one DICOM file
mlip prepare --check-phi PATH                    what de-identification left in file or folder
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from mlip.dataloading.datasets import DATASETS
from mlip.dataloading.datasets.rows import Collected, Dataset, DatasetError, Row, leads_out
from mlip.dataloading.dicom.notes import NOTES
from mlip.dataloading.dicom.radiograph import CODES, DicomError, explain
from mlip.dataloading.ledger import REASONS, listed
from mlip.dataloading.prepare.duplicates import prepared_duplicates
from mlip.dataloading.prepare.id_map import write_id_map
from mlip.dataloading.prepare.options import (
    check_places,
    dataset_options,
    image_settings,
    leave_out_demographics,
    part_of,
    require_alone,
)
from mlip.dataloading.prepare.output_folder import OutputFolder, read_salt, write_json
from mlip.dataloading.prepare.phi_report import report_phi
from mlip.dataloading.prepare.shard_build import (
    PASSING,
    Plan,
    Result,
    build_shards,
)
from mlip.dataloading.prepare.tables import grouping_lines, told_views, write_csv
from mlip.dataloading.progress import Progress
from mlip.settings.typed_tree import ConfigError, require_utf8
from mlip.system.machine import usable_cores
from mlip.system.output_file import file_sha256
from mlip.system.unread_output import one_line, terminal_text

_MEANINGS = {
    **REASONS,
    **CODES,
    **NOTES,
    "crashed": "the process that decoded it ended, twice",
    "timeout": "decoding took longer than --timeout, twice",
    "outside_root": "a link leads out of --root",
    "not_deidentified": "it names a patient or is not marked as de-identified",
    "too_dark": "no pixel reaches an eighth of white",
    "above_white": "a pixel is brighter than --png-white",
    "sex_unlike_table": "header and table differ: the one that is read first is taken",
    "age_unlike_table": "header and table differ: the one that is read first is taken",
}
_ADVICE = {
    "too_dark": "; of 12-bit values in 16-bit PNGs say --png-white 4095",
    "above_white": "; say a larger --png-white",
    "internal_error": "; of a DICOM file, --explain FILE names the place",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `mlip prepare`."""
    add = parser.add_argument
    add("dataset", nargs="?", choices=sorted(DATASETS), help="what --root holds")
    add("--root", type=Path, help="folder of the raw data; nothing in it is changed")
    add("--out", type=Path, help="folder to write shards, index and manifest to")
    add("--side", type=int, default=256, metavar="PX", help="longest side in px (default: 256)")
    add("--bits", type=int, choices=(8, 16), default=8, help="bits per pixel (default: 8)")
    codec_help = "format of the stored images (default: jpeg for 8 bits, png for 16)"
    add("--codec", choices=("jpeg", "png"), help=codec_help)
    add("--quality", type=int, metavar="Q", help="JPEG quality, 1 to 100 (default: 95)")
    white_help = (
        "value of white in 16-bit PNGs (default: 65535), or own: each one's brightest pixel"
    )
    add("--png-white", default="65535", metavar="N", help=white_help)
    shard_help = "images per shard (default: 4096)"
    add("--shard-images", type=int, default=4096, metavar="N", help=shard_help)
    workers_help = "decoding processes (default: one per core)"
    add("--workers", type=int, default=0, metavar="N", help=workers_help)
    part_help = "make only every N-th shard, from the I-th on: a share for one of N machines"
    add("--part", default="1/1", metavar="I/N", help=part_help)
    time_help = "processor seconds that a file may take (default: 10)"
    add("--timeout", type=float, default=10.0, metavar="S", help=time_help)
    add("--overwrite", action="store_true", help="remake an --out made with other settings")
    add("--verify", action="store_true", help="read finished shards again and remake damaged ones")
    add("--keep-ids", action="store_true", help="write ids as they are, not hashed")
    map_help = (
        "secret table to write: hashed ids with their originals, and files left out by a rule"
    )
    add("--id-map", type=Path, metavar="FILE", help=map_help)
    deid_help = "refuse DICOM files that are not marked as de-identified or still name a patient"
    add("--require-deid", action="store_true", help=deid_help)
    no_help = "leave the patients' sex and age out of index and manifest"
    add("--no-demographics", action="store_true", help=no_help)
    option_help = "a setting of the data set (repeatable); --list names them"
    add("--option", action="append", default=[], metavar="NAME=VALUE", help=option_help)
    list_help = "print the data sets with their licences, sources and options"
    add("--list", action="store_true", help=list_help)
    add("--explain", type=Path, metavar="FILE", help="print each step of reading one DICOM file")
    phi_help = "print what may identify a patient in a DICOM file or folder"
    add("--check-phi", type=Path, metavar="PATH", help=phi_help)


def run(arguments: argparse.Namespace) -> int:
    """What the arguments ask for; the process's exit status.

    Raises:  ConfigError for arguments that cannot be honoured (exit status 2); DatasetError,
             ManifestError, ShardError for data that cannot be used, WorkerError (3).
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    require_alone(arguments, parser.parse_args([]))
    if arguments.list:
        print("\n\n".join(_describe(name, DATASETS[name]) for name in sorted(DATASETS)))
        return 0
    if arguments.explain is not None:
        return _explain(arguments.explain)
    if arguments.check_phi is not None:
        return report_phi(arguments.check_phi)
    if arguments.dataset is None or arguments.root is None or arguments.out is None:
        raise ConfigError(
            "expected `prepare <dataset> --root DIR --out DIR`, `--explain FILE`, "
            "`--check-phi PATH` or `--list`"
        )
    return _prepare(arguments)


def _describe(name: str, dataset: Dataset) -> str:
    lines = [f"{name}: {dataset.title}", f"  licence: {dataset.licence}"]
    lines.append(f"  access: {dataset.access}")
    for option, (default, text) in dataset.options.items():
        lines.append(f"  --option {option}={default or '...'}: {text}")
    return "\n".join(lines)


def _explain(path: Path) -> int:
    if not os.path.lexists(path):
        raise ConfigError(f"--explain {path}: no such file")
    try:
        print(terminal_text(explain(path)))
    except DicomError as error:
        raise DatasetError(f"{path}: {error}") from None
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    dataset = DATASETS[arguments.dataset]
    root = Path(os.path.realpath(arguments.root))
    if not root.is_dir():
        raise ConfigError(f"--root {arguments.root}: no such folder")
    options = dataset_options(dataset, arguments.option)
    if arguments.no_demographics:
        leave_out_demographics(dataset, options)
    settings = image_settings(arguments)
    part = part_of(arguments.part)
    keep_ids = dataset.keeps_ids or arguments.keep_ids
    out = Path(os.path.realpath(arguments.out))
    require_utf8("--out", str(out))
    asked = {
        "dataset": arguments.dataset,
        **asdict(settings),
        "shard_images": arguments.shard_images,
        "ids": "as they are" if keep_ids else "hashed",
    }
    folder = OutputFolder(out, str(arguments.out), asked, part, arguments.overwrite)
    check_places(arguments, root, out, options)
    folder.check()
    print(f"{dataset.title}. Licence: {dataset.licence}", flush=True)
    collected = dataset.collect(root, options)
    check_rows(collected.rows)
    _print_counts(collected)
    if not collected.rows:
        left_out = listed(collected.excluded) or "none"
        raise DatasetError(f"{root}: no image is left (left out: {left_out})")
    with folder.held():
        try:
            plan = Plan(
                root=root,
                out=out,
                settings=settings,
                salt=f"mlip {arguments.dataset}" if keep_ids else read_salt(out),
                keep_ids=keep_ids,
                shard_images=arguments.shard_images,
                workers=arguments.workers or usable_cores(),
                timeout_s=arguments.timeout,
                part=part,
                verify=arguments.verify,
                header_first=dataset.header_first,
            )
            return _build(arguments, options, collected, plan)
        except OSError as error:
            raise DatasetError(f"--out {arguments.out}: cannot be used: {error.strerror}") from None


def _build(
    arguments: argparse.Namespace, options: dict[str, str], collected: Collected, plan: Plan
) -> int:
    if arguments.id_map is not None:
        try:
            write_id_map(collected, plan, arguments.id_map)
        except OSError as error:
            raise ConfigError(
                f"--id-map {arguments.id_map}: cannot be written: {error.strerror}"
            ) from None
    start = time.monotonic()
    try:
        result = build_shards(collected.rows, plan, Progress("images", tells_end=True))
    except KeyboardInterrupt:
        print(
            "interrupted: finished shards are whole; the same command makes the rest",
            file=sys.stderr,
        )
        raise
    for name, rows in collected.files.items():
        write_csv(rows, plan.out / name)
    seconds = time.monotonic() - start
    # minutes where films are many: a kill in them is to leave no prepared.json, which comes last
    alike = prepared_duplicates(plan.out) if result.complete else []
    _record(arguments.dataset, options, collected, plan, result)
    lost = _print_result(collected, plan, result, seconds, alike)
    if lost:
        raise DatasetError(f"{plan.out}: {lost} rows are in no shard: run the same command again")
    if result.complete and result.images == 0:
        raise DatasetError(f"{plan.out}: no image could be read; the reasons stand in refused.csv")
    return 0


def check_rows(rows: list[Row]) -> None:
    """Raises DatasetError for a patient in two splits, a doubled image or an unsafe path."""
    split_of: dict[str, str] = {}
    crossing = {
        row.patient_id
        for row in rows
        if split_of.setdefault(row.patient_id, row.split) != row.split
    }
    if crossing:
        raise DatasetError(
            f"{len(crossing)} patients stand in more than one split: expected every patient in "
            "one split only"
        )
    for name in ("image", "image_id"):
        count = len(rows) - len({getattr(row, name) for row in rows})
        if count:
            raise DatasetError(f"{count} rows repeat an {name}: expected one row an image")
    if count := sum(leads_out(row.image) for row in rows):
        raise DatasetError(
            f"{count} image paths may lead out of the root: expected relative paths without '..'"
        )


def _print_counts(collected: Collected) -> None:
    print(f"{'split':8s}{'images':>10s}{'studies':>10s}{'patients':>10s}{'reports':>10s}  views")
    for split in ("train", "val", "test"):
        rows = [row for row in collected.rows if row.split == split]
        views = Counter(row.view for row in rows)
        print(
            f"{split:8s}{len(rows):10d}{len({(r.patient_id, r.study_id) for r in rows}):10d}"
            f"{len({r.patient_id for r in rows}):10d}{sum(bool(r.report) for r in rows):10d}  "
            + one_line(told_views(views))
        )
    for rule, count in sorted(collected.excluded.items()):
        print(f"left out by rule {rule}: {count}")
    if collected.left_out:
        print("which files a rule left out: --id-map FILE lists them, behind the images")
    for note in collected.notes:
        print(one_line(note))
    sys.stdout.flush()


def _record(
    name: str, options: dict[str, str], collected: Collected, plan: Plan, result: Result
) -> None:
    """prepared.json: how this folder was made, without any path or identifier of the source."""
    if not result.complete:
        return
    record = {
        "dataset": name,
        "options": {k: v for k, v in options.items() if not ("/" in v or os.path.exists(v))},
        "settings": json.loads(plan.settings.to_json()),
        "ids": "as published" if plan.keep_ids else "hashed",
        "rows": len(collected.rows),
        "images": result.images,
        "refused": dict(sorted(result.refused.items())),
        "noted": dict(sorted(result.noted.items())),
        "excluded": dict(sorted(collected.excluded.items())),
        "manifest_sha256": file_sha256(plan.out / "manifest.parquet"),
    }
    write_json(record, plan.out / "prepared.json")


def _meaning(code: str) -> str:
    """In brackets; shards of another version may hold codes that this one does not know."""
    return f" ({_MEANINGS[code]})" if code in _MEANINGS else ""


def _print_result(
    collected: Collected, plan: Plan, result: Result, seconds: float, alike: list[str]
) -> int:
    """How many rows are lost: neither an image nor refused."""
    refused = sum(result.refused.values())
    print(
        f"{result.shards} shards, {result.made} of them made now in {seconds:.1f} s; "
        f"{result.images} images, {result.member_bytes / 1e6:.1f} MB"
    )
    for reason, count in result.refused.most_common():
        advice = "; the same command takes those that are there by then" * (reason in PASSING)
        print(f"refused, {reason}: {count}{_meaning(reason)}{_ADVICE.get(reason, advice)}")
    if refused and result.complete:
        by_key = "" if plan.keep_ids else " by key; --id-map FILE lists the name of each key"
        print(f"which files were refused: refused.csv{by_key}")
    for code, count in result.noted.most_common():
        print(f"noted, {code}: {count}{_meaning(code)}")
    if not result.complete:
        print("not complete: other parts are missing; the last one to finish writes the manifest")
        return 0
    lost = len(collected.rows) - result.images - refused
    print(f"rows {len(collected.rows)} = images {result.images} + refused {refused} + lost {lost}")
    for line in alike:
        print(line)
    # the headers of DICOM files have told by now what the split's table above could not know
    for line in grouping_lines(plan.out / "manifest.parquet"):
        print(one_line(line))
    print(f"manifest: {plan.out / 'manifest.parquet'}")
    return lost
