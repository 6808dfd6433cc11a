"""Who takes part in bench_dataloading.py: image files, and iterators of batches made from them.

Each contestant ends with its batch on one device. "cpu" as it comes; "cuda" copied there from
page-locked memory, or made there by DALI. Contestants of the CPU see no GPU.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from mlip.dataloading.loader import Loader, build_loader
from mlip.dataloading.manifest import load_manifest
from mlip.dataloading.prepare.shard_worker import ImageSettings, convert, encode
from mlip.dataloading.reports.tokenizer import train_tokenizer
from mlip.dataloading.shards import ShardWriter, synced_file
from mlip.settings import config

IMAGES = 2048  # different 256-px images; all stay in the page cache, as shards on fast disks do
FULL_IMAGES = 12  # different full-size files
BATCH = 64
FULL_BATCH = 4
FULL_BATCH_GPU = 32  # a GPU's decoders work on a batch at a time
SENTENCES = (
    "There is a small left pleural effusion.",
    "No pneumothorax is seen.",
    "The heart size is normal.",
    "The lungs are clear.",
    "A left chest tube is in place.",
)


class Contestant(NamedTuple):
    """device: where its batches end; is_full: 2500 x 3000 px JPEG instead of 256 px."""

    device: str
    is_full: bool


CONTESTANTS = {
    "dali": Contestant("cpu", False),
    "torch": Contestant("cpu", False),
    "dataloader": Contestant("cpu", False),
    "dataloader_default": Contestant("cpu", False),
    "dataloader_rgb": Contestant("cpu", False),
    "full": Contestant("cpu", True),
    "dali_gpu": Contestant("cuda", False),
    "torch_gpu": Contestant("cuda", False),
    "dataloader_gpu": Contestant("cuda", False),
    "dali_full_gpu": Contestant("cuda", True),
    "full_gpu": Contestant("cuda", True),
}


def radiograph(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint16]:
    """Smooth shapes and detector noise: JPEG spends about as many bytes on it as on a chest."""
    smooth = cv2.resize(rng.random((14, 14)), (width, height), interpolation=cv2.INTER_CUBIC)
    noise = cv2.GaussianBlur(rng.normal(0, 1, (height, width)), (0, 0), 0.8)
    return ((smooth + 0.01 * noise).clip(0, 1) * 65535).astype(np.uint16)


def make_files(folder: Path) -> dict[str, float]:
    """One shard of prepared images, the same images as files, and full-size JPEG files."""
    rng = np.random.default_rng(0)
    settings = ImageSettings()
    for name in ("shards", "files", "full"):
        (folder / name).mkdir()
    lines = ["image,report,patient_id,study_id,split"]
    sizes = []
    with synced_file(folder / "shards" / "train-00000.tar") as file:
        writer = ShardWriter(file)
        for i in range(IMAGES):
            member = encode(convert(radiograph(rng, 256, 256), settings), settings)
            (folder / "files" / f"{i}.jpg").write_bytes(member)
            place = writer.add(f"{i}.jpg", member)
            sizes.append(place.size)
            report = " ".join(SENTENCES[j] for j in rng.choice(5, 3, replace=False)) + f" Film {i}."
            reference = f"shards/train-00000.tar#{place.offset}+{place.size}"
            lines.append(f"{reference},{report},p{i},s{i},train")
        writer.finish()
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    full, full_lines = [], lines[:1]
    for i in range(FULL_IMAGES):
        image = (radiograph(rng, 2500, 3000) >> 8).astype(np.uint8)
        path = folder / "full" / f"{i}.jpg"
        cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 90])
        full.append(path.stat().st_size)
        full_lines.append(f"{i}.jpg,{SENTENCES[i % 5]} Film {i}.,p{i},s{i},train")
    (folder / "full" / "manifest.csv").write_text("\n".join(full_lines) + "\n", encoding="utf-8")
    return {"member_kb": statistics.mean(sizes) / 1e3, "full_mb": statistics.mean(full) / 1e6}


class Files(torch.utils.data.Dataset[torch.Tensor]):
    """What people write: read, letterbox, crop, contrast and brightness, normalise."""

    def __init__(self, folder: Path, channels: int, side_px: int = 256) -> None:
        self.paths = sorted(str(path) for path in folder.glob("*.jpg"))
        self.channels, self.side_px = channels, side_px

    def __len__(self) -> int:
        return 1 << 24  # endless for our purpose: no epoch ends inside a measurement

    def __getitem__(self, index: int) -> torch.Tensor:
        image = cv2.imread(self.paths[index % len(self.paths)], cv2.IMREAD_GRAYSCALE)
        if max(image.shape) > self.side_px:
            scale = self.side_px / max(image.shape)
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        if image.shape != (self.side_px, self.side_px):
            below, right = self.side_px - image.shape[0], self.side_px - image.shape[1]
            image = cv2.copyMakeBorder(
                image, below // 2, below - below // 2, right // 2, right - right // 2, 0
            )
        top, left = np.random.randint(0, self.side_px - 224 + 1, 2)
        bright, contrast = 1.0 + 0.1 * (2.0 * np.random.rand(2) - 1.0)
        crop = image[top : top + 224, left : left + 224].astype(np.float32)
        crop *= np.float32(bright * contrast / 0.25 / 255.0)
        crop += np.float32((bright * 0.5 * (1.0 - contrast) - 0.5) / 0.25)
        return torch.from_numpy(crop)[None].expand(self.channels, -1, -1)


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)


def dataloader(
    folder: Path, channels: int, workers: int, batch_size: int, device: str
) -> Iterator[int]:
    """Sizes of the batches of a torch DataLoader as its documentation recommends it."""
    batches = torch.utils.data.DataLoader(
        Files(folder, channels),
        batch_size=batch_size,
        shuffle=False,
        num_workers=workers,
        worker_init_fn=_one_thread,
        persistent_workers=True,
        pin_memory=device == "cuda",
    )
    for batch in batches:
        # a tensor of its own on the GPU, as a step would be given
        yield len(batch.to(device, non_blocking=True))


def ours(
    manifest: Path, kind: str, channels: int, workers: int, batch_size: int, device: str
) -> Iterator[int]:
    """Sizes of our loader's batches: images, tokens and all."""
    loader = loader_of(manifest, kind, channels, workers, batch_size)
    for batch in loader:
        moved = batch.to(device)
        assert moved.image.device.type == device
        yield len(moved)


class NoLinks:
    """Linking happens once a report and is cached: a rate does not see it."""

    index: dict[str, int] = {}

    def link(self, text: str) -> list[Any]:
        return []


def loader_of(
    manifest_path: Path, kind: str, channels: int, workers: int, batch_size: int = BATCH
) -> Loader:
    settings = config.load(
        [],
        [
            f"data.manifest={manifest_path}",
            f"data.pipeline={kind}",
            f"data.channels={channels}",
            f"data.workers={workers}",
            f"batch.global_pairs={batch_size}",
        ],
    )
    manifest = load_manifest(settings.data)
    vocabulary = Path(tempfile.mkdtemp(dir=manifest_path.parent)) / "tokenizer"
    tokenizer = train_tokenizer([" ".join(SENTENCES)] * 5, 200, vocabulary)
    nothing = NoLinks()
    return build_loader(
        settings,
        manifest,
        split="train",
        train=True,
        tokenizer=tokenizer,
        linker=nothing,
        table=nothing,
    )


def batches_of(name: str, folder: Path, channels: int, workers: int) -> Iterator[int]:
    """Endless sizes of a contestant's batches."""
    device, is_full = CONTESTANTS[name]
    kind = name.split("_")[0]
    size = BATCH if not is_full else FULL_BATCH if device == "cpu" else FULL_BATCH_GPU
    if kind in ("dali", "torch"):
        manifest = folder / "full" / "manifest.csv" if is_full else folder / "manifest.csv"
        return ours(manifest, kind, channels, workers, size, device)
    images = folder / ("full" if is_full else "files")
    return dataloader(images, 3 if name == "dataloader_rgb" else 1, workers, size, device)
