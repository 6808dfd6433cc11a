"""CheXbert's labels of CheXpert Plus: a file for each section that was read, an image a line.

{"path_to_image": "train/patient00001/study1/view1_frontal.jpg", "Edema": 1.0, "Fracture": null,
...}: 1 present, 0 absent, -1 uncertain, null not mentioned, as CheXpert's own tables. Of an empty
section CheXbert says No Finding: three studies of four have no findings, and such labels are none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlip.dataloading.datasets.json_file import read_json_lines
from mlip.dataloading.datasets.rows import first_of, label_states, require_choice
from mlip.dataloading.datasets.sections import section_text

# section that was read -> column of the table that must say something
_COLUMNS = {
    "impression": "section_impression",
    "findings": "section_findings",
    "report": "report",
}
CHOICES = ("", *_COLUMNS, "none")
_IMAGE = "path_to_image"
_States = tuple[str, str, str]  # names of what is there, uncertain, absent


class CheXbertLabels:
    """Label states by row of the main table, and the account of those without any.

    root     folder with impression_fixed.json and the like, or chexbert_labels/ or labels/ in it
    section  one of CHOICES; "" = impression where its file is there
    Raises:  ConfigError for another section; DatasetError for a file that is not there, or a line
             that is no object.
    """

    def __init__(self, root: Path, section: str, access: str) -> None:
        require_choice({"labels": section}, "labels", CHOICES)
        name = f"{section or 'impression'}_fixed.json"
        places = [f"{folder}{name}" for folder in ("", "chexbert_labels/", "labels/")]
        self._column, self._path, self._unfound = "", Path(name), False
        self._silent = self._missing = self._repeated = 0
        self._states: dict[str, _States] = {}
        if section == "none":
            return
        if not section and not any((root / place).is_file() for place in places):
            self._unfound = True
            return
        self._path = first_of(root, places, access)
        self._column = _COLUMNS[section or "impression"]
        known: dict[tuple[Any, ...], _States] = {}  # lines that are alike share one
        for image, entry in read_json_lines(self._path, _IMAGE, access):
            del entry[_IMAGE]
            states = known.get(key := _key(entry))
            if states is None:
                cells = {name: _cell(value) for name, value in entry.items()}
                states = known[key] = label_states(cells, (), self._path)
            if image in self._states:
                self._repeated += 1
            else:
                self._states[image] = states

    def of(self, row: Mapping[str, str]) -> _States:
        """Names of what is there, uncertain and absent, "|" between them."""
        if not self._column:
            return "", "", ""
        if not section_text(row[self._column]):
            self._silent += 1
            return "", "", ""
        states = self._states.get(row[_IMAGE])
        if states is None:
            self._missing += 1
            return "", "", ""
        return states

    def notes(self) -> list[str]:
        """What the labels are of, and how many studies have none."""
        if self._unfound:
            return [f"no {self._path} in the root or its chexbert_labels/: no labels"]
        if not self._column:
            return []
        counts = f"{self._silent} studies without that section have none"
        if self._missing:
            counts += f", {self._missing} studies are not in it"
        if self._repeated:
            counts += f", {self._repeated} lines repeat an image: the first one counts"
        return [f"labels: CheXbert's of {self._path.name}; {counts}"]


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    values = tuple(entry.values())
    try:
        hash(values)
    except TypeError:  # a list or an object, which label_states refuses
        return ()
    return tuple(entry), values


def _cell(value: Any) -> str:
    """A label's state as a table would hold it; null and NaN are blank."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    # true is equal to 1, so that both stand under one key
    return str(int(value)) if isinstance(value, bool) else str(value)
