"""Mentions and their assertion on own sentences, one claim per pattern of real reports."""

import hashlib
import os
import random
import subprocess
import sys
import time
import weakref

import pytest

from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.concepts import Concept, ConceptTable, LexiconError
from mlip.knowledge.cues import english_cues
from mlip.knowledge.linker import Linker, Mention, default_linker, link, linker_of


def states(text: str) -> dict[str, str]:
    """Concept -> state, the first mention of each."""
    found: dict[str, str] = {}
    for mention in link(text):
        found.setdefault(mention.concept_id, mention.state)
    return found


def expect(text: str, **wanted: str) -> None:
    found = states(text)
    assert {k: found.get(k) for k in wanted} == wanted, text


def test_a_negator_reaches_over_a_list():
    for text in (
        "No effusion, consolidation or pneumothorax.",
        "The lungs are clear of effusion, consolidation, and pneumothorax.",
        "Negative for effusion, consolidation, or pneumothorax.",
    ):
        expect(text, pleural_effusion="absent", consolidation="absent", pneumothorax="absent")


def test_a_verb_and_comma_close_a_negation():
    expect("No effusion seen, old granuloma at the apex.", granuloma="present")
    expect("No effusion is identified, heart is enlarged.", cardiomegaly="present")


def test_a_copular_negation_stands_inside_a_term_written_apart():
    expect("The heart is not enlarged.", cardiomegaly="absent")
    expect("The heart is not significantly enlarged.", cardiomegaly="absent")
    expect("The cardiomegaly has not significantly changed.", cardiomegaly="present")
    expect("No enlargement of the heart.", cardiomegaly="absent")


def test_a_false_negator_denies_nothing():
    expect("No change in the small effusion.", pleural_effusion="present")
    expect("The effusion has not resolved.", pleural_effusion="present")
    expect("Not only effusion but also edema.", pleural_effusion="present")


def test_a_negator_may_stand_behind():
    for text in (
        "Effusion is no longer seen.",
        "Effusion is not well seen today.",
        "Effusion has resolved.",
        "Effusion: none.",
        "Effusion or edema has been ruled out.",
    ):
        expect(text, pleural_effusion="absent")


def test_a_normal_range_behind_denies_the_finding():
    expect(
        "Heart size and vascular engorgement are within normal limits.",
        vascular_congestion="absent",
    )
    assert "cardiomegaly" not in states("Heart size at the upper limits of normal.")


def test_a_hedge_reaches_its_cause():
    expect(
        "Opacity, which may be due to atelectasis.",
        lung_opacity="present",
        atelectasis="uncertain",
    )


def test_alternatives_are_uncertain_and_what_they_explain_is_not():
    expect(
        "Opacity, scar versus atelectasis.",
        lung_opacity="present",
        scar="uncertain",
        atelectasis="uncertain",
    )


def test_a_hedge_may_stand_behind():
    expect("A tiny effusion cannot be excluded.", pleural_effusion="uncertain")
    expect("A nodule is suspected.", lung_nodule="uncertain")
    expect("Pneumonia is also possible.", pneumonia="uncertain")


def test_denied_evidence_denies_both():
    expect("No opacity to suggest pneumonia.", lung_opacity="absent", pneumonia="absent")
    expect("This does not suggest heart failure.", heart_failure="absent")


def test_what_is_asked_for_is_not_asserted():
    expect("CT to exclude a nodule.", lung_nodule="uncertain")
    expect("Rib fractures may be invisible on this view.", rib_fracture="uncertain")
    expect("Nodule?", lung_nodule="uncertain")


def test_longer_terms_block_the_sense_of_a_word_in_them():
    assert "pleural_effusion" not in states("Pericardial effusion.")
    assert "emphysema" not in states("Subcutaneous emphysema.")
    assert "pleural_effusion" not in states("Small knee joint effusion.")


def test_an_adjective_is_not_the_noun_it_stands_for():
    found = states("Nodular opacity at the base.")
    assert "lung_opacity" in found and "lung_nodule" not in found
    table = default_linker().table
    both = table.ancestors("calcified_nodule")
    assert {"lung_nodule", "calcification"} <= both


def test_terms_written_apart_are_found_in_either_order():
    expect("The aorta is calcified and mildly tortuous.", tortuous_aorta="present")
    expect("Flattening of both diaphragms.", flattened_diaphragm="present")
    expect("Collapse of much of the left lung.", atelectasis="present")


def test_an_exception_is_judged_anew():
    expect("Lungs are clear except for a granuloma.", granuloma="present")
    expect("ET tube has been removed, port remains.", endotracheal_tube="absent")
    expect("ET tube has been removed, port remains.", port_catheter="present")
    expect("No effusion but cardiomegaly.", pleural_effusion="absent", cardiomegaly="present")


def test_a_stop_ends_a_sentence_with_or_without_a_space_and_a_decimal_does_not():
    expect("No effusion.Nodule at the base.", pleural_effusion="absent", lung_nodule="present")
    expect("No nodule above 0.5 cm or mass.", lung_nodule="absent", lung_mass="absent")
    expect("Atelectasis vs. scar at the base.", atelectasis="uncertain", scar="uncertain")


def test_the_stop_of_an_abbreviation_ends_no_sentence():
    expect("No evidence of an approx. 3 cm nodule.", lung_nodule="absent")
    expect("No effusion per Dr. Smith or pneumothorax.", pneumothorax="absent")
    expect("No opacity, e.g. pneumonia or scar. Nodule.", scar="absent", lung_nodule="present")
    expect("No nodule (i.e. granuloma) or mass.", granuloma="absent", lung_mass="absent")
    expect("No pneumothorax on the A.P. view or effusion.", pleural_effusion="absent")


def test_text_under_other_headings_is_left_out_until_a_report_heading_or_blank_line():
    text = "INDICATION: Pneumonia? COMPARISON: Old mass.\nFINDINGS: Small effusion."
    assert "pneumonia" not in states(text) and "lung_mass" not in states(text)
    expect(text, pleural_effusion="present")
    expect("HISTORY: cough, nodule.\n\nLarge mass.", lung_mass="present")
    assert "lung_nodule" not in states("HISTORY: cough, nodule.\n\nLarge mass.")


def test_spans_are_the_hull_of_the_words_also_with_blanks_plurals_and_hyphens():
    text = "Bilateral  pleural-effusions;\n heart is  mildly enlarged ."
    spans = {m.concept_id: text[m.start : m.end] for m in link(text)}
    assert spans["pleural_effusion"] == "pleural-effusions"
    assert spans["cardiomegaly"] == "heart is  mildly enlarged"


def test_matches_respect_word_boundaries_and_prefer_the_longest():
    assert states("Masseter, nodules1 and effusionx.") == {}
    found = [m.concept_id for m in link("right lower lobe rib fracture")]
    assert found == ["right_lower_lobe", "rib_fracture"]


def test_anatomy_is_present_also_where_the_finding_is_denied():
    expect("No effusion in the left lung.", pleural_effusion="absent", left_lung="present")


def test_mentions_come_in_order_of_their_start():
    text = "Heart is enlarged. No effusion. Nodule in the left upper lobe, scar versus mass."
    starts = [m.start for m in link(text)]
    assert starts == sorted(starts) and len(starts) >= 6


def test_letters_that_change_length_in_lower_case_keep_the_offsets():
    text = "\u0130\u0130 Small EFFUSION \ufb01n"
    (mention,) = [m for m in link(text) if m.concept_id == "pleural_effusion"]
    assert text[mention.start : mention.end] == "EFFUSION"


@pytest.mark.parametrize("noise", ["\0", "\ud800", "\U0001f600", "\u2028", "\x85", "\x03"])
def test_odd_characters_neither_break_nor_hide_mentions(noise):
    text = f"{noise}No effusion{noise} nodule.{noise}"
    found = {m.concept_id: text[m.start : m.end] for m in link(text)}
    assert found["pleural_effusion"] == "effusion"
    assert found["lung_nodule"] == "nodule"


def test_empty_and_blank_texts_have_no_mentions():
    assert link("") == [] and link(" \n\n - \t") == []


@pytest.mark.parametrize(
    "unit",
    [
        "No effusion, consolidation or pneumothorax; the heart is mildly enlarged. ",
        "nodule, ",  # one list without a stop: the rules must not search all of it at each comma
        "possible nodule and effusion not seen ",
    ],
)
def test_a_megabyte_is_linked_in_linear_time(unit):
    def seconds(size: int) -> float:
        text = "no " + unit * (size // len(unit))
        start = time.process_time()
        assert link(text)
        return time.process_time() - start

    seconds(1000)
    small, large = seconds(50_000), seconds(1_000_000)
    # twenty times the text; a square would take four hundred times
    assert large < 60 * small + 1.0


def test_a_list_of_forty_findings_is_still_under_one_negator():
    found = {m.state for m in link("No " + "nodule, mass, " * 20 + "or effusion.")}
    assert found == {"absent"}


def test_a_report_in_another_language_is_counted_not_guessed():
    text = "Kein Pleuraerguss. Herz normal gross. Lungen frei belueftet, kein Infiltrat."
    known, total = default_linker().known_words(text)
    assert total == 10 and known / total < 0.35
    text = "The heart is normal in size without effusion."
    known, total = default_linker().known_words(text)
    assert known / total > 0.6
    assert default_linker().known_words(text.upper()) == (known, total)


def test_the_same_text_gives_the_same_mentions_in_another_process_with_another_hash_seed():
    text = "Heart is enlarged. Possible effusion, no nodule or mass. Scar versus atelectasis."
    script = f"from mlip.knowledge.linker import link; print([tuple(m) for m in link({text!r})])"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert outputs == {str([tuple(m) for m in link(text)])}


def test_linking_leaves_no_state_behind():
    texts = ["No effusion.", "INDICATION: mass", "Scar versus", "nodule " * 5, "XXXX wordunknown"]
    alone = [Linker(default_linker().table).link(t) for t in texts[:3]]
    shared = Linker(default_linker().table)
    shuffled = texts * 3
    random.Random(1).shuffle(shuffled)
    for text in shuffled:
        shared.link(text)
    assert [shared.link(t) for t in texts[:3]] == alone


def test_terms_of_any_table_are_found_and_the_earlier_concept_owns_a_shared_form():
    table = ConceptTable(
        [
            Concept(id="a", name="blue sign", synonyms=("cyan mark",)),
            Concept(id="b", name="cyan marks", synonyms=("red sign",)),
        ]
    )
    linker = Linker(table)
    assert linker.link("Blue signs and a red sign.") == [
        Mention("a", 0, 10, "present"),
        Mention("b", 17, 25, "present"),
    ]
    assert [m.concept_id for m in linker.link("cyan mark")] == ["a"]


def test_a_length_that_a_term_names_is_no_other_length():
    linker = Linker(ConceptTable([Concept(id="a", name="5mm clip"), Concept(id="b", name="clip")]))
    assert [m.concept_id for m in linker.link("A 5mm clip, an 8mm clip.")] == ["a", "b"]


def test_a_large_vocabulary_takes_wider_codes_and_gives_the_same_mentions():
    base = load_concepts(None)
    extra = [Concept(id=f"x{i}", name=f"zz{i}qq word{i}") for i in range(4000)]
    large = Linker(ConceptTable([*base, *extra]))
    text = "Heart is enlarged. No effusion or nodule. Zz17qq word17 is seen."
    found = [m for m in large.link(text) if not m.concept_id.startswith("x")]
    assert found == link(text)
    assert ("x17", "present") in {(m.concept_id, m.state) for m in large.link(text)}


def test_tables_of_equal_content_share_a_linker_until_nobody_holds_it():
    concepts = [Concept(id="a", name="blue sign")]
    held = linker_of(ConceptTable(concepts))
    assert linker_of(ConceptTable(concepts, provenance={"source": "elsewhere"})) is held
    more = linker_of(ConceptTable([Concept(id="a", name="blue sign", synonyms=("cyan mark",))]))
    cues = {**english_cues(), "negation_before": ("sans",)}
    denied = linker_of(ConceptTable(concepts, cues=cues))
    text = "Sans blue sign, no cyan mark."
    assert [(m.concept_id, m.state) for m in held.link(text)] == [("a", "present")]
    assert [(m.concept_id, m.state) for m in more.link(text)] == [("a", "present"), ("a", "absent")]
    assert [(m.concept_id, m.state) for m in denied.link(text)] == [("a", "absent")]
    gone = weakref.ref(held)
    del held
    assert gone() is None


def test_a_term_that_no_report_can_match_is_an_error_that_names_it():
    with pytest.raises(LexiconError, match="5\u00b5m"):
        Linker(ConceptTable([Concept(id="a", name="\u20ac 5\u00b5m")]))


def test_the_linker_starts_within_a_second_of_processor_time():
    """In a process of its own, as a command starts it: among all that other tests have left in
    memory, and with a neighbour on the same core, it took three times as long."""
    code = """
import time
from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.linker import Linker
start = time.process_time()
Linker(load_concepts(None))
print(time.process_time() - start)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0


def test_link_is_a_pure_function_of_the_text():
    text = "Possible effusion, no nodule."
    digest = hashlib.sha256(repr(link(text)).encode()).hexdigest()
    assert all(hashlib.sha256(repr(link(text)).encode()).hexdigest() == digest for _ in range(3))
