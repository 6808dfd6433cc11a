"""Mutated DICOM and JPEG files through the decoders: no crash, no hang, no unnamed failure.

python tests/dataloading/fuzz_images.py --kind dicom --count 10000 [--seed 1] [--keep DIR]

Every mutant is a pure function of (kind, seed, number). It is decoded in a worker process under a
memory limit; the parent kills a worker that works on one for 10 s. Printed as JSON: outcomes,
mutants that decode to the original's pixels or to others (only a content hash sees those), kills,
crashes, the slowest mutant and the largest resident memory.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pydicom

from mlip.dataloading.dicom.radiograph import CODES, DicomError, read_radiograph, write_radiograph
from mlip.dataloading.images.image_file import decode_grey, read_header
from mlip.dataloading.ledger import REASONS, BadSample
from mlip.dataloading.phantom.study import generate_study

LIMIT_SECONDS = 10.0  # of the processor
_BLOCKED = 60  # times that of waiting: a worker that sleeps
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "dicom"


def corpus(kind: str) -> list[bytes]:
    """A phantom in many encodings, so that no data set is needed; then real files."""
    # 160 rows and 128 columns: sides that the mutators know
    image = np.ascontiguousarray(generate_study(7, 1, 160).image[:, 16:144])
    if kind == "jpeg":
        return [
            cv2.imencode(".jpg", (image >> 8).astype(np.uint8), flags)[1].tobytes()
            for flags in ([], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1], [cv2.IMWRITE_JPEG_RST_INTERVAL, 4])
        ]
    seeds = []
    with tempfile.TemporaryDirectory() as folder:
        kinds: Any = (("DX", "MONOCHROME2"), ("CR", "MONOCHROME1"))
        for modality, photometric in kinds:
            for syntax in ("explicit", "jpegls", "jpeg2000"):
                write_radiograph(
                    f"{folder}/a",
                    image,
                    patient_id="p",
                    study_id="s",
                    modality=modality,
                    photometric=photometric,
                    syntax=syntax,
                    bits_stored=12 if syntax == "explicit" else 16,
                )
                seeds.append(Path(f"{folder}/a").read_bytes())
        seeds += _other_syntaxes(f"{folder}/a", image)
    for path in sorted(SHARED.glob("*/*.dcm")):
        if path.stat().st_size < 700_000:
            seeds.append(path.read_bytes())
    return seeds


def _other_syntaxes(path: str, image: np.ndarray) -> list[bytes]:
    """The image as RLE, deflated and lossless JPEG, with lookup tables in the last."""
    write_radiograph(path, image, patient_id="p", study_id="s")
    rle, deflated, jpeg = (pydicom.dcmread(path) for _ in range(3))
    rle.compress(pydicom.uid.RLELossless)
    deflated.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    frame = imagecodecs.jpeg8_encode(image, lossless=True, predictor=1, bitspersample=16)
    jpeg.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLosslessSV1
    jpeg.PixelData = pydicom.encaps.encapsulate([bytes(frame)])
    jpeg["PixelData"].is_undefined_length = True
    for name in ("ModalityLUTSequence", "VOILUTSequence"):
        item = pydicom.Dataset()
        item.add_new("LUTDescriptor", "US", [4096, 0, 12])
        item.add_new("LUTData", "US", list(range(4096)))
        setattr(jpeg, name, [item])
    del jpeg.RescaleSlope, jpeg.RescaleIntercept
    files = []
    for dataset in (rle, deflated, jpeg):
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, dataset)
        files.append(buffer.getvalue())
    return files


def mutant(kind: str, seeds: list[bytes], seed: int, number: int) -> tuple[int, str, bytes]:
    """(seed file, mutator, bytes) of one mutant."""
    rng = np.random.default_rng([seed, number, len(kind)])
    which = int(rng.integers(len(seeds)))
    data = bytearray(seeds[which])
    mutators = JPEG_MUTATORS if kind == "jpeg" else DICOM_MUTATORS
    name = list(mutators)[int(rng.integers(len(mutators)))]
    return which, name, bytes(mutators[name](data, rng))


def _noise(data: bytearray, rng: np.random.Generator, start: int, stop: int) -> bytearray:
    stop = max(start + 1, min(stop, len(data)))
    for at in rng.integers(start, stop, int(rng.integers(1, 12))):
        data[int(at) % len(data)] = int(rng.integers(256))
    return data


def _truncate(data: bytearray, rng: np.random.Generator) -> bytearray:
    return data[: int(rng.integers(0, len(data)))]


def _lengths(data: bytearray, rng: np.random.Generator) -> bytearray:
    """A 16- or 32-bit field somewhere in the header becomes an extreme number."""
    at = int(rng.integers(132, min(len(data) - 4, 1600)))
    value = int(rng.choice([0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFFFFFE, 1 << 20]))
    struct.pack_into("<I", data, at, value)
    return data


def _element(data: bytearray, tag: bytes, value: bytes) -> bytearray:
    at = data.find(tag)
    if at >= 0:
        data[at + 8 : at + 8 + len(value)] = value
    return data


def _sizes(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Rows, columns, bits, sign or frames get another number."""
    element = int(rng.choice([0x10, 0x11, 0x100, 0x101, 0x102, 0x103, 0x02]))
    value = int(rng.choice([0, 1, 7, 15, 16, 127, 161, 4096, 16385, 65535]))
    return _element(data, struct.pack("<HH", 0x28, element), struct.pack("<H", value))


def _syntax(data: bytearray, rng: np.random.Generator) -> bytearray:
    at = data.find(b"\x02\x00\x10\x00UI")
    if at < 0:
        return data
    length = struct.unpack_from("<H", data, at + 6)[0]
    tails = b"1.2 1.2.1 1.2.2 1.2.1.99 1.2.5 1.2.4.50 1.2.4.51 1.2.4.57 1.2.4.70 1.2.4.80 1.2.4.90"
    tails += b" 1.2.4.91 1.2.4.201 1.2.4.100 9"
    uid = b"1.2.840.10008." + tails.split()[int(rng.integers(len(tails.split())))]
    uid += b"\0" * (len(uid) % 2)
    data[at + 6 : at + 8 + length] = struct.pack("<H", len(uid)) + uid
    return data


def _pixels(data: bytearray, rng: np.random.Generator) -> bytearray:
    """The pixel element's own head and the first bytes of the frame."""
    at = data.rfind(b"\xe0\x7f\x10\x00")
    return _noise(data, rng, max(at, 0), max(at, 0) + 120)


def _splice(data: bytearray, rng: np.random.Generator) -> bytearray:
    """A run of bytes is repeated, removed or zeroed."""
    start, size = int(rng.integers(len(data))), int(rng.integers(1, 400))
    piece = data[start : start + size]
    kind = int(rng.integers(3))
    data[start : start + size] = (piece * 3, b"", bytes(len(piece)))[kind]
    return data


DICOM_MUTATORS = {
    "header_noise": lambda data, rng: _noise(data, rng, 0, 1600),
    "truncation": _truncate,
    "length_field": _lengths,
    "size_attribute": _sizes,
    "transfer_syntax": _syntax,
    "pixel_element": _pixels,
    "anywhere": lambda data, rng: _noise(data, rng, 0, len(data)),
    "splice": _splice,
}


def _jpeg_size(data: bytearray, rng: np.random.Generator) -> bytearray:
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    struct.pack_into(
        ">HH", data, at + 5, *(int(v) for v in rng.choice([0, 7, 160, 16385, 65535], 2))
    )
    return data


JPEG_MUTATORS = {
    "header_noise": lambda data, rng: _noise(data, rng, 0, 400),
    "truncation": _truncate,
    "size": _jpeg_size,
    "anywhere": lambda data, rng: _noise(data, rng, 0, len(data)),
    "splice": _splice,
}


def decode(kind: str, data: bytes) -> tuple[str, str]:
    """(code, digest of the pixels); anything but the named errors ends the worker."""
    try:
        if kind == "dicom":
            image = read_radiograph(data)[0]
        else:
            image = decode_grey(data, read_header(data))
    except DicomError as error:
        assert error.code in CODES
        return error.code, ""
    except BadSample as error:
        assert error.reason in REASONS or error.reason in CODES
        return error.reason, ""
    return "decoded", hashlib.sha256(image.tobytes() + repr(image.shape).encode()).hexdigest()


def work(kind: str, seed: int, sabotage: dict[int, str]) -> None:
    """Numbers on stdin, one line of JSON each on stdout; `sabotage` proves that faults are seen."""
    sys.stdout.reconfigure(line_buffering=True)
    cv2.setNumThreads(0)
    seeds = corpus(kind)
    originals = [decode(kind, data)[1] for data in seeds]
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (1 << 30), resource.RLIM_INFINITY))
    for line in sys.stdin:
        which, mutator, data = mutant(kind, seeds, seed, int(line))
        start = time.process_time()
        fault = sabotage.get(int(line))
        if fault == "abort":
            os.abort()
        elif fault == "hang":
            while True:
                pass
        elif fault == "leak":
            raise StopIteration("an exception that is no code")
        code, digest = decode(kind, data)
        if code == "decoded":
            code = "same_pixels" if digest == originals[which] else "changed_pixels"
        seconds = time.process_time() - start
        unchanged = data == seeds[which]
        print(json.dumps([int(line), mutator, code, seconds, unchanged]))


class Worker:
    def __init__(self, kind: str, seed: int, sabotage: str) -> None:
        command = [sys.executable, __file__, "--work", "--kind", kind, "--seed", str(seed)]
        command += ["--sabotage", sabotage]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def ask(self, number: int, timeout: float) -> list | str:
        """The worker's row, or why there is none: "hang" or "crash"."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(f"{number}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            return "crash"
        begun, spent = time.monotonic(), self.cpu_seconds()
        while not select.select([self.process.stdout], [], [], 0.2)[0]:
            # processor seconds: a busy machine is no hang; blocking without any has its limit too
            waited = time.monotonic() - begun
            if self.cpu_seconds() - spent > timeout or waited > _BLOCKED * timeout:
                return "hang"
        line = self.process.stdout.readline()
        return json.loads(line) if line else "crash"

    def cpu_seconds(self) -> float:
        with open(f"/proc/{self.process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> int:
        """Peak resident memory in MiB."""
        os.kill(self.process.pid, signal.SIGKILL)  # Popen.kill would reap it without its usage
        _, _, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = 0
        return usage.ru_maxrss // 1024


def run(kind: str, count: int, seed: int, keep: Path | None, sabotage: str, limit: float) -> dict:
    codes: Counter[str] = Counter()
    slowest, peak, unchanged = (0.0, -1), 0, 0
    failures = []
    worker, fresh = Worker(kind, seed, sabotage), True
    start = time.monotonic()
    for number in range(count):
        row = worker.ask(number, limit + (60 if fresh and not sabotage else 0))
        fresh = False
        if isinstance(row, str):
            failures.append([row, number])
            codes[row] += 1
            peak = max(peak, worker.stop())
            worker, fresh = Worker(kind, seed, sabotage), True
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                name = f"{kind}-{seed}-{number}-{row}"
                (keep / name).write_bytes(mutant(kind, corpus(kind), seed, number)[2])
            continue
        codes[row[2]] += 1
        unchanged += row[4]
        if row[2] == "changed_pixels" and row[4]:
            failures.append(["unstable", number])
        slowest = max(slowest, (row[3], number))
    peak = max(peak, worker.stop())
    return {
        "kind": kind,
        "count": count,
        "seed": seed,
        "codes": dict(codes.most_common()),
        "unchanged_mutants": unchanged,
        "failures": failures,
        "slowest_s": round(slowest[0], 3),
        "slowest_mutant": slowest[1],
        "peak_mib": peak,
        "wall_s": round(time.monotonic() - start, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("dicom", "jpeg"), default="dicom")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for mutants that crash or hang")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds a mutant")
    parser.add_argument("--sabotage", default="", help="number:abort|hang|leak,... to test this")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        faults = (fault.split(":") for fault in arguments.sabotage.split(",") if fault)
        work(arguments.kind, arguments.seed, {int(number): kind for number, kind in faults})
        return 0
    result = run(
        arguments.kind,
        arguments.count,
        arguments.seed,
        arguments.keep,
        arguments.sabotage,
        arguments.limit,
    )
    print(json.dumps(result, indent=1))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
