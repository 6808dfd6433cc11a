"""negspacy on the spans of our linker: what its rules of negation are worth beside ours.

negspacy is not a dependency: install it into an environment of its own that also sees this
project (a venv with a .pth file that names this environment's site-packages), and run
bench_linker.py with that environment's Python.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import Any

from mlip.knowledge.linker import Mention

# of its three English term sets this one does best on the development half, and so does the
# default without chunk_prefix: ["no"] also denies every "nodule"
TERMS = "en_clinical"


def negspacy_states(
    texts: list[str], linked: list[list[Mention]], *, inside: bool = False
) -> list[list[Mention]] | None:
    """The same spans with negspacy's state; None where negspacy is not installed.

    inside: in its favour, a span that holds one of its negators between the words of a term
    written apart ("heart is not enlarged") counts as denied too.
    """
    try:
        spacy = importlib.import_module("spacy")
        importlib.import_module("negspacy.negation")  # registers the component
    except ImportError:
        return None
    terms = importlib.import_module("negspacy.termsets").termset(TERMS)
    language = spacy.blank("en")
    language.add_pipe("sentencizer")
    language.add_pipe("negex", config={"neg_termset": terms.get_patterns()})
    sentencizer, negex = (language.get_pipe(name) for name in ("sentencizer", "negex"))
    result = []
    for text, mentions in zip(texts, linked, strict=True):
        doc = sentencizer(language.make_doc(text))
        negators = [start for _, start, _ in negex.process_negations(doc)[0]] if inside else []
        result.append(_judged(spacy, doc, negex, mentions, negators))
    return result


def name_and_version() -> str:
    return f"negspacy {version('negspacy')}, spacy {version('spacy')}, term set {TERMS}"


def _judged(
    spacy: Any, doc: Any, negex: Any, mentions: list[Mention], negators: list[int]
) -> list[Mention]:
    rest = [
        doc.char_span(m.start, m.end, label=m.concept_id, alignment_mode="expand") for m in mentions
    ]
    rest = [span for span in rest if span is not None]
    judged = []
    # nested spans cannot stand in doc.ents together: each gets its turn
    while rest:
        chosen = spacy.util.filter_spans(rest)
        doc.set_ents(chosen)
        doc = negex(doc)
        for entity in doc.ents:
            denied = entity._.negex or any(entity.start <= n < entity.end for n in negators)
            state: Any = "absent" if denied else "present"
            judged.append(Mention(entity.label_, entity.start_char, entity.end_char, state))
        kept = {id(span) for span in chosen}
        rest = [span for span in rest if id(span) not in kept]
    return judged
