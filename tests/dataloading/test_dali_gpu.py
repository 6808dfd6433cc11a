"""DALI on an NVIDIA GPU: `mixed` decoding against the CPU's, the loader against its torch twin.

Run by `python3 benchmarks/gpu_check.py --part data`. Two decoders of one JPEG may differ because
each rounds its inverse DCT: IEEE 1180 (JPEG: ISO/IEC 10918-2) lets a compliant one err by at most 1
level at any pixel, so two differ by at most 2 in the luminance. Where colour is turned into grey
too, DALI's own test of `mixed` against `cpu` bounds the mean difference of JPEG by 4 and of other
formats by 1 (NVIDIA/DALI, dali/test/python/decoder/test_image.py,
_testimpl_image_decoder_consistency). Grey PNG and PGM hold the very values: no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mlip.batch import Batch
from mlip.dataloading.images.image_file import read_header
from mlip.dataloading.ledger import BadSample
from mlip.dataloading.manifest import load_manifest
from mlip.settings import config as settings
from mlip.settings.config import Config
from tests.dataloading.conftest import take

pytest.importorskip("nvidia.dali", reason="nvidia.dali is not installed")

from mlip.dataloading.pipelines import dali_graph, dali_pipeline

pytestmark = pytest.mark.gpu

STD = 0.25  # data.std: turns a normalised difference into one of intensities
GREY_JPEG, COLOUR_JPEG, OTHER, EXACT = 2, 4, 1, 0  # grey levels, see above
EXACT_RUN = "run.deterministic=true"  # every JPEG through the same decoder
AS_PREPARED = ["data.resize_px=48", "data.crop_px=40"]
SQUARES = np.array([1, 2, 3, 7, 8, 9, 13, 14, 15])  # the corpus' training files of 8 bits, 48 px
PNGS = np.array([1, 7, 13])  # of these the grey PNG


def decoded(contents: list[bytes], wide: bool, device: str, **decoder: float) -> list[NDArray[Any]]:
    """The pixels of encoded files as the loader's graphs decode them, [H, W] each."""
    dali = dali_pipeline._dali()
    pipeline_def, fn, types = dali
    dtype = types.UINT16 if wide else types.UINT8

    @pipeline_def(batch_size=len(contents), num_threads=4, device_id=0, exec_dynamic=True)
    def graph() -> Any:
        source = [np.frombuffer(content, np.uint8) for content in contents]
        encoded = fn.external_source(source=lambda: source, batch=True, dtype=types.UINT8, ndim=1)
        return dali_graph._decode(dali, encoded, dtype, device, **decoder)

    pipeline = graph()
    pipeline.build()
    (images,) = pipeline.run()
    images = images.as_cpu() if device == "mixed" else images
    return [np.asarray(images[i])[:, :, 0].copy() for i in range(len(contents))]


def radiograph(height: int, width: int, seed: int = 0) -> NDArray[np.uint16]:
    """Smooth shapes, noise, and black and white areas, where decoders clip."""
    rng = np.random.default_rng(seed)
    smooth = cv2.resize(rng.random((9, 9)), (width, height), interpolation=cv2.INTER_CUBIC)
    noisy = 1.4 * smooth - 0.2 + 0.02 * rng.normal(size=smooth.shape)
    return (np.clip(noisy, 0.0, 1.0) * 65535).astype(np.uint16)


def encoded_files() -> list[tuple[str, bytes, bool, int]]:
    """(name, file, whether it has 16 bits, the bound in grey levels)."""

    def jpeg(image: NDArray[Any], *options: int) -> bytes:
        return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, *options])[1].tobytes()

    def png(image: NDArray[Any]) -> bytes:
        return cv2.imencode(".png", image)[1].tobytes()

    files: list[tuple[str, bytes, bool, int]] = []
    full_444 = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
    progressive = (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    for seed, (height, width) in enumerate([(64, 64), (61, 83), (97, 8), (256, 213), (1250, 1501)]):
        size = f"{height}x{width}"
        wide = radiograph(height, width, seed)
        grey = (wide >> 8).astype(np.uint8)
        tinted = np.dstack([grey, np.roll(grey, 3, 0), np.roll(grey, 5, 1)])
        files += [
            (f"grey JPEG 95 {size}", jpeg(grey, 95), False, GREY_JPEG),
            (f"grey JPEG 60 {size}", jpeg(grey, 60), False, GREY_JPEG),
            (f"progressive JPEG {size}", jpeg(grey, 90, *progressive), False, GREY_JPEG),
            (f"RGB JPEG of grey {size}", jpeg(np.dstack([grey] * 3), 90), False, COLOUR_JPEG),
            (f"RGB JPEG 4:2:0 {size}", jpeg(tinted, 90), False, COLOUR_JPEG),
            (f"RGB JPEG 4:4:4 {size}", jpeg(tinted, 90, *full_444), False, COLOUR_JPEG),
            (f"grey PNG {size}", png(grey), False, EXACT),
            (f"16-bit PNG {size}", png(wide), True, EXACT),
            (f"RGB PNG {size}", png(tinted), False, OTHER),
            (f"PGM {size}", dali_pipeline.as_pgm(grey).tobytes(), False, EXACT),
            (f"16-bit PGM {size}", dali_pipeline.as_pgm(wide).tobytes(), True, EXACT),
        ]
    return files


def assert_decoders_agree(files: list[tuple[str, bytes, bool, int]], **decoder: float) -> None:
    over = []
    for wide in (False, True):
        some = [file for file in files if file[2] == wide]
        if not some:
            continue
        contents = [content for _, content, _, _ in some]
        pairs = zip(
            some, decoded(contents, wide, "mixed", **decoder), decoded(contents, wide, "cpu"),
            strict=True,
        )  # fmt: skip
        for (name, _, _, bound), gpu, cpu in pairs:
            assert gpu.shape == cpu.shape and gpu.dtype == cpu.dtype, name
            apart = np.abs(gpu.astype(np.int64) - cpu)
            print(f"{name}: at most {apart.max()}, mean {apart.mean():.4f}, bound {bound}")
            if apart.max() > bound:
                over.append(f"{name}: {apart.max()} > {bound}")
    assert not over, over


@pytest.mark.parametrize("decoder", [{}, {"hw_decoder_load": 0.0}], ids=["engine", "kernels"])
def test_mixed_decoding_agrees_with_the_cpu(decoder: dict[str, float]) -> None:
    assert_decoders_agree(encoded_files(), **decoder)


def test_real_images_decode_alike(shared_data: Path) -> None:
    files = []
    for path in sorted((shared_data / "images").rglob("*")):
        if path.suffix.lower() not in (".jpg", ".jpeg", ".png") or len(files) == 48:
            continue
        content = path.read_bytes()
        try:
            header = read_header(content)
        except BadSample:
            continue
        if header.plain:
            bound = COLOUR_JPEG if header.kind == "jpeg" else OTHER
            files.append((path.name[:20], content, header.bits == 16, bound))
    assert files, "no plain image below ../shared/data/images"
    assert_decoders_agree(files)


@pytest.mark.parametrize("train", [False, True])
def test_batches_are_those_of_the_twin(
    corpus: Callable[..., Config], build: Any, train: bool
) -> None:
    """Rows, order and text side equal; pixels within 2/255 on average (docs/data.md)."""
    twin = build(corpus("data.channels=3"), train=train)
    dali = build(corpus("data.channels=3", "data.pipeline=dali"), train=train)
    assert dali.pipeline.on_gpu and dali.pipeline.finishes_in_dali
    for a, b in zip(take(twin, 7 if train else 3), take(dali, 7 if train else 3), strict=True):
        assert_twins(a, b)


def assert_equal(a: Batch, b: Batch) -> None:
    for name, value in vars(a).items():
        assert value is None or torch.equal(value, getattr(b, name)), name


def assert_twins(a: Batch, b: Batch, levels: float = 2.0) -> None:
    for name in vars(a):
        if name not in ("image", "token_counts"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.image.shape == b.image.shape and a.image.dtype == b.image.dtype
    difference = (a.image - b.image.cpu()).abs().mean((1, 2, 3)) * STD * 255
    assert difference.max() < levels, difference


def test_pixels_never_visit_the_host(corpus: Callable[..., Config], build: Any) -> None:
    batch = take(build(corpus("data.pipeline=dali", "data.channels=3")), 1)[0]
    assert batch.image.is_cuda and batch.image.stride(1) == 0  # three channels are one
    others = [n for n in vars(batch) if n not in ("image", "token_counts")]
    assert all(getattr(batch, n).is_pinned() for n in others)
    moved = batch.to("cuda")
    assert moved.token_mask.is_cuda
    assert torch.equal(moved.token_counts, batch.token_mask.sum(1))
    assert moved.image.data_ptr() == batch.image.data_ptr()
    on_host = [name for name in vars(moved) if not getattr(moved, name).is_cuda]
    assert on_host == ["token_counts"]


def test_crop_and_augmentation_are_the_twins(corpus: Callable[..., Config], build: Any) -> None:
    """Grey PNG of resize_px are neither decoded nor scaled differently: what is left is one
    multiplication and one addition in float32, of (x - mean) / std against gain x + offset.

    Bound: x and mean reach 255, half a unit in their last place is 1.5e-5, over std of 255 / gain
    with gain below 1.21 / 0.25: 2 * 1.5e-5 * 4.84 / 255 = 6e-7, and as much again for the product.
    """
    more = [*AS_PREPARED, "data.augment.brightness=0.1", "data.augment.contrast=0.1"]
    twin, dali = (
        build(corpus(*more, f"data.pipeline={kind}", "batch.global_pairs=3"), rows=PNGS)
        for kind in ("torch", "dali")
    )
    batches = list(zip(take(twin, 6), take(dali, 6), strict=True))
    for a, b in batches:
        assert_twins(a, b)
        assert (a.image - b.image.cpu()).abs().max() < 4e-6
    # the crops move: an error of one pixel would show
    assert len({float(a.image[0, 0, 0, 0]) for a, _ in batches}) > 1


def test_rotation_is_the_twins(corpus: Callable[..., Config], build: Any) -> None:
    more = ["data.augment.rotation_degrees=25.0", "data.augment.brightness=0.0"]
    twin, dali = build(corpus(*more)), build(corpus(*more, "data.pipeline=dali"))
    for a, b in zip(take(twin, 3), take(dali, 3), strict=True):
        assert_twins(a, b)


@pytest.mark.parametrize("train", [False, True])
def test_the_graph_without_branches_gives_the_same_bits(
    corpus: Callable[..., Config], build: Any, train: bool
) -> None:
    config = corpus("data.pipeline=dali", *AS_PREPARED, EXACT_RUN)
    straight, branching = (build(config, train=train, rows=SQUARES) for _ in range(2))
    branching.pipeline._needs_branches = True
    count = 5 if train else 2
    for a, b in zip(take(straight, count), take(branching, count), strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.row_index, b.row_index)
    assert not straight.pipeline._has_branches and branching.pipeline._has_branches


def test_the_first_unusual_image_brings_the_branches_and_costs_no_batch(
    corpus: Callable[..., Config], build: Any
) -> None:
    rows = np.array([1, 2, 3, 7, 8, 9, 11, 12, 13, 14])  # 12 has 16 bits
    more = [*AS_PREPARED, "batch.global_pairs=2"]
    dali = build(corpus("data.pipeline=dali", *more), train=False, rows=rows)
    twin = build(corpus(*more), train=False, rows=rows)
    for a, b in zip(take(twin, 5), take(dali, 5), strict=True):
        assert_twins(a, b)
    assert dali.pipeline._has_branches


def test_damaged_files_are_quarantined_as_in_the_twin(
    corpus: Callable[..., Config], build: Any
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
    for a, b in zip(take(twin, 8), take(dali, 8), strict=True):
        assert_twins(a, b)
    assert twin.ledger.state_dict() == dali.ledger.state_dict()
    assert dali.ledger.bad == {1: "empty_file", 2: "missing", 6: "truncated", 7: "undecodable"}


def test_a_short_last_batch_of_evaluation_leaves_bad_rows_out(
    corpus: Callable[..., Config], build: Any
) -> None:
    config = corpus("data.pipeline=dali", "batch.global_pairs=4")
    (Path(load_manifest(config.data).root) / load_manifest(config.data).image_path(3)).unlink()
    batches = list(build(config, train=False, rows=np.arange(6)))
    assert [batch.row_index.tolist() for batch in batches] == [[0, 1, 2], [4, 5]]
    assert all(batch.image.is_cuda and len(batch.image) == len(batch) for batch in batches)


def test_resume_in_the_middle_gives_the_same_bits(
    corpus: Callable[..., Config], build: Any
) -> None:
    config = corpus("data.pipeline=dali", EXACT_RUN)
    straight = take(build(config), 7)
    first = build(config)
    take(first, 3)
    second = build(config)
    second.load_state_dict(first.state_dict())
    for a, b in zip(straight[3:], take(second, 4), strict=True):
        assert_equal(a, b)


def test_batches_stay_what_they_are_while_the_gpu_is_busy(
    corpus: Callable[..., Config], build: Any
) -> None:
    """A batch is read by kernels that start long after Python let go of it: its memory must not be
    given to the next one before."""
    config = corpus("data.pipeline=dali", EXACT_RUN, "data.crop_px=40")
    quiet = [batch.image.cpu() for batch in take(build(config), 24)]
    iterator, late = iter(build(config)), []
    for _ in range(24):
        image = next(iterator).image
        torch.cuda._sleep(20_000_000)  # clock ticks: about 10 ms
        late.append(image.clone())  # reads after the sleep
        del image
    torch.cuda.synchronize()
    for a, b in zip(quiet, late, strict=True):
        assert torch.equal(a, b.cpu())


def test_real_radiographs_agree_within_two_grey_levels(build: Any, shared_data: Path) -> None:
    override = [f"data.manifest={shared_data / 'manifest.csv'}", "data.columns.image=path",
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
