"""What each sub-command of `mlip` does with its arguments: calls the module that does the work, and
says what came out.

Nothing that needs another package is imported before it is used (mlip/cli.py says what is missing).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlip.doctor import examine, is_healthy, report
from mlip.output_file import require_writable
from mlip.typed_tree import ConfigError

if TYPE_CHECKING:
    from mlip.config import Config


def read_settings(items: Sequence[str]) -> Config:
    """Config of YAML files and overrides in any order; files are read first."""
    from mlip.config import load, sort_settings

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


def _open_for_films(config: Config, device: str, *, by_patient: bool) -> tuple[Any, Config, Any]:
    """_open, and the manifest: of new films nothing is written yet, so no other columns are asked
    for than that of the image and, by_patient, those of patient and split."""
    from mlip.dataloading.manifest import load_manifest

    opened, config = _open(config, device)
    columns = dataclasses.replace(
        config.data.columns, report=None, study_id=None, image_id=None, labels=None
    )
    if config.data.verify == "none":
        columns = dataclasses.replace(columns, sha256=None)
    if not by_patient:
        columns = dataclasses.replace(columns, split=None, patient_id=columns.image)
    data = dataclasses.replace(config.data, columns=columns, empty_report="image_only")
    config = dataclasses.replace(config, data=data)
    return opened, config, load_manifest(config.data)


def run_evaluate(options: argparse.Namespace) -> int:
    from mlip.dataloading.manifest import load_manifest
    from mlip.report.run_page import write_report
    from mlip.transfer.alignment.evaluation import evaluate_run
    from mlip.transfer.results_file import save_results
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
    from mlip.transfer.films.ground_image import ground_image

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
    from mlip.transfer.films.embed import write_embeddings

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


def run_outliers(options: argparse.Namespace) -> int:
    from mlip.transfer.films.outlier_table import require_own_file, write_outliers, write_reference

    config = read_settings(options.settings)
    device = _device(options.device)
    _keep_memory(device)
    if options.fit and options.out:
        raise ConfigError(
            f"--out {options.out}: is the table of --reference; --fit writes its own file alone"
        )
    made = Path(options.fit or options.out or "outliers.csv")
    options.out = str(made)  # for the line where it cannot be written
    require_writable(made.absolute().parent)
    require_own_file(made, is_table=not options.fit)
    split = options.split or ("train" if options.fit else "all")
    opened, config, manifest = _open_for_films(
        config, device, by_patient=bool(options.fit) or split != "all"
    )
    if options.fit:
        print(write_reference(opened, config, manifest, made, split=split, device=device))
        return 0
    table = write_outliers(
        opened, config, manifest, Path(options.reference), made, split=split, device=device
    )
    print("\n".join(table))
    return 0


def run_classify(options: argparse.Namespace) -> int:
    from mlip.transfer.films.classify import ask_as_evaluated, ask_names, ask_wordings
    from mlip.transfer.films.classify_table import require_own_file, write_classification

    config = read_settings(options.settings)
    device = _device(options.device)
    _keep_memory(device)
    out = Path(options.out)
    require_writable(out.absolute().parent)
    require_own_file(out)
    wordings = None if options.wordings is None else ask_wordings(Path(options.wordings))
    opened, config, manifest = _open_for_films(config, device, by_patient=options.split != "all")
    if wordings is not None:
        question = wordings
    elif options.like is not None:
        question = ask_as_evaluated(Path(options.like), opened, options.head)
    else:
        question = ask_names(options.finding, opened, config.evaluate)
    table = write_classification(
        *(opened, config, manifest, question, out),
        split=options.split,
        head=options.head,
        device=device,
    )
    print("\n".join([*table, "Not for clinical use."]))
    return 0


def run_compare(options: argparse.Namespace) -> int:
    from mlip.transfer.films.row_table import require_replaceable
    from mlip.transfer.measures.compare import compare, comparison_lines, is_comparison
    from mlip.transfer.measures.predictions import load_predictions
    from mlip.transfer.results_file import save_json

    if options.out:
        out = Path(options.out)
        require_writable(out.absolute().parent)
        # results.json and predictions.parquet of hours lie beside
        require_replaceable(out, "--out", "file of mlip compare", is_ours=is_comparison(out))
    own, others = (
        [load_predictions(Path(path)).named(path) for path in side]  # run.dir may be of one name
        for side in (options.of, options.against)
    )
    methods = None
    if options.method:
        if len(options.method) > 2:
            raise ConfigError(f"--method: expected one or two, got {len(options.method)}")
        methods = (options.method[0], options.method[-1])
    if options.bootstrap < 1:
        raise ConfigError(f"--bootstrap {options.bootstrap}: expected 1 or more")
    found = compare(own, others, methods, resamples=options.bootstrap, seed=options.seed)
    print("\n".join(comparison_lines(found)))
    if options.out:
        print(save_json(found, Path(options.out)))
    return 0


def run_export(options: argparse.Namespace) -> int:
    from mlip.model_facts import results_beside
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
        origin=opened.origin,
        results=results_beside(opened.facts["checkpoint"]),
        include_concepts=options.include_concepts,
        onnx=options.onnx,
        transformers=options.transformers,
    )
    print(f"{folder}: {sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()):,} bytes")
    return 0


def run_doctor(options: argparse.Namespace) -> int:
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
