"""Cue words: what decides whether a mention is asserted, denied or left open.

The project's own are English; a lexicon of another language brings its own in a file of the same
form (lexicon/_cues.yaml is the example). What does not live here: what each kind does (scope.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from mlip.knowledge.concepts import ConceptTable, LexiconError
from mlip.knowledge.events import KINDS
from mlip.knowledge.lexicon_text import LEXICON_DIR, expand, read_text
from mlip.knowledge.plain_letters import plain
from mlip.settings.strict_yaml import read_yaml

CUES_FILE = "_cues.yaml"  # in a lexicon's folder
Cues = Mapping[str, tuple[str, ...]]
# a file that does not name these has them as ours has: they are no words
_SIGNS = ("comma", "sentence", "question")
_NOT = re.compile(r"\b(is|are|was|were|does|do|did|has|have|had|could|would|should|ca) not\b")


def cues_of(table: ConceptTable) -> Cues:
    """The cues that reports of a table are read with."""
    return english_cues() if table.cues is None else table.cues


@lru_cache(maxsize=1)
def english_cues() -> Cues:
    """The project's own, alternatives written out, "is not" also as "isn't"."""
    return read_cues(LEXICON_DIR / CUES_FILE)


def read_cues(path: str | Path) -> Cues:
    """Kind of cue -> its surface forms, lower case, alternatives written out.

    Raises:  LexiconError naming the file: not YAML, an unknown kind, or what is no list of texts
    """
    try:
        content = read_yaml(read_text(path))
    except yaml.YAMLError as error:
        raise LexiconError(f"{path}: not valid YAML: {error}") from error
    return checked_cues(content, path)


def checked_cues(content: Any, path: str | Path) -> Cues:
    """What a file of cues holds, written out.

    Raises:  LexiconError as read_cues
    """
    if not isinstance(content, dict) or not content:
        raise LexiconError(f"{path}: expected a mapping of kinds of cue to lists of texts")
    unknown = sorted(set(map(str, content)) - set(KINDS))
    if unknown:
        raise LexiconError(f"{path}: unknown kind of cue {unknown[0]!r}; known: {', '.join(KINDS)}")
    cues = {}
    for kind, lines in content.items():
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise LexiconError(
                f"{path}: expected a list of texts for {kind} (quote numbers, yes, no, on, off)"
            )
        forms = expand((plain(line).lower() for line in lines), f"{path}, {kind}")
        cues[kind] = tuple(dict.fromkeys((*forms, *_contracted(forms))))
    if missing := [sign for sign in _SIGNS if sign not in cues]:
        cues |= {sign: english_cues()[sign] for sign in missing}
    return cues


def _contracted(forms: Iterable[str]) -> list[str]:
    """Forms with "is not" once more with "isn't", and so on."""
    short = (_NOT.sub(r"\1n't", form.replace("can not", "ca not")) for form in forms)
    return [form for form in short if "n't" in form]
