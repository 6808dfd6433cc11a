"""What a shard keeps of an image: its pixels to a stated error, and no word of the source file.

Oracles: direct decoding where nothing is scaled, block means where it is, the loader's own
transform for the size, planted words for the metadata.
"""

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet
import pytest

from mlip.dataloading.dicom import radiograph as dicom
from mlip.dataloading.dicom.radiograph import read_radiograph
from mlip.dataloading.pipelines.transforms import Transform
from mlip.dataloading.prepare import shard_worker
from mlip.dataloading.prepare.shard_build import build_shards
from mlip.dataloading.prepare.shard_worker import ImageSettings, convert, make_member, scaled_size
from mlip.dataloading.shards import (
    read_bytes,
)
from mlip.settings import config
from tests.dataloading.shard_sources import picture, plan_for, source


def test_sixteen_bits_are_exact_where_nothing_is_scaled(tmp_path):
    rows = source(tmp_path / "raw", 4)
    settings = ImageSettings(side_px=200, bits=16, codec="png")
    build_shards(rows, plan_for(tmp_path, settings=settings))
    table = pyarrow.parquet.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    for row in table:
        content = read_bytes(str(tmp_path / "out"), row["image"])
        stored = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        path = tmp_path / "raw" / rows[int(row["image_id"][3:])].image
        if path.suffix == ".dcm":
            expected = read_radiograph(path)[0]
        else:
            expected = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH)
            if expected.dtype == np.uint8:
                expected = expected.astype(np.uint16) * 257
        np.testing.assert_array_equal(stored, expected)
        assert row["bits"] == 16


@pytest.mark.parametrize("shape", [(2500, 3000), (3000, 2500), (257, 13), (256, 256), (40, 30)])
def test_stored_size_is_the_size_the_loader_would_scale_to(shape):
    height, width = scaled_size(shape[0], shape[1], 256)
    if max(shape) > 256:
        place = Transform(config.Data(resize_px=256), train=False, seed=0).placement(*shape)
        assert (height, width) == (place.height, place.width)
    else:
        assert (height, width) == shape


def test_eight_bits_are_the_nearest_step_of_sixteen():
    wide = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    eight = convert(wide, ImageSettings(side_px=256))
    assert np.abs(eight.astype(float) - wide / 257).max() <= 0.5 + 1e-9
    back = convert(np.arange(256, dtype=np.uint8).reshape(16, 16), ImageSettings(bits=16))
    assert back.reshape(-1).tolist() == [257 * i for i in range(256)]


def test_area_average_keeps_the_mean_and_jpeg_stays_close(tmp_path):
    image = picture(3, 1000, 800)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    item = {"image": "a.png"}
    fields, member = make_member(str(tmp_path), item, ImageSettings(side_px=250))
    stored = cv2.imdecode(np.frombuffer(member, np.uint8), cv2.IMREAD_UNCHANGED)
    blocks = image.reshape(250, 4, 200, 4).mean(axis=(1, 3))
    assert (fields["height"], fields["width"]) == stored.shape == (250, 200)
    assert np.abs(stored - blocks).mean() < 1.0  # quality 95 on a smooth picture


def test_no_metadata_of_a_source_file_survives(tmp_path):
    good, data = cv2.imencode(".jpg", picture(1))
    comment = b"\xff\xfe" + (2 + 6).to_bytes(2, "big") + b"CANARY"
    (tmp_path / "a.jpg").write_bytes(data.tobytes()[:2] + comment + data.tobytes()[2:])
    _, member = make_member(str(tmp_path), {"image": "a.jpg"}, ImageSettings())
    assert good and member and b"CANARY" not in member


def test_any_code_that_reading_notes_is_handed_on_once(tmp_path, monkeypatch):
    source(tmp_path, 4)
    film, info = read_radiograph(tmp_path / "003.dcm")
    noted = dataclasses.replace(info, notes=("some_new_code", "a", "some_new_code"))
    monkeypatch.setattr(dicom, "read_radiograph", lambda content: (film, noted))
    fields, _ = make_member(str(tmp_path), {"image": "003.dcm"}, ImageSettings())
    assert fields["notes"] == ["a", "some_new_code"]


def test_deidentification_can_be_required(tmp_path):
    rows = source(tmp_path / "raw", 4)
    import pydicom

    dataset = pydicom.dcmread(tmp_path / "raw" / "003.dcm")
    settings = ImageSettings(side_px=64, require_deid=True)
    assert make_member(str(tmp_path / "raw"), {"image": "003.dcm"}, settings)[0]["reason"] == ""
    dataset.PatientName = "CANARY"
    dataset.save_as(tmp_path / "raw" / "003.dcm")
    fields, _ = make_member(str(tmp_path / "raw"), {"image": rows[3].image}, settings)
    assert fields == {"reason": "not_deidentified"}


def test_a_file_gets_no_more_memory_than_its_process_may_take(tmp_path):
    """Without the limit a file that unpacks without end takes the machine's memory, not its own."""
    start = json.dumps({"root": str(tmp_path), "settings": dataclasses.asdict(ImageSettings())})
    command = [sys.executable, "-m", "mlip.dataloading.prepare.shard_worker", start]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdin and worker.stdout and worker.stdout.readline() == b"ready\n"
        most, _ = resource.prlimit(worker.pid, resource.RLIMIT_AS)
        mapped = int(Path(f"/proc/{worker.pid}/statm").read_text().split()[0])
        worker.stdin.close()
    assert 0 < most <= mapped * resource.getpagesize() + (3 << 29)


def test_under_a_limit_of_memory_that_may_not_be_raised_images_are_still_read(tmp_path):
    """`ulimit -v`, as grid engines set it: the worker died of asking for more than it may have."""
    rows = source(tmp_path / "raw", 2)
    settings = ImageSettings()
    start = json.dumps({"root": str(tmp_path / "raw"), "settings": dataclasses.asdict(settings)})
    most = 3 << 29
    ended = subprocess.run(
        [sys.executable, "-m", "mlip.dataloading.prepare.shard_worker", start],
        input=json.dumps({"image": rows[0].image}).encode() + b"\n",
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (most, most)),
        check=True,
    )
    ready, answer, _ = ended.stdout.split(b"\n", 2)
    assert ready == b"ready" and json.loads(answer)["reason"] == ""


def test_a_mistake_of_ours_in_the_worker_is_none_of_the_file(tmp_path, monkeypatch):
    grey = np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8)
    assert cv2.imwrite(str(tmp_path / "a.png"), grey)
    monkeypatch.setattr(shard_worker, "convert", None)
    reply, _ = make_member(str(tmp_path), {"image": "a.png"}, ImageSettings())
    assert reply["reason"] == "internal_error"
