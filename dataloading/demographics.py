"""Sex and age of a patient at the study, from what publishers and DICOM headers write for them.

Both are texts: sex "F", "M", "O" or "", age whole years or ""; "" = not stated. Ages over 89 become
"90": HIPAA's Safe Harbor rule, 45 CFR 164.514(b)(2)(i)(C), counts them as identifiers and allows
one class "age 90 or older". No date is handed on.
"""

from __future__ import annotations

import datetime
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

_OLDEST_TOLD = 90
_MOST_YEARS = 120  # more is a slip of the keyboard: NIH's first table has a patient of 414
# what programs and publishers write for a gap; U and UNKNOWN are HL7's and CheXpert's
_NOTHING = frozenset({"", "na", "n/a", "nan", "null", "none", "u", "unk", "unknown", "not stated"})
# with the words that tables of German, Spanish, Portuguese, Italian and French departments have
_SEX = {
    **dict.fromkeys(
        "f female w weiblich femenino feminino femminile feminin mujer femme".split(), "F"
    ),
    **dict.fromkeys(
        "m male mannlich maennlich masculino maschile masculin hombre homme".split(), "M"
    ),
    **dict.fromkeys("o other d divers".split(), "O"),
}
# beside DICOM's own letters what lists of a RIS say: 58 years, 58yrs, 58 y/o, 18 months
_YEARS = r"Y(?:(?:EA)?RS?|/?O)?"
_AGE = re.compile(
    rf"(\d{{1,3}})(\.\d*)?\s*({_YEARS}|M(?:O(?:NTH)?S?)?|W(?:EEKS?|KS?)?|D(?:AYS?)?)?\.?",
    re.ASCII,
)
_OVER = re.compile(rf"(?:>89|90\+|>=90|>90)(?:{_YEARS})?\.?")  # blanks taken out
_IN_A_YEAR = {"": 1, "Y": 1, "M": 12, "W": 52, "D": 365}  # of DICOM's age strings, PS3.5 6.2
_DATE = re.compile(r"(\d{4})(?:[-.]?(\d{2})[-.]?(\d{2}))?(?:\.0)?", re.ASCII)
_DUMMY_BIRTHS = ((1900, 1, 1), (1900,))  # what stands for a birth date that was taken away


def read_sex(text: str) -> str | None:
    """ "F", "M", "O", "" where nothing is stated; None for a word that is not known."""
    letters = unicodedata.normalize("NFKD", text.strip().lower())
    word = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return "" if word in _NOTHING else _SEX.get(word)


def read_age(text: str, zero_years: str = "0") -> str | None:
    """Whole years of "58", "58.0", "058Y", "018M", "012W", "010D"; "" where nothing is stated.

    zero_years  what an age of 0 years says: "" where it stands for a gap
    Returns: None for what is no age, or over 120 years.
    """
    word = text.strip().upper()
    if word.lower() in _NOTHING:
        return ""
    if _OVER.fullmatch(word.replace(" ", "")):
        return str(_OLDEST_TOLD)
    match = _AGE.fullmatch(word)
    if match is None:
        return None
    number, fraction, word = match.groups()
    unit = (word or "")[:1]
    if unit in ("", "Y") and not float(number + (fraction or "")):
        return zero_years
    return _told(int(number) // _IN_A_YEAR[unit])


def age_between(birth: str, study: str) -> str | None:
    """Whole years from one date to another, YYYYMMDD or a year alone; "" where one is not stated.

    With a year alone the difference of the years, which may be one too many.
    Returns: None for what is no date or a stand-in for one, or no age.
    """
    if birth.strip().lower() in _NOTHING or study.strip().lower() in _NOTHING:
        return ""
    born, seen = _date(birth), _date(study)
    if born is None or seen is None or born in _DUMMY_BIRTHS:
        return None
    is_before_birthday = len(born) == len(seen) == 3 and seen[1:] < born[1:]
    return _told(seen[0] - born[0] - is_before_birthday)


def _told(years: int) -> str | None:
    if not 0 <= years <= _MOST_YEARS:
        return None
    return str(min(years, _OLDEST_TOLD))


def _date(text: str) -> tuple[int, ...] | None:
    match = _DATE.fullmatch(text.strip())
    if match is None:
        return None
    parts = tuple(int(part) for part in match.groups() if part is not None)
    try:
        datetime.date(*parts) if len(parts) == 3 else datetime.date(parts[0], 1, 1)
    except ValueError:
        return None
    return parts


def differs(name: str, one: str, other: str) -> bool:
    """Whether two sources tell another "sex" or "age"; "" tells none.

    A year apart is none: a list has the age of the day it was made.
    """
    if not (one and other):
        return False
    return one != other if name == "sex" else abs(int(one) - int(other)) > 1


class PatientCells:
    """Sex and age as a table's rows are read, and how many of them could not be.

    sexes  the whole column of sex, where there is one: in one that has H (hombre, homme) M may be
           mujer, so it is not read
    """

    def __init__(self, sexes: Iterable[str | None] = ()) -> None:
        self._unread: Counter[str] = Counter()
        self._has_h = any((cell or "").strip().upper() == "H" for cell in sexes)

    def sex(self, cell: str) -> str:
        letter = cell.strip().upper() if self._has_h else ""
        if letter in ("H", "M"):
            return self.counted("sex", "M" if letter == "H" else None)
        return self.counted("sex", read_sex(cell))

    def age(self, cell: str, zero_years: str = "0") -> str:
        return self.counted("age", read_age(cell, zero_years))

    def age_between(self, birth: str, study: str) -> str:
        return self.counted("age", age_between(birth, study))

    def counted(self, name: str, value: str | None) -> str:
        """The value, "" where it is None, which is counted."""
        self._unread[name] += value is None
        return value or ""

    def notes(self) -> list[str]:
        """One line where something could not be read: how much, never what."""
        found = [f"{name} {count}" for name, count in self._unread.items() if count]
        return [f"cells not read, so not stated: {', '.join(found)}"] if found else []
