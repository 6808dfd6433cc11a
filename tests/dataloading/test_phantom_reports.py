"""Phantom reports: true, polarised in minimal pairs, and silent about the prompts of evaluation."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import pytest

from mlip.dataloading.phantom.findings import plan_findings
from mlip.dataloading.phantom.reports import (
    GROUNDING_PHRASES,
    HELD_OUT_PROMPTS,
    NAMES,
    PLAIN_PROMPTS,
    Instance,
    write_report,
)
from mlip.dataloading.phantom.study_types import CONCEPT_IDS, SPEC_OF, Claim, size_tier
from mlip.knowledge.linker import default_linker

DENIALS = re.compile(r"\b(no|not|absent|free of|resolved)\b")


class Told(NamedTuple):
    report: str
    claims: tuple[Claim, ...]
    findings: list[Instance]


def _instances(rng: np.random.Generator) -> list[Any]:
    found = []
    for plan in plan_findings(rng):
        words = SPEC_OF[plan.concept_id].size_words
        found.append(
            Instance(
                concept_id=plan.concept_id,
                side=plan.side,
                zone=plan.zone,
                size_word=words[size_tier(plan.concept_id, plan.size)] if words else None,
                variant={"pacemaker": "dual lead", "central_venous_catheter": "jugular"}.get(
                    plan.concept_id
                ),
                is_faint=rng.random() < 0.2,
            )
        )
    return found


@pytest.fixture(scope="module")
def told() -> list[Told]:
    rng = np.random.default_rng(5)
    anatomy = {
        "lung_volume": "low",
        "heart_size": "normal",
        "aorta": "prominent",
        "diaphragm": "left",
        "scoliosis": "none",
        "sternotomy": "present",
        "leads": "absent",
    }
    reports = []
    for _ in range(6000):
        findings = _instances(rng)
        reports.append(Told(*write_report(rng, findings, anatomy), findings))
    return reports


def _sentences(report: str) -> list[str]:
    return [s.strip().lower() for s in report.split(".") if s.strip()]


def _mentions(sentence: str) -> list[str]:
    """Concepts named in a sentence: longest names first, each letter used once."""
    named = []
    for concept, name in sorted(
        ((c, n) for c in NAMES for _, n in NAMES[c]), key=lambda pair: -len(pair[1])
    ):
        if re.search(rf"\b{name}\b", sentence):
            named.append(concept)
            sentence = re.sub(rf"\b{name}\b", "#", sentence)
    return named


def test_every_present_finding_is_named_and_nothing_absent_is_asserted(told: list[Told]) -> None:
    # oracle: a reader of its own, by name and word of denial
    for report, claims, findings in told[:2000]:
        present = {f.concept_id for f in findings}
        asserted, denied = set(), set()
        for sentence in _sentences(report):
            cannot = sentence.replace("cannot be excluded", "")
            group = denied if DENIALS.search(cannot) else asserted
            group.update(_mentions(sentence))
        assert asserted == present, report
        assert not denied & present, report
        assert {c.about for c in claims if c.about in NAMES and c.value == "present"} == present
        assert {c.about for c in claims if c.value == "absent" and c.about in NAMES} == denied


def test_sides_zones_and_sizes_are_true(told: list[Told]) -> None:
    checked = 0
    for report, _, findings in told[:2000]:
        for sentence in _sentences(report):
            mentions = _mentions(sentence)
            if len(mentions) != 1 or DENIALS.search(sentence):
                continue
            same = [f for f in findings if f.concept_id == mentions[0]]
            said_both = "bilateral" in sentence or "both sides" in sentence
            for side in ("left", "right"):
                if re.search(rf"\b{side}\b", sentence):
                    assert [f.side for f in same] == [side], report
                    checked += 1
            assert said_both <= (len(same) == 2), report
            for zone in ("upper", "mid", "lower"):
                if re.search(rf"\b{zone} zone", sentence):
                    assert {f.zone for f in same} == {zone}, report
            for word in SPEC_OF[mentions[0]].size_words:
                if re.search(rf"\b{word}\b", sentence):
                    assert {f.size_word for f in same} == {word}, report
    assert checked > 1000


def test_reports_have_two_to_six_sentences(told: list[Told]) -> None:
    for report, _, _ in told:
        assert 2 <= len(_sentences(report)) <= 6
        assert len(report.split()) <= 64
        assert "  " not in report and "{" not in report


def test_every_name_is_asserted_and_denied_in_the_same_bare_frames(told: list[Told]) -> None:
    lines = {s for t in told for s in _sentences(t.report)}
    for concept in CONCEPT_IDS:
        for article, name in NAMES[concept]:
            x = f"{article} {name}".strip()
            pairs = (
                (f"there is {x}", f"there is no {name}"),
                (f"{name} is seen", f"no {name} is seen"),
                (f"{name} is present", f"no {name} is present"),
                (name, f"no {name}"),
                (f"the film shows {x}", f"the film shows no {name}"),
            )
            held = sum(yes in lines and no in lines for yes, no in pairs)
            assert held >= 4, (name, [p for p in pairs if not set(p) <= lines])


def test_no_word_of_a_finding_lives_in_one_polarity_only(told: list[Told]) -> None:
    seen: dict[str, set[bool]] = defaultdict(set)
    for report, _, _ in told:
        for sentence in _sentences(report):
            is_denied = bool(DENIALS.search(sentence))
            for word in sentence.replace(",", "").split():
                seen[word].add(is_denied)
    names = {w for c in NAMES for _, n in NAMES[c] for w in n.split()}
    places = {"left", "right", "upper", "mid", "lower", "zone"}
    sizes = {w for s in SPEC_OF.values() for words in s.size_words for w in words.split()}
    frames = {"there", "is", "seen", "present", "noted", "film", "shows", "evidence", "place"}
    for word in names | places | sizes | frames:
        assert seen[word] == {True, False}, word


def test_faint_findings_are_hedged_more_often(told: list[Told]) -> None:
    hedge = re.compile(r"possible|may|suspected|cannot be excluded")
    shares = []
    for wanted in (True, False):
        hits = [
            bool(hedge.search(t.report.lower()))
            for t in told
            if len(t.findings) == 1 and t.findings[0].is_faint is wanted
        ]
        shares.append(np.mean(hits))
    assert shares[0] > 0.4 and shares[1] == 0


def test_held_out_prompts_never_occur_and_use_only_known_words(told: list[Told]) -> None:
    text = " ".join(t.report.lower() for t in told)
    words = set(re.findall(r"[a-z]+", text))
    for concept in CONCEPT_IDS:
        for polarity in ("positive", "negative"):
            prompts = HELD_OUT_PROMPTS[concept][polarity]
            assert len(prompts) == len(set(prompts)) == 4 * len(NAMES[concept])
            for prompt in prompts:
                assert prompt.rstrip(".") not in text, prompt
                assert set(re.findall(r"[a-z]+", prompt)) <= words, prompt
                assert bool(DENIALS.search(prompt)) == (polarity == "negative")


def test_held_out_frames_are_no_frame_of_the_reports(told: list[Told]) -> None:
    # stronger: with any name of any finding in its place, the frame occurs nowhere
    names = sorted((n for c in NAMES for _, n in NAMES[c]), key=len, reverse=True)
    pattern = re.compile(r"\b(an? )?(" + "|".join(names) + r")\b")
    frames = {pattern.sub("#", s) for t in told for s in _sentences(t.report)}
    for prompts in HELD_OUT_PROMPTS.values():
        for prompt in (*prompts["positive"], *prompts["negative"]):
            assert pattern.sub("#", prompt.rstrip(".")) not in frames, prompt


def test_plain_prompts_and_grounding_phrases_name_their_finding() -> None:
    for concept in CONCEPT_IDS:
        for phrase in (*PLAIN_PROMPTS[concept]["positive"], *GROUNDING_PHRASES[concept]["keyword"]):
            assert _mentions(phrase) == [concept]
        for sentence in GROUNDING_PHRASES[concept]["sentence"]:
            assert ("{side}" in sentence) == SPEC_OF[concept].has_side
            assert _mentions(sentence.format(side="left")) == [concept]


def test_reports_of_different_studies_differ(told: list[Told]) -> None:
    assert len({t.report for t in told}) > 0.97 * len(told)


def test_the_linker_reads_what_the_reports_claim(told: list[Told]) -> None:
    # two parts made apart: the generator's claims, and the linker that reads the words
    linker = default_linker()
    for report, claims, _ in told[:600]:
        states: dict[str, set[str]] = defaultdict(set)
        for mention in linker.link(report):
            if mention.concept_id in NAMES:
                states[mention.concept_id].add(mention.state)
        claimed = {c.about: c.value for c in claims if c.about in NAMES}
        assert set(states) == set(claimed), report
        for concept, value in claimed.items():
            wanted = {"absent"} if value == "absent" else {"present", "uncertain"}
            assert states[concept] <= wanted, report
