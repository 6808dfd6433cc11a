"""DALI against its torch twin: the same samples in the same order, pixels within 2/255."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cv2
import numpy as np
import pytest
import torch

from mlip.batch import Batch
from mlip.dataloading.ledger import DataError
from mlip.dataloading.manifest import load_manifest
from mlip.dataloading.pipelines.transforms import Transform
from mlip.settings import config as settings
from mlip.settings.config import Config
from tests.dataloading.conftest import take
from tests.virtual_gpu import virtual_gpu

pytest.importorskip("nvidia.dali", reason="nvidia.dali is not installed")

from mlip.dataloading.pipelines import dali_graph, dali_pipeline
from mlip.dataloading.pipelines.dali_pipeline import as_pgm, why_not_dali

STD = 0.25  # data.std: turns a normalised difference into one of intensities


def assert_equal(a: Batch, b: Batch) -> None:
    for name, value in vars(a).items():
        assert value is None or torch.equal(value, getattr(b, name)), name


def assert_twins(a: Batch, b: Batch) -> None:
    for name in vars(a):
        if name not in ("image", "token_counts"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.image.shape == b.image.shape and a.image.dtype == b.image.dtype
    difference = (a.image - b.image.cpu()).abs().mean((1, 2, 3)) * STD * 255
    assert difference.max() < 2.0


@pytest.mark.parametrize("train", [False, True])
def test_both_pipelines_give_the_same_batches(
    corpus: Callable[..., Config], build: Any, train: bool
) -> None:
    twin = build(corpus(), train=train, rows=None if train else np.arange(16))
    dali = build(corpus("data.pipeline=dali"), train=train, rows=None if train else np.arange(16))
    assert dali.pipeline.name == "dali" and twin.pipeline.name == "torch"
    count = 7 if train else 3
    for a, b in zip(take(twin, count), take(dali, count), strict=True):
        assert_twins(a, b)


def test_sixteen_bit_values_arrive_exactly(corpus: Callable[..., Config], build: Any) -> None:
    # images of resize_px are not resampled: both pipelines then do one multiply and add
    override = ["data.resize_px=48", "data.crop_px=48", "data.mean=0.0", "data.std=1.0"]
    rows = np.array([0, 6, 12])
    dali = build(corpus("data.pipeline=dali", *override), train=False, rows=rows)
    for batch in dali:
        for i, row in enumerate(batch.row_index.tolist()):
            path = Path(dali.manifest.root) / dali.manifest.image_path(row)
            raw = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            assert raw.dtype == np.uint16
            assert np.abs(batch.image[i, 0].numpy() * 65535.0 - raw).max() < 0.02


def test_resume_in_the_middle_gives_the_same_batches(
    corpus: Callable[..., Config], build: Any
) -> None:
    config = corpus("data.pipeline=dali")
    straight = take(build(config), 7)
    first = build(config)
    take(first, 3)
    second = build(config)
    second.load_state_dict(first.state_dict())
    for a, b in zip(straight[3:], take(second, 4), strict=True):
        assert_equal(a, b)


def test_bad_files_are_replaced_as_in_the_twin(
    corpus: Callable[..., Config], build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = corpus("data.bad_share=0.9")
    manifest = load_manifest(config.data)
    paths = {row: Path(manifest.root) / manifest.image_path(row) for row in (1, 2, 6, 7)}
    paths[1].write_bytes(b"")
    paths[2].unlink()
    paths[6].write_bytes(paths[6].read_bytes()[:60])
    # a good header and end, but a body that only the decoder finds to be damaged
    content = bytearray(paths[7].read_bytes())
    content[len(content) // 2] ^= 0xFF
    paths[7].write_bytes(bytes(content))
    twin, dali = build(config), build(corpus("data.bad_share=0.9", "data.pipeline=dali"))
    begun: list[int] = []
    begin = dali.pipeline._build
    monkeypatch.setattr(dali.pipeline, "_build", lambda step: begun.append(step) or begin(step))
    for a, b in zip(take(twin, 8), take(dali, 8), strict=True):
        assert_twins(a, b)
    assert twin.ledger.state_dict() == dali.ledger.state_dict()
    assert dali.ledger.bad == {1: "empty_file", 2: "missing", 6: "truncated", 7: "undecodable"}
    # DALI refused a whole batch, was rebuilt for it once, and was not shown that row again
    assert begun[0] == 0 and len(begun) == 2


def test_dark_films_are_refused_where_asked_for_as_in_the_twin(
    corpus: Callable[..., Config], build: Any
) -> None:
    config = corpus()
    manifest = load_manifest(config.data)
    dark = Path(manifest.root) / manifest.image_path(6)
    cv2.imwrite(str(dark), cv2.imread(str(dark), cv2.IMREAD_UNCHANGED) // 16)
    for made in (config, corpus("data.pipeline=dali")):
        for refuses in (True, False):
            loader = build(made, train=False, rows=np.array([0, 6, 12]), refuses_dark=refuses)
            rows = [row for batch in loader for row in batch.row_index.tolist()]
            assert rows == ([0, 12] if refuses else [0, 6, 12])
            assert loader.ledger.bad == ({6: "too_dark"} if refuses else {})


def test_a_failure_stops_the_step_it_belongs_to_and_none_before(
    corpus: Callable[..., Config], build: Any
) -> None:
    """Batches are made ahead: what a later one met ended the run up to three steps too soon."""
    config = corpus("data.bad_share=1.0", "batch.global_pairs=2")
    manifest = load_manifest(config.data)
    order = build(config).order
    good = set(order.plan(0).rows) | set(order.plan(1).rows)
    for row in set(range(16)) - good:
        (Path(manifest.root) / manifest.image_path(row)).write_bytes(b"")
    taken = []
    for pipeline in ("torch", "dali"):
        loader = build(
            corpus("data.bad_share=1.0", "batch.global_pairs=2", f"data.pipeline={pipeline}")
        )
        loader.pipeline.order.replacements = lambda *_: order.rows[:0]
        with pytest.raises(DataError, match="no readable image"):
            take(loader, 8)
        taken.append((loader.step, loader.ledger.state_dict()))
    assert taken[0] == taken[1] and taken[0][0] == 2


SQUARES = np.array([1, 2, 3, 7, 8, 9, 13, 14, 15])  # the corpus' training files of 8 bits, 48 px
AS_PREPARED = ["data.pipeline=dali", "data.resize_px=48", "data.crop_px=40"]


@pytest.mark.parametrize("train", [False, True])
def test_the_graph_without_branches_gives_the_same_bits(
    corpus: Callable[..., Config], build: Any, train: bool
) -> None:
    config = corpus(*AS_PREPARED)
    straight, branching = (build(config, train=train, rows=SQUARES) for _ in range(2))
    branching.pipeline._needs_branches = True
    twin = build(corpus(*AS_PREPARED[1:]), train=train, rows=SQUARES)
    count = 5 if train else 2  # of evaluation the second is short
    for a, b, c in zip(*(take(one, count) for one in (straight, branching, twin)), strict=True):
        assert torch.equal(a.image, b.image)
        assert_twins(a, b)
        assert_twins(a, c)
    assert not straight.pipeline._has_branches and branching.pipeline._has_branches


@pytest.mark.parametrize("train", [False, True])
def test_the_graphs_that_finish_in_dali_as_on_a_gpu_agree_with_each_other_and_the_twin(
    corpus: Callable[..., Config], build: Any, train: bool
) -> None:
    straight, branching = (build(corpus(*AS_PREPARED), train=train, rows=SQUARES) for _ in "ab")
    mixed = build(corpus("data.pipeline=dali"), train=train)  # every kind of file, 16 bits too
    twins = [
        build(corpus(*AS_PREPARED[1:]), train=train, rows=SQUARES),
        build(corpus(), train=train),
    ]
    for loader in (straight, branching, mixed):
        loader.pipeline.finishes_in_dali = True
    branching.pipeline._needs_branches = True
    count = 5 if train else 2
    batches = [take(loader, count) for loader in (straight, branching, mixed, *twins)]
    for a, b, c, like_a, like_c in zip(*batches, strict=True):
        assert torch.equal(a.image, b.image)
        assert_twins(like_a, a)
        assert_twins(like_c, c)
    assert not straight.pipeline._has_branches and mixed.pipeline._has_branches
    # what only dataloading/pipelines/crop.py would take is not kept, step after step
    assert not straight.pipeline._windows and not mixed.pipeline._windows


@pytest.mark.parametrize("one_decoder", [False, True])
@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("degrees", [0.0, 5.0])
def test_the_graphs_of_a_gpu_keep_pixels_there_and_arguments_on_the_host(
    corpus: Callable[..., Config], degrees: float, branches: bool, one_decoder: bool
) -> None:
    """Oracle: DALI's own account of its operators; building the graph would take a GPU."""
    pipeline_def, fn, types = dali_pipeline._dali()
    decoders: list[dict[str, Any]] = []

    def image(encoded: Any, **settings: Any) -> Any:
        decoders.append(settings)
        return fn.decoders.image(encoded, **settings)

    class Told:
        """DALI's functions, and what the decoder was asked for."""

        def __getattr__(self, name: str) -> Any:
            return SimpleNamespace(image=image) if name == "decoders" else getattr(fn, name)

    config = corpus(f"data.augment.rotation_degrees={degrees}")
    pipeline = dali_graph.finished(
        (pipeline_def, Told(), types),
        lambda step: None,
        Transform(config.data, train=True, seed=0),
        on_gpu=True,
        branches=branches,
        one_decoder=one_decoder,
        batch_size=4,
        num_threads=1,
        device_id=0,
        exec_dynamic=True,
    )
    pipeline._build_graph()
    seen = set()
    for operator in pipeline._ops:
        name = operator._op.schema.Name()
        places = [node.device for node in operator.inputs]
        assert name != "Constant", "a constant of its own is one more tensor to be copied"
        if name in ("Resize", "Slice", "Crop", "WarpAffine", "CropMirrorNormalize"):
            assert places[0] == "gpu" and set(places[1:]) <= {"cpu"}, (name, places)
            assert [node.device for node in operator.outputs] == ["gpu"]
            seen.add(name)
    assert {"Resize", "Slice"} <= seen or not branches
    assert all(settings["device"] == "mixed" for settings in decoders)
    loads = {settings.get("hw_decoder_load") for settings in decoders}
    assert loads == ({0.0} if one_decoder else {None})


def test_a_copy_from_dali_waits_for_its_own_stream_and_outlives_the_thread(
    corpus: Callable[..., Config], build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU; the streams are stand-ins that note their order."""
    from nvidia.dali.plugin import pytorch

    done: list[str] = []
    stream = mock.MagicMock()
    stream.synchronize = lambda: done.append("waited")

    def feed(source: Any, target: torch.Tensor, cuda_stream: Any) -> torch.Tensor:
        assert cuda_stream is stream
        done.append("copied")
        return target

    monkeypatch.setattr(pytorch, "feed_ndarray", feed)
    record = lambda self, of: done.append(of)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "record_stream", record, raising=False)
    with virtual_gpu():
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "the training's")
        pipeline = build(corpus("data.pipeline=dali")).pipeline
        assert pipeline.on_gpu and pipeline.finishes_in_dali and pipeline.device_id == 0
        for _ in range(2):
            assert pipeline._copied(object()).shape == (6, 1, 32, 32)
    assert done == ["copied", "waited", "the training's"] * 2


def test_what_needs_no_scaling_is_the_twins_to_the_bit_without_branches(
    tmp_path: Path, build: Any
) -> None:
    # as `mlip prepare` leaves them: the longest side is resize_px, the other is what it is
    rng = np.random.default_rng(4)
    lines = ["image,report,patient_id,study_id,split"]
    for i, shape in enumerate([(48, 48), (48, 31), (25, 48), (48, 47), (8, 48), (48, 48)] * 2):
        content = cv2.imencode(".jpg", rng.integers(0, 256, shape).astype(np.uint8))[1]
        (tmp_path / f"{i}.jpg").write_bytes(content.tobytes())
        lines.append(f"{i}.jpg,No effusion {i}.,p{i},s{i},train")
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    override = [f"data.manifest={tmp_path / 'm.csv'}", "batch.global_pairs=4"]
    override += ["data.resize_px=48", "data.crop_px=40"]
    twin, dali, branching = (
        build(settings.load([], [*override, f"data.pipeline={kind}"]))
        for kind in ("torch", "dali", "dali")
    )
    branching.pipeline._needs_branches = True
    for a, b, c in zip(*(take(one, 9) for one in (twin, dali, branching)), strict=True):
        assert_equal(a, b)
        assert torch.equal(a.image, c.image)
    assert not dali.pipeline._has_branches and branching.pipeline._has_branches


def test_the_first_unusual_image_brings_the_branches_and_costs_no_batch(
    corpus: Callable[..., Config], build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.array([1, 2, 3, 7, 8, 9, 11, 12, 13, 14])  # 12 has 16 bits
    config = corpus(*AS_PREPARED, "batch.global_pairs=2")
    dali, branching = (build(config, train=False, rows=rows) for _ in range(2))
    branching.pipeline._needs_branches = True
    twin = build(corpus(*AS_PREPARED[1:], "batch.global_pairs=2"), train=False, rows=rows)
    begun: list[tuple[int, bool]] = []
    begin = dali.pipeline._build

    def build_and_note(step: int) -> None:
        begin(step)
        begun.append((step, dali.pipeline._has_branches))

    monkeypatch.setattr(dali.pipeline, "_build", build_and_note)
    for a, b, c in zip(*(take(one, 5) for one in (dali, branching, twin)), strict=True):
        assert torch.equal(a.image, b.image)
        assert_twins(a, c)
    # step 3 holds it; DALI asks for a batch or two ahead
    assert begun[0] == (0, False) and len(begun) == 2
    assert 1 <= begun[1][0] <= 3 and begun[1][1]


def test_a_damaged_file_is_replaced_without_branches_too(
    corpus: Callable[..., Config], build: Any
) -> None:
    override = [*AS_PREPARED, "data.bad_share=0.9"]
    config = corpus(*override)
    manifest = load_manifest(config.data)
    path = Path(manifest.root) / manifest.image_path(7)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    (Path(manifest.root) / manifest.image_path(2)).unlink()
    dali, twin = build(config, rows=SQUARES), build(corpus(*override[1:]), rows=SQUARES)
    for a, b in zip(take(dali, 5), take(twin, 5), strict=True):
        assert_twins(a, b)
    assert dali.ledger.bad == twin.ledger.bad == {2: "missing", 7: "undecodable"}
    assert not dali.pipeline._has_branches


def test_rotation_on_the_cpu_backend_is_refused_with_the_reason(
    corpus: Callable[..., Config], build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = corpus("data.pipeline=dali", "data.augment.rotation_degrees=5.0")
    with pytest.raises(ValueError, match="rotation_degrees.*CPU backend.*data.pipeline=torch"):
        build(config)
    auto = corpus("data.pipeline=auto", "data.augment.rotation_degrees=5.0")
    assert build(auto).pipeline.name == "torch"


def test_rotation_agrees_with_the_twin(
    corpus: Callable[..., Config], build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    override = ["data.augment.rotation_degrees=25.0", "data.augment.brightness=0.0"]
    twin = build(corpus(*override))
    monkeypatch.setattr(dali_pipeline, "why_not_dali", lambda config: None)
    dali = build(corpus("data.pipeline=dali", *override))
    for a, b in zip(take(twin, 3), take(dali, 3), strict=True):
        assert_twins(a, b)


def test_reasons_against_dali_are_none_or_a_sentence(corpus: Callable[..., Config]) -> None:
    assert why_not_dali(corpus()) is None


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pgm_holds_the_values(dtype: type) -> None:
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (5, 7)).astype(dtype)
    content = as_pgm(pixels).tobytes()
    header = b"P5\n7 5\n%d\n" % np.iinfo(dtype).max
    assert content.startswith(header)
    body = np.frombuffer(content[len(header) :], ">u2" if dtype == np.uint16 else np.uint8)
    assert (body.reshape(5, 7) == pixels).all()


def test_dicom_rows_go_through_our_own_reader(tmp_path: Path, build: Any) -> None:
    from mlip.dataloading.dicom.radiograph import read_radiograph, write_radiograph

    rng = np.random.default_rng(2)
    lines = ["image,report,patient_id,study_id,split"]
    for i in range(4):
        image = rng.integers(0, 65536, (40, 40)).astype(np.uint16)
        write_radiograph(tmp_path / f"{i}.dcm", image, patient_id="p", study_id=f"s{i}")
        lines.append(f"{i}.dcm,No effusion {i}.,p{i},s{i},train")
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    override = [f"data.manifest={tmp_path / 'm.csv'}", "data.mean=0.0", "data.std=1.0"]
    override += [f"data.{side}_px=40" for side in ("resize", "crop")]
    override += ["data.channels=1", "batch.global_pairs=4"]
    for kind in ("torch", "dali"):
        config = settings.load([], [*override, f"data.pipeline={kind}"])
        batch = next(iter(build(config, train=False)))
        for i in range(4):
            expected = read_radiograph(tmp_path / f"{i}.dcm")[0]
            assert np.abs(batch.image[i, 0].numpy() * 65535.0 - expected).max() < 0.02


def test_real_radiographs_agree_within_two_grey_levels(build: Any) -> None:
    root = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not (root / "manifest.csv").is_file():
        pytest.skip("../shared/data is not there")
    override = [f"data.manifest={root / 'manifest.csv'}", "data.columns.image=path",
                "data.columns.report=text", "data.columns.study_id=null",
                "data.empty_report=image_only", "batch.global_pairs=16"]  # fmt: skip
    batches = []
    for kind in ("torch", "dali"):
        config = settings.load([], [*override, f"data.pipeline={kind}"])
        manifest = load_manifest(config.data)
        rows = manifest.rows("train", with_report=False)[::12]
        batches.append(list(build(config, train=False, with_report=False, rows=rows)))
    for a, b in zip(*batches, strict=True):
        assert_twins(a, b)
