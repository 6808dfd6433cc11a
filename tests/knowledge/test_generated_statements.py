"""Thousands of sentences built of a denied list and one more statement, each of a known form.

Oracle: the state that each finding has by the construction of its sentence.
"""

import pytest

from mlip.knowledge.linker import default_linker

DENIALS = (
    "No",
    "There is no",
    "No evidence of",
    "Without",
    "No definite",
    "Negative for",
    "The lungs are free of",
    "No acute",
)
LISTS = {
    "effusion": ("pleural_effusion",),
    "pulmonary edema": ("pulmonary_edema",),
    "effusion or pneumothorax": ("pleural_effusion", "pneumothorax"),
    "edema, effusion": ("pulmonary_edema", "pleural_effusion"),
    "fracture, effusion, or pneumothorax": ("fracture", "pleural_effusion", "pneumothorax"),
}
FINDINGS = {
    "nodule": "lung_nodule",
    "mass": "lung_mass",
    "granuloma": "granuloma",
    "cavity": "cavity",
}
SIZES = (
    "8 mm",
    "5-mm",
    "12mm",
    "1.5cm",
    "1.2 x 0.8 cm",
    "3 to 4 mm",
    "approximately 2 cm",
    "two 10 millimeter",
    "left upper lobe 7 mm",
    "stable 9 mm",
    "spiculated 3 x 4 x 5 cm",
)
LIMITS = (
    "larger than 1 cm",
    "> 4 mm",
    "greater than 1.5 cm",
    ">5mm",
    "over 1 cm",
    "exceeding 8 mm",
    "measuring more than 5 mm",
    ">= 6 mm",
    "\u2265 6 mm",
    "\u22656mm",
    "at least 6 mm",
)
DOUBTS = (
    "cannot be excluded",
    "is not excluded",
    "can not be completely excluded",
    "is possible",
    "is suspected",
    "may be missed",
)
EXPLAINED = {
    "atelectasis": "atelectasis",
    "scarring": "scar",
    "pleural thickening": "pleural_thickening",
    "vascular congestion": "vascular_congestion",
}
REJECTED = {"pneumonia": "pneumonia", "a mass": "lung_mass", "consolidation": "consolidation"}
WORDS = ("rather than", "instead of", "as opposed to")
DONE = {
    "chest tube placement": "chest_tube",
    "PICC placement": "picc",
    "CABG": "bypass_graft",
    "median sternotomy": "sternotomy",
    "mitral valve replacement": "prosthetic_valve",
    "left upper lobectomy": "lung_resection",
}
CHANGES = (
    "interval increase in",
    "increase in",
    "change in",
    "significant interval change in",
    "decrease in",
    "worsening of",
    "interval progression of",
    "growth of",
    "enlargement of",
    "interval enlargement of",
)
BESIDE = ("adjacent to", "related to", "in the region of", "overlying", "to account for")
SEEN = ("is noted", "is seen", "is identified in the left lung", "is present")


def denied_lists():
    for denial in DENIALS:
        for text, concepts in LISTS.items():
            yield f"{denial} {text}", dict.fromkeys(concepts, "absent")


def stated_sizes():
    for text, states in denied_lists():
        for size in SIZES:
            for name, concept in FINDINGS.items():
                wanted = {**states, concept: "present"}
                yield f"{text}, {size} {name}.", wanted
                yield f"{text} with {size} {name} in the left lung.", wanted
                yield f"{text}, {size} {name}, unchanged.", wanted
                if len(states) == 1:
                    yield f"{text} and {size} {name} is seen.", wanted


def limits():
    for text, states in denied_lists():
        for limit in LIMITS:
            for name, concept in FINDINGS.items():
                wanted = {**states, concept: "absent"}
                yield f"{text}, {name} {limit}.", wanted
                yield f"{text}, {name} {limit}, or scarring.", {**wanted, "scar": "absent"}
                if not limit.startswith("measuring"):
                    yield f"{text}, {limit} {name}.", wanted


def doubts_behind_and():
    for text, states in denied_lists():
        for doubt in DOUBTS:
            for quality in ("", "an underlying ", "a small ", "early "):
                wanted = {**states, "pneumonia": "uncertain"}
                yield f"{text} and {quality}pneumonia {doubt}.", wanted
                yield f"{text}, and {quality}pneumonia {doubt}.", wanted
                wanted = {**wanted, "aspiration": "uncertain"}
                yield f"{text} and {quality}pneumonia or aspiration {doubt}.", wanted


def rejected():
    for word in WORDS:
        for name, concept in EXPLAINED.items():
            for other, denied in REJECTED.items():
                wanted = {concept: "present", denied: "absent"}
                for form in (
                    "Left basilar {0} {1} {2}.",
                    "The opacity represents {0} {1} {2}.",
                    "{0} {1} {2} is seen.",
                    "{1} {2} this is {0}.",
                    "{1} {2}, there is {0}.",
                    "{1} {2} these findings represent {0}.",
                ):
                    yield form.format(name, word, other), wanted
                yield f"{name} {word} {other} or edema.", {**wanted, "pulmonary_edema": "absent"}
                yield (
                    f"{name} {word} {other}, small effusion.",
                    {
                        **wanted,
                        "pleural_effusion": "present",
                    },
                )
                for form in ("Likely {0} {1} {2}.", "{0} {1} {2} is suspected."):
                    yield form.format(name, word, other), dict.fromkeys(wanted, "uncertain")


def done_to_the_patient():
    for text, states in denied_lists():
        for words in ("status post", "s/p", "status-post"):
            for name, concept in DONE.items():
                wanted = {**states, concept: "present"}
                yield f"{text} {words} {name}.", wanted
                yield f"{text}, {words} {name}.", wanted
                yield (
                    f"{text} is seen {words} {name}, no nodule.",
                    {
                        **wanted,
                        "lung_nodule": "absent",
                    },
                )


def changes():
    for text, states in denied_lists():
        for change in CHANGES:
            for quality in ("", "the ", "the small "):
                for joint in (" or", ", or", " nor"):
                    wanted = {**states, "lung_nodule": "present"}
                    yield f"{text}{joint} {change} {quality}nodule.", wanted
        for quality in ("new", "increased", "enlarging", "interval development of"):
            yield f"{text} or {quality} nodule.", {**states, "lung_nodule": "absent"}


def seen_behind_whole_lists():
    for text, states in denied_lists():
        for name, concept in FINDINGS.items() if " or " in text else ():
            for verb in SEEN:
                yield f"{text}, {name} {verb}.", {**states, concept: "present"}
                yield f"{text}, {name} in the right base {verb}.", {**states, concept: "present"}
                wanted = {**states, concept: "absent", "scar": "absent"}
                yield f"{text}, {name} or scarring {verb}.", wanted
                yield f"{text}, or {name} {verb}.", {**states, concept: "absent"}


def beside_what_is_there():
    for text, states in denied_lists():
        for name, concept in FINDINGS.items():
            for place in BESIDE:
                yield f"{text} {place} the {name}.", {**states, concept: "present"}
                wanted = {**states, concept: "present", "scar": "absent"}
                yield f"{text} {place} the small {name}, or scarring.", wanted
            yield f"{text} or the {name}.", {**states, concept: "absent"}


FORMS = (
    stated_sizes,
    limits,
    doubts_behind_and,
    rejected,
    done_to_the_patient,
    changes,
    seen_behind_whole_lists,
    beside_what_is_there,
)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_each_finding_has_the_state_that_its_sentence_was_built_with(form):
    sentences = list(form())
    assert len(sentences) >= 350
    linker = default_linker()
    wrong = []
    for text, wanted in sentences:
        found = {mention.concept_id: mention.state for mention in linker.link(text)}
        wrong += [(text, name) for name, state in wanted.items() if found.get(name) != state]
    assert wrong[:20] == []
