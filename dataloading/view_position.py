"""Which projection a view's name means: the one place where names of views are compared.

Manifests keep the name as the header or the publisher wrote it (column `view`); what groups or
filters films by their projection asks here.

Source:  ViewPosition (0018,5101), PS3.3 C.8.1.1 and C.8.11.5; the meanings of PS3.16 CID 4010
         (ViewCodeSequence); all values of MIMIC-CXR 2.0 (AP, PA, LATERAL, LL, AP AXIAL, AP LLD,
         AP RLD, PA LLD, PA RLD, LAO, RAO, LPO, SWIMMERS, XTABLE LATERAL), PadChest (PA, L,
         AP_horizontal, AP, COSTAL, EXCLUDE, UNK), CheXpert, NIH, RSNA, Open-i (Frontal, Lateral);
         the usual words of German, Spanish, Portuguese, Italian and French departments.
"""

from __future__ import annotations

import re
import unicodedata

PROJECTIONS = ("PA", "AP", "FRONTAL", "LATERAL", "DECUBITUS", "OBLIQUE", "OTHER")
FRONTAL = frozenset({"PA", "AP", "FRONTAL"})

# The way of the ray written out, in capitals without accents: "POSTERO ANTERIOR", "P A",
# "ANTEROPOSTERIEURE", "DORSOVENTRAL". Beside "FRONTAL" or "OBLIQUE" it is one word among others.
_WRITTEN_OUT = (
    (re.compile(r"\bPOSTER(O|IOR) ?ANTERI(OR|EUR)\w*|\bDORSO ?VENTRAL\w*|\bP A\b"), "PA"),
    (re.compile(r"\bANTER(O|IOR) ?POSTERI(OR|EUR)\w*|\bVENTRO ?DORSAL\w*|\bA P\b"), "AP"),
)
# Lying on the back is no decubitus film, whose patient lies on a side: "AP DECUBITO SUPINO".
_ON_THE_BACK = re.compile(r"\bDECUB\w* (SUPIN\w*|DORSAL\w*)|\b(SUPIN\w*|DORSAL\w*) DECUB\w*")
# Words of a name, the first line that one begins with decides: "LATERAL DECUBITUS" is no lateral
# film, and "AP AXIAL" (lordotic) none that a model of frontal films should meet.
_WORDS = {
    "DECUBITUS": r"DECUB\w*|LLD|RLD|(LINKS|RECHTS)?SEITENLAGE\w*",
    "OBLIQUE": r"OBLI(Q|C)U\w*|OBL|LAO|RAO|LPO|RPO|LLO|RLO|OA[DGI]|OP[DGI]|SCHRA(E?G\w*)?",
    "OTHER": r"AXIALE?|LORDOT\w*|APICAL\w*|SWIMMERS?|COSTAL",
}
_FRONTAL = re.compile(r"FRONTAL\w*|FACE|FRENTE")
_LATERAL = re.compile(r"(LATERO)?LATERAL\w*|LAT|LL|RL|L|SEITL\w*|PERFIL|PROFIL\w*")
# posture, place and part of the body: no projection is told by them
_UNTOLD = re.compile(
    r"NA|NAN|NONE|NULL|UNK|UNKNOWN|U|UNSPECIFIED|SUPINE|ERECT|UPRIGHT|STANDING|SITTING|PORTABLE|"
    r"MOBILE|BEDSIDE|CHEST|THORAX|TORAX|LIEGEND|STEHEND|SITZEND"
)
_BESIDE = "HORIZONTAL|XTABLE|EXCLUDE"  # in names of published sets
_NOTHING = frozenset({"N A", "NOT STATED"})  # whole names, of which no word says it alone


def projection(view: str) -> str:
    """One of PROJECTIONS; "" where nothing is stated, or two things that exclude each other.

    FRONTAL is PA or AP, nobody says which.
    """
    words = _words_of(view)
    found = _told_by(words)
    return found if found is not None else "OTHER" if words else ""


def stated_projection(view: str) -> str:
    """As projection, "" for words that are of no view: the name of a protocol ("ROUTINE"), say."""
    return _told_by(_words_of(view)) or ""


def is_view_name(view: str) -> bool:
    """Whether it is made of a view's words alone: a cell of a user's column may name a patient."""
    known = (*_WORDS.values(), "PA", "AP", _FRONTAL.pattern, _LATERAL.pattern, _BESIDE)
    is_plain = not any(map(str.isdigit, view))  # "LATERAL4711"
    return is_plain and all(re.fullmatch("|".join(known), word) for word in _words_of(view))


def _words_of(view: str) -> set[str]:
    """In capitals without accents, less those that tell no projection."""
    letters = unicodedata.normalize("NFKD", view.upper())
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    name = " ".join(word for word in re.split(r"[\W_]+", plain) if word)
    if name in _NOTHING:
        return set()
    name = _ON_THE_BACK.sub("", name)
    for written, short in _WRITTEN_OUT:
        name = written.sub(short, name)
    return {word for word in name.split() if not _UNTOLD.fullmatch(word)}


def _told_by(words: set[str]) -> str | None:
    """None where no word is known, "" where two exclude each other."""
    for found, known in _WORDS.items():
        if any(re.fullmatch(known, word) for word in words):
            return found
    told = words & {"PA", "AP"}
    is_frontal = bool(told) or any(map(_FRONTAL.fullmatch, words))
    is_lateral = any(map(_LATERAL.fullmatch, words))
    if is_frontal and is_lateral:
        return ""
    if is_frontal:
        return told.pop() if len(told) == 1 else "FRONTAL"
    return "LATERAL" if is_lateral else None


def is_frontal(view: str) -> bool:
    """Whether it is the usual film from front or back, standing, sitting or lying on the back."""
    return projection(view) in FRONTAL
