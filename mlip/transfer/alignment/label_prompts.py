"""Sentences that ask for labels, those that state a finding and those that deny it.

They come from the concept table and `evaluate.positive_prompts` and `negative_prompts`. Generated
studies bring their own (wordings kept out of training), unless these settings name others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mlip.dataloading.manifest import ManifestError
from mlip.dataloading.phantom import reports as phantom_reports
from mlip.knowledge.plain_letters import plain
from mlip.settings.evaluate import Evaluate
from mlip.transfer.alignment.zero_shot import Prompts

# what a label may be of and is no finding: "lung", "clear", "chronic", "portable"
_NO_FINDINGS = frozenset({"anatomy", "normal", "qualifier", "technique"})


def phantom_prompts(linker: Any, table: Any, settings: Evaluate) -> tuple[list[Prompts], list[str]]:
    """Prompts for the findings of generated studies, and those that the table does not know.

    In the wordings that no report of theirs has; in the user's as lexicon_prompts, where they name
    their own.
    """
    own, usual = (
        (which.positive_prompts, which.negative_prompts) for which in (settings, Evaluate())
    )
    if own != usual:
        return lexicon_prompts(phantom_reports.HELD_OUT_PROMPTS, linker, table, settings)
    prompts = [
        Prompts(
            concept,
            _title(table[concept].name if concept in table else concept.replace("_", " ")),
            tuple(wordings["positive"]),
            tuple(wordings["negative"]),
        )
        for concept, wordings in phantom_reports.HELD_OUT_PROMPTS.items()
    ]
    return prompts, []


def lexicon_prompts(
    labels: Iterable[str], linker: Any, table: Any, settings: Evaluate
) -> tuple[list[Prompts], list[str]]:
    """Prompts for the labels that name a concept of the table, and the labels that name none.

    A label that is a concept's name or synonym, or its CheXpert label, is asked by the concept's
    name; one that says more ("calcified pleural plaques") in its own words.
    Raises:  ManifestError for a sentence of evaluate.negative_prompts that a lexicon with its own
             cues reads as a statement: it is of another language.
    """
    prompts, unknown = [], []
    for label in labels:
        text = " ".join(plain(label).replace("_", " ").lower().split())
        found = _concept_of(label, text, linker, table)
        if found is None:
            unknown.append(label)
            continue
        concept, name = found
        if table.cues is not None:
            _require_denials(concept, name, linker, settings.negative_prompts)
        positive, negative = (
            tuple(sentence.replace("{}", name) for sentence in sentences)
            for sentences in (settings.positive_prompts, settings.negative_prompts)
        )
        prompts.append(Prompts(label, _title(text), positive, negative))
    return prompts, unknown


def _concept_of(label: str, text: str, linker: Any, table: Any) -> tuple[Any, str] | None:
    """The finding that a label names and the words to ask it by; None where it names none."""
    for mention in linker.link(text):
        concept = table[mention.concept_id]
        if concept.semantic_type in _NO_FINDINGS:
            continue
        # "no finding" and the like say what is not there: that is no finding to score
        if mention.state != "present":
            return None
        is_whole = text[mention.start : mention.end] == text
        return concept, concept.name if is_whole else text
    same = [
        concept
        for concept in table
        if concept.semantic_type not in _NO_FINDINGS
        and label in concept.mappings.get("chexpert", ())
    ]
    return (same[0], same[0].name) if len(same) == 1 else None


def _require_denials(concept: Any, name: str, linker: Any, sentences: Iterable[str]) -> None:
    for sentence in sentences:
        found = linker.link(sentence.replace("{}", name))
        if any(m.concept_id == concept.id and m.state == "present" for m in found):
            raise ManifestError(
                f"evaluate.negative_prompts: the cues of the lexicon read {sentence!r} as a "
                f"statement of {concept.id}: write evaluate.positive_prompts and "
                "evaluate.negative_prompts in the lexicon's language"
            )


def _title(text: str) -> str:
    return text[:1].upper() + text[1:]
