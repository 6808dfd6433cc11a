"""Stored cells -> 16-bit display values: the whole DICOM grey-scale chain as one lookup table.

A cell has at most 16 bits, so modality LUT or rescale, VOI LUT or window, inversion and scaling
are computed once for each of the 65,536 possible cells in float64, and one numba pass looks the
pixels up. Order and formulas: DICOM PS3.3 C.7.6.3, C.11.1 and C.11.2.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mlip.dataloading.dicom.header import Header
from mlip.dataloading.dicom.lut import Lut

_WHITE = 65_535
_COMPILED_PIXELS = 1 << 20  # below, NumPy takes 2 ms and spares the second of numba's start


@dataclass(frozen=True)
class Tone:
    """The table and the record of how it came about."""

    table: np.ndarray  # [2 ** bits_allocated] uint16
    voi: str  # "lut", "linear", "linear_exact", "sigmoid" or "own_range"
    own_range: tuple[float, float] | None  # set where voi is "own_range"
    steps: tuple[tuple[str, np.ndarray], ...]  # (name, value of every cell) in order


def build_tone(header: Header, seen: np.ndarray | None) -> Tone:
    """The lookup table of a header; padding is black, on the film's light side too.

    Shapes:  seen [2 ** bits_allocated] bool, cells that occur; needed where needs_range(header)
    """
    stored = stored_values(header)
    steps = [("stored", stored)]
    values = stored
    if header.modality_lut is not None:
        values = _look_up(header.modality_lut, stored).astype(np.float64)
        steps.append(("modality LUT", values))
    elif header.rescale is not None:
        values = stored * header.rescale[0] + header.rescale[1]
        steps.append(("rescale", values))
    own_range = None
    if header.voi_lut is not None:
        voi = "lut"
        unit = _look_up(header.voi_lut, values) / float((1 << header.voi_lut.bits) - 1)
    elif header.window is not None:
        centre, width, function = header.window
        voi = function.lower()
        unit = window(values, centre, width, function)
    else:
        voi = "own_range"
        assert seen is not None
        kept = image_cells(header, seen)
        lowest, highest = float(values[kept].min()), float(values[kept].max())
        own_range = (lowest, highest)
        span = highest - lowest
        unit = (values - lowest) / span if span > 0 else np.zeros_like(values)
    unit = np.clip(unit, 0.0, 1.0)
    steps.append((voi, unit))
    constant = own_range is not None and own_range[0] == own_range[1]
    if header.photometric == "MONOCHROME1" and not constant:
        unit = 1.0 - unit
        steps.append(("inverted", unit))
    if header.padding is not None:
        unit = np.where(_padding_cells(header), 0.0, unit)
        steps.append(("padding", unit))
    table = np.floor(unit * _WHITE + 0.5).astype(np.uint16)
    steps.append(("output", table.astype(np.float64)))
    return Tone(table, voi, own_range, tuple(steps))


def needs_range(header: Header) -> bool:
    """Whether the table depends on the values that occur in the image."""
    return header.voi_lut is None and header.window is None


def drop_useless_padding(header: Header, seen: np.ndarray) -> Header:
    """The header without a padding value that does not occur, or that cannot be one: noted.

    What pads lies outside the image's own values (PS3.3 C.7.5.1.1.2); a value among them, or all
    there is, is image, and to blacken it would leave holes.

    Shapes:  seen [2 ** bits_allocated] bool
    """
    if header.padding is None:
        return header
    low, high = header.padding
    image = stored_values(header)[image_cells(header, seen)]
    if not (seen & _padding_cells(header)).any():
        return replace(header, padding=None)
    if len(image) == 0 or (image.min() < low and image.max() > high):
        return replace(header, padding=None, notes=(*header.notes, "unusable_padding"))
    return header


def has_stray_bits(header: Header, cells: np.ndarray) -> bool:
    """Whether bits above BitsStored are set that are no sign: an overlay of old, or BitsStored is
    too small, and the film, of which they are masked, is garbled.

    Shapes:  cells [H, W] uint8 or uint16
    """
    unused = (1 << header.bits_allocated) - (1 << header.bits_stored)
    # one pass without a branch; only where it finds some are the cells looked at
    if not unused or not int(np.bitwise_or.reduce(cells, axis=None)) & unused:
        return False
    found = np.flatnonzero(seen_cells(cells))
    above = found & unused
    is_negative = (found >> (header.bits_stored - 1) & 1).astype(bool) & header.signed
    return bool(((above != 0) & ~(is_negative & (above == unused))).any())


def image_cells(header: Header, seen: np.ndarray) -> np.ndarray:
    """bool [2 ** bits_allocated]: the cells that occur and are no padding."""
    return seen if header.padding is None else seen & ~_padding_cells(header)


def _padding_cells(header: Header) -> np.ndarray:
    assert header.padding is not None
    stored = stored_values(header)
    return (stored >= header.padding[0]) & (stored <= header.padding[1])


def stored_values(header: Header) -> np.ndarray:
    """float64 [2 ** bits_allocated]: the number a cell stands for; unused high bits are masked."""
    cells = np.arange(1 << header.bits_allocated, dtype=np.int64)
    values = cells & ((1 << header.bits_stored) - 1)
    if header.signed:
        values -= (values >> (header.bits_stored - 1)) << header.bits_stored
    return values.astype(np.float64)


def window(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """VOI window with output range [0, 1] (PS3.3 C.11.2.1.2 and C.11.2.1.3), not yet clipped."""
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return 1.0 / (1.0 + np.exp(-4.0 * (values - centre) / width))
    if function == "LINEAR_EXACT":
        return (values - centre) / width + 0.5
    if width == 1:
        return (values > centre - 0.5).astype(np.float64)
    return (values - (centre - 0.5)) / (width - 1.0) + 0.5


def _look_up(lut: Lut, values: np.ndarray) -> np.ndarray:
    index = np.floor(values + 0.5) - lut.first
    return lut.values[np.clip(index, 0, len(lut.values) - 1).astype(np.int64)]


def apply_table(cells: np.ndarray, table: np.ndarray) -> np.ndarray:
    """table[cells] as uint16 [H, W] in one pass, without the interpreter's lock."""
    if cells.size < _COMPILED_PIXELS:
        return table[cells]
    out = np.empty(cells.shape, np.uint16)
    _compiled()[0](cells.reshape(-1), table, out.reshape(-1))
    return out


def seen_cells(cells: np.ndarray) -> np.ndarray:
    """bool [256 or 65536]: which cells occur."""
    seen = np.zeros(1 << (8 * cells.dtype.itemsize), np.bool_)
    if cells.size < _COMPILED_PIXELS:
        seen[cells.reshape(-1)] = True
        return seen
    _compiled()[1](cells.reshape(-1), seen)
    return seen


def _gather(cells, table, out):
    for i in range(cells.size):
        out[i] = table[cells[i]]


def _mark(cells, seen):
    for i in range(cells.size):
        seen[cells[i]] = True


_compile_lock = threading.Lock()


def _compiled() -> tuple[Callable[..., None], Callable[..., None]]:
    with _compile_lock:
        return _compile()


@functools.cache
def _compile() -> tuple[Callable[..., None], Callable[..., None]]:
    """The two loops as machine code."""
    from mlip.dataloading.compiled import compiled

    pair = compiled(_gather), compiled(_mark)
    for kind in (np.uint8, np.uint16):
        cells, table = np.zeros(1, kind), np.zeros(1 << (8 * kind().itemsize), np.uint16)
        cells.flags.writeable = False  # pixel bytes are read-only: a type of its own
        pair[0](cells, table, np.empty(1, np.uint16))
        pair[1](cells, np.zeros(len(table), np.bool_))
    return pair
