"""Images through OpenCV threads: the twin of dali_pipeline.py that runs everywhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from mlip.dataloading.pipelines.buffers import Buffers
from mlip.dataloading.pipelines.sampler import Plan, SequentialOrder, TrainingOrder
from mlip.dataloading.pipelines.samples import Bad, Images, SampleReader, fill_place
from mlip.dataloading.pipelines.transforms import Transform
from mlip.settings.config import Data


class TorchPipeline:
    """Plan -> Images, decoded and transformed on data.workers threads."""

    name = "torch"

    def __init__(
        self,
        order: TrainingOrder | SequentialOrder,
        reader: SampleReader,
        transform: Transform,
        data: Data,
    ) -> None:
        self.order, self.reader, self.transform = order, reader, transform
        self._buffers = Buffers()
        # with one worker the loader's own background thread does the work
        self._pool = ThreadPoolExecutor(data.workers, "mlip-image") if data.workers > 1 else None

    def load(self, plan: Plan) -> Images:
        """Raises:  DataError; a bad file is replaced or left out, never raised."""
        size = self.transform.crop_px
        image = self._buffers.take(len(plan), 1, size, size)
        out = image.numpy()
        parameters = self.transform.draw(plan.epoch, plan.global_index)

        def fill(place: int) -> tuple[bool, int, list[Bad]]:
            pixels, row, bad = fill_place(self.order, plan, place, self.reader.pixels)
            if pixels is not None:
                self.transform.apply(pixels, parameters, place, out[place, 0])
            return pixels is not None, row, bad

        run = map if self._pool is None else self._pool.map
        results = list(run(fill, range(len(plan))))
        kept = np.flatnonzero([found for found, _, _ in results]).astype(np.int64)
        rows = np.array([row for _, row, _ in results], dtype=np.int64)[kept]
        if len(kept) < len(plan):
            image = image[torch.from_numpy(kept)]
        image = image.expand(-1, self.transform.channels, -1, -1)
        return Images(image, kept, rows, [item for _, _, bad in results for item in bad])

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
