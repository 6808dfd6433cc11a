"""Images through NVIDIA DALI: bytes and parameters from us, decoding and pixels by DALI.

The only file that imports nvidia.dali. DALI's random operators and readers are not used: a callback
keyed by (step, place) delivers checked bytes with their parameters, so samples, order and
augmentation equal those of torch_pipeline.py and any step can be started from. On a GPU DALI also
crops and normalises; on a CPU its operator for that takes four times as long as crop.py, which
does it there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mlip.dataloading.images.image_file import Header
from mlip.dataloading.ledger import BadSample
from mlip.dataloading.pipelines import dali_graph as graph
from mlip.dataloading.pipelines.buffers import Buffers
from mlip.dataloading.pipelines.crop import crop_batch, crop_one
from mlip.dataloading.pipelines.sampler import Plan, SequentialOrder, TrainingOrder
from mlip.dataloading.pipelines.samples import Bad, Images, SampleReader, fill_place
from mlip.dataloading.pipelines.transforms import Parameters, Transform
from mlip.settings.config import Config
from mlip.system.machine import require_threads

_DALI_THREADS = 8  # of a pipeline beside those that decode


class Sample(NamedTuple):
    """An encoded image as DALI gets it."""

    content: bytes | NDArray[np.uint8]
    height: int
    width: int
    is_wide: bool  # 16 bits


class Window(NamedTuple):
    """What crop.py does with the images of one step."""

    top: NDArray[np.int64]  # [B] px in the scaled image, negative where black is above it
    left: NDArray[np.int64]
    scale: NDArray[np.float32]
    offset: NDArray[np.float32]


def why_not_dali(config: Config) -> str | None:
    """Why this run cannot use DALI, or None where it can."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        mend = "pip install '.[dali]' in the checkout"
        return f"nvidia.dali cannot be imported ({error}): {mend}"
    if config.data.augment.rotation_degrees != 0.0 and not torch.cuda.is_available():
        return (
            "data.augment.rotation_degrees on DALI's CPU backend runs at a fifth of the speed "
            "(1,300 images/s against 6,800/s without it): set it to 0, use data.pipeline=torch, or "
            "train on a GPU"
        )
    return None


def _dali() -> graph.Dali:
    """DALI's stubs lack what its types module has at run time."""
    from nvidia.dali import fn, pipeline_def, types

    return pipeline_def, fn, types


def _tensors(samples: list[Sample]) -> Any:
    """A batch as DALI keeps it: handed over as arrays, each would be looked at in Python again."""
    from nvidia.dali.tensors import TensorCPU, TensorListCPU

    return TensorListCPU([TensorCPU(sample.content) for sample in samples])


class DaliPipeline:
    """Plan -> Images. Plans come with rising steps; any other step rebuilds the pipeline."""

    name = "dali"

    def __init__(
        self,
        order: TrainingOrder | SequentialOrder,
        reader: SampleReader,
        transform: Transform,
        config: Config,
    ) -> None:
        reason = why_not_dali(config)
        if reason is not None:
            raise ValueError(f"data.pipeline=dali: {reason}")
        self.order, self.reader, self.transform = order, reader, transform
        side = transform.resize_px
        # where no sample fills a place
        self._black = Sample(as_pgm(np.zeros((side, side), np.uint8)), side, side, False)
        self._needs_branches = False  # set for good by the first image that is no usual one
        self._has_branches = True  # the running graph
        self._first: tuple[Any, ...] | None = None  # its first batch, made before it
        self.threads = max(1, config.data.workers)
        self.on_gpu = torch.cuda.is_available()
        self.device_id = torch.cuda.current_device() if self.on_gpu else None
        self._stream: Any = None  # of copies on a GPU
        self._one_decoder = config.run.deterministic
        # DALI rotates before it normalises
        self.finishes_in_dali = self.on_gpu or transform.rotation_degrees != 0.0
        self.batch_size = max(1, len(order.plan(0)))
        self._pipe: Any = None
        self._base = self._next = 0
        self._plans: dict[int, tuple[Plan, Parameters]] = {}
        self._windows: dict[int, Window] = {}
        self._buffers = Buffers()
        self._filled: dict[tuple[int, int], tuple[bool, int, list[Bad]]] = {}
        self._decode_ourselves: set[int] = set()  # steps whose batch DALI refused
        self._own_rows: set[int] = set()  # rows found bad there: not shown to DALI again
        self._failures: dict[int, Exception] = {}  # by step: batches are made ahead

    def load(self, plan: Plan) -> Images:
        """Raises:  DataError; a bad file is replaced or left out, never raised."""
        if len(plan) == 0:
            size = self.transform.crop_px
            empty = torch.zeros(0, self.transform.channels, size, size)
            return Images(empty, np.zeros(0, np.int64), np.zeros(0, np.int64))
        if self._pipe is None or plan.step != self._next:
            self._build(plan.step)
        try:
            image = self._image(plan.step)
        except RuntimeError:
            # One undecodable image fails its whole batch in DALI, and which one is not said: this
            # batch is decoded by our own decoder, which finds and replaces the bad one.
            self._decode_ourselves.add(plan.step)
            self._build(plan.step)
            image = self._image(plan.step)
            self._decode_ourselves.discard(plan.step)
        self._next = plan.step + 1
        self._plans.pop(plan.step, None)
        filled = [self._filled.pop((plan.step, place)) for place in range(self.batch_size)]
        filled = filled[: len(plan)]
        kept = np.flatnonzero([found for found, _, _ in filled]).astype(np.int64)
        rows = np.array([row for _, row, _ in filled], dtype=np.int64)[kept]
        image = image[torch.from_numpy(kept)] if len(kept) < self.batch_size else image
        image = image.expand(-1, self.transform.channels, -1, -1)
        return Images(image, kept, rows, [item for _, _, bad in filled for item in bad])

    def close(self) -> None:
        self._pipe = None

    def _image(self, step: int) -> torch.Tensor:
        """A step's pixels; the graph is built anew where the first unusual image was met."""
        outputs = self._run(step)
        if self._needs_branches and not self._has_branches:
            self._build(step)
            outputs = self._run(step)
        if not self.finishes_in_dali:
            return self._cropped(outputs, self._windows.pop(step))
        images = outputs.as_tensor()
        if not self.on_gpu:
            # the dynamic executor's outputs are the caller's: no copy, no later batch in them
            return torch.from_dlpack(images)
        return self._copied(images)

    def _copied(self, images: Any) -> torch.Tensor:
        """DALI's GPU tensor in torch's memory, over a stream of this pipeline's own.

        On torch's default stream the copy would queue behind the training step, and the loader's
        thread with it: DALI waits for the copy before it uses its memory again.
        """
        from nvidia.dali.plugin.pytorch import feed_ndarray

        device = torch.device(f"cuda:{self.device_id}")
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        size = self.transform.crop_px
        with torch.cuda.stream(self._stream):
            out = torch.empty(self.batch_size, 1, size, size, device=device)
            feed_ndarray(images, out, cuda_stream=self._stream)
        self._stream.synchronize()
        # allocated on this stream, read on the training's: not free before that is done with it
        out.record_stream(torch.cuda.default_stream(device))
        return out

    def _run(self, step: int) -> Any:
        outputs = self._pipe.run()
        failure = self._failures.pop(step, None)
        if failure is not None:
            self._pipe = None
            raise failure
        return outputs[0]

    def _cropped(self, images: Any, window: Window) -> torch.Tensor:
        """[B, 1, crop_px, crop_px] of DALI's [H, W, 1] grey values."""
        size = self.transform.crop_px
        image = self._buffers.take(self.batch_size, 1, size, size)
        out = image[:, 0].numpy()
        if images.is_dense_tensor():
            pixels = np.asarray(images.as_tensor())
            crop_batch(pixels.reshape(pixels.shape[:3]), *window, out)
            return image
        for i, values in enumerate(zip(*window, strict=True)):
            pixels = np.asarray(images[i])
            crop_one(pixels.reshape(pixels.shape[:2]), *values, out[i])
        return image

    def _build(self, step: int) -> None:
        self._pipe = None  # frees the old one first
        self._base = self._next = step
        self._plans.clear()
        self._windows.clear()
        self._filled.clear()
        self._failures.clear()
        # made first, as it says which graph is needed
        self._has_branches = True
        self._first = self._make(step)
        self._has_branches = self._needs_branches
        options: dict[str, Any] = {
            "branches": self._has_branches,
            "batch_size": self.batch_size,
            "num_threads": self.threads,
            "device_id": self.device_id,
            "prefetch_queue_depth": 2,
            "exec_dynamic": True,
        }
        if self.finishes_in_dali:
            options |= {"on_gpu": self.on_gpu, "one_decoder": self._one_decoder}
            self._pipe = graph.finished(_dali(), self._batch, self.transform, **options)
        else:
            self._pipe = graph.pixels(_dali(), self._batch, **options)
        require_threads(self.threads + _DALI_THREADS)
        self._pipe.build()

    def _batch(self, iteration: int) -> tuple[Any, ...]:
        """A step's encoded images and arguments; called ahead of need."""
        first, self._first = self._first, None
        made = self._make(self._base + iteration) if first is None else first
        # the graph without branches that leaves crops to us takes images only
        return made if self._has_branches or self.finishes_in_dali else made[:1]

    def _make(self, step: int) -> tuple[Any, ...]:
        samples = [self._black] * self.batch_size
        parameters = None
        try:
            plan, parameters = self._plan(step)
            samples = [
                self._sample(step, place, plan, parameters) for place in range(self.batch_size)
            ]
        except Exception as error:
            self._failures[step] = error
            for place in range(self.batch_size):
                self._filled.setdefault((step, place), (False, -1, []))
        arguments = self._arguments(step, samples, parameters)
        if self._needs_branches and not self._has_branches:
            # this batch is made again for the graph that can take it
            samples = [self._black] * self.batch_size
        made = [_tensors(samples), arguments]
        if self.transform.rotation_degrees != 0.0:
            degrees = np.zeros(self.batch_size)
            if parameters is not None:
                degrees[: len(parameters)] = parameters.degrees
            made.append(np.stack([self._matrix(value) for value in degrees.tolist()]))
        return tuple(made)

    def _arguments(
        self, step: int, samples: list[Sample], parameters: Parameters | None
    ) -> NDArray[np.float32]:
        """What the graph reads of each sample, and what is left to crop.py."""
        side, crop = self.transform.resize_px, self.transform.crop_px
        height = np.array([sample.height for sample in samples])
        width = np.array([sample.width for sample in samples])
        is_wide = np.array([sample.is_wide for sample in samples])
        scaled_h, scaled_w, top, left = self.transform.placements(height, width)
        if self.finishes_in_dali:
            fits = (height == side) & (width == side)
        else:
            fits = (height == scaled_h) & (width == scaled_w)
        if is_wide.any() or not fits.all():
            self._needs_branches = True
        largest = np.where(is_wide, np.float32(65535.0), np.float32(255.0))
        crop_y, crop_x = np.zeros((2, self.batch_size), dtype=np.int64)
        gain, offset = np.ones((2, self.batch_size), dtype=np.float32)
        if parameters is not None:
            count = len(parameters)
            crop_y[:count], crop_x[:count] = parameters.top, parameters.left
            gain[:count], offset[:count] = parameters.gain, parameters.offset
        if not self.finishes_in_dali:
            self._windows[step] = Window(crop_y - top, crop_x - left, gain / largest, offset)
        out = np.zeros((self.batch_size, graph.STD + 1))
        out[:, graph.WIDE], out[:, graph.FITS] = is_wide, fits
        out[:, graph.HEIGHT], out[:, graph.WIDTH] = scaled_h, scaled_w
        if self.finishes_in_dali:
            out[:, graph.CORNER_Y], out[:, graph.CORNER_X] = -top, -left
            # as shares of the slack
            out[:, graph.CROP_Y] = crop_y / max(1, side - crop)
            out[:, graph.CROP_X] = crop_x / max(1, side - crop)
            # (x - mean) / std over 0..largest is gain * x / largest + offset; a gain of zero is
            # refused sample by sample
            usable = np.where(gain == 0.0, 1.0, gain.astype(np.float64))
            out[:, graph.MEAN] = -offset / usable * largest
            out[:, graph.STD] = largest / usable
        return out.astype(np.float32)

    def _sample(self, step: int, place: int, plan: Plan, parameters: Parameters) -> Sample:
        """One sample, keyed by (step, place)."""
        if place >= len(plan):
            return self._nothing(step, place, -1, [])
        if self.finishes_in_dali and parameters.gain[place] == 0.0:

            def use(row: int, epoch: int) -> Sample:
                raise BadSample("undecodable", "brightness of zero")
        elif step in self._decode_ourselves:
            use = self._decoded
        else:
            use = self._encoded
        sample, row, bad = fill_place(self.order, plan, place, use)
        if sample is None:
            return self._nothing(step, place, row, bad)
        self._filled[step, place] = (True, row, bad)
        return sample

    def _plan(self, step: int) -> tuple[Plan, Parameters]:
        if step not in self._plans:
            plan = self.order.plan(step)
            self._plans[step] = plan, self.transform.draw(plan.epoch, plan.global_index)
        return self._plans[step]

    def _encoded(self, row: int, epoch: int) -> Sample:
        """A row's bytes for DALI's decoder, or what ours made of them where DALI's cannot."""
        content, header = self.reader.read(row, epoch)
        may_be_dark = self.reader.refuses_dark and header.bits == 16  # which pixels alone tell
        if not header.plain or may_be_dark or row in self._own_rows:
            return self._raw(row, content, header)
        return Sample(content, header.height, header.width, header.bits == 16)

    def _decoded(self, row: int, epoch: int) -> Sample:
        return self._raw(row, *self.reader.read(row, epoch))

    def _raw(self, row: int, content: bytes, header: Header) -> Sample:
        try:
            pixels = self.reader.decode(content, header)
        except BadSample:
            self._own_rows.add(row)
            raise
        height, width = pixels.shape
        return Sample(as_pgm(pixels), height, width, pixels.dtype == np.uint16)

    def _matrix(self, degrees: float) -> NDArray[np.float32]:
        """transform.rotation in DALI's coordinates, where pixel centres lie at one half."""
        matrix = self.transform.rotation(degrees)
        matrix[:, 2] += 0.5 - matrix[:, :2] @ np.array([0.5, 0.5])
        return matrix.astype(np.float32)

    def _nothing(self, step: int, place: int, row: int, bad: list[Bad]) -> Sample:
        """A black picture in a place that no sample fills."""
        self._filled[step, place] = (False, row, bad)
        return self._black


def as_pgm(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Grey pixels as a binary PGM file: a header and the raw values, for DALI's decoder.

    Shapes:  pixels [H, W] uint8 or uint16 -> [bytes] uint8
    """
    wide = pixels.dtype == np.uint16
    header = b"P5\n%d %d\n%d\n" % (pixels.shape[1], pixels.shape[0], 65535 if wide else 255)
    body = pixels.astype(">u2" if wide else np.uint8)
    return np.concatenate(
        [np.frombuffer(header, np.uint8), np.ascontiguousarray(body).reshape(-1).view(np.uint8)]
    )
