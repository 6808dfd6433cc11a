"""What segmentation and detection share: framed images, augmented with what lies on them."""

from __future__ import annotations

import torch
from torch import Tensor

from mlip.config import Config
from mlip.dataloading.manifest import Manifest
from mlip.transfer.annotations import Annotations
from mlip.transfer.frames import Images, augmentation, frame_of, normalise, to_tensor, warp
from mlip.transfer.interval import Array


class FramedTask:
    """A task whose truth lies on the image: one manifest, its annotations and its framed images."""

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        annotations: Annotations,
        images: Images,
        device: torch.device,
    ) -> None:
        frame = frame_of(config)
        assert frame is not None
        self.config, self.transfer, self.manifest = config, config.transfer, manifest
        self.annotations, self.images, self.device = annotations, images, device
        self.frame, self.side = frame, frame.side

    def _pictures(
        self, rows: Array, epoch: int | None, seed: int
    ) -> tuple[Tensor, list[Array | None]]:
        """Images of a batch on the device, and what each was warped by: None without an epoch."""
        black = -self.config.data.mean / self.config.data.std
        pictures, matrices = [], []
        for (grey, _), row in zip(self.images.many(rows.tolist()), rows.tolist(), strict=True):
            matrix = None if epoch is None else augmentation(self.side, seed, epoch, row)
            pictures.append(warp(normalise(grey, self.config), matrix, fill=black))
            matrices.append(matrix)
        return to_tensor(pictures, self.config).to(self.device), matrices
