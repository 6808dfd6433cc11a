"""What each sub-command of `mlip` does with its arguments: calls the module that does the work, and
says what came out.

Nothing that needs another package is imported before it is used (mlip/cli.py says what is missing).
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from mlip.commands.doctor import examine, is_healthy, report
from mlip.commands.inputs import (
    keep_memory,
    open_trained,
    open_with_settings,
    pick_device,
    read_given,
    sort_items,
)
from mlip.settings.typed_tree import ConfigError, all_keys
from mlip.system.output_file import begins_with, require_replaceable, require_writable, whole_file
from mlip.system.unread_output import terminal_text


def run_evaluate(options: argparse.Namespace) -> int:
    from mlip.commands.evaluate_transfer import evaluate_transfer, takes_checkpoint
    from mlip.dataloading.manifest import load_manifest
    from mlip.pages.run_page import write_report
    from mlip.settings.given import of_task
    from mlip.transfer.alignment.evaluation import evaluate_run
    from mlip.transfer.results_file import save_results
    from mlip.transfer.summary import summary_lines

    given = read_given(options.settings)
    config, has_task = given.config, given.config.transfer.task != "none"
    command = of_task(config.transfer, takes_checkpoint(config)) if has_task else "mlip evaluate"
    given = given.asked_by(command)
    device = pick_device(options.device)
    options.out = options.out or config.run.dir
    folder = require_writable(Path(options.out))
    keep_memory(device)
    if has_task:
        evaluate_transfer(given, folder, device=device)
        return 0
    opened, config = open_with_settings(given, device)
    results = evaluate_run(opened, config, load_manifest(config.data))
    saved = save_results(results, folder)
    page = write_report(folder, results)
    print(terminal_text(summary_lines(results)))
    print(f"\n{saved}\n{page}")
    return 0


def run_compare(options: argparse.Namespace) -> int:
    from mlip.transfer.comparison import comparison_lines
    from mlip.transfer.measures.compare import compare, is_comparison
    from mlip.transfer.measures.predictions import file_of, load_predictions
    from mlip.transfer.results_file import save_json

    def require_own(out: Path) -> None:
        # results.json and predictions.parquet of hours lie beside
        require_replaceable(out, "--out", "file of mlip compare", is_ours=is_comparison(out))

    if options.out:
        require_writable(Path(options.out).absolute().parent)
        require_own(Path(options.out))
    pairs = [
        tuple(file_of(Path(path)).resolve() for path in pair)
        for pair in zip(options.of, options.against, strict=False)
    ]
    if len(set(pairs)) < len(pairs):
        raise ConfigError(
            "a pair of evaluations is named twice: fits would be counted that there are not; name "
            "it once"
        )
    own, others = (
        [load_predictions(Path(path)).named(path) for path in side]  # run.dir may be of one name
        for side in (options.of, options.against)
    )
    methods = None
    if options.method:
        if len(options.method) > 2:
            raise ConfigError(f"--method: expected one or two, got {len(options.method)}")
        methods = (options.method[0], options.method[-1])
    if options.seed < 0:
        raise ConfigError(f"--seed {options.seed}: expected 0 or more")
    if options.bootstrap < 1:
        raise ConfigError(f"--bootstrap {options.bootstrap}: expected 1 or more")
    found = compare(own, others, methods, resamples=options.bootstrap, seed=options.seed)
    print(terminal_text(comparison_lines(found)))
    if options.out:
        print(save_json(found, Path(options.out), require_own=require_own))
    return 0


def run_export(options: argparse.Namespace) -> int:
    from mlip.pretrained import save_pretrained
    from mlip.saved.model_facts import results_beside

    out = Path(options.out)
    require_writable(out.absolute().parent)  # where it is written first
    opened = open_trained(read_given(options.settings).asked_by("mlip export"), "cpu")
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


def run_settings(options: argparse.Namespace) -> int:
    from mlip.settings.config import assemble, read
    from mlip.settings.reference import find, sections
    from mlip.settings.text import block, listing, values

    words, files, overrides = _sort_terms(options)
    if options.out:
        if words or files or overrides:
            raise ConfigError("--out writes a page of all settings: leave out words and values")
        out = Path(options.out)
        _write_settings(out)
        print(out)
        return 0
    if not (words or files or overrides):
        print(terminal_text(listing(sections())))
        return 0
    named = read(files, overrides, takes_exports=True)
    come_to = values(assemble(named), named) if named else {}
    lines = [line for s in find(words) for line in block(s, come_to.get(s.name))]
    print(terminal_text(lines))
    return 0


def _sort_terms(options: argparse.Namespace) -> tuple[list[str], list[str], list[str]]:
    """(words, files, overrides) that `mlip settings` was given.

    --config takes all that follows it; files may also stand where other commands take them.
    """
    given = [*options.config, *options.terms]
    if "" in given:  # "$WORD" where WORD is not set
        raise ConfigError("a word is empty: expected a word, a name, key=value, or nothing for all")
    words = [
        item
        for item in given
        if not ("=" in item or "/" in item or item.endswith((".yaml", ".yml")))
        and not (item in options.config and _stands_for_settings(item))
    ]
    return (words, *sort_items([item for item in given if item not in words]))


def _stands_for_settings(path: str) -> bool:
    from mlip.settings.config import Config
    from mlip.settings.config_file import OF_A_RUN, OF_AN_EXPORT

    held = [os.path.join(path, name) for name in (OF_A_RUN, OF_AN_EXPORT)]
    # the folder data is not what `mlip settings --config FILE data` asks about
    is_section = path in all_keys(Config) and os.path.isdir(path)
    return any(map(os.path.isfile, held)) if is_section else os.path.exists(path)


def _write_settings(out: Path) -> None:
    """The page of all settings."""
    from mlip.settings.reference import sections
    from mlip.settings.text import TITLE, page

    require_writable(out.absolute().parent)
    is_ours = begins_with(out, f"{TITLE}\n")
    require_replaceable(out, "--out", "page of mlip settings", is_ours=is_ours)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as partial:
        partial.write_text(page(sections()), encoding="utf-8")


def run_doctor(options: argparse.Namespace) -> int:
    for name, value in (("--ranks", options.ranks), ("--memory-gib", options.memory_gib)):
        if value is None:
            continue
        if not options.plan:
            raise ConfigError(f"{name} {value}: is of a plan; name its settings with --plan")
        least = 1 if name == "--ranks" else 0.001  # a MiB
        if not least <= value < math.inf:
            raise ConfigError(f"{name} {value}: expected {least:g} or more")
    if options.plan:
        from mlip.memory_plan import make_plan

        text, refusal = make_plan(
            read_given(options.plan).config, ranks=options.ranks, memory_gib=options.memory_gib
        )
        print(text)
        if refusal is not None:
            raise ConfigError(refusal)
        return 0
    checks = examine()
    print(report(checks))
    return 0 if is_healthy(checks) else 1


def run_phantoms(options: argparse.Namespace) -> int:
    from mlip.dataloading.phantom.dataset import write_dataset

    phantom = read_given(options.settings).asked_by("mlip phantoms").config.data.phantom
    if phantom.studies == 0:
        raise ConfigError(
            "data.phantom.studies is 0: say how many training studies to make, for example "
            "data.phantom.studies=1000"
        )
    if options.workers is not None and options.workers < 0:
        raise ConfigError(f"--workers {options.workers}: expected 1 or more, 0 for one a core")
    try:
        print(write_dataset(options.out, phantom, workers=options.workers))
    except FileNotFoundError:
        require_writable(Path(options.out))  # /proc and its like have no room for a folder
        raise
    return 0
