"""An image file's bytes, checked: containment, size, hash, declared dimensions, grey pixels.

Every failure of a file leaves here as BadSample with a stable reason, so no library exception can
end an epoch (a damaged DICOM can raise StopIteration). DICOM is handed to dicom/radiograph.py.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import stat
import struct
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from mlip.dataloading.image_limits import (
    MAX_FILE_BYTES,
    MAX_PIXELS,
    MAX_SCANS,
    MAX_SIDE_PX,
    MIN_SIDE_PX,
)
from mlip.dataloading.ledger import BadSample, DataError, unreadable
from mlip.dataloading.name_forms import as_it_lies, as_utf8, on_disk

# An eighth of white. Where no pixel of a 16-bit picture reaches it, 12-bit values stand in it as
# they are: at 8 bits four would be left of them, and the film would be nearly black.
_DARK = 1 << 13

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Header(NamedTuple):
    """What the first bytes say; `plain` = any decoder gives the same grey picture of it."""

    kind: str  # "png" | "jpeg" | "dicom", of which sides are not read here: 0
    height: int
    width: int
    bits: int
    plain: bool


def read_bytes(root: str, relative: str, name: str = "") -> bytes:
    """The content of root/relative, read through one descriptor.

    relative as UTF-8 whatever the locale says of names (LC_ALL=C): tables and disks write it so;
             in either form of Unicode (name_forms.py)
    name     what stands for it in errors, which never hold its path: that may name a patient

    Raises:  BadSample with the reason; DataError if the file lies outside root (a link) or the
             root is gone; LimitError where a limit of the machine is in the way.
    """
    top, below = os.fsencode(root), on_disk(relative)
    path, inside = os.path.join(top, below), top.rstrip(b"/") + b"/"
    if not _is_inside(top, os.path.dirname(below)):
        raise _outside(name)
    try:
        descriptor = _open(path)
    except OSError as error:
        if os.path.islink(path):
            # the last part is a link: looked at before it is followed
            target = os.path.realpath(path)
            if not target.startswith(inside):
                raise _outside(name) from None
            if os.path.islink(target):
                raise BadSample("missing", "links that lead to one another") from None
            return read_bytes(root, as_utf8(os.path.relpath(target, top)), name)
        if error.errno == errno.ENOENT and (lies := as_it_lies(top, below)):
            return read_bytes(root, as_utf8(lies), name)
        if not os.path.isdir(root):
            raise DataError(
                "the image folder (data.root) is gone: mount or restore it, then resume"
            ) from None
        raise unreadable(error) from None
    try:
        status = os.fstat(descriptor)
        # the descriptor's own path: no link can be swapped between this check and the read
        real = os.readlink(b"/proc/self/fd/%d" % descriptor)
        if not real.startswith(inside):
            raise _outside(name)
        if not stat.S_ISREG(status.st_mode):
            raise BadSample("not_a_file")
        if status.st_size == 0:
            raise BadSample("empty_file")
        if status.st_size > MAX_FILE_BYTES:
            raise BadSample("too_large", f"{status.st_size} bytes")
        content = os.read(descriptor, status.st_size)
        while len(content) < status.st_size and (more := os.read(descriptor, status.st_size)):
            content += more
        return content
    except OSError as error:
        raise unreadable(error) from None
    finally:
        os.close(descriptor)


def _open(path: bytes) -> int:
    # O_NONBLOCK: opening a pipe must not wait for a writer
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)


@functools.lru_cache(maxsize=65_536)
def _is_inside(root: bytes, folder: bytes) -> bool:
    """Whether a folder's real path lies in the root; remembered, the open descriptor decides."""
    real = os.path.realpath(os.path.join(root, folder))
    return real == root.rstrip(b"/") or real.startswith(root.rstrip(b"/") + b"/")


def _outside(name: str) -> DataError:
    called = f"image {name}" if name else "an image"
    return DataError(
        f"{called} leads outside data.root through a link: copy the file into the folder or set "
        "data.root to a folder that holds all images"
    )


def check_hash(content: bytes, expected: str) -> None:
    """Raises:  BadSample hash_mismatch; expected is SHA-256 in hex."""
    if hashlib.sha256(content).hexdigest() != expected.lower():
        raise BadSample("hash_mismatch")


def read_header(content: bytes) -> Header:
    """Kind and declared size, before any decoder sees the bytes.

    Raises:  BadSample: unsupported, truncated, too_large, too_small, undecodable.
    """
    if content.startswith(PNG_SIGNATURE):
        header = _png_header(content)
    elif content.startswith(b"\xff\xd8\xff"):
        header = _jpeg_header(content)
    elif content[128:132] == b"DICM":
        return Header("dicom", 0, 0, 16, False)
    else:
        raise BadSample("unsupported", "the file starts like neither JPEG, PNG nor DICOM")
    check_size(header.height, header.width)
    return header


def check_size(height: int, width: int) -> None:
    """Raises:  BadSample: too_large, too_small."""
    if height > MAX_SIDE_PX or width > MAX_SIDE_PX or height * width > MAX_PIXELS:
        raise BadSample("too_large", f"{width} x {height} px")
    if min(height, width) < MIN_SIDE_PX:
        raise BadSample("too_small", f"{width} x {height} px is no radiograph")


def _png_header(content: bytes) -> Header:
    if len(content) < 45 or content[12:16] != b"IHDR":
        raise BadSample("truncated", "no complete PNG header")
    width, height, bits, colour = struct.unpack(">IIBB", content[16:26])
    if content.find(b"IEND", max(33, len(content) - 4096)) < 0:
        raise BadSample("truncated", "no PNG end mark")
    # palettes, alpha and an orientation are read differently by different decoders
    plain = bits in (8, 16) and colour in (0, 2) and content.find(b"eXIf") < 0
    return Header("png", height, width, bits, plain)


# The last JPEG's bytes up to its frame header, and whether they let it be plain: one writer begins
# all its files alike, and walking over equal bytes again had cost 8 us a file.
_last_start: tuple[bytes, bool] = (b"\xff\xd8", True)


def _jpeg_header(content: bytes) -> Header:
    global _last_start
    start, plain = _last_start
    position = len(start)
    if not (position > 2 and content.startswith(start) and _is_frame(content, position)):
        position, plain = _walk_to_frame(content)
        _last_start = content[:position], plain
    bits, height, width, components = struct.unpack_from(">BHHB", content, position + 4)
    if content.rfind(b"\xff\xd9", position) < 0:
        raise BadSample("truncated", "no JPEG end mark")
    _check_scans(content, position)
    usual = bits == 8 and components in (1, 3) and content[position + 1] in (0xC0, 0xC1, 0xC2)
    return Header("jpeg", height, width, bits, plain and usual)


def _check_scans(content: bytes, position: int) -> None:
    """Raises BadSample for a JPEG, whose frame header is at position, of more than MAX_SCANS.

    A scan of a few bytes goes over every pixel: 200 of them, 418 KB, took 98 s. A baseline picture
    of one channel has one, and libjpeg reads no more.
    """
    is_single = content[position + 1] in (0xC0, 0xC1) and content[position + 9] == 1
    if not is_single and content.count(b"\xff\xda", position) > MAX_SCANS:
        raise BadSample("undecodable", f"more than {MAX_SCANS} scans")


def _is_frame(content: bytes, position: int) -> bool:
    """Whether a frame header (SOF) begins here; 0xC4, 0xC8 and 0xCC are other segments."""
    if position + 9 >= len(content) or content[position] != 0xFF:
        return False
    marker = content[position + 1]
    return 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)


def _walk_to_frame(content: bytes) -> tuple[int, bool]:
    """Where the frame header begins, and whether no EXIF data stand before it."""
    position, plain = 2, True
    while position + 9 < len(content):
        if content[position] != 0xFF:
            raise BadSample("undecodable", "damaged JPEG header")
        if _is_frame(content, position):
            return position, plain
        if content[position + 1] == 0xFF:  # fill byte
            position += 1
            continue
        if content[position + 1] == 0xE1 and content[position + 4 : position + 8] == b"Exif":
            plain = False  # may carry an orientation
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    raise BadSample("truncated", "no JPEG frame header")


def decode_grey(content: bytes, header: Header) -> NDArray[Any]:
    """The picture as one grey channel, brighter = denser tissue for DICOM.

    Shapes:  -> [H, W] uint8 or uint16
    Raises:  BadSample.
    """
    if header.kind == "dicom":
        return _decode_dicom(content)
    try:
        image = cv2.imdecode(
            np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH
        )
    except MemoryError:
        raise BadSample("out_of_memory") from None
    except cv2.error as error:
        reason = "out_of_memory" if error.code == cv2.Error.StsNoMem else "undecodable"
        raise BadSample(reason, type(error).__name__) from None
    if image is None or image.dtype not in (np.uint8, np.uint16):
        raise BadSample("undecodable")
    return image


def is_too_dark(image: NDArray[Any]) -> bool:
    """Whether a picture of more than 8 bits is nearly black; neither prepared nor asked about."""
    return image.dtype == np.uint16 and int(image.max()) < _DARK


def _decode_dicom(content: bytes) -> NDArray[np.uint16]:
    from mlip.dataloading.dicom.radiograph import DicomError, read_radiograph

    try:
        image, _ = read_radiograph(content)
    except DicomError as error:
        raise BadSample(error.code, "DICOM") from None
    check_size(*image.shape)
    return image
