"""Which projection a view's name means: the one place where names of views are compared.

Manifests keep the name as the header or the publisher wrote it (column `view`); what groups or
filters films by their projection asks here.

Source:  ViewPosition (0018,5101), PS3.3 C.8.1.1 and C.8.11.5; all values of MIMIC-CXR 2.0 (AP, PA,
         LATERAL, LL, AP AXIAL, AP LLD, AP RLD, PA LLD, PA RLD, LAO, RAO, LPO, SWIMMERS, XTABLE
         LATERAL), PadChest (PA, L, AP_horizontal, AP, COSTAL, EXCLUDE, UNK), CheXpert, NIH, RSNA,
         Open-i (Frontal, Lateral).
"""

from __future__ import annotations

import re

PROJECTIONS = ("PA", "AP", "FRONTAL", "LATERAL", "DECUBITUS", "OBLIQUE", "OTHER")
FRONTAL = frozenset({"PA", "AP", "FRONTAL"})

# Words of a name, the first line that one is of decides: "LATERAL DECUBITUS" is no lateral film,
# and "AP AXIAL" (lordotic) none that a model of frontal films should meet.
_WORDS = {
    "DECUBITUS": "DECUBITUS DECUB LLD RLD",
    "OBLIQUE": "OBLIQUE OBL LAO RAO LPO RPO LLO RLO",
    "OTHER": "AXIAL LORDOTIC APICAL SWIMMERS COSTAL",
}
_LATERAL = frozenset("LATERAL LAT LL RL L".split())
_UNKNOWN = frozenset("NA NAN NONE NULL UNK UNKNOWN U UNSPECIFIED".split())
_NOTHING = frozenset({"N A", "NOT STATED"})  # whole names, of which no word says it alone


def projection(view: str) -> str:
    """One of PROJECTIONS; "" where nothing is stated, or two things that exclude each other.

    FRONTAL is PA or AP, nobody says which.
    """
    in_order = [word for word in re.split(r"[\W_]+", view.upper()) if word]
    words = set() if " ".join(in_order) in _NOTHING else {*in_order} - _UNKNOWN
    for name, known in _WORDS.items():
        if words & set(known.split()):
            return name
    is_frontal, is_lateral = bool(words & FRONTAL), bool(words & _LATERAL)
    if is_frontal and is_lateral:
        return ""
    if is_frontal:
        told = words & FRONTAL - {"FRONTAL"}
        return told.pop() if len(told) == 1 else "FRONTAL"
    return "LATERAL" if is_lateral else "OTHER" if words else ""


def is_frontal(view: str) -> bool:
    """Whether it is the usual film from front or back, standing, sitting or lying on the back."""
    return projection(view) in FRONTAL
