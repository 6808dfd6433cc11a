"""Ways of doubting, denying and dating a finding, in other words than the rules' own examples.

Oracle: labels written by hand, P present, A absent, U uncertain (docs/knowledge.md says which is
which); the concept's first mention counts.
"""

from collections import defaultdict

import pytest

from mlip.knowledge.linker import default_linker, link, read_cues

LETTER = {"present": "P", "absent": "A", "uncertain": "U"}
SENTENCES = {
    "what an examination is asked to rule out is uncertain": """
        Rule out effusion. | pleural_effusion=U
        Kindly rule out a rib fracture. | rib_fracture=U
        Exclude malignancy. | malignancy=U
        Chest CT rules out an embolism or mass. | lung_mass=A
        CT excludes a mass. | lung_mass=A
    """,
}
# kinds that one wording may have together, each decided by its order in scope.resolve
ON_PURPOSE = {
    ("negation_before", "or"),  # nor
    ("negation_after", "negation_before"),  # resolved
    ("uncertain_after", "uncertain_before"),  # cannot exclude
    ("positive", "seen"),  # again seen
}


@pytest.mark.parametrize("row", SENTENCES)
def test_states_of_sentences(row):
    for line in filter(None, map(str.strip, SENTENCES[row].splitlines())):
        text, _, labels = line.rpartition(" | ")
        found: dict[str, str] = {}
        for mention in link(text):
            found.setdefault(mention.concept_id, LETTER[mention.state])
        wanted = dict(label.split("=") for label in labels.split())
        assert {name: found.get(name) for name in wanted} == wanted, text


def test_no_two_wordings_of_cues_share_a_key_across_kinds():
    linker = default_linker()
    kinds, wordings = defaultdict(set), defaultdict(set)
    for kind, forms in read_cues().items():
        for form in forms:
            kinds[linker.key(form)].add(kind)
            wordings[linker.key(form)].add(form)
    shared = [key for key, names in kinds.items() if len(names) > 1]
    assert [sorted(wordings[key]) for key in shared if len(wordings[key]) > 1] == []
    assert {tuple(sorted(kinds[key])) for key in shared} == ON_PURPOSE
