"""The arguments of `mlip`'s sub-commands, and what their help says.

What does not live here: prepare, label and knowledge, whose own modules add theirs (mlip/cli.py).
Nothing that needs another package is imported: the help is there where they are missing.
"""

from __future__ import annotations

import argparse
from typing import Any, cast

from mlip.commands.actions import (
    run_compare,
    run_doctor,
    run_evaluate,
    run_export,
    run_phantoms,
    run_settings,
)
from mlip.commands.films import run_classify, run_embed, run_ground, run_outliers, run_search

_SPLITS = ("train", "val", "test", "all")
_WORDINGS = "YAML file of your own sentences: finding -> positive and negative"


def add_commands(commands: Any) -> None:
    """Add the sub-commands that actions.py and films.py run.

    commands  what ArgumentParser.add_subparsers gives
    """
    evaluate = _add_command(
        commands,
        "evaluate",
        "score a checkpoint (zero-shot, retrieval, grounding, or a task of configs/transfer) and "
        "write results and a page",
    )
    _add_settings(evaluate)
    evaluate.add_argument(
        "--out", metavar="DIR", help="folder for the results and the page (default: run.dir)"
    )
    _add_device(evaluate)
    evaluate.set_defaults(run=run_evaluate)

    ground = _add_command(commands, "ground", "show where phrases point in one image: heat maps")
    ground.add_argument("image", help="JPEG, PNG or DICOM file")
    ground.add_argument(
        "phrases",
        nargs="+",
        metavar="phrase",
        help='what to look for, for example "left pleural effusion"',
    )
    ground.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="run folder, checkpoint or export"
    )
    ground.add_argument(
        "--out",
        metavar="FILE",
        default="map.png",
        help="PNG to write, or DICOM object for the film's study (map.dcm) (default: map.png)",
    )
    ground.add_argument(
        "--words", action="store_true", help="add a map of each word and each linked concept"
    )
    ground.add_argument(
        "--lexicon", metavar="FILE", help="concept table, if the checkpoint has none"
    )
    _add_device(ground)
    ground.set_defaults(run=run_ground)

    embed = _add_command(
        commands, "embed", "write the embeddings of a split to files; can be stopped and resumed"
    )
    _add_settings(embed)
    embed.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="folder to write; give the same command again to go on",
    )
    embed.add_argument(
        "--split",
        choices=_SPLITS,
        help="rows to take (default: evaluate.split; with --images: all)",
    )
    embed.add_argument(
        "--images",
        action="store_true",
        help="embed images alone; without --split the manifest needs no column but theirs",
    )
    embed.add_argument(
        "--format",
        choices=("safetensors", "parquet"),
        default="safetensors",
        help="format of the files (default: safetensors)",
    )
    embed.add_argument("--patches", action="store_true", help="write patch embeddings too (large)")
    _add_device(embed)
    embed.set_defaults(run=run_embed)

    search = _add_command(
        commands,
        "search",
        "find the films of an embedded archive that fit words or resemble a film",
    )
    _add_settings(search)
    search.add_argument(
        "--in",
        dest="embeddings",
        required=True,
        metavar="DIR",
        help="folder that `mlip embed` wrote",
    )
    search.add_argument(
        "--phrase",
        action="append",
        default=[],
        metavar="TEXT",
        help="words to look for; can be given several times",
    )
    search.add_argument(
        "--finding",
        action="append",
        default=[],
        metavar="NAME",
        help="a finding that the lexicon knows, asked with sentences that state it and sentences "
        "that deny it; can be given several times",
    )
    search.add_argument("--wordings", metavar="FILE", help=_WORDINGS)
    search.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="a film to find others like it; can be given several times",
    )
    search.add_argument(
        "--row",
        action="append",
        default=[],
        type=int,
        metavar="N",
        help="the same with a film of the archive, by its row_index; can be given several times",
    )
    search.add_argument(
        "--among",
        choices=("image", "report"),
        default="image",
        help="search among images or among reports (default: image)",
    )
    search.add_argument(
        "--top", type=int, default=20, metavar="N", help="answers per query (default: 20)"
    )
    search.add_argument(
        "--per-patient",
        action="store_true",
        help="at most one answer per patient, as the manifest names them",
    )
    search.add_argument(
        "--rerank",
        type=int,
        metavar="N",
        help="read the N best films and score them again with both heads together",
    )
    search.add_argument(
        "--out", metavar="FILE", default="found.csv", help="table to write (default: found.csv)"
    )
    search.add_argument("--page", metavar="FILE", help="also write an HTML page with the films")
    _add_device(search)
    search.set_defaults(run=run_search)

    classify = _add_command(
        commands, "classify", "score findings on images without labels and write a table"
    )
    _add_settings(classify)
    asked = classify.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "--finding",
        action="append",
        metavar="NAME",
        help="a finding that the lexicon knows; can be given several times",
    )
    asked.add_argument("--wordings", metavar="FILE", help=_WORDINGS)
    asked.add_argument(
        "--like",
        metavar="RESULTS",
        help="results.json of an evaluation of this model: take its findings, sentences and "
        "thresholds",
    )
    classify.add_argument(
        "--head",
        choices=("combined", "global", "local"),
        help="which score (default: combined, or global if no loss trained the local score)",
    )
    classify.add_argument(
        "--out",
        metavar="FILE",
        default="findings.csv",
        help="table to write (default: findings.csv)",
    )
    classify.add_argument(
        "--split", choices=_SPLITS, default="all", help="rows to take (default: all)"
    )
    _add_device(classify)
    classify.set_defaults(run=run_classify)

    compare = _add_command(
        commands,
        "compare",
        "compare two evaluations of the same images: the difference with its interval",
    )
    compare.add_argument(
        "of",
        nargs="+",
        metavar="DIR",
        help="folder of an evaluation, or its predictions.parquet; several, one per seed",
    )
    compare.add_argument(
        "--with",
        dest="against",
        nargs="+",
        action="extend",
        required=True,
        metavar="DIR",
        help="what to compare with; several are paired with the first ones in their order",
    )
    compare.add_argument(
        "--method",
        action="append",
        help="compare this head or share of labels alone, as global or '10 %%'; given twice: the "
        "one of the first side, then the one of --with",
    )
    compare.add_argument("--out", metavar="FILE", help="also write the comparison as JSON")
    compare.add_argument(
        "--bootstrap",
        type=int,
        default=1000,
        metavar="N",
        help="number of resamples (default: 1000)",
    )
    compare.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the resamples (default: 0)"
    )
    compare.set_defaults(run=run_compare)

    outliers = _add_command(
        commands,
        "outliers",
        "say how unlike a reference's images each image is: a table of p-values",
    )
    _add_settings(outliers)
    way = outliers.add_mutually_exclusive_group(required=True)
    way.add_argument("--fit", metavar="FILE", help="write a reference of a split's images")
    way.add_argument(
        "--reference", metavar="FILE", help="rank images by a reference that --fit wrote"
    )
    outliers.add_argument(
        "--out", metavar="FILE", help="table to write with --reference (default: outliers.csv)"
    )
    outliers.add_argument(
        "--split",
        choices=_SPLITS,
        help="rows to take (default: train with --fit, all with --reference)",
    )
    _add_device(outliers)
    outliers.set_defaults(run=run_outliers)

    export = _add_command(
        commands,
        "export",
        "write one folder with weights, settings and vocabulary, for from_pretrained",
    )
    _add_settings(export)
    export.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    export.add_argument(
        "--include-concepts",
        action="store_true",
        help="also write a concept table of other sources; keeping to its licences is up to you",
    )
    export.add_argument(
        "--onnx", action="store_true", help="also write both towers as ONNX files, and check them"
    )
    export.add_argument(
        "--transformers",
        action="store_true",
        help="also write both towers as folders that transformers opens, and check them",
    )
    export.set_defaults(run=run_export)

    doctor = _add_command(
        commands, "doctor", "check what is installed, missing or broken on this machine"
    )
    doctor.add_argument(
        "--plan",
        nargs="+",
        action="extend",
        metavar="CONFIG|key=value",
        help="print the memory that a training needs on one rank; exit code 2 if it cannot fit",
    )
    doctor.add_argument(
        "--ranks", type=int, metavar="N", help="ranks of the plan (default: the GPUs here, or 1)"
    )
    doctor.add_argument(
        "--memory-gib",
        type=float,
        metavar="GIB",
        help="memory of one rank of the plan (default: what this machine has)",
    )
    doctor.set_defaults(run=run_doctor)

    settings = _add_command(
        commands, "settings", "list the settings: type, range, default, and what each one does"
    )
    settings.add_argument(
        "terms",
        nargs="*",
        metavar="WORD|key=value",
        help="words that a setting's name or description has, or whole names of settings and "
        "sections (default: all settings); with key=value also what each comes to",
    )
    settings.add_argument(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="YAML files, run folders or exports: also say what each setting comes to with them, "
        "and which file decides it",
    )
    settings.add_argument(
        "--out", metavar="FILE", help="write all settings as a Markdown page instead"
    )
    settings.set_defaults(run=run_settings)

    phantoms = _add_command(
        commands, "phantoms", "generate chest phantom studies whose findings are known"
    )
    phantoms.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    phantoms.add_argument(
        "--workers", type=int, metavar="N", help="number of processes (default: one per core)"
    )
    _add_settings(phantoms)
    phantoms.set_defaults(run=run_phantoms)


def _add_command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    """A sub-command of this file, its text in the list of commands and above its own options."""
    parser = commands.add_parser(name, help=text, description=as_sentence(text))
    return cast(argparse.ArgumentParser, parser)


def as_sentence(text: str) -> str:
    """What a command does, as its own help begins."""
    return f"{text[0].upper()}{text[1:]}."


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="CONFIG|key=value",
        help="YAML files, run folders, and single settings as key=value (`mlip settings` lists "
        "them); checkpoint=DIR is short for evaluate.checkpoint=DIR",
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", help="cpu, cuda or cuda:1 (default: the GPU if there is one, else cpu)"
    )
