"""State of mentions on own sentences in report style, the second half of them scored once.

Oracle: labels written by hand before the rules (state_sentences.txt). A sentence belongs to the
sealed half by a hash of its text; docs/knowledge.md holds the figures of the first scoring.
"""

import pytest

from benchmarks.linker_states import outcomes, read_sentences
from mlip.dataloading.reports.text import clean_report
from mlip.knowledge.linker import default_linker, link


def test_there_are_enough_own_sentences():
    rows = read_sentences()
    assert len(rows) >= 300
    assert len({text for text, _, _ in rows}) == len(rows)
    assert min(sum(sealed for _, _, sealed in rows), sum(not s for _, _, s in rows)) >= 140


@pytest.mark.parametrize("sealed", [False, True], ids=["open", "sealed"])
def test_states_of_own_sentences_reach_the_gate(sealed):
    linker = default_linker()
    met, labelled, met_sure, sure = outcomes(linker, linker.table, sealed).sum(axis=0)
    assert labelled > sure > 150
    assert met / labelled >= 0.92
    assert met_sure / sure >= 0.97


@pytest.mark.parametrize(
    "text, state",
    [
        ("Pneumothorax isn't seen.", "absent"),
        ("The film doesn't show pneumothorax.", "absent"),
        ("There isn't a pneumothorax.", "absent"),
        ("Pneumothorax can't be excluded.", "uncertain"),
        ("Pneumothorax wasn't excluded.", "uncertain"),
    ],
)
def test_a_contraction_says_what_its_two_words_say(text: str, state: str) -> None:
    (mention,) = [m for m in link(text) if m.concept_id == "pneumothorax"]
    assert mention.state == state


@pytest.mark.parametrize(
    "text, states",
    [
        ("1) No edema 2) Nodule 3) Pneumothorax: none", "absent present absent"),
        ("[x] Edema [ ] Pneumothorax", "present absent"),
        ("\u2610 Edema\n\u2611 Pneumothorax", "absent present"),
        ("Edema ( ) Pneumothorax (x)", "absent present"),
        ("Edema: [ ] yes [x] no", "absent"),
        ("Edema: N\nPneumothorax: Y", "absent present"),
        ("Edema, pneumothorax, pneumonia: none", "absent absent absent"),
        ("Small edema, pneumothorax: none", "present present absent"),
        ("Edema isn\u00e2\u20ac\u2122t seen.", "absent"),
    ],
)
def test_forms_and_lists_are_read_as_their_writer_means(text: str, states: str) -> None:
    assert [m.state for m in link(clean_report(text))] == states.split()
