"""How reports about phantom studies are worded, and which wordings evaluation keeps to itself.

Rules that learning depends on (docs/phantoms.md): every name of a finding is asserted and negated
in the same frames, bare assertions included; what a report says of side, zone and size is true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.random import Generator

from mlip.dataloading.phantom.study_types import CONCEPT_IDS, SPEC_OF, Claim, FindingTruth

# Every name takes an article ("a", "an") or none (""): mass nouns have none.
NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "pleural_effusion": (("a", "pleural effusion"), ("", "pleural fluid"), ("an", "effusion")),
    "pneumothorax": (("a", "pneumothorax"), ("", "pleural air")),
    "consolidation": (
        ("", "consolidation"),
        ("a", "consolidative opacity"),
        ("", "airspace consolidation"),
    ),
    "lung_nodule": (("a", "nodule"), ("a", "pulmonary nodule"), ("a", "lung nodule")),
    "cardiomegaly": (
        ("", "cardiomegaly"),
        ("", "cardiac enlargement"),
        ("", "enlargement of the heart"),
    ),
    "atelectasis": (("", "atelectasis"), ("", "linear atelectasis"), ("an", "atelectatic band")),
    "pacemaker": (("a", "pacemaker"), ("a", "cardiac pacemaker"), ("a", "cardiac pacing device")),
    "central_venous_catheter": (
        ("a", "central venous catheter"),
        ("a", "central line"),
        ("a", "central catheter"),
    ),
}
DEVICES = ("pacemaker", "central_venous_catheter")

# {x} with article, {n} without; each positive frame has a negative twin of the same words.
POSITIVE_FRAMES = (
    "there is {x}.",
    "{n} is seen.",
    "{n} is present.",
    "{n} is noted.",
    "{n}.",
    "the film shows {x}.",
    "evidence of {n}.",
    "there is evidence of {n}.",
)
NEGATIVE_FRAMES = (
    "there is no {n}.",
    "no {n} is seen.",
    "no {n} is present.",
    "no {n} is noted.",
    "no {n}.",
    "the film shows no {n}.",
    "no evidence of {n}.",
    "there is no evidence of {n}.",
    "{n} is absent.",
    "{n} is not seen.",
    "the chest is free of {n}.",
)
DEVICE_POSITIVE = ("{n} is in place.", "{n} projects over the chest.")
DEVICE_NEGATIVE = ("no {n} is in place.", "no {n} projects over the chest.")
UNCERTAIN_FRAMES = (
    "possible {n}.",
    "there may be {x}.",
    "suspected {n}.",
    "{n} cannot be excluded.",
    "findings may represent {n}.",
)
PRIOR_POSITIVE = ("the {n} is unchanged.", "the known {n} persists.", "{n} is again seen.")
PRIOR_NEGATIVE = ("the previous {n} has resolved.", "the known {n} is no longer seen.")
PRIOR_NEUTRAL = ("comparison is made with the prior film.", "no prior film for comparison.")
FILLERS = (
    "the bones are intact.",
    "the trachea is midline.",
    "frontal view of the chest.",
    "the soft tissues are normal.",
)

# Evaluation only. {x} and {n} as above; made of the vocabulary of the frames, in frames that
# reports never use.
_HELD_OUT_POSITIVE = (
    "the chest shows {x}.",
    "{n} is present on the film.",
    "evidence of {n} is noted.",
    "on the film there is {x}.",
)
_HELD_OUT_NEGATIVE = (
    "the chest shows no {n}.",
    "{n} is absent on the film.",
    "no evidence of {n} is noted.",
    "on the film there is no {n}.",
)


def _fill(frame: str, article: str, name: str) -> str:
    return frame.format(x=f"{article} {name}".strip(), n=name)


def _prompts(frames: Sequence[str]) -> dict[str, list[str]]:
    return {
        concept: [_fill(frame, *name) for name in NAMES[concept] for frame in frames]
        for concept in CONCEPT_IDS
    }


HELD_OUT_PROMPTS: dict[str, dict[str, list[str]]] = {
    concept: {
        "positive": _prompts(_HELD_OUT_POSITIVE)[concept],
        "negative": _prompts(_HELD_OUT_NEGATIVE)[concept],
    }
    for concept in CONCEPT_IDS
}
# Bare phrases, which reports do contain: what a user types first.
PLAIN_PROMPTS: dict[str, dict[str, list[str]]] = {
    concept: {
        "positive": [f"{name}." for _, name in NAMES[concept]],
        "negative": [f"no {name}." for _, name in NAMES[concept]],
    }
    for concept in CONCEPT_IDS
}
# "{side}" is to be filled with the truth's side; concepts without a side have no "{side}".
GROUNDING_PHRASES: dict[str, dict[str, list[str]]] = {
    concept: {
        "keyword": [name for _, name in NAMES[concept]],
        "sentence": [
            _fill("there is {x} on the {{side}}.", *name)
            if SPEC_OF[concept].has_side
            else _fill("there is {x}.", *name)
            for name in NAMES[concept]
        ],
    }
    for concept in CONCEPT_IDS
}


@dataclass(frozen=True)
class Group:
    """The instances of one finding in a study, as one sentence tells them."""

    concept_id: str
    side: str | None  # "left", "right", "both"
    zone: str | None  # None also where two sides differ
    size_word: str | None
    variant: str | None
    is_faint: bool


@dataclass(frozen=True)
class Instance:
    """What words need of a FindingTruth: everything but its pixels."""

    concept_id: str
    side: str | None
    zone: str | None
    size_word: str | None
    variant: str | None
    is_faint: bool


def group_findings(findings: Sequence[FindingTruth | Instance]) -> list[Group]:
    """One group per concept, in the order of FINDINGS."""
    groups = []
    for concept in CONCEPT_IDS:
        same = [f for f in findings if f.concept_id == concept]
        if not same:
            continue
        first = same[0]

        def shared(name: str, same: list[Any] = same) -> Any:
            values = {getattr(f, name) for f in same}
            return values.pop() if len(values) == 1 else None

        side = first.side if len(same) == 1 else "both"
        faint = all(f.is_faint for f in same)
        groups.append(
            Group(concept, side, shared("zone"), shared("size_word"), shared("variant"), faint)
        )
    return groups


def write_report(
    rng: Generator, findings: Sequence[FindingTruth], anatomy: dict[str, str]
) -> tuple[str, tuple[Claim, ...]]:
    """A report of 2 to 6 sentences and what it claims; every present finding is named."""
    groups = group_findings(findings)
    absent = [c for c in CONCEPT_IDS if all(g.concept_id != c for g in groups)]
    sentences: list[str] = []
    claims: list[Claim] = []
    for group in groups:
        sentence, claim = _assert(rng, group)
        sentences.append(sentence)
        claims.append(claim)
    extras = [*_describe(rng, anatomy)]
    order = rng.permutation(len(extras)).tolist()
    room = 6 - len(sentences)
    wanted = min(room, max(2 - len(sentences), int(rng.integers(1, 4))))
    if absent and rng.random() < (0.8 if room > 1 else 0.5):
        sentence, said = _deny(rng, absent)
        sentences.append(sentence)
        claims += said
        wanted -= 1
        if len(groups) < 2 and rng.random() < 0.5:
            left = [c for c in absent if all(c != claim.about for claim in said)]
            if left:
                sentence, said = _deny(rng, left)
                sentences.append(sentence)
                claims += said
    room = 6 - len(sentences)
    for k in order[: max(0, min(room, max(wanted, 2)))]:
        sentence, described = extras[k]
        sentences.append(sentence)
        if described is not None:
            claims.append(described)
    while len(sentences) < 2:
        sentences.append(_pick(rng, FILLERS))
    if len(sentences) < 6 and rng.random() < 0.12:
        sentences.append(_pick(rng, (*FILLERS, *PRIOR_NEUTRAL)))
    shuffled = [sentences[k] for k in rng.permutation(len(sentences)).tolist()]
    return " ".join(s[0].upper() + s[1:] for s in shuffled), tuple(claims)


def _pick(rng: Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def _assert(rng: Generator, group: Group) -> tuple[str, Claim]:
    concept, is_device = group.concept_id, group.concept_id in DEVICES
    article, name = _pick(rng, NAMES[concept])
    is_bare = rng.random() < 0.2
    side = group.side if not is_bare and rng.random() < 0.9 else None
    zone = group.zone if not is_bare and rng.random() < 0.85 else None
    size = group.size_word if not is_bare and rng.random() < 0.75 else None
    variant = group.variant if not is_bare and rng.random() < 0.75 else None
    article, phrase = _noun_phrase(rng, article, name, side, zone, size, variant)
    roll = rng.random()
    if group.is_faint and roll < 0.6:
        frames: Sequence[str] = UNCERTAIN_FRAMES[:3] if is_device else UNCERTAIN_FRAMES
    elif roll > 0.95:
        frames = PRIOR_POSITIVE
    else:
        frames = (*POSITIVE_FRAMES, *DEVICE_POSITIVE) if is_device else POSITIVE_FRAMES
    claim = Claim(
        about=concept, value="present", side=side, zone=zone, size_word=size, variant=variant
    )
    return _fill(_pick(rng, frames), article, phrase), claim


def _noun_phrase(
    rng: Generator,
    article: str,
    name: str,
    side: str | None,
    zone: str | None,
    size: str | None,
    variant: str | None,
) -> tuple[str, str]:
    """Article and phrase, with place before the name or behind it."""
    place_before = rng.random() < 0.5
    before = [size] if size else []
    behind = ""
    if side == "both":
        if place_before:
            before.append("bilateral")
        else:
            behind = " on both sides"
        if zone:
            behind = f" in the {zone} zones" + behind
    elif side and zone:
        if place_before:
            before += [side, f"{zone} zone"]
        else:
            behind = _pick(
                rng, (f" in the {side} {zone} zone", f" in the {zone} zone on the {side}")
            )
    elif side:
        if place_before:
            before.append(side)
        else:
            behind = f" on the {side}"
    elif zone:
        if place_before:
            before.append(f"{zone} zone")
        else:
            behind = f" in the {zone} zone"
    if variant:
        before.append(variant)
    phrase = " ".join([*before, name]) + behind
    if article:
        article = "an" if phrase[0] in "aeio" else "a"
    return article, phrase


def _deny(rng: Generator, absent: Sequence[str]) -> tuple[str, list[Claim]]:
    """One sentence that denies one to three absent findings."""
    count = min(len(absent), int(rng.choice([1, 2, 3], p=(0.5, 0.3, 0.2))))
    chosen = [absent[k] for k in rng.permutation(len(absent))[:count].tolist()]
    claims = [Claim(about=concept, value="absent") for concept in chosen]
    names = [_pick(rng, NAMES[concept]) for concept in chosen]
    if count > 1:
        listed = ", ".join(n for _, n in names[:-1]) + f" or {names[-1][1]}"
        return _fill(_pick(rng, NEGATIVE_FRAMES[:8]), "", listed), claims
    (article, name), spec, roll = names[0], SPEC_OF[chosen[0]], rng.random()
    if roll < 0.06:
        return _fill(_pick(rng, PRIOR_NEGATIVE), article, name), claims
    if roll < 0.22:
        # sides, zones and sizes are denied too, so that none of them means "present"
        size = _pick(rng, spec.size_words) if spec.size_words and rng.random() < 0.4 else None
        side = _pick(rng, ("left", "right")) if spec.has_side and rng.random() < 0.6 else None
        zone = _pick(rng, spec.zones) if spec.zones and rng.random() < 0.4 else None
        article, name = _noun_phrase(rng, article, name, side, zone, size, None)
    frames = NEGATIVE_FRAMES + (DEVICE_NEGATIVE if spec.concept_id in DEVICES else ())
    return _fill(_pick(rng, frames), article, name), claims


_DESCRIPTORS: dict[str, dict[str, tuple[str, ...]]] = {
    "lung_volume": {
        "low": ("lung volumes are low.", "low lung volumes.", "shallow inspiration."),
        "normal": ("lung volumes are normal.", "normal lung volumes.", "normal inspiration."),
        "high": ("lung volumes are high.", "high lung volumes.", "deep inspiration."),
    },
    "heart_size": {
        "small": ("the heart is small.", "small heart size."),
        "normal": ("heart size is normal.", "the heart is of normal size."),
    },
    "aorta": {
        "prominent": ("the aortic knob is prominent.", "prominent aortic knob."),
        "normal": ("the aortic knob is normal.", "normal aortic knob."),
    },
    "diaphragm": {
        "right": ("the right hemidiaphragm is raised.", "raised right hemidiaphragm."),
        "left": ("the left hemidiaphragm is raised.", "raised left hemidiaphragm."),
        "none": ("no hemidiaphragm is raised.", "the diaphragm is normal."),
    },
    "scoliosis": {
        "right": ("scoliosis convex to the right.", "there is scoliosis to the right."),
        "left": ("scoliosis convex to the left.", "there is scoliosis to the left."),
        "none": ("no scoliosis.", "the spine is straight."),
    },
    "sternotomy": {
        "present": ("sternotomy wires are seen.", "there are sternotomy wires."),
        "absent": ("no sternotomy wires.", "there are no sternotomy wires."),
    },
    "leads": {
        "present": ("monitoring wires overlie the chest.", "there are monitoring wires."),
        "absent": ("no monitoring wires.", "there are no monitoring wires."),
    },
}
# chance that a descriptor is offered to the report: unusual values are said more often
_OFFERED = {"none": 0.2, "normal": 0.3, "absent": 0.15}


def _describe(rng: Generator, anatomy: dict[str, str]) -> list[tuple[str, Claim | None]]:
    offered: list[tuple[str, Claim | None]] = []
    for about, wordings in _DESCRIPTORS.items():
        value = anatomy[about]
        if value not in wordings or rng.random() > _OFFERED.get(value, 0.85):
            continue
        offered.append((_pick(rng, wordings[value]), Claim(about=about, value=value)))
    return offered
