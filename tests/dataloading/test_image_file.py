"""Files that are no good image: each has its own reason, none blocks, none escapes."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from mlip.dataloading.image_limits import MAX_FILE_BYTES
from mlip.dataloading.images import image_file
from mlip.dataloading.images.image_file import (
    check_hash,
    decode_grey,
    read_bytes,
    read_header,
)
from mlip.dataloading.ledger import BadSample, DataError
from mlip.system.machine import LimitError

GREY = np.random.default_rng(0).integers(0, 256, (40, 60)).astype(np.uint8)


def encode(suffix: str, image: np.ndarray) -> bytes:
    return cv2.imencode(suffix, image)[1].tobytes()


def reason_of(content: bytes) -> str:
    with pytest.raises(BadSample) as caught:
        decode_grey(content, read_header(content))
    return caught.value.reason


@pytest.mark.parametrize(
    "kind",
    ["missing", "empty_file", "directory", "pipe", "socket", "dangling", "loop", "loops", "file"],
)
def test_what_is_no_readable_file_has_a_reason_and_does_not_block(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "x.png"
    expected = dict.fromkeys(("directory", "pipe", "socket"), "not_a_file")
    expected["empty_file"] = "empty_file"
    if kind == "empty_file":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "dangling":
        path.symlink_to(tmp_path / "gone.png")
    elif kind.startswith("loop"):  # a link to itself, or two to one another
        path.symlink_to(tmp_path / ("x.png" if kind == "loop" else "y.png"))
        (tmp_path / "y.png").symlink_to(path)
    elif kind == "file":  # in a folder's place
        path = tmp_path / "file" / "x.png"
        (tmp_path / "file").touch()
    begin = time.perf_counter()
    with pytest.raises(BadSample) as caught:
        read_bytes(str(tmp_path), str(path.relative_to(tmp_path)))
    assert caught.value.reason == expected.get(kind, "missing")
    assert time.perf_counter() - begin < 1.0


def test_a_file_without_permission_has_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> int:  # root may read every file, so the system's answer is played
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(image_file, "_open", refuse)
    with pytest.raises(BadSample, match="no_permission"):
        read_bytes(str(tmp_path), "x.png")


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("step", ["open", "read"])
def test_a_disk_that_fails_is_no_missing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    def fail(*given: object) -> int:
        raise OSError(code, os.strerror(code))

    (tmp_path / "x.png").write_bytes(b"content")
    monkeypatch.setattr(*((image_file, "_open", fail) if step == "open" else (os, "read", fail)))
    with pytest.raises(BadSample, match=f"^io_error: {os.strerror(code)}$"):
        read_bytes(str(tmp_path), "x.png")


def test_too_many_open_files_are_no_fault_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"content")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as lowest_free:  # all below it are taken
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free.fileno() + 1, hard))
        try:
            with pytest.raises(LimitError, match="an image cannot be read: .*ulimit -n") as caught:
                read_bytes(str(tmp_path), "x.png")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert str(tmp_path) not in str(caught.value)  # the path may name a patient
    assert read_bytes(str(tmp_path), "x.png") == b"content"


@pytest.mark.parametrize("error", [MemoryError(), None])
def test_a_picture_that_memory_is_too_short_for_is_not_damaged(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    of_opencv = cv2.error("Insufficient memory")
    of_opencv.code = cv2.Error.StsNoMem

    def fail(*given: object) -> None:
        raise error or of_opencv

    monkeypatch.setattr(cv2, "imdecode", fail)
    assert reason_of(encode(".png", GREY)) == "out_of_memory"


def test_a_huge_sparse_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    seconds = []
    for _ in range(3):  # the least: another process may take the core away
        begin = time.perf_counter()
        with pytest.raises(BadSample, match="too_large"):
            read_bytes(str(tmp_path), "x.png")
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.1


def test_a_link_out_of_the_root_stops_the_run_and_one_inside_is_fine(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(b"canary")
    (root / "good.png").write_bytes(b"good")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "in.png").symlink_to(root / "good.png")
    (tmp_path / "rootling").mkdir()
    (tmp_path / "rootling" / "x.png").write_bytes(b"canary")
    (root / "neighbour").symlink_to(tmp_path / "rootling")  # shares the root's name as a prefix
    assert read_bytes(str(root), "in.png") == b"good"
    for name in ("out.png", "neighbour/x.png"):
        with pytest.raises(DataError, match="^an image leads outside data.root") as caught:
            read_bytes(str(root), name)
        assert name not in str(caught.value)
        with pytest.raises(DataError, match="^image of data row 3 leads outside data.root"):
            read_bytes(str(root), name, "of data row 3")


def test_a_root_that_is_gone_stops_the_run_instead_of_quarantining_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.root.*gone"):
        read_bytes(str(tmp_path / "unmounted"), "x.png")


def test_a_changed_byte_is_caught_by_the_hash() -> None:
    content = encode(".png", GREY)
    digest = hashlib.sha256(content).hexdigest()
    check_hash(content, digest.upper())
    with pytest.raises(BadSample, match="hash_mismatch"):
        check_hash(content[:-1] + bytes([content[-1] ^ 1]), digest)


@pytest.mark.parametrize(
    "suffix, image, bits",
    [
        (".png", GREY, 8),
        (".png", GREY.astype(np.uint16) * 257, 16),
        (".png", np.dstack([GREY] * 3), 8),
        (".png", np.dstack([GREY] * 4), 8),
        (".jpg", GREY, 8),
        (".jpg", np.dstack([GREY] * 3), 8),
    ],
)
def test_headers_give_the_size_that_decoding_gives(
    suffix: str, image: np.ndarray, bits: int
) -> None:
    content = encode(suffix, image)
    header = read_header(content)
    pixels = decode_grey(content, header)
    assert (header.height, header.width, header.bits) == (40, 60, bits)
    assert pixels.shape == (40, 60)
    assert pixels.dtype == (np.uint16 if bits == 16 else np.uint8)
    if suffix == ".png":
        # equal channels stay what they are, 16 bits stay exact
        assert (pixels == (image if image.ndim == 2 else GREY)).all()


def test_sixteen_bits_are_exact() -> None:
    wide = np.random.default_rng(1).integers(0, 65536, (50, 70)).astype(np.uint16)
    content = encode(".png", wide)
    assert (decode_grey(content, read_header(content)) == wide).all()


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.98])
def test_a_cut_file_is_never_taken_for_a_picture(suffix: str, share: float) -> None:
    content = encode(suffix, GREY)
    assert reason_of(content[: int(len(content) * share)]) in {
        "truncated", "unsupported", "undecodable"
    }  # fmt: skip


def test_files_of_another_kind_are_unsupported() -> None:
    for content in (b"", b"GIF89a" + bytes(100), b"<html>", bytes(200), b"%PDF-1.7" + bytes(99)):
        assert reason_of(content) == "unsupported"


def png_of(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(30_000, 30_000), (12_000, 12_000), (2**31 - 1, 1), (20_000, 64)])
def test_a_declared_bomb_is_refused_before_decoding(size: tuple[int, int]) -> None:
    assert reason_of(png_of(*size)) == "too_large"


def test_a_damaged_png_body_is_undecodable() -> None:
    content = bytearray(encode(".png", GREY))
    content[len(content) // 2] ^= 0xFF
    assert reason_of(bytes(content)) == "undecodable"


def test_a_picture_of_a_few_pixels_is_no_radiograph() -> None:
    """It was called undecodable, which sends for a damage that is not there."""
    assert reason_of(encode(".png", GREY[:3, :3])) == "too_small"


def test_an_exif_orientation_leaves_the_direct_path() -> None:
    content = encode(".jpg", GREY)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    turned = content[:2] + segment + content[2:]
    assert read_header(content).plain and not read_header(turned).plain
    assert decode_grey(turned, read_header(turned)).shape == (60, 40)


def test_an_orientation_in_a_png_leaves_the_direct_path() -> None:
    """OpenCV turns it, the header's size is that of the unturned picture, DALI has its own mind."""
    content = encode(".png", GREY)
    exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    chunk = b"eXIf" + exif
    framed = struct.pack(">I", len(exif)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    turned = content[:33] + framed + content[33:]
    assert read_header(content).plain and not read_header(turned).plain
    assert decode_grey(turned, read_header(turned)).shape == (60, 40)


def test_a_header_does_not_depend_on_the_file_read_before() -> None:
    other = np.random.default_rng(1).integers(0, 256, (33, 90)).astype(np.uint8)
    colour = np.dstack([other] * 3)
    plain = encode(".jpg", GREY)
    comment = b"\xff\xfe\0\x06abcd"
    exif = b"\xff\xe1\0\x0aExif\0\0\0\0"
    progressive = cv2.imencode(".jpg", GREY, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    frame = plain.index(b"\xff\xc0")
    files = [plain, encode(".jpg", other), encode(".jpg", colour), progressive]
    files += [plain[:2] + extra + plain[2:] for extra in (comment, exif, b"\xff")]
    # the same start with something else in the frame's place, and cut short within it
    files += [plain[:frame] + comment + plain[frame:], plain[: frame + 6], plain[:-2]]
    files += [plain[: frame + 1] + bytes([marker]) + plain[frame + 2 :] for marker in (0xC4, 0xC9)]

    def answer(content: bytes) -> object:
        try:
            return read_header(content)
        except BadSample as error:
            return error.reason

    alone = []
    for content in files:
        image_file._last_start = (b"\xff\xd8", True)
        alone.append(answer(content))
    assert len({repr(a) for a in alone}) == 5
    for before in files:
        for content, expected in zip(files, alone, strict=True):
            answer(before)
            assert answer(content) == expected


def test_a_file_outside_the_root_is_never_even_opened(tmp_path: Path) -> None:
    script = """
import sys
from mlip.dataloading.image_limits import MAX_FILE_BYTES
from mlip.dataloading.images.image_file import read_bytes
from mlip.dataloading.ledger import DataError
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
for name in ("file.png", "folder/canary.png"):
    try:
        read_bytes(sys.argv[1], name)
    except DataError:
        print("refused")
print(sum("canary" in name for name in opened), len(opened) > 0)
"""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "canary.png").write_bytes(b"x")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "file.png").symlink_to(tmp_path / "outside" / "canary.png")
    (tmp_path / "root" / "folder").symlink_to(tmp_path / "outside")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "root")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    # the last part of file.png is opened without following it, which fails
    assert done.stdout.split() == ["refused", "refused", "0", "True"]
