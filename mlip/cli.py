"""The `mlip` command: every sub-command's arguments, and how it ends.

What does not live here: any work (mlip/commands.py, mlip/film_commands.py). Errors of ours are one
line and a stable exit code. Nothing that needs another package is imported before it is used: what
is missing is a line, too.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from mlip.commands import run_compare, run_doctor, run_evaluate, run_export, run_phantoms
from mlip.doctor import install_line
from mlip.film_commands import run_classify, run_embed, run_ground, run_outliers, run_search
from mlip.machine import limit_reached
from mlip.output_file import refusal
from mlip.stop_signal import Stopped, signals_stop
from mlip.typed_tree import ConfigError, require_utf8
from mlip.unread_output import one_line, unread_output_is_lost

# sub-command -> its module (with add_arguments and run), and what it does
FOREIGN = {
    "prepare": (
        "mlip.dataloading.prepare",
        "turn raw downloads or own files into shards and a manifest",
    ),
    "label": (
        "mlip.dataloading.label_reports",
        "labels of findings from reports: what each states, denies, doubts",
    ),
    "knowledge": ("mlip.knowledge.command", "build and look into concept tables"),
}

# options that name a file or folder
_PATHS = {
    name: f"--{name}"
    for name in ("out", "checkpoint", "fit", "reference", "wordings", "like", "page")
} | {"embeddings": "--in"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command; its exit code (mlip/training/lifecycle.py lists them)."""
    with unread_output_is_lost() as lost:  # `mlip prepare ... | head` prepares all the same
        try:
            with signals_stop():
                code = _main(arguments)
        except KeyboardInterrupt as error:
            stop = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
            print(f"mlip: {stop}", file=sys.stderr)
            code = stop.exit_code
    if lost and code == 0:  # not a reader that left: `> file` on a full disk
        print(f"mlip: the lines of this command were not written: {lost[0]}", file=sys.stderr)
        return 2
    return code


def _main(arguments: Sequence[str] | None) -> int:
    parser = build_parser()
    given = [_at_home(item) for item in (sys.argv[1:] if arguments is None else arguments)]
    # the rest belongs to the sub-commands whose arguments live in their own modules
    options, rest = parser.parse_known_args(given)
    several = getattr(options, "settings", getattr(options, "phrases", None))
    if several is not None:
        # argparse takes positionals only up to the first option: later ones are meant as well
        several += [item for item in rest if not item.startswith("-")]
        rest = [item for item in rest if item.startswith("-")]
    if rest and options.command not in FOREIGN:
        parser.error(f"unrecognized arguments: {' '.join(rest)}; a setting is key=value")
    options.rest = rest
    try:
        return _run(options)
    except ImportError as error:
        told = install_line(error)
        if told is None:  # broken, not missing
            raise
        print(f"mlip {options.command}: {told}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    """The sub-command, its errors as one line; one of an import is the caller's."""
    try:
        for name, option in _PATHS.items():
            given = getattr(options, name, None)
            require_utf8(option, str(given or ""))
            if given == "":
                raise ConfigError(f"{option} is empty: expected the name of a file or folder")
        return int(options.run(options))
    except ImportError:
        raise
    except Exception as error:
        if told := limit_reached(error):  # first: without memory nothing can be imported
            print(f"mlip {options.command}: {one_line(told)}", file=sys.stderr)
            return 2
        from mlip.training.lifecycle import CONFIG, exit_code

        code, told = exit_code(error), str(error)
        if code == 1:
            unwritten = refusal(error, getattr(options, "out", None))
            if unwritten is None:
                raise  # not a mistake we know: the traceback is what helps
            code, told = CONFIG, unwritten
        print(f"mlip {options.command}: {one_line(told)}", file=sys.stderr)
        return code


def build_parser() -> argparse.ArgumentParser:
    about = "Medical language-image pre-training: what to do before and after train.py."
    epilog = "Research software. Not for clinical use."
    parser = argparse.ArgumentParser(prog="mlip", description=about, epilog=epilog)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    evaluate = commands.add_parser(
        "evaluate",
        help="zero-shot, retrieval, grounding, or a task of configs/transfer: results and a page",
    )
    _add_settings(evaluate)
    evaluate.add_argument("--out", help="folder of results.json and report.html (run.dir)")
    evaluate.add_argument("--device", default=None, help="cpu, cuda (default: what is there)")
    evaluate.set_defaults(run=run_evaluate)

    ground = commands.add_parser("ground", help="where phrases point in one image: heat maps")
    ground.add_argument("image", help="JPEG, PNG or DICOM file")
    ground.add_argument(
        "phrases", nargs="+", metavar="phrase", help='for example "left pleural effusion"'
    )
    ground.add_argument("--checkpoint", required=True, help="run folder, checkpoint or export")
    ground.add_argument("--out", default="map.png", help="PNG to write (map.png)")
    ground.add_argument(
        "--words", action="store_true", help="below it a map of each word and linked concept"
    )
    ground.add_argument("--lexicon", help="concept table, where the checkpoint has none")
    ground.add_argument("--device", default=None)
    ground.set_defaults(run=run_ground)

    embed = commands.add_parser("embed", help="embeddings of a split as files, resumable")
    _add_settings(embed)
    embed.add_argument("--out", required=True, help="folder to write; run again to go on")
    embed.add_argument(
        "--split",
        choices=("train", "val", "test", "all"),
        help="(evaluate.split; all of --images)",
    )
    embed.add_argument(
        "--images",
        action="store_true",
        help="of images alone: the list needs no column but theirs",
    )
    embed.add_argument(
        "--format", choices=("safetensors", "parquet"), default="safetensors", help="(safetensors)"
    )
    embed.add_argument("--patches", action="store_true", help="patch embeddings too (large)")
    embed.add_argument("--device", default=None)
    embed.set_defaults(run=run_embed)

    search = commands.add_parser(
        "search", help="the films of an embedded archive that fit words, or are like a film"
    )
    _add_settings(search)
    search.add_argument(
        "--in", dest="embeddings", required=True, metavar="FOLDER", help="what `mlip embed` wrote"
    )
    search.add_argument("--phrase", action="append", default=[], metavar="TEXT", help="repeatable")
    search.add_argument(
        "--finding",
        action="append",
        default=[],
        metavar="NAME",
        help="one that the lexicon knows: sentences that state it against those that deny it",
    )
    search.add_argument(
        "--wordings", metavar="FILE", help="YAML: finding -> positive and negative sentences"
    )
    search.add_argument("--image", action="append", default=[], metavar="FILE", help="a film")
    search.add_argument(
        "--row", action="append", default=[], type=int, help="a film of the archive: its row_index"
    )
    search.add_argument(
        "--among", choices=("image", "report"), default="image", help="what is searched (image)"
    )
    search.add_argument("--top", type=int, default=20, help="answers a query (20)")
    search.add_argument(
        "--per-patient", action="store_true", help="at most one answer a patient, by the manifest"
    )
    search.add_argument(
        "--rerank",
        type=int,
        metavar="N",
        help="score the N best films again by both heads together, which reads them",
    )
    search.add_argument("--out", default="found.csv", help="table to write (found.csv)")
    search.add_argument("--page", metavar="FILE", help="an HTML page with the films as well")
    search.add_argument("--device", default=None)
    search.set_defaults(run=run_search)

    classify = commands.add_parser(
        "classify", help="findings of images that nobody labelled: a table of scores"
    )
    _add_settings(classify)
    asked = classify.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "--finding", action="append", metavar="NAME", help="one that the lexicon knows; repeatable"
    )
    asked.add_argument(
        "--wordings", metavar="FILE", help="YAML: finding -> positive and negative sentences"
    )
    asked.add_argument(
        "--like",
        metavar="RESULTS",
        help="results.json of an evaluation of this model: its findings, sentences, thresholds",
    )
    classify.add_argument(
        "--head",
        choices=("combined", "global", "local"),
        help="(combined, or global where no loss trained the local score)",
    )
    classify.add_argument("--out", default="findings.csv", help="table to write (findings.csv)")
    classify.add_argument(
        "--split", choices=("train", "val", "test", "all"), default="all", help="(all)"
    )
    classify.add_argument("--device", default=None)
    classify.set_defaults(run=run_classify)

    compare = commands.add_parser(
        "compare", help="two evaluations on the same images: the difference with its interval"
    )
    compare.add_argument("of", nargs="+", help="folder of results, or predictions.parquet")
    compare.add_argument(
        "--with",
        dest="against",
        nargs="+",
        action="extend",
        required=True,
        metavar="DIR",
        help="what it is compared with; several (of other seeds) in pairs with the first",
    )
    compare.add_argument(
        "--method",
        action="append",
        help="that alone, as global or '10 %%'; twice: of the first and of the second side",
    )
    compare.add_argument("--out", help="the same as JSON")
    compare.add_argument("--bootstrap", type=int, default=1000, help="resamples (1000)")
    compare.add_argument("--seed", type=int, default=0, help="of the resamples (0)")
    compare.set_defaults(run=run_compare)

    outliers = commands.add_parser(
        "outliers", help="how unlike a reference's images each image is: a p-value, in a table"
    )
    _add_settings(outliers)
    way = outliers.add_mutually_exclusive_group(required=True)
    way.add_argument("--fit", metavar="FILE", help="write the reference of a split's images")
    way.add_argument("--reference", metavar="FILE", help="one that --fit wrote: rank images by it")
    outliers.add_argument("--out", help="table of --reference to write (outliers.csv)")
    outliers.add_argument(
        "--split",
        choices=("train", "val", "test", "all"),
        help="(train of --fit, all of --reference)",
    )
    outliers.add_argument("--device", default=None)
    outliers.set_defaults(run=run_outliers)

    export = commands.add_parser(
        "export", help="one folder with weights, settings, vocabulary: for from_pretrained"
    )
    _add_settings(export)
    export.add_argument("--out", required=True, help="folder to write")
    export.add_argument(
        "--include-concepts",
        action="store_true",
        help="write a concept table of other sources too; its licences are yours to keep",
    )
    export.add_argument(
        "--onnx", action="store_true", help="write both towers as ONNX files too, and check them"
    )
    export.add_argument(
        "--transformers",
        action="store_true",
        help="write both towers as folders that transformers opens too, and check them",
    )
    export.set_defaults(run=run_export)

    doctor = commands.add_parser("doctor", help="what is installed, missing or broken here")
    doctor.add_argument(
        "--plan",
        nargs="+",
        action="extend",
        metavar="CONFIG|key=value",
        help="memory that a training needs on one rank; status 2 where it cannot fit",
    )
    doctor.add_argument("--ranks", type=int, help="of the planned run (the GPUs here, or 1)")
    doctor.add_argument("--memory-gib", type=float, help="of one rank (what is here)")
    doctor.set_defaults(run=run_doctor)

    phantoms = commands.add_parser("phantoms", help="generate chest phantom studies with truth")
    phantoms.add_argument("--out", required=True, help="folder to write")
    phantoms.add_argument("--workers", type=int, help="processes (one a core)")
    _add_settings(phantoms)
    phantoms.set_defaults(run=run_phantoms)

    for name in FOREIGN:
        _add_foreign(commands, name, *FOREIGN[name])
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="CONFIG|key=value",
        help="YAML files, run folders and overrides; checkpoint=DIR means evaluate.checkpoint=DIR",
    )


def _add_foreign(commands: Any, name: str, module: str, text: str) -> None:
    """A sub-command whose arguments its own module adds, imported only when it is asked for.

    Its module may need packages that the other commands do not.
    """
    parser = commands.add_parser(name, help=text, add_help=False)

    def run(options: argparse.Namespace) -> int:
        import importlib

        command = importlib.import_module(module)
        own = argparse.ArgumentParser(prog=f"mlip {name}", description=text)
        command.add_arguments(own)
        for before, given in zip([name, *options.rest], options.rest, strict=False):
            # the empty path is the current folder: "$OUT" where OUT is not set
            if given == "" or (given.startswith("--") and given.endswith("=")):
                named = given or before
                raise ConfigError(f"{named} is empty: expected a value, or leave it out")
        asked = own.parse_args(options.rest)
        options.out = getattr(asked, "out", None)  # for the line where it cannot be written
        return int(command.run(asked))

    parser.set_defaults(run=run)


def _at_home(item: str) -> str:
    """--out=~/x as --out ~/x is: a shell makes no home folder of it behind the sign."""
    option, sign, value = item.partition("=")
    is_path = option.startswith("--") and value.startswith("~/")
    return f"{option}{sign}{os.path.expanduser(value)}" if is_path else item


if __name__ == "__main__":
    sys.exit(main())
