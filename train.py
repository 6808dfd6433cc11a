"""Pre-train MLIP: parse -> seed -> data -> objective -> loop (engine, saves) -> evaluate.

    deepspeed --num_gpus 2 train.py --config configs/demo.yaml run.seed=2
    torchrun --nproc_per_node 2 train.py --config configs/demo.yaml
    python train.py --config configs/demo.yaml

The same command again goes on where the last one stopped. Exit codes: mlip/training/lifecycle.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlip.assembly import (
    Corpus,
    build_objective,
    keep_concepts,
    open_corpus,
    open_loader,
    provide_phantoms,
)
from mlip.commands.options_once import Parser
from mlip.dataloading.ledger import Ledger
from mlip.dataloading.loader import listed_bad, merge_states
from mlip.held_out_pairs import open_validation
from mlip.pages.run_page import write_report
from mlip.ranks import distributed, process_group
from mlip.saved.model_facts import start_of
from mlip.saved.resumed_run import open_resumed
from mlip.saved.run_vocabulary import keep_vocabulary
from mlip.saved.starting_point import open_start
from mlip.saved.tower_shapes import shapes_of
from mlip.saved.trained_model import open_checkpoint
from mlip.settings.config import Config, ConfigError, read, sort_settings
from mlip.settings.given import given
from mlip.system.output_file import whole_file
from mlip.system.unread_output import terminal_text
from mlip.training import agreement, randomness
from mlip.training.deepspeed_json import read_json
from mlip.training.determinism import require_deterministic
from mlip.training.lifecycle import guarded, leave, locked_folder
from mlip.training.loop import Trainer
from mlip.training.runlog import setup_logging
from mlip.training.stop_request import StopRequest
from mlip.training.trackers import put_evaluation
from mlip.transfer.alignment.evaluation import evaluate_run
from mlip.transfer.fingerprint import (
    hash_of_shapes,
    hash_of_source,
    hash_of_vocabulary,
    source_commit,
    versions,
)
from mlip.transfer.results_file import save_results
from mlip.transfer.summary import mean_scores, summary_lines


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    """The command's options and the Config of its files and key=value overrides."""
    about = "Pre-train MLIP. The same command again goes on where the last one stopped."
    parser = Parser(description=about)
    parser.add_argument(  # "extend": --config A --config B is --config A B
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="YAML files or run folders; a later one wins over an earlier one",
    )
    mismatch_help = "resume a run although settings, vocabulary or concepts differ"
    parser.add_argument("--allow-mismatch", action="store_true", help=mismatch_help)
    flag_help = "as scripts of DeepSpeed take it: the same as train.engine=deepspeed"
    parser.add_argument("--deepspeed", action="store_true", help=flag_help)
    json_help = "DeepSpeed's own JSON file; refused where it differs from the settings"
    parser.add_argument("--deepspeed_config", metavar="JSON", help=json_help)
    rank_help = "passed by launchers; not used"
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=rank_help)
    setting_help = "settings, such as train.max_steps=100; they win over files"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=setting_help)
    options, rest = parser.parse_known_intermixed_args(arguments)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}; a setting is key=value")
    # "--config FILE key=value" reads all as files
    files, overrides = sort_settings(options.config + options.overrides)
    if options.deepspeed:  # before what is typed, which may contradict it
        overrides.insert(0, "train.engine=deepspeed")
    named = given(read(files, overrides, takes_exports=True))
    config = named.config
    if options.deepspeed and config.train.engine != "deepspeed":
        raise ConfigError(f"--deepspeed and train.engine={config.train.engine}: name one of them")
    named.asked_by("train.py")
    if config.evaluate.weights == "ema" and config.train.ema_decay == 0.0:
        raise ConfigError(
            "evaluate.weights=ema needs train.ema_decay above 0, for example 0.999: there would be "
            "no average to evaluate when the training is over"
        )
    if config.evaluate.checkpoint is not None and config.evaluate.after_training:
        raise ConfigError(
            f"evaluate.checkpoint={config.evaluate.checkpoint}: train.py evaluates the run it has "
            "trained; leave it out, or set evaluate.after_training=false and use `mlip evaluate`"
        )
    return options, config


def require_one_command(options: argparse.Namespace, config: Config) -> None:
    """Raises:  ConfigError where a node was started with other settings, code or libraries."""
    if not distributed.is_distributed():
        return
    found = versions()
    agreement.require_same(
        {
            **agreement.settings_of(config),
            "--allow-mismatch": options.allow_mismatch,
            "--deepspeed_config": read_json(options.deepspeed_config),
            "the code of mlip": hash_of_source()[:12],
            **{name: found.get(name) for name in ("torch", "deepspeed")},
        },
        "start all nodes with the same command, of the same code and packages",
    )


def train(options: argparse.Namespace, config: Config, stop: StopRequest) -> Corpus:
    """From the first or the resumed step to the last; a collective call."""
    commit = source_commit()  # before minutes of setting up: it may refuse MLIP_COMMIT
    provide_phantoms(config)
    resumed = open_resumed(config, allow_mismatch=options.allow_mismatch)
    start = open_start(config) if resumed is None else None
    corpus = open_corpus(config, start)
    place = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    loader = open_loader(config, corpus, **place)
    validation = open_validation(config, corpus, **place)

    def keep_ledger(state: Mapping[str, Any]) -> None:
        ledger = Ledger.from_state(state["ledger"])
        bad = listed_bad(corpus.manifest, ledger)
        for name, content in (("ledger", ledger.summary()), ("quarantine", bad)):
            with whole_file(Path(config.run.dir) / f"{name}.json") as partial:
                partial.write_text(json.dumps(content, indent=1), encoding="utf-8")

    objective = build_objective(config, corpus, start, resumed)
    del start  # a whole model
    begun = {
        "towers": shapes_of(config.model, objective.model),
        "start": (resumed.start if resumed is not None else None) or start_of(config),
    }
    content = {
        "concept_table": corpus.table.fingerprint,
        "tokenizer": hash_of_vocabulary(corpus.tokenizer),
    }
    hashes = {
        "manifest": corpus.manifest.fingerprint,
        **content,
        "weights' names and shapes": hash_of_shapes(objective),
    }
    agreement.require_same(
        {"training rows": loader.num_rows, **{k: v[:12] for k, v in hashes.items()}},
        "give all nodes the same manifest, run.dir, lexicon and pretrained weights",
    )
    trainer = Trainer(
        config,
        objective.to(distributed.device()),
        loader,
        merge_states=merge_states,
        on_save=keep_ledger,
        validation=validation,
        facts={"commit": commit, "versions": versions(), **begun, **content},
        deepspeed_json=read_json(options.deepspeed_config),
        allow_mismatch=options.allow_mismatch,
    )
    keep_concepts(config, corpus.table)
    keep_vocabulary(config, corpus.tokenizer)
    try:
        trainer.fit(stop)
    finally:
        loader.close()
        if validation is not None:
            validation.close()
    return corpus


def evaluate(config: Config, corpus: Corpus) -> None:
    """Score the run's checkpoint, read back from disk, and write its page."""
    folder = Path(config.run.dir)
    opened = open_checkpoint(
        folder, device=distributed.device(), weights_of=config.evaluate.weights
    )
    results = evaluate_run(opened, config, corpus.manifest)
    save_results(results, folder)
    page = write_report(folder, results)
    print(terminal_text(summary_lines(results)))
    print(f"report: {page}")
    put_evaluation(config, opened.facts["step"], mean_scores(results))


def main(arguments: list[str]) -> int:
    """Run the command; its exit code (mlip/training/lifecycle.py lists them)."""
    folder: list[Path] = []  # known once the settings are

    def run() -> None:
        options, config = parse(arguments)
        folder.append(Path(config.run.dir))
        stop = StopRequest()
        process_group.start(config.run.timeout_s)
        if not distributed.is_distributed():  # several ranks agree on it before the first step
            stop.raise_at_once("before training; nothing was trained since the start")
        setup_logging()
        randomness.seed_everything(config.run.seed)
        require_one_command(options, config)
        with locked_folder(folder[0], config.run.timeout_s):
            require_deterministic(config)
            corpus = train(options, config, stop)
            gc.collect()  # the engine's memory, before the model is built again
            with process_group.rank_0_alone() as is_main:
                if config.evaluate.after_training:
                    stop.raise_at_once("around the evaluation; the training state is saved")
                    if is_main:
                        randomness.use_all_cores()
                        evaluate(config, corpus)
                elif is_main:
                    print(
                        "not evaluated (evaluate.after_training=false): "
                        f"`mlip evaluate {config.run.dir}` does it"
                    )

    return guarded(run, lambda: folder[0] if folder else None)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
