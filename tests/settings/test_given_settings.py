"""Settings of a command line that nothing would read are refused; those of files are not."""

from __future__ import annotations

import os
import threading
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import yaml

import train
from mlip.cli import main
from mlip.commands.inputs import read_given
from mlip.saved.agreement import read_config
from mlip.settings import config as configuration
from mlip.settings.config import Config
from mlip.settings.config_file import read_override
from mlip.settings.given import OF_TASK, OF_TASK_ALONE, OF_TASK_TUNED, READS, Given
from mlip.settings.needed import NEEDS
from mlip.settings.typed_tree import ConfigError, all_keys, merge
from tests.small_run import small_export, small_run

PROBE = ("transfer.task=classification", "transfer.classes={Edema: one, Mass: zero}")


def given(*items: str) -> Given:
    return read_given(items)


@pytest.mark.parametrize(
    "command, items, named",
    [
        ("mlip evaluate", ["transfer.start=random"], "transfer.start=random: it is of a task"),
        ("mlip evaluate", ["transfer.classes={A: one}"], "transfer.classes"),
        (OF_TASK, [*PROBE, "evaluate.split=val"], "evaluate.split=val: a task trains on train"),
        (OF_TASK, [*PROBE, "evaluate.max_studies=20"], "evaluate.max_studies=20"),
        (OF_TASK, [*PROBE, "evaluate={thresholds: false}"], "thresholds=false: leave it out"),
        (OF_TASK, [*PROBE, "evaluate.negative_prompts=['no {}']"], "negative_prompts"),
        (OF_TASK_ALONE, [*PROBE, "train.lr=0.1"], "train.lr=0.1"),
        ("mlip embed", ["evaluate.max_studies=20"], "evaluate.max_studies"),
        ("mlip embed --images", ["evaluate.split=val"], "evaluate.split=val: say --split"),
        ("mlip embed --images", ["evaluate.max_studies=9"], "max_studies=9: leave it out"),
        ("mlip search --finding", ["evaluate.subset=a"], "evaluate.subset"),
        ("mlip search", ["evaluate.positive_prompts=['{}']"], "positive_prompts"),
        ("mlip classify", ["evaluate.negative_prompts=['no {}']"], "evaluate.negative_prompts"),
        ("mlip classify --finding", ["evaluate.split=val"], "evaluate.split=val: say --split"),
        ("mlip classify", ["evaluate.threshold_rule=youden"], "evaluate.threshold_rule"),
        ("mlip outliers", ["evaluate.subgroups={sex: []}"], "evaluate.subgroups"),
        ("mlip phantoms", ["run.seed=3"], "run.seed=3: say data.phantom.seed"),
        *(
            ("mlip evaluate", [f"transfer.{item}"], f"{item}.*: it is of a task")
            for item in ("lr=1.0", "balance=true", "nms_iou=0.1", "monitor=score")
        ),
        ("mlip evaluate", ["transfer.by_fraction.1.lr=1"], "by_fraction=.*: it is of a task"),
        (
            OF_TASK_ALONE,
            [*PROBE, "data.phantom.studies=9"],
            "studies=9: nothing is generated here: make studies with `mlip phantoms`",
        ),
    ],
)
def test_a_typed_setting_that_a_command_does_not_read_is_refused(
    command: str, items: list[str], named: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{command} does not read .*{named}"):
        given(*items).asked_by(command)
    given(*items).asked_by("train.py")  # the run keeps it, for the command that reads it


def test_what_a_command_reads_beside_what_it_does_not_is_its_own() -> None:
    given("evaluate.split=val").asked_by("mlip embed")
    given("evaluate.positive_prompts=['{}']").asked_by("mlip classify --finding")
    given("data.phantom.studies=3", "data.phantom.seed=3").asked_by("mlip phantoms")
    given(*PROBE, "evaluate.threshold_rule=youden", "transfer.epochs=3").asked_by(OF_TASK)


def test_what_files_and_runs_hold_beside_is_refused_to_nobody(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("evaluate: {split: val, max_studies: 20}\ntransfer: {start: random}\n")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    whole = configuration.to_dict(configuration.load([file], [*PROBE, f"run.dir={run}"]))
    (run / "config.yaml").write_text(yaml.safe_dump(whole))
    for command in READS:
        given(str(file)).asked_by(command)
        given(str(run), "transfer.task=none").asked_by(command)
        given(str(run / "config.yaml")).asked_by(command)


def test_what_a_file_of_a_task_says_of_its_evaluation_counts_as_typed(tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    file.write_text("evaluate: {split: val}\ndata: {crop_px: 96}\ntransfer: {task: detection}\n")
    with pytest.raises(ConfigError, match="does not read evaluate.split=val"):
        given(str(file)).asked_by(OF_TASK)
    given(str(file), "evaluate.split=test").asked_by(OF_TASK)  # the default takes it away
    given(str(file), "transfer.task=none").asked_by("mlip evaluate")
    given(str(file)).asked_by("mlip phantoms")  # another command has nothing to do with it
    file.write_text("train: {lr: 0.1}\ntransfer: {task: detection}\n")
    given(str(file)).asked_by(OF_TASK_ALONE)  # of its evaluation, and of nothing else


def test_a_typed_setting_of_the_training_must_be_the_checkpoints() -> None:
    trained = small_run().config
    typed = given(*small_run().settings, "data.phantom.studies=0").asked_by("mlip evaluate")
    typed.require_trained(trained, "DIR")  # the same settings again, as a script has them
    for items, kept in (
        (["train.precision=bf16"], "fp32"),
        (["loss.matching.weight=0"], "0.5"),
        (["model.embed_dim=128"], "32"),  # the default, and not what is used
        (["data.vocab_size=500"], "400"),
    ):
        asked = given(*items).asked_by("mlip evaluate")
        with pytest.raises(
            ConfigError, match=rf"DIR was trained with {kept}, and mlip evaluate takes"
        ):
            asked.require_trained(trained, "DIR")
    with pytest.raises(ConfigError, match="leave it out; what a task trains with is set in transf"):
        given(*PROBE, "train.lr=0.1").asked_by(OF_TASK).require_trained(trained, "DIR")
    with pytest.raises(ConfigError, match="takes no other: say OMP_NUM_THREADS=N"):
        given("run.threads=1").asked_by("mlip embed").require_trained(trained, "DIR")
    for read in ("knowledge.lexicon=a", "model.vision.source=a", "train.start=a", "run.seed=9"):
        given(read).asked_by("mlip evaluate").require_trained(trained, "DIR")
    # opened for use it is computed by what every machine has
    ways = ("model.attention=xformers", "loss.local_alignment.impl=triton")
    opened = read_config(configuration.to_dict(configuration.load([], ways)), Path("DIR"))
    given(*ways).asked_by("mlip evaluate").require_trained(opened, "DIR")
    assert (opened.model.attention, opened.loss.local_alignment.impl) == ("sdpa", "auto")
    augmented, tuned = [*PROBE, "data.augment.contrast=0.3"], "transfer.encoder=tuned"
    told = "contrast=0.3 is of the training: DIR was .* with 0.1, .*encoder=tuned reads it"
    with pytest.raises(ConfigError, match=told):
        given(*augmented).asked_by(OF_TASK).require_trained(trained, "DIR")
    given(*augmented, tuned).asked_by(OF_TASK_TUNED).require_trained(trained, "DIR")
    given(*augmented, tuned).asked_by(OF_TASK_ALONE)
    sentences = [*PROBE, tuned, "data.augment.sentence_dropout=0"]
    with pytest.raises(ConfigError, match="sentence_dropout=0.0 is of the training"):
        given(*sentences).asked_by(OF_TASK_TUNED).require_trained(trained, "DIR")
    with pytest.raises(ConfigError, match="does not read data.augment.sentence_dropout=0.0"):
        given(*sentences).asked_by(OF_TASK_ALONE)
    for items in ([*augmented], ["transfer.task=segmentation", tuned, augmented[-1]]):
        with pytest.raises(ConfigError, match="contrast=0.3 is not read with transfer"):
            given(*items).asked_by(OF_TASK_ALONE)


@pytest.mark.parametrize(
    "command", sorted(set(READS) - {OF_TASK_ALONE, "train.py", "mlip phantoms"})
)
def test_commands_that_generate_nothing_take_only_the_phantoms_of_the_training(
    command: str,
) -> None:
    """`mlip evaluate runs/a data.phantom.test_studies=5000` scored the old ones without a word."""
    trained = small_run().config
    given(*small_run().settings).asked_by(command).require_trained(trained, "DIR")
    given("data.phantom.studies=0").asked_by(command).require_trained(trained, "DIR")
    for item, kept in (("studies=9", 32), ("test_studies=5000", 32), ("test_seed=3", 1000001)):
        asked = given(f"data.phantom.{item}").asked_by(command)
        with pytest.raises(
            ConfigError,
            match=f"data.phantom.{item} is of the training: DIR was trained with {kept}, and "
            f"{command} takes no other: nothing is generated here: make studies with `mlip phan",
        ):
            asked.require_trained(trained, "DIR")
    given("data.phantom.studies=9", "data.phantom.seed=3").asked_by("mlip phantoms")


def test_a_percentage_of_no_fit_is_refused_where_it_was_typed_or_a_file_contradicts_itself(
    tmp_path: Path,
) -> None:
    """transfer.by_fraction={5: {lr: 1}} beside fractions of 1, 10 and 100 changed nothing."""
    for items in (
        ["transfer.by_fraction={5: {lr: 1}}"],
        ["transfer.by_fraction.5.lr=1"],
        ["transfer.by_fraction={1: {lr: 1}, 5: {lr: 1}}"],
        ["transfer.fractions=[5]", "transfer.by_fraction={1: {lr: 1}}"],
    ):
        wrong = "1" if "fractions=[5]" in items[0] else "5"
        for command in (OF_TASK, OF_TASK_ALONE):
            with pytest.raises(ConfigError, match=rf"by_fraction\.{wrong} is of no fit with "):
                given(*PROBE, *items).asked_by(command)
        given(*PROBE, *items).asked_by("train.py")  # of whose run a later task may be
    given(*PROBE, "transfer.fractions=[5]", "transfer.by_fraction={5.0: {lr: 1}}").asked_by(OF_TASK)
    file, other = tmp_path / "task.yaml", tmp_path / "fewer.yaml"
    file.write_text(
        "transfer: {task: detection, fractions: [1, 100], by_fraction: {1: {batch: 8}}}\n"
    )
    other.write_text("transfer: {fractions: [100]}\n")
    given(str(file)).asked_by(OF_TASK)
    given(str(file), str(other)).asked_by(OF_TASK)  # fewer of them, by another file or typed
    given(str(file), "transfer.fractions=[100]").asked_by(OF_TASK)
    given(str(file), "transfer.by_fraction.100.lr=1").asked_by(OF_TASK)
    with pytest.raises(ConfigError, match=r"by_fraction\.100 is of no fit"):
        given(
            str(file), str(other), "transfer.fractions=[1]", "transfer.by_fraction.100.lr=1"
        ).asked_by(OF_TASK)
    file.write_text(file.read_text().replace("{1: {", "{10: {"))
    with pytest.raises(
        ConfigError, match=r"by_fraction\.10 is of no fit with .*=\[1.0, 100.0\]: name"
    ):
        given(str(file)).asked_by(OF_TASK)
    given(str(file), "transfer.by_fraction={}").asked_by(OF_TASK)
    given(str(file), "transfer.fractions=[10]").asked_by(OF_TASK)
    given(str(file)).asked_by("mlip embed")


def test_files_of_tasks_are_refused_to_no_command() -> None:
    of_tasks = {OF_TASK, OF_TASK_ALONE, OF_TASK_TUNED}
    opened = set(READS) - {*of_tasks, "train.py", "mlip phantoms"}
    configs = Path(__file__).parents[2] / "configs"
    for file in configs.rglob("*_classification.yaml"):
        for over in ([], [str(configs / "transfer" / "baseline_imagenet.yaml")]):
            for commands, typed in ((opened, ["checkpoint=a"]), (set(READS) - opened, [])):
                named = given(str(file), *over, *typed)
                for command in commands:
                    named.asked_by(command)


def test_where_the_checkpoint_decides_both_of_two_settings_they_are_held_against_it() -> None:
    typed = ("loss.local_alignment.aggregation_scale=3", "train.momentum=0.9")
    trained = configuration.load(
        [],
        [*typed, "loss.local_alignment.aggregation=lse", "train.optimizer=muon"]
        + ["train.zero_stage=0"],
    )
    for command in ("mlip evaluate", "mlip export", OF_TASK, OF_TASK_TUNED):
        asked = given(*typed).asked_by(command)
        asked.require_trained(trained, "DIR")  # an export brings aggregation and optimizer along
        with pytest.raises(ConfigError, match="trained with 5.0"):
            asked.require_trained(Config(), "DIR")


def test_what_a_start_was_trained_with_may_be_typed_for_the_run_that_begins_with_it(
    tmp_path: Path,
) -> None:
    """One list of settings for the first training and those that begin with it ended here."""
    export, run = small_export(), tmp_path / "run"
    kept = run / "checkpoints" / "step_00000001"
    kept.mkdir(parents=True)
    (run / "config.yaml").write_text("data: {vocab_size: 300}\n")
    for start, size in ((export, 400), (run, 300), (kept, 300)):
        given(*small_run().settings, f"data.vocab_size={size}", f"train.start={start}").asked_by(
            "train.py"
        )
        for other in ("data.vocab_size=500", "data.vocab_min_patients=9"):
            with pytest.raises(ConfigError, match="is not read with train.start="):
                given(f"run.dir={tmp_path}/new", other, f"train.start={start}").asked_by("train.py")
    # the same command goes on where its start is gone
    gone = ["data.vocab_size=300", f"train.start={tmp_path}/gone"]
    given(f"run.dir={run}", *gone).asked_by("train.py")
    with pytest.raises(ConfigError, match="vocab_size=300 is not read with train.start="):
        given(f"run.dir={tmp_path}/new", *gone).asked_by("train.py")
    with pytest.raises(ConfigError, match="vocab_size=400 is not read with model.text.tokenizer="):
        given(
            "data.vocab_size=400", f"train.start={export}", f"model.text.tokenizer={export}"
        ).asked_by("train.py")


def test_what_others_read_is_turned_off_to_no_command() -> None:
    given("data.phantom.seed=3").asked_by("mlip evaluate")  # it generates none in any case
    scored = ("evaluate.threshold_rule=youden", "transfer.task=detection")
    given(*scored).asked_by("train.py")  # whose own evaluation is none of the task


def test_settings_from_a_pipe_are_read_once_and_count_as_those_of_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "settings"
    os.mkfifo(pipe)
    text = "transfer: {task: detection}\nevaluate: {split: val}\n"
    writer = threading.Thread(target=pipe.write_text, args=(text,), daemon=True)
    writer.start()
    named = given(str(pipe))
    writer.join()
    assert named.config.transfer.task == "detection"
    with pytest.raises(ConfigError, match="evaluate.split=val: a task trains on train"):
        named.asked_by(OF_TASK)


def test_what_a_resumed_run_has_changed_since_is_its_own(tmp_path: Path) -> None:
    trained = small_run().config  # of its best checkpoint, from before val was watched
    asked = given("train.monitor=loss", "train.keep_checkpoints=3").asked_by("mlip evaluate")
    now = configuration.load([], [*small_run().settings, "train.monitor=loss"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(configuration.to_dict(now)))
    with pytest.raises(ConfigError, match=r"keep_checkpoints=3 .* was trained with 2, and"):
        asked.require_trained(trained, str(tmp_path))
    (tmp_path / "config.yaml").write_text("train: {monitor: loss, keep_checkpoints: 3}\n")
    asked.require_trained(trained, str(tmp_path))
    (tmp_path / "config.yaml").write_text("train: [")
    with pytest.raises(ConfigError, match="train.keep_checkpoints=3 is of the training"):
        asked.require_trained(trained, str(tmp_path))


@pytest.mark.parametrize(
    "items, other",
    [
        (["train.epochs=3", "train.max_steps=10"], "train.max_steps=10: set train.max_steps=0"),
        (["train.momentum=0.9"], "train.optimizer=adamw: set train.optimizer=muon"),
        (["train.monitor_pairs=9"], "train.monitor=none"),
        (["data.phantom.test_studies=9"], "data.phantom.studies=0"),
        (["model.vision.pool_heads=4"], "model.vision.pool=tower"),
        (["model.divergence.beta_kl=1", "model.divergence.kind=dropout"], "kind=dropout"),
        (["loss.local_alignment.aggregation_scale=3"], "aggregation=mean"),
        (
            ["loss.local_alignment.attention_scale=3", "loss.local_alignment.pooling=max"],
            "pooling=max: set loss.local_alignment.pooling=attention",
        ),
        *(
            ([f"data.{item}", f"{other}=a"], f"{other}=a: set {other}=null, or leave it out")
            for item in ("vocab_size=500", "vocab_min_patients=9")
            for other in ("model.text.tokenizer", "model.text.source", "train.start")
        ),
        (["model.vision.options={depths: [1]}", "model.vision.source=a"], "source=a: set"),
        (["model.text.options={hidden_size: 8}", "model.text.source=a"], "source=a: set"),
        *(
            (["transfer.task=segmentation", f"transfer.{item}"], "task=segmentation: set .*=detec")
            for item in ("nms_iou=0.1", "box_loss=objects", "iou_thresholds=[0.5]")
        ),
        (["transfer.task=detection", "transfer.mask_source=boxes"], "task=detection: set"),
        (["knowledge.dim=9", "knowledge.vectors=own.safetensors"], "vectors=own.safetensors"),
        ([*PROBE, "transfer.lr=1", "transfer.probe=logistic"], "transfer.probe=logistic"),
        ([*PROBE, "transfer.subset_of=all"], "transfer.subset=null"),
        ([*PROBE, "evaluate.checkpoint=a", "transfer.start=imagenet"], "start=imagenet"),
        (["evaluate.threshold_rule=youden", "transfer.task=detection"], "task=detection"),
        (
            [*PROBE, "evaluate.threshold_rule=youden", "transfer.exclusive=true"],
            "transfer.exclusive=true",
        ),
    ],
)
def test_a_typed_setting_that_another_one_turns_off_is_refused(
    items: list[str], other: str, tmp_path: Path
) -> None:
    command = OF_TASK if any(item.startswith("transfer.task=") for item in items) else "train.py"
    with pytest.raises(ConfigError, match=f"is not read with .*{other}"):
        given(*items).asked_by(command)
    merged: dict[str, Any] = {}
    for item in items:
        merge(merged, read_override(item, Config), Config)
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(merged))
    given(str(file)).asked_by(command)  # a file may be one of several that are laid over


@pytest.mark.parametrize(
    "item, off",
    [
        ("model.divergence.dropout=0.5", "model.divergence.kind=none"),
        ("model.divergence.dropout=0.5", "loss.global_contrastive.weight=0.0"),
        ("model.divergence.kind=dropout", "loss.global_contrastive.weight=0.0"),
        ("loss.local_alignment.knowledge_scale=3", "loss.local_alignment.knowledge_gain=0.0"),
        ("loss.category.prototypes=9", "loss.category.weight=0.0"),
        ("loss.matching.layers=1", "loss.matching.weight=0.0"),
        ("loss.swapping.margin=1", "loss.swapping.weight=0.0"),
    ],
)
def test_a_setting_of_what_a_file_turns_off_is_refused_but_not_beside_a_typed_off(
    item: str, off: str, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(read_override(off, Config)))
    with pytest.raises(ConfigError, match=f"is not read with {off}"):
        given(str(file), item).asked_by("train.py")
    given(str(file), item, off).asked_by("train.py")  # one of a sweep over weights


def test_tables_name_settings_that_there_are() -> None:
    known = set(all_keys(Config))
    named = {
        name for reads in READS.values() for name in (*reads.own, *reads.of_model, *reads.unread)
    }
    named |= {name for needs in NEEDS for name in (*needs.settings, needs.other)}
    assert named <= known
    for needs in NEEDS:  # what a refusal tells to set is enough
        if needs.remedy != "NAME":
            told = read_override(f"{needs.other}={needs.remedy}", Config)
            assert needs.holds(reduce(getitem, needs.other.split("."), told)), needs


def test_commands_refuse_before_they_write_and_train_py_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model = small_run(), f"checkpoint={small_export()}"
    out = ["--out", str(tmp_path / "out")]
    (tmp_path / "of-1").symlink_to(small_export())
    by_seed = [*run.settings, *PROBE, f"checkpoint={tmp_path}/of-{{seed}}", "transfer.seeds=[1]"]
    for command, told in (
        (["export", model, "data.crop_px=112", *out], "trained with 96, and mlip export takes"),
        (["export", model, "train.ema_decay=0.9", *out], "trained with 0.0"),
        (["evaluate", *run.settings, model, "transfer.encoder=tuned", *out], "set transfer.task"),
        (["evaluate", *run.settings, model, "train.compile=true", *out], "trained with false"),
        (["evaluate", *PROBE, model, "evaluate.split=val", *out], "does not read evaluate.split"),
        (["evaluate", *run.settings, *PROBE, model, "train.lr=1", *out], "is set in transfer"),
        (["evaluate", *by_seed, "train.lr=1", *out], "/of-1 was trained with"),
        (
            ["evaluate", *PROBE, *run.settings, model, "data.augment.contrast=0.3", *out],
            "contrast=0.3 is of the training",
        ),
        (
            ["evaluate", *PROBE, *run.settings, model, "data.augment.contrast=0.3", *out]
            + ["transfer.encoder=tuned", "train.lr=1"],
            "encoder=tuned takes no other",  # where contrast is its own
        ),
        (["classify", model, "--finding", "edema", "evaluate.split=val", *out], "evaluate.split"),
        (["outliers", model, "--fit", f"{tmp_path}/out", "evaluate.split=val"], "evaluate.split"),
        (["phantoms", "data.phantom.studies=2", "run.seed=2", *out], "run.seed"),
    ):
        assert main(command) == 2, command
        assert told in capsys.readouterr().err
        assert not list(tmp_path.glob("out*/*")), command
    with pytest.raises(ConfigError, match="train.epochs=2.0 is not read"):
        train.parse(["train.epochs=2", "train.max_steps=3"])
    train.parse(["train.max_steps=3"])


def test_an_export_takes_typed_settings_that_are_its_runs_own(tmp_path: Path) -> None:
    run = small_run()
    command = ["export", *run.settings, f"checkpoint={small_export()}", "--out", f"{tmp_path}/e"]
    assert main(command) == 0
