"""The `mlip` command: evaluate, ground, embed, export, doctor, phantoms, prepare, knowledge.

What does not live here: any work. A sub-command reads its arguments, calls the module that does
the work, and says what came out. Errors of ours are one line and a stable exit code.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlip.config import Config, ConfigError, load, require_utf8, sort_settings
from mlip.output_file import refusal, require_writable
from mlip.unread_output import unread_output_is_lost

# sub-command -> its module (with add_arguments and run), and what it does
FOREIGN = {
    "prepare": (
        "mlip.dataloading.prepare",
        "turn raw downloads or own files into shards and a manifest",
    ),
    "knowledge": ("mlip.knowledge.command", "build and look into concept tables"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command; its exit code (mlip/training/lifecycle.py lists them)."""
    with unread_output_is_lost():  # `mlip prepare ... | head` prepares all the same
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    parser = build_parser()
    # the rest belongs to the sub-commands whose arguments live in their own modules
    options, rest = parser.parse_known_args(arguments)
    if hasattr(options, "settings"):
        # argparse takes positionals only up to the first option: later ones are meant as well
        options.settings += [item for item in rest if not item.startswith("-")]
        rest = [item for item in rest if item.startswith("-")]
    if rest and options.command not in FOREIGN:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        for name in ("out", "checkpoint"):
            given = getattr(options, name, None)
            require_utf8(f"--{name}", str(given or ""))
            if given == "":
                raise ConfigError(f"--{name} is empty: expected the name of a file or folder")
        return int(options.run(options) or 0)
    except KeyboardInterrupt:
        print("mlip: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        from mlip.training.lifecycle import CONFIG, exit_code

        code, told = exit_code(error), str(error)
        if code == 1:
            unwritten = refusal(error, getattr(options, "out", None))
            if unwritten is None:
                raise  # not a mistake we know: the traceback is what helps
            code, told = CONFIG, unwritten
        print(f"mlip {options.command}: {' '.join(told.split())}", file=sys.stderr)
        return code


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlip",
        description="Medical language-image pre-training: what to do before and after train.py.",
        epilog="Research software. Not for clinical use.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    evaluate = commands.add_parser(
        "evaluate",
        help="zero-shot, retrieval, grounding, or a task of configs/transfer: results and a page",
    )
    _add_settings(evaluate)
    evaluate.add_argument("--out", help="folder of results.json and report.html (run.dir)")
    evaluate.add_argument("--device", default=None, help="cpu, cuda (default: what is there)")
    evaluate.set_defaults(run=run_evaluate)

    ground = commands.add_parser("ground", help="where a phrase points in one image: a heat map")
    ground.add_argument("image", help="JPEG, PNG or DICOM file")
    ground.add_argument("phrase", help='for example "left pleural effusion"')
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
    embed.add_argument("--split", choices=("train", "val", "test"), help="(evaluate.split)")
    embed.add_argument(
        "--format", choices=("safetensors", "parquet"), default="safetensors", help="(safetensors)"
    )
    embed.add_argument("--patches", action="store_true", help="patch embeddings too (large)")
    embed.add_argument("--device", default=None)
    embed.set_defaults(run=run_embed)

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
    export.set_defaults(run=run_export)

    doctor = commands.add_parser("doctor", help="what is installed, missing or broken here")
    doctor.add_argument(
        "--plan",
        nargs="+",
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
        help="YAML files and overrides; checkpoint=DIR means evaluate.checkpoint=DIR",
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
        return int(command.run(asked) or 0)

    parser.set_defaults(run=run)


def read_settings(items: Sequence[str]) -> Config:
    """Config of YAML files and overrides in any order; files are read first."""
    if "checkpoint=" in items:  # "checkpoint=$DIR" where DIR is not set: run.dir's would be taken
        raise ConfigError(
            "checkpoint= is empty: expected a run folder, a checkpoint or an export, or leave it "
            "out for the newest checkpoint of run.dir"
        )
    files, overrides = sort_settings(items)
    return load(
        files,
        [f"evaluate.{item}" if item.startswith("checkpoint=") else item for item in overrides],
    )


def _device(asked: str | None) -> str:
    import torch

    if asked is not None:
        if asked.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"--device {asked}: torch sees no GPU here; leave --device out")
        try:
            torch.empty(1, device=asked)
        except (RuntimeError, AssertionError):
            raise ConfigError(
                f"--device {asked}: torch has no such device here; expected cpu, cuda or cuda:1"
            ) from None
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"


def _keep_memory(device: str) -> None:
    """On a CPU activations of one batch are the next one's memory: 3 to 14 % of an embedding."""
    from mlip.training.allocator import keep_freed_memory

    if device == "cpu":
        keep_freed_memory()


def _opened(config: Config, device: str) -> Any:
    """The checkpoint of the settings (evaluate.checkpoint or run.dir) as it was trained."""
    from mlip.pretrained import open_checkpoint

    return open_checkpoint(
        config.evaluate.checkpoint or config.run.dir,
        device=device,
        lexicon=config.knowledge.lexicon,
        weights_of=config.evaluate.weights,
    )


def _open(config: Config, device: str) -> Any:
    """The checkpoint of the settings (evaluate.checkpoint or run.dir) and the settings to use.

    The towers are the checkpoint's; pixels and tokens must be prepared as it was trained.
    """
    from mlip.evaluate_transfer import check_preprocessing
    from mlip.transfer.fingerprint import preprocessing

    opened = _opened(config, device)
    where = str(config.evaluate.checkpoint or config.run.dir)
    check_preprocessing(preprocessing(config), preprocessing(opened.config), where)
    merged = dataclasses.replace(
        config,
        model=opened.config.model,
        loss=opened.config.loss,
        knowledge=dataclasses.replace(opened.config.knowledge, lexicon=config.knowledge.lexicon),
        train=dataclasses.replace(config.train, precision=opened.config.train.precision),
    )
    return opened, merged


def run_evaluate(options: argparse.Namespace) -> int:
    from mlip.dataloading.manifest import load_manifest
    from mlip.report import write_report
    from mlip.transfer import evaluate_run, save_results
    from mlip.transfer.summary import summary_lines

    config = read_settings(options.settings)
    device = _device(options.device)
    options.out = options.out or config.run.dir
    folder = require_writable(Path(options.out))
    _keep_memory(device)
    if config.transfer.task != "none":
        from mlip.evaluate_transfer import evaluate_transfer

        evaluate_transfer(config, folder, device=device)
        return 0
    opened, config = _open(config, device)
    results = evaluate_run(
        opened.model,
        config,
        load_manifest(config.data),
        opened.tokenizer,
        opened.linker,
        opened.table,
        device=device,
        run=opened.facts,
        prototypes=opened.prototypes,
    )
    saved = save_results(results, folder / "results.json")
    page = write_report(folder, results)
    print("\n".join(summary_lines(results)))
    print(f"\n{saved}\n{page}")
    return 0


def run_ground(options: argparse.Namespace) -> int:
    from mlip.pretrained import open_checkpoint
    from mlip.transfer.ground_image import ground_image

    out, device = Path(options.out), _device(options.device)
    require_writable(out.parent)
    if out.is_dir() or out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out}: expected the name of a PNG file, for example map.png")
    opened = open_checkpoint(options.checkpoint, device=device, lexicon=options.lexicon)
    answer = ground_image(
        opened, Path(options.image), options.phrase, out, with_parts=options.words
    )
    x, y = answer.point
    print(f"points at x={x:.0f} y={y:.0f} of {answer.width_px} x {answer.height_px} px")
    print(f"best patch {answer.highest:+.3f}, mean {answer.mean:+.3f} (cosine; high = match)")
    linked = ", ".join(f"{name} ({state})" for name, state in answer.mentions) or "none"
    print(f"linked knowledge: {linked}")
    for part in answer.parts:
        print(f"  {part.name:<32} best patch {part.heat.max():+.3f}, mean {part.heat.mean():+.3f}")
    print(f"{options.out}\nNot for clinical use.")
    return 0


def run_embed(options: argparse.Namespace) -> int:
    from mlip.dataloading.manifest import load_manifest
    from mlip.transfer.embed import write_embeddings

    config = read_settings(options.settings)
    device = _device(options.device)
    _keep_memory(device)
    out = require_writable(Path(options.out))
    opened, config = _open(config, device)
    embedded = write_embeddings(
        opened,
        config,
        load_manifest(config.data),
        out,
        split=options.split or config.evaluate.split,
        with_patches=options.patches,
        device=device,
        form=options.format,
        say=print,
    )
    print(f"{embedded} in {options.out}")
    return 0


def run_export(options: argparse.Namespace) -> int:
    from mlip.pretrained import save_pretrained

    out = Path(options.out)
    require_writable(out.absolute().parent)  # where it is written first
    opened = _opened(read_settings(options.settings), "cpu")
    folder = save_pretrained(
        require_writable(out),
        opened.model,
        opened.config,
        opened.tokenizer,
        opened.table,
        facts=opened.facts,
        include_concepts=options.include_concepts,
    )
    print(f"{folder}: {sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()):,} bytes")
    return 0


def run_doctor(options: argparse.Namespace) -> int:
    from mlip.doctor import examine, is_healthy, report

    if options.plan:
        from mlip.memory_plan import make_plan

        text, refusal = make_plan(
            read_settings(options.plan), ranks=options.ranks, memory_gib=options.memory_gib
        )
        print(text)
        if refusal is not None:
            raise ConfigError(refusal)
        return 0
    checks = examine()
    print(report(checks))
    return 0 if is_healthy(checks) else 1


def run_phantoms(options: argparse.Namespace) -> int:
    from mlip.dataloading.phantom_dataset import write_dataset

    phantom = read_settings(options.settings).data.phantom
    if phantom.studies == 0:
        raise ConfigError(
            "data.phantom.studies is 0: say how many training studies to make, for example "
            "data.phantom.studies=1000"
        )
    print(write_dataset(options.out, phantom, workers=options.workers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
