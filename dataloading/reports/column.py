"""A manifest's report texts: sections chosen and rules applied as they are read, kept compressed.

A million reports of 290 characters are 290 MiB as an Arrow column and a fraction of that here; a
training run reads each text once (encoder.py keeps its tokens): reading may cost a little.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlip.dataloading.reports.markup import plain_reports
from mlip.dataloading.reports.text import select_sections
from mlip.dataloading.text_hash import HashArray, hash_of_nan_words, hash_words

# Why a row is left out, by code; 0 = it is not.
RULES = (
    "",
    "no_report",
    "blank_report",
    "nan_report",
    "one_word_report",
    "no_section",
    "no_split",
    "rtf_report",
)
(_, NO_REPORT, BLANK_REPORT, NAN_REPORT, ONE_WORD_REPORT, NO_SECTION, NO_SPLIT_RULE, RTF_REPORT) = (
    range(8)
)

_GROUP = 32  # texts compressed together: alone they shrink half as well, and one read unpacks all
_LEVEL = 1  # of zstd: higher levels take longer for a tenth less
_OPEN_GROUPS = 64  # unpacked and kept, for reads in order; under 1 MiB


class TextStore:
    """Texts by row number, in compressed groups; safe in threads."""

    def __init__(self) -> None:
        self._codec = pa.Codec("zstd", _LEVEL)
        self._groups: list[bytes] = []
        self._ends: list[NDArray[np.uint32]] = []  # in bytes of the unpacked group
        self._count = 0
        self._open: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._waiting = pa.array([], pa.large_string())  # texts of the group that is not full yet

    def __getstate__(self) -> dict[str, Any]:
        # neither a codec nor a lock can be sent to another process
        kept = ("_groups", "_ends", "_count", "_waiting")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        TextStore.__init__(self)
        self.__dict__.update(state)

    @classmethod
    def of(cls, texts: Iterable[str]) -> TextStore:
        store = cls()
        store.append(pa.array(list(texts), pa.large_string()))
        return store

    def append(self, texts: pa.LargeStringArray) -> None:
        """Adds the texts of an array; a null is an empty text."""
        texts = pa.concat_arrays([self._waiting, pc.fill_null(texts, "")])
        whole = len(texts) - len(texts) % _GROUP
        # a copy: a slice would keep the whole array
        self._waiting = pa.concat_arrays([texts[whole:], texts[:0]])
        self._count += whole
        _, offset_buffer, data = texts.buffers()
        offsets = np.frombuffer(offset_buffer, np.int64) if whole else np.zeros(1, np.int64)
        content = pa.py_buffer(b"") if data is None else data
        for first in range(0, whole, _GROUP):
            inside = offsets[texts.offset + first : texts.offset + first + _GROUP + 1]
            begin, end = int(inside[0]), int(inside[-1])
            packed = self._codec.compress(content[begin:end], asbytes=True)
            self._groups.append(packed)
            self._ends.append((inside[1:] - begin).astype(np.uint32))

    def __len__(self) -> int:
        return self._count + len(self._waiting)

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < len(self):
            raise IndexError(f"text {row} of {len(self)}")
        group, place = divmod(row, _GROUP)
        if row >= self._count:
            return str(self._waiting[row - self._count].as_py())
        content, ends = self._unpacked(group), self._ends[group]
        begin = int(ends[place - 1]) if place else 0
        return content[begin : int(ends[place])].decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))

    def _unpacked(self, group: int) -> bytes:
        with self._lock:
            content = self._open.get(group)
            if content is None:
                size = int(self._ends[group][-1])
                # an empty group needs no codec: its compressed form has no content to size
                packed = self._groups[group]
                content = self._codec.decompress(packed, size, asbytes=True) if size else b""
                self._open[group] = content
                while len(self._open) > _OPEN_GROUPS:
                    self._open.popitem(last=False)
            return content


class ReportColumn:
    """What a manifest keeps of its report column, built piece by piece in row order."""

    def __init__(self, sections: str) -> None:
        self._sections = sections
        self.clear()

    def clear(self) -> None:
        self.texts = TextStore()
        self._rules: list[NDArray[np.uint8]] = []
        self._hashes: list[HashArray] = []

    def append(self, column: pa.LargeStringArray) -> None:
        absent = pc.is_null(column).to_numpy(zero_copy_only=False)
        filled = pa.chunked_array([pc.fill_null(column, "")])
        plain, is_rtf = plain_reports(filled)
        report, without_section = select_sections(plain, self._sections)
        text_hash, words = hash_words(report)
        rule = np.zeros(len(column), dtype=np.uint8)
        rule[words == 1] = ONE_WORD_REPORT
        rule[np.isin(text_hash, hash_of_nan_words())] = NAN_REPORT
        rule[words == 0] = BLANK_REPORT
        rule[without_section] = NO_SECTION
        rule[is_rtf] = RTF_REPORT
        rule[absent] = NO_REPORT
        self._rules.append(rule)
        self._hashes.append(text_hash)
        for chunk in report.chunks:
            self.texts.append(chunk)

    def append_missing(self, rows: int) -> None:
        """Rows of a manifest without a report column."""
        self._rules.append(np.full(rows, NO_REPORT, dtype=np.uint8))
        self._hashes.append(np.zeros(rows, dtype=np.uint64))
        self.texts.append(pa.nulls(rows, pa.large_string()))

    def rule(self) -> NDArray[np.uint8]:
        """[R] index into RULES."""
        return np.concatenate([np.zeros(0, np.uint8), *self._rules])

    def text_hash(self) -> HashArray:
        """[R] hash of the words of each text."""
        return np.concatenate([np.zeros(0, np.uint64), *self._hashes])
