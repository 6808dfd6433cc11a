"""What a picture may be at most and at least, whatever kind of file holds it."""

from __future__ import annotations

MAX_FILE_BYTES = 512 * 1024 * 1024
MAX_PIXELS = 100_000_000  # the largest detectors give about 20 megapixels
MAX_SIDE_PX = 16_384
MIN_SIDE_PX = 8
MAX_SCANS = 50  # of a JPEG; a progressive one has about ten, each of which goes over all pixels
