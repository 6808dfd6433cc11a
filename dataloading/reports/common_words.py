"""Words that many patients' reports share: what a trained vocabulary may learn from.

A word piece is a part of a word it was trained on, so a name, id or date that stands in the reports
of a few patients can become no piece where its words are left out. Pure counting, no tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class CommonWords:
    """What a corpus leaves to learn from."""

    counts: dict[str, int]  # occurrences of each common word, in alphabetical order
    rare: int  # different words of too few patients
    rare_share: float  # of all occurrences


def common_words(
    reports: Iterable[tuple[Hashable, Iterable[str]]],
    min_patients: int,
    public: Collection[str] = (),
) -> CommonWords:
    """Words that occur in the reports of at least min_patients patients, or are public.

    reports: (patient, words of one report); a patient may have several reports, in any order.
    public: words known from elsewhere, such as a lexicon's; they count where they occur.
    The result does not depend on the order. Memory: under min_patients ids for each rare word.
    """
    occurrences: Counter[str] = Counter()
    # patients seen with a word that is not common yet; None = it is
    patients: dict[str, set[Hashable] | None] = {}
    for patient, words in reports:
        words = list(words)
        occurrences.update(words)
        for word in set(words):
            seen = patients.setdefault(word, set())
            if seen is None:
                continue
            seen.add(patient)
            if len(seen) >= min_patients or word in public:
                patients[word] = None
    common = {word: occurrences[word] for word in sorted(patients) if patients[word] is None}
    total = occurrences.total()
    return CommonWords(
        counts=common,
        rare=len(patients) - len(common),
        rare_share=1 - sum(common.values()) / total if total else 0.0,
    )
