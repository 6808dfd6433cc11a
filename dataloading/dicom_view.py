"""The view that a DICOM header states, by ViewPosition or else by ViewCodeSequence.

Descriptions of series and protocols are not read: they are typed, or those of the protocol that
was chosen, not of the film that was taken.

Source:  PS3.3 C.8.11.5: a DX image must have the sequence and may lack the other; C.8.1.1: a CR
         image has ViewPosition alone.
"""

from __future__ import annotations

import pydicom
from pydicom.dataset import Dataset

from mlip.dataloading.dicom_values import as_code, read_text, value_of
from mlip.dataloading.view_position import projection

VIEW_TAGS = ("ViewPosition", "ViewCodeSequence")


def read_view(dataset: Dataset) -> str:
    """ViewPosition in capitals, several values with the file's backslash between.

    One that is no code string ("P.A.", "antero-posterior") is the projection that it means, and
    nothing where it means none, for it may be anybody's free text. Where that states no projection,
    the one of the sequence stands for it.
    """
    said = [as_code(part) or _meant(part) for part in _view_positions(dataset)]
    return _or_coded("\\".join(dict.fromkeys(said)) if all(said) else "", dataset)


def read_view_as_written(dataset: Dataset) -> str:
    """As read_view, free text too: to compare with projections, never for output."""
    return _or_coded("\\".join(_view_positions(dataset)), dataset)


def _view_positions(dataset: Dataset) -> list[str]:
    value = value_of(dataset, "ViewPosition")
    parts = value if isinstance(value, pydicom.multival.MultiValue) else [value or ""]
    return [text for part in parts if (text := str(part).strip(" \0"))]


def _or_coded(view: str, dataset: Dataset) -> str:
    if projection(view):
        return view
    items = value_of(dataset, "ViewCodeSequence")
    if not isinstance(items, pydicom.Sequence):  # of another kind in a careless file
        return view
    meanings = (_meant(read_text(item, "CodeMeaning")) for item in items)
    return next(filter(None, meanings), view)


def _meant(text: str) -> str:
    """The projection of a text in anybody's words; OTHER is that of every unknown word."""
    found = projection(text)
    return found if found != "OTHER" else ""
