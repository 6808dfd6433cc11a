"""Findings asked of images that nobody labelled: a score each, and yes or no where an evaluation
of the same model chose thresholds.

What is asked comes from names that the lexicon knows, from sentences of one's own, or from the
results.json of an evaluation. A score is what alignment/zero_shot.py says: what states the finding
minus what denies it. No score is a probability.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml

from mlip.batch import ImageFeatures
from mlip.settings.evaluate import Evaluate
from mlip.settings.strict_yaml import read_yaml
from mlip.transfer.alignment.label_prompts import lexicon_prompts
from mlip.transfer.alignment.prompts import TextError
from mlip.transfer.alignment.zero_shot import Prompts, prompt_texts
from mlip.transfer.alignment.zero_shot_run import head_scores
from mlip.transfer.array import Array
from mlip.transfer.features import TextBank
from mlip.transfer.films.own_inputs import encode_texts, require_features
from mlip.transfer.fingerprint import made_with
from mlip.transfer.trained_heads import is_local_trained, require_local

ScoreHead = Literal["combined", "global", "local"]
SCORE_HEADS: tuple[str, ...] = get_args(ScoreHead)
_SIDES = ("positive", "negative")


class QuestionError(ValueError):
    """Findings that cannot be asked of this model; says what to do."""

    exit_code = 4


@dataclass(frozen=True)
class Question:
    """What is asked of every image.

    thresholds  finding -> score from which on it is called, of one head; a finding that the
                evaluation could choose none for is None, one that it names none of is not in it
    no_thresholds  why there are none, where an evaluation was named
    file    of the sentences, "" where they are of no file
    """

    prompts: tuple[Prompts, ...]
    thresholds: Mapping[str, float | None] = field(default_factory=dict)
    no_thresholds: str = ""
    file: str = ""

    def __post_init__(self) -> None:
        names = [prompt.finding for prompt in self.prompts]
        # each is a column of a table, whose header is one line
        if odd := [n for n in names if n != n.strip() or len(n.splitlines()) != 1]:
            raise QuestionError(
                f"finding {odd[0]!r}: expected a name in one line without blanks around it"
            )
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise QuestionError(f"finding {twice[0]!r} is asked twice: leave one out")


def ask_names(names: Iterable[str], opened: Any, settings: Evaluate) -> Question:
    """Findings by names that the lexicon knows, in the sentences of evaluate.positive_prompts.

    Raises:  QuestionError naming those it does not know
    """
    prompts, unknown = lexicon_prompts(names, opened.linker, opened.table, settings)
    if unknown:
        raise QuestionError(
            f"the lexicon knows no finding called {', '.join(map(repr, unknown))}: expected names "
            "such as 'pneumothorax' (`mlip knowledge link` shows what a text names); with "
            "sentences of your own (--wordings) anything can be asked"
        )
    return Question(tuple(prompts))


def ask_wordings(path: Path) -> Question:
    """Findings by sentences: YAML of finding -> positive and negative, a list each.

    Raises:  QuestionError naming the file and what was expected
    """
    expected = "expected YAML as `pneumonia: {positive: [a sentence, ...], negative: [...]}`"
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise QuestionError(f"{path}: cannot be read: {error}; {expected}") from error
    return Question(_prompts(tree, f"{path}", expected), file=f"{path}")


def ask_as_evaluated(path: Path, opened: Any, head: ScoreHead) -> Question:
    """Findings, sentences and thresholds of `results.json` of a zero-shot evaluation.

    Raises:  QuestionError where it cannot be read, holds none, or is of another model
    """
    expected = "expected results.json of `mlip evaluate` with zero-shot scores"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        made, wordings = _model_of(results), results["zero_shot"].get("wordings")
        cuts, why = _thresholds(results, head)
        is_sound = all(cut is None or _is_number(cut) for cut in cuts.values())
    except OSError as error:
        raise QuestionError(f"{path}: cannot be read: {error.strerror}; {expected}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise QuestionError(f"{path}: {expected}") from error
    if wordings is None or not is_sound:
        raise QuestionError(
            f"{path}: holds no zero-shot scores, or thresholds that are no numbers: {expected}"
        )
    own = {**made_with(opened), "concepts": opened.table.fingerprint}
    if others := [name for name in own if made[name] != own[name]]:
        raise QuestionError(
            f"{path}: is of a model with other {' and '.join(others)}: its thresholds mean "
            "nothing for this one; evaluate this model and name its results.json"
        )
    prompts = _prompts(wordings, f"{path}", expected)
    if not cuts:
        return Question(prompts, no_thresholds=f"{path}: {why}", file=f"{path}")
    known = {p.finding: cuts[p.finding] for p in prompts if p.finding in cuts}
    return Question(prompts, known, file=f"{path}")


def _model_of(results: Any) -> dict[str, Any]:
    """What an evaluation's scores depend on of the model, as ask_as_evaluated compares it."""
    prints = results["fingerprints"]
    return {
        "weights": prints["weights"],
        "preprocessing": prints["preprocessing"],
        "concepts": prints["concept_table"],
    }


def _thresholds(results: Any, head: ScoreHead) -> tuple[dict[str, Any], str]:
    """(those of the head by finding, why there are none)"""
    told = results["zero_shot"].get("at_thresholds", {})
    chosen, why = told.get("findings", {}), told.get("reason", "none chosen")
    if not told and results.get("run", {}).get("split") == "val":
        why = "of val itself, on which thresholds are chosen: evaluate with evaluate.split=test"
    return {name: chosen[name][head]["threshold"] for name in chosen}, why


def _prompts(tree: Any, where: str, expected: str) -> tuple[Prompts, ...]:
    if not isinstance(tree, dict) or not tree:
        raise QuestionError(f"{where}: {expected}")
    prompts = []
    for finding, wordings in tree.items():
        sides: list[Any] = (
            [wordings.get(side) for side in _SIDES] if isinstance(wordings, dict) else [None]
        )
        if not isinstance(finding, str) or not all(map(_is_sentences, sides)):
            raise QuestionError(f"{where}: {finding!r}: {expected}")
        if extra := sorted(set(map(str, wordings)) - set(_SIDES)):
            raise QuestionError(f"{where}: {finding!r}: {extra[0]!r} is none of {_SIDES}")
        prompts.append(Prompts(finding, finding, *(tuple(side) for side in sides)))
    return tuple(prompts)


def _is_number(value: Any) -> bool:
    """Python's JSON reads NaN and Infinity too, from which on nothing, or all, would be called."""
    is_one = isinstance(value, float | int) and not isinstance(value, bool)
    return is_one and abs(value) <= sys.float_info.max


def _is_sentences(side: Any) -> bool:
    return isinstance(side, list) and bool(side) and all(isinstance(text, str) for text in side)


def default_head(opened: Any) -> ScoreHead:
    """The head that answers where none is named: both scores, if a loss trained both."""
    return "combined" if is_local_trained(opened) else "global"


def encode_question(opened: Any, question: Question) -> TextBank:
    """The sentences' features.

    Raises:  QuestionError for a sentence that cannot be asked, else ValueError as encode_texts
    """
    try:
        return encode_texts(opened, prompt_texts(question.prompts))
    except TextError as error:
        owners = [p.finding for p in question.prompts for _ in prompt_texts([p])]
        where = f"{question.file}: " if question.file else ""
        raise QuestionError(f"{where}finding {owners[error.place]!r}: {error}") from None


@torch.no_grad()
def scores(
    opened: Any, images: ImageFeatures, question: Question, texts: TextBank, head: ScoreHead
) -> Array:
    """[images, findings] float64; high = the finding is there.

    texts   encode_question of the question
    Raises:  ValueError for another head, one that no loss trained, or for what is not features of
             this model
    """
    if head not in SCORE_HEADS:
        raise ValueError(f"head: expected one of {', '.join(SCORE_HEADS)}, got {head!r}")
    if head != "global":
        require_local(opened, f"head {head!r} (ask by 'global')")
    require_features(opened, images, texts)
    return head_scores(opened.model, images, texts, question.prompts)[head]


def called(values: Array, question: Question) -> dict[str, Array]:
    """Finding -> which of the images have it, where its threshold is known.

    Shapes:  values [images, findings] -> [images] bool each
    """
    cuts: Sequence[float | None] = [question.thresholds.get(p.finding) for p in question.prompts]
    return {
        p.finding: values[:, f] >= cut
        for f, (p, cut) in enumerate(zip(question.prompts, cuts, strict=True))
        if cut is not None
    }
