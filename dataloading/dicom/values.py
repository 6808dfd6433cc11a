"""Attributes of a DICOM data set as plain values, checked to be of their kind."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from mlip.dataloading.dicom.source import DicomError


def value_of(dataset: Dataset, name: str) -> Any:
    """The attribute's value, None where absent, empty or not convertible."""
    try:
        value = dataset.get(name)
    except (ValueError, TypeError, ArithmeticError, struct.error, NotImplementedError):
        return None
    return None if value is None or value == "" else value


def read_items(dataset: Dataset, name: str, code: str) -> list[Dataset]:
    """The items of a sequence, none where it is absent; DicomError(code) where it is another kind.

    Files call text a sequence, and one that says how to read the pixels is not passed over.
    """
    value = value_of(dataset, name)
    if value is None:
        return []
    if not isinstance(value, pydicom.Sequence):
        raise DicomError(code, f"{name} is no sequence")
    return list(value)


def is_empty(dataset: Dataset, name: str) -> bool:
    """Whether the attribute stands there without a value; a word for a number is not empty."""
    value = dataset.get_item(name).value
    return value is None or (isinstance(value, bytes | str) and not value.strip())


def read_integer(dataset: Dataset, name: str, code: str, default: int | None = None) -> int:
    """The attribute's whole number; DicomError(code) where it is none, missing_tag where absent."""
    if name not in dataset:
        if default is None:
            raise DicomError("missing_tag", name)
        return default
    value = value_of(dataset, name)
    if value is None and default is not None and is_empty(dataset, name):
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise DicomError(code, f"{name} is not one whole number")
    return int(value)


def read_numbers(dataset: Dataset, name: str) -> list[float] | None:
    """The numbers that are there; None where there is none, or one that is not finite."""
    entries = read_entries(dataset, name)
    return [entry for entry in entries or [] if entry is not None] or None


def read_entries(dataset: Dataset, name: str) -> list[float | None] | None:
    """As read_numbers, None where an entry is blank, so that two attributes stay side by side."""
    value = value_of(dataset, name)
    if value is None:
        return None
    values = value if isinstance(value, list | pydicom.multival.MultiValue) else [value]
    try:
        entries = [None if v is None or str(v).strip() == "" else float(v) for v in values]
    except (TypeError, ValueError, OverflowError):
        return None
    return entries if all(entry is None or np.isfinite(entry) for entry in entries) else None


def read_text(dataset: Dataset, name: str) -> str:
    """The attribute's one text, "" where it is none."""
    value = value_of(dataset, name)
    return value.strip(" \0") if isinstance(value, str) else ""


def read_any_text(dataset: Dataset, name: str) -> str:
    """As read_text, of a number or of several values too: those tell nothing, and are no gap."""
    value = value_of(dataset, name)
    return "" if value is None else str(value).strip(" \0")


def read_code(dataset: Dataset, name: str) -> str:
    """A code string; anything that is none, free text for instance, is dropped."""
    return as_code(read_text(dataset, name))


def as_code(text: str) -> str:
    """The text in capitals where it is a code string, else ""."""
    valid = len(text) <= 16 and all(c.isascii() and (c.isalnum() or c in " _") for c in text)
    return text.upper() if valid else ""
