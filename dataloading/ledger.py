"""Where every manifest row went: trained, quarantined for a reason, or excluded by a rule.

Holds counts and row numbers only, never paths, texts or patient ids, so its state may be saved.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from mlip.system.machine import LimitError, limit_reached

# Stable codes: they appear in run logs and are compared between runs.
REASONS = {
    "missing": "the file does not exist",
    "no_permission": "the file may not be read",
    "not_a_file": "the path is a folder, a pipe or a device",
    "io_error": "the system could not read the file",
    "out_of_memory": "there was no memory to decode the file",
    "empty_file": "the file has zero bytes",
    "too_large": "the file or its declared picture is over the size limits",
    "too_small": "the picture has a side of fewer pixels than any radiograph",
    "unsupported": "the file is no JPEG, PNG or DICOM that can be read",
    "truncated": "the file ends before its picture does",
    "undecodable": "the decoder refused the file",
    "internal_error": "an error of this program, not of the file: please report it",
    "not_in_place": "the shard is not the one that the manifest was made with",
    "hash_mismatch": "the bytes differ from the manifest's SHA-256",
}
# beside these: CODES of dicom/source.py, for what only a DICOM file can have wrong


class DataError(RuntimeError):
    """The data cannot carry the run: too many bad files, or the image folder is gone."""

    exit_code = 3


class BadSample(Exception):
    """One image that cannot be used; `reason` is a stable code, `detail` never holds content."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail or REASONS.get(reason, '')}")
        self.reason = reason


def unreadable(error: OSError, what: str = "") -> BadSample:
    """Why the system gave no bytes of a file: a disk that fails is no missing file.

    what     of the file was to be read, for the detail
    Raises:  LimitError where nothing is wrong with the file: a good film must not be left out
             because too many others are open.
    """
    nameless = OSError(error.errno, error.strerror)  # the path of a film may name a patient
    # EAGAIN of an open is another program's lease on the file, no limit
    if error.errno != errno.EAGAIN and (told := limit_reached(nameless)):
        raise LimitError(f"an image cannot be read: {told}") from None
    if error.errno in (errno.EACCES, errno.EPERM):
        return BadSample("no_permission", what)
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return BadSample("missing", what)
    if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, a device that nothing serves
        return BadSample("not_a_file", what)
    told = os.strerror(error.errno) if error.errno else type(error).__name__
    return BadSample("io_error", f"{what}: {told}" if what else told)


def listed(counts: Mapping[str, int]) -> str:
    """Reasons or rules with how many rows each has, by name: "missing 3, truncated 1"."""
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def most_bad(share: float, rows: int) -> int:
    """How many of the rows are not more than the share, which is meant as it is written.

    0.29 * 100 is below 29: a product of floats would stop a run at its 29th bad image.
    """
    return int(Fraction(repr(float(share))) * rows)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"ledger: expected a whole number of 0 or more, got {value!r:.40}")
    return value


@dataclass
class EpochCount:
    trained: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    replacements: int = 0  # extra visits that filled the places of quarantined rows

    @property
    def seen(self) -> int:
        return self.trained + sum(self.quarantined.values())


class Ledger:
    """Counts of one rank (or, after `merge`, of all).

    For every finished epoch: trained + quarantined = rows of the training order, and
    that + excluded = rows of the manifest.
    """

    def __init__(self, rows: int, excluded: Mapping[str, int], bad_share: float = 1.0) -> None:
        self.excluded = dict(excluded)
        self.rows = rows
        self.bad_share = bad_share
        self.epochs: dict[int, EpochCount] = {}
        self.bad: dict[int, str] = {}  # manifest row -> reason, each row once

    @property
    def order_rows(self) -> int:
        """Rows that training may visit: all that no rule excluded."""
        return self.rows - sum(self.excluded.values())

    def _epoch(self, epoch: int) -> EpochCount:
        return self.epochs.setdefault(epoch, EpochCount())

    def add_trained(self, epoch: int, count: int) -> None:
        self._epoch(epoch).trained += count

    def add_bad(self, epoch: int, row: int, reason: str, *, in_order: bool = True) -> None:
        """One bad row; `in_order` is False where a replacement draw met it."""
        self.bad.setdefault(row, reason)
        if in_order:
            self._epoch(epoch).quarantined[reason] += 1

    def add_replacement(self, epoch: int) -> None:
        self._epoch(epoch).replacements += 1

    def check(self) -> None:
        """Raises:  DataError once more than bad_share of the training rows is bad."""
        allowed = most_bad(self.bad_share, self.order_rows)
        if len(self.bad) > allowed:
            top = ", ".join(
                f"{reason} {count}" for reason, count in Counter(self.bad.values()).most_common(5)
            )
            raise DataError(
                f"{len(self.bad)} of {self.order_rows} training rows have a bad image "
                f"({top}); data.bad_share={self.bad_share} allows {allowed}: repair the files or "
                "raise it"
            )

    def summary(self) -> dict[str, Any]:
        """What a person reads: per epoch where the rows went, and what is still ahead."""
        return {
            "rows": self.rows,
            "excluded": dict(sorted(self.excluded.items())),
            "quarantined_rows": dict(sorted(Counter(self.bad.values()).items())),
            "epochs": {
                str(epoch): {
                    "trained": count.trained,
                    "quarantined": dict(sorted(count.quarantined.items())),
                    "replacements": count.replacements,
                    "ahead": self.order_rows - count.seen,
                }
                for epoch, count in sorted(self.epochs.items())
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready; its size grows with epochs and bad rows, not with rows."""
        return {
            "rows": self.rows,
            "excluded": dict(self.excluded),
            "bad_share": self.bad_share,
            "epochs": {
                str(e): [c.trained, dict(c.quarantined), c.replacements]
                for e, c in self.epochs.items()
            },
            "bad": {str(row): reason for row, reason in self.bad.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Ledger:
        """Raises:  KeyError, TypeError, ValueError, AttributeError where it is no state_dict."""
        excluded = {rule: _count(count) for rule, count in state["excluded"].items()}
        ledger = cls(_count(state["rows"]), excluded, float(state["bad_share"]))
        ledger.epochs = {
            int(e): EpochCount(
                _count(trained),
                Counter({reason: _count(count) for reason, count in quarantined.items()}),
                _count(replacements),
            )
            for e, (trained, quarantined, replacements) in state["epochs"].items()
        }
        ledger.bad = {int(row): reason for row, reason in state["bad"].items()}
        return ledger

    @classmethod
    def merge(cls, ledgers: Iterable[Ledger]) -> Ledger:
        """The ranks' ledgers of one run as one."""
        ledgers = list(ledgers)
        first = ledgers[0]
        if any((x.rows, x.excluded) != (first.rows, first.excluded) for x in ledgers):
            raise ValueError(
                "ledgers to merge must come from one manifest: rows or excluded differ"
            )
        total = cls(first.rows, first.excluded, first.bad_share)
        for ledger in ledgers:
            for epoch, count in ledger.epochs.items():
                into = total._epoch(epoch)
                into.trained += count.trained
                into.quarantined.update(count.quarantined)
                into.replacements += count.replacements
            for row, reason in ledger.bad.items():
                total.bad.setdefault(row, reason)
        return total
