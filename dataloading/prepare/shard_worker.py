"""One process that turns image files into shard members.

Runs under worker_pool.py. It sees paths relative to one root and answers with codes, sizes and
encoded pixels, never with a tag value or a message of a library.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
from dataclasses import asdict, dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from mlip.dataloading.images.image_file import (
    check_hash,
    check_size,
    decode_grey,
    is_too_dark,
    read_bytes,
    read_header,
)
from mlip.dataloading.images.perceptual_hash import perceptual_hashes
from mlip.dataloading.ledger import BadSample, DataError
from mlip.system.machine import LimitError
from mlip.system.own_mistake import own_mistake

_MEMORY_BYTES = 3 << 29  # above what is mapped at the start: 1 GiB of pixels, 0.5 of libraries


@dataclass(frozen=True)
class ImageSettings:
    """What decides the bytes of a member, and what is told of its file."""

    side_px: int = 256  # longest side; smaller images stay as they are
    bits: Literal[8, 16] = 8
    codec: Literal["jpeg", "png"] = "jpeg"
    quality: int = 95  # JPEG only
    require_deid: bool = False  # refuse a DICOM file that check_phi objects to severely
    png_white: int | Literal["own"] = 65535  # of 16-bit PNGs; "own" = each one's brightest pixel
    demographics: bool = True  # tell sex and age of a DICOM file's patient

    def to_json(self) -> str:
        fields = asdict(self)
        if self.png_white == 65535:
            del fields["png_white"]  # sets from before there was a choice are not out of date
        if not self.demographics:
            del fields["demographics"]  # as before
        return json.dumps(fields, sort_keys=True)


def scaled_size(height: int, width: int, side_px: int) -> tuple[int, int]:
    """Height and width with the longest side scaled down to side_px, rounded half up."""
    longest = max(height, width)
    if longest <= side_px:
        return height, width
    scaled = [max(1, (2 * n * side_px + longest) // (2 * longest)) for n in (height, width)]
    return scaled[0], scaled[1]


def whitened(image: NDArray[np.uint16], white: int | Literal["own"]) -> NDArray[np.uint16]:
    """The picture with the value that is white in it at 65,535.

    Raises:  BadSample "above_white" where a pixel is brighter than that
    """
    brightest = int(image.max())
    top = brightest if white == "own" else white
    if brightest > top:
        raise BadSample("above_white")
    scaled = (image.astype(np.uint32) * 65535 + top // 2) // max(top, 1)
    return scaled.astype(np.uint16)


def convert(image: NDArray[Any], settings: ImageSettings) -> NDArray[Any]:
    """The grey image at the wanted depth, scaled down by area averaging.

    Shapes:  [H, W] uint8 or uint16 -> [h, w] uint8 or uint16
    """
    if settings.bits == 16 and image.dtype == np.uint8:
        image = image.astype(np.uint16) * np.uint16(257)
    height, width = scaled_size(image.shape[0], image.shape[1], settings.side_px)
    if (height, width) != image.shape:
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    if settings.bits == 8 and image.dtype == np.uint16:
        image = ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return image


def encode(image: NDArray[Any], settings: ImageSettings) -> bytes:
    """A grey JPEG or PNG; no metadata of the source file survives."""
    if settings.codec == "jpeg":
        good, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, settings.quality])
    else:
        good, data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 4])
    assert good
    return data.tobytes()


def make_member(
    root: str, item: dict[str, Any], settings: ImageSettings
) -> tuple[dict[str, Any], bytes]:
    """The answer to one item {"image": relative path, "sha256": expected or absent}.

    A "limit" in it is of the machine, whatever the file holds.
    """
    fields: dict[str, Any] = {"reason": ""}
    try:
        content = read_bytes(root, item["image"])
        if item.get("sha256"):
            check_hash(content, item["sha256"])
        fields["source_sha256"] = hashlib.sha256(content).hexdigest()
        header = read_header(content)
        if header.kind == "dicom":
            image, told = _radiograph(content, settings)
            fields |= told
            check_size(*image.shape)
        else:
            image = decode_grey(content, header)
            if image.dtype == np.uint16 and settings.png_white != 65535:
                image = whitened(image, settings.png_white)
        if is_too_dark(image):
            raise BadSample("too_dark")
        fields["source_height"], fields["source_width"] = image.shape
        image = convert(image, settings)
        member = encode(image, settings)
        fields["hashes"] = [bits.tobytes().hex() for bits in perceptual_hashes(image)]
    except BadSample as error:
        return {"reason": error.reason}, b""
    except DataError:
        return {"reason": "outside_root" if os.path.isdir(root) else "missing"}, b""
    except LimitError as error:
        return {"reason": "", "limit": str(error)}, b""
    except MemoryError:
        return {"reason": "out_of_memory"}, b""
    except Exception as error:
        # one file must not end the process that the next files need
        return {"reason": "internal_error" if own_mistake(error) else "undecodable"}, b""
    fields["height"], fields["width"] = image.shape
    return fields, member


def _radiograph(
    content: bytes, settings: ImageSettings
) -> tuple[NDArray[np.uint16], dict[str, Any]]:
    """The film, what its header tells, and the codes of its notes, own_range too, each once."""
    from mlip.dataloading.dicom.header import UNREAD
    from mlip.dataloading.dicom.phi import SEVERE
    from mlip.dataloading.dicom.radiograph import DicomError, check_phi, read_radiograph

    try:
        if settings.require_deid and SEVERE & {leftover.reason for leftover in check_phi(content)}:
            raise BadSample("not_deidentified")
        image, info = read_radiograph(content)
    except DicomError as error:
        raise BadSample(error.code, "DICOM") from None
    notes = {*info.notes, "own_range"} if info.voi == "own_range" else set(info.notes)
    told: dict[str, Any] = {"view": info.view}
    if settings.demographics:
        told |= {"sex": info.sex, "age": info.age}
    else:
        notes -= UNREAD
    return image, told | {"notes": sorted(notes)}


def main() -> int:
    start = json.loads(sys.argv[1])
    root, settings = start["root"], ImageSettings(**start["settings"])
    cv2.setNumThreads(0)  # one process a core
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    # above what the account may have (ulimit -v, h_vmem of a grid engine) no limit can be set
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = mapped + _MEMORY_BYTES
    limit = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    sys.stdout.buffer.write(b"ready\n")
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        fields, member = make_member(root, json.loads(line), settings)
        fields["size"] = len(member)
        sys.stdout.buffer.write(json.dumps(fields).encode() + b"\n" + member)
        sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
