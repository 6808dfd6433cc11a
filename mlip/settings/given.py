"""Settings that a command line names and nothing would read: refused, command by command.

Only what was typed as key=value counts, and for a task what a file that names a transfer.task says
of its evaluation. Files are shared by commands, and a run's own settings come along with its
folder: what those hold beside is nobody's mistake. Which typed settings another one turns off is in
needed.py; what two settings must agree on whoever named them, in agreement.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from mlip.settings.config import Config, Named, assemble, from_dict
from mlip.settings.config_file import CHECKPOINTS, OF_A_RUN, OF_AN_EXPORT, read_file
from mlip.settings.needed import CROPS, NEEDS, PHANTOMS, below
from mlip.settings.transfer import Transfer
from mlip.settings.typed_tree import ConfigError, all_keys, plain


@dataclass(frozen=True, kw_only=True)
class _Reads:
    """What a command does not read from the settings; of the names that hold the longest decides.

    unread    what it has no use for, though one could think so
    of_model  what it takes from the checkpoint
    own       what it reads all the same; so are settings that no name holds, as those of other
              commands which a script may give to all of them
    hints     setting -> what to say instead of it, where that is more than to leave it out
    """

    unread: tuple[str, ...] = ()
    of_model: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    hints: Mapping[str, str] = field(default_factory=dict)

    def kind(self, setting: str) -> str:
        """ "own", "of_model" or "unread"; of equal names the first decides."""
        named = {kind: getattr(self, kind) for kind in ("own", "of_model", "unread")}
        lengths = {
            kind: max((len(n) for n in names if f"{setting}.".startswith(f"{n}.")), default=0)
            for kind, names in named.items()
        }
        return max(lengths, key=lambda kind: lengths[kind])

    def instead_of(self, setting: str) -> str:
        return {**_HINTS, **self.hints}.get(setting, "leave it out")


OF_TASK = "mlip evaluate with transfer.task"
OF_TASK_ALONE = f"{OF_TASK} and without a checkpoint"
OF_TASK_TUNED = f"{OF_TASK}=classification and transfer.encoder=tuned"
_OF_TASKS = (OF_TASK, OF_TASK_ALONE, OF_TASK_TUNED)
_LEXICON = "knowledge.lexicon"
_SENTENCES = "data.augment.sentence_dropout"
# decided when the model was trained: the others have nothing to do with it any more
_TRAINED = (
    *("model", "loss", "knowledge", "train", "batch", "data.phantom"),
    *below("data", "augment vocab_size vocab_min_patients"),
    *below("run", "exact deterministic threads"),
)
# what the other commands hold against the checkpoint themselves, whoever named it
_PREPARED = below("data", "resize_px crop_px channels mean std max_tokens max_entities sections")
_PROMPTS = below("evaluate", "positive_prompts negative_prompts")
_OF_FITS = below("evaluate", "split max_studies thresholds")
_OF_SCORES = below(
    "evaluate",
    "split max_studies subset exclusive thresholds threshold_rule trained_on subgroups",
)

_HINTS = {
    "run.threads": "say OMP_NUM_THREADS=N before the command",
    **dict.fromkeys(
        (*PHANTOMS, "data.phantom.studies"),
        "nothing is generated here: make studies with `mlip phantoms`, and name data.manifest",
    ),
}
_SAY_SPLIT = {"evaluate.split": "say --split"}
_ALL_OF_TEST = dict.fromkeys(
    ("evaluate.split", "evaluate.max_studies"),
    "a task trains on train, chooses on val and scores all of test: leave it out",
)
_OF_TUNED = dict.fromkeys(
    CROPS, "only transfer.task=classification with transfer.encoder=tuned reads it: leave it out"
)
# not seeds, steps, batch, sizes, val_share: one budget for a list of configs, some of which train
# nothing
_ASKS_FOR_TASK = below(
    "transfer",
    "start encoder classes probe subset_of by_fraction balance fit lr encoder_lr weight_decay "
    "monitor augment box_loss nms_iou score_cut compat_score_cut iou_thresholds",
)

# what reads images alone, of the split that its own option names
_OF_IMAGES = _Reads(
    unread=(*_OF_SCORES, *_PROMPTS), of_model=_TRAINED, own=(_LEXICON,), hints=_SAY_SPLIT
)

READS = {
    "mlip evaluate": _Reads(
        unread=_ASKS_FOR_TASK,
        of_model=_TRAINED,
        own=(_LEXICON,),
        hints=dict.fromkeys(
            _ASKS_FOR_TASK, "it is of a task: set transfer.task (configs/transfer)"
        ),
    ),
    OF_TASK: _Reads(
        unread=(*_OF_FITS, *_PROMPTS),
        of_model=_TRAINED,
        own=(_LEXICON,),
        hints={**_ALL_OF_TEST, **_OF_TUNED},
    ),
    # the one task that sees crops as pre-training draws them
    OF_TASK_TUNED: _Reads(
        unread=(*_OF_FITS, *_PROMPTS),
        of_model=(*_TRAINED, _SENTENCES),
        own=(_LEXICON, "data.augment"),
        hints=_ALL_OF_TEST,
    ),
    OF_TASK_ALONE: _Reads(
        unread=(*_OF_FITS, *_PROMPTS, "train", "batch", "loss", "data.phantom", _SENTENCES),
        hints=_ALL_OF_TEST,
    ),
    "mlip embed": _Reads(
        unread=(*_OF_SCORES, *_PROMPTS), of_model=_TRAINED, own=(_LEXICON, "evaluate.split")
    ),
    "mlip embed --images": _OF_IMAGES,
    "mlip search": _Reads(unread=(*_OF_SCORES, *_PROMPTS), of_model=_TRAINED, own=(_LEXICON,)),
    "mlip search --finding": _Reads(unread=_OF_SCORES, of_model=_TRAINED, own=(_LEXICON,)),
    "mlip classify": _OF_IMAGES,
    "mlip classify --finding": _Reads(
        unread=_OF_SCORES, of_model=_TRAINED, own=(_LEXICON,), hints=_SAY_SPLIT
    ),
    "mlip outliers": _OF_IMAGES,
    "mlip export": _Reads(of_model=(*_TRAINED, *_PREPARED), own=(_LEXICON,)),
    "mlip phantoms": _Reads(
        unread=("run.seed",),
        hints={"run.seed": "say data.phantom.seed and data.phantom.test_seed"},
    ),
    "train.py": _Reads(),
}
# where a model or its data once lay, by what a tower's shape was told, and ways to compute that a
# machine may lack: what is opened has others
_REPLACED = (
    *("train.start", "knowledge.vectors", "knowledge.cache_dir", "model.text.tokenizer"),
    *("model.vision.source", "model.vision.options", "model.text.source", "model.text.options"),
    *("model.attention", "loss.local_alignment.impl"),
)
# sections that some commands alone read: to the others it is nothing that one turns off
_READ_BY = {"transfer": _OF_TASKS, "data.phantom": ("train.py", "mlip phantoms")}


@dataclass(frozen=True)
class Given:
    """The settings that a command line names itself, with the values they came to.

    typed    by key=value
    of_task  those of the evaluation, by a file that names a transfer.task too
    unread_fractions  of transfer.by_fraction, of no fit: typed, or by such a file's own fractions
    """

    config: Config
    typed: Mapping[str, Any]
    of_task: Mapping[str, Any]
    unread_fractions: tuple[str, ...] = ()
    command: str = "train.py"  # of READS

    def asked_by(self, command: str) -> Given:
        """The same of a command.  Raises:  ConfigError for a setting that it has no use for."""
        reads = READS[command]
        of_task = self.of_task if command in _OF_TASKS else {}
        for setting, value in {**of_task, **self.typed}.items():
            # what takes a file's value away is no wish
            if value != _usual(setting) and reads.kind(setting) == "unread":
                raise ConfigError(
                    f"{command} does not read {setting}={shown(value)}: {reads.instead_of(setting)}"
                )
        if command in _OF_TASKS and self.unread_fractions:
            fractions = list(self.config.transfer.fractions)
            raise ConfigError(
                f"transfer.by_fraction.{self.unread_fractions[0]} is of no fit with "
                f"transfer.fractions={fractions}: name one of them, add it there, or leave it out"
            )
        for needs in NEEDS:
            if command not in _READ_BY.get(needs.other.rpartition(".")[0], (command,)):
                continue
            current = attrgetter(needs.other)(self.config)
            # who turns it off by its name knows what he does: a sweep over weights
            is_off = needs.other in self.typed and current in (_usual(needs.other), 0, "none")
            is_read = is_off or needs.holds(current)
            for setting in needs.settings:
                value = self.typed.get(setting, _usual(setting))
                # where the checkpoint decides, both are its own: require_trained
                is_open = value != _usual(setting) and reads.kind(setting) != "of_model"
                if is_open and not is_read and not self._has(needs.other, setting, value):
                    raise ConfigError(
                        f"{setting}={shown(value)} is not read with {needs.other}="
                        f"{shown(current)}: set {needs.other}={needs.remedy}, or leave it out"
                    )
        return replace(self, command=command)

    def _has(self, other: str, setting: str, value: Any) -> bool:
        """Whether what a training begins with has this value itself: settings that a script gives
        to the first training and to those that begin with it. Its start may be gone by the time
        the run goes on: so does the run have it.
        """
        if other != "train.start":
            return False
        start = Path(str(self.config.train.start))
        if start.parent.name == CHECKPOINTS:
            start = start.parent.parent
        places = (start, Path(self.config.run.dir))
        found = (_settings_now(place, takes_exports=True) for place in places)
        return any(own is not None and value == attrgetter(setting)(own) for own in found)

    def require_trained(self, trained: Config, where: str) -> None:
        """Raises:  ConfigError for a setting that the command takes from the checkpoint, where that
        was trained with another value.

        trained  the checkpoint's settings
        where    what was opened; of a run its settings now count too, as its best checkpoint may be
                 older than what a resumed run is free to change
        """
        reads = READS[self.command]
        others = [
            setting
            for setting, value in self.typed.items()
            if setting not in _REPLACED
            and (setting, value) != ("data.phantom.studies", 0)  # none are made
            and reads.kind(setting) == "of_model"
            and value != attrgetter(setting)(trained)
        ]
        now = (_settings_now(Path(where)) if others else None) or trained
        for setting in others:
            value = self.typed[setting]
            if value == attrgetter(setting)(now):
                continue
            is_task = self.command in _OF_TASKS
            own = "; what a task trains with is set in transfer" if is_task else ""
            raise ConfigError(
                f"{setting}={shown(value)} is of the training: {where} was trained with "
                f"{shown(attrgetter(setting)(trained))}, and {self.command} takes no other: "
                f"{reads.instead_of(setting)}{own}"
            )


def of_task(transfer: Transfer, takes_checkpoint: bool) -> str:
    """The command of READS that an evaluation with a task is."""
    if not takes_checkpoint:
        return OF_TASK_ALONE
    is_tuned = transfer.encoder == "tuned" and transfer.task == "classification"
    return OF_TASK_TUNED if is_tuned else OF_TASK


def _settings_now(where: Path, *, takes_exports: bool = False) -> Config | None:
    """Those of a run's config.yaml, or of an export; None where there are none to be read."""
    if not (where / OF_A_RUN).is_file() and not (
        takes_exports and (where / OF_AN_EXPORT).is_file()
    ):
        return None
    try:
        return from_dict(read_file(where, Config, takes_exports=takes_exports))
    except ConfigError:
        return None


def given(named: Sequence[Named]) -> Given:
    """What a command line names.  named  what config.read gave of it

    Raises:  ConfigError, as assemble
    """
    config = assemble(named)
    typed: set[str] = set()
    of_task: set[str] = set()
    unread: set[str] = set()
    for file, tree in named:
        if file is None:
            typed |= set(named_settings(tree))
            unread |= _unread_fractions(tree, config, ())
        # a run's own names every setting there is, and so does an export's
        elif os.path.isdir(file) or Path(file).name == OF_A_RUN:
            continue
        elif tree.get("transfer", {}).get("task", "none") != "none":
            of_task |= {name for name in named_settings(tree) if name.startswith("evaluate.")}
            own = tree["transfer"].get("fractions") or Transfer().fractions
            unread |= _unread_fractions(tree, config, own)
    typed_values, task_values = (
        {name: attrgetter(name)(config) for name in sorted(names)} for names in (typed, of_task)
    )
    return Given(config, typed_values, task_values, tuple(sorted(unread)))


def _unread_fractions(tree: Mapping[str, Any], config: Config, own: Iterable[Any]) -> set[str]:
    """Percentages that a tree has settings for and the config has, but no fit.

    own  percentages that the tree is right about although others were asked for in the end
    """
    named = {str(key) for key in (tree.get("transfer") or {}).get("by_fraction") or ()}
    kept = named & set(map(str, config.transfer.by_fraction))
    fits = {*config.transfer.fractions, *own}
    return {key for key in kept if float(key) not in fits}


def named_settings(tree: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Settings that a checked tree holds; one that is a mapping itself counts as one."""
    for key, value in tree.items():
        name = f"{path}{key}"
        if name in leaf_names():
            yield name
        else:
            yield from named_settings(value, f"{name}.")


@cache
def leaf_names() -> frozenset[str]:
    """Names of settings, without those of sections."""
    names = all_keys(Config)
    sections = {name.rpartition(".")[0] for name in names}
    return frozenset(names) - sections


def _usual(setting: str) -> Any:
    return attrgetter(setting)(Config())


def shown(value: Any) -> str:
    """A value as one writes it in YAML."""
    return json.dumps(plain(value)) if not isinstance(value, str) else value
