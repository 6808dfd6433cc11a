"""The view that a DICOM header states, by ViewPosition or else by ViewCodeSequence.

Descriptions of series and protocols are not read: they are typed, or those of the protocol that
was chosen, not of the film that was taken.

Source:  PS3.3 C.8.11.5: a DX image must have the sequence and may lack the other; C.8.1.1: a CR
         image has ViewPosition alone.
"""

from __future__ import annotations

import pydicom
from pydicom.dataset import Dataset

from mlip.dataloading.dicom.values import as_code, read_text, value_of
from mlip.dataloading.view_position import stated_projection

VIEW_TAGS = ("ViewPosition", "ViewCodeSequence")


def read_view(dataset: Dataset) -> str:
    """ViewPosition in capitals, several values with the file's backslash between.

    One that is no code string ("P.A.", "antero-posterior") is the projection that it means, and
    nothing where it means none, for it may be anybody's free text. Where that states no projection,
    the one of the sequence stands for it.
    """
    written = _view_positions(dataset)
    said = [as_code(part) or stated_projection(part) for part in written]
    view = "\\".join(dict.fromkeys(said)) if all(said) else ""
    is_stated = bool(view) and stated_projection("\\".join(written))
    return view if is_stated else _coded(dataset) or view


def read_view_as_written(dataset: Dataset) -> str:
    """As read_view, free text too: to compare with projections, never for output."""
    view = "\\".join(_view_positions(dataset))
    return view if stated_projection(view) else _coded(dataset) or view


def _view_positions(dataset: Dataset) -> list[str]:
    value = value_of(dataset, "ViewPosition")
    parts = value if isinstance(value, pydicom.multival.MultiValue) else [value or ""]
    return [text for part in parts if (text := str(part).strip(" \0"))]


def _coded(dataset: Dataset) -> str:
    """The first projection that the sequence means, "" where it means none."""
    items = value_of(dataset, "ViewCodeSequence")
    if not isinstance(items, pydicom.Sequence):  # of another kind in a careless file
        return ""
    meanings = (stated_projection(read_text(item, "CodeMeaning")) for item in items)
    return next(filter(None, meanings), "")
