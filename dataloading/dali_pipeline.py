"""Images through NVIDIA DALI: bytes and parameters from us, decoding and pixels by DALI.

The only file that imports nvidia.dali. DALI's random operators and readers are not used: a callback
keyed by (step, place) delivers checked bytes with their parameters, so samples, order and
augmentation equal those of torch_pipeline.py and any step can be started from. Parameters of a
batch cross into DALI as arrays: one small array a sample had cost 20 us an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mlip.config import Config
from mlip.dataloading.ledger import BadSample
from mlip.dataloading.sampler import Plan, SequentialOrder, TrainingOrder
from mlip.dataloading.samples import Bad, Images, SampleReader, fill_place
from mlip.dataloading.transforms import Parameters, Transform

# one sample: the encoded image and, where they are not those of a letterboxed 8-bit file, the first
# six of its arguments
Sample = tuple[NDArray[np.uint8], "list[float] | None"]


# what comes with every encoded image: 16 bits, a letterbox already, height and width to scale to,
# corner of the letterbox in the scaled image, crop as shares of the slack, and mean and std that
# stand for contrast, brightness and normalising
_ARGUMENTS = 10


def why_not_dali(config: Config) -> str | None:
    """Why this run cannot use DALI, or None where it can."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        return f"nvidia.dali cannot be imported ({error}): pip install 'mlip-medical[dali]'"
    if config.data.augment.rotation_degrees != 0.0 and not torch.cuda.is_available():
        return (
            "data.augment.rotation_degrees on DALI's CPU backend runs at a fifth of the speed "
            "(1,300 images/s against 6,800/s without it): set it to 0, use data.pipeline=torch, or "
            "train on a GPU"
        )
    return None


def _dali() -> tuple[Any, Any, Any]:
    """pipeline_def, fn and types; DALI's stubs lack what its types module has at run time."""
    from nvidia.dali import fn, pipeline_def, types

    return pipeline_def, fn, types


class DaliPipeline:
    """Plan -> Images. Plans come with rising steps; any other step rebuilds the pipeline."""

    name = "dali"

    def __init__(
        self,
        order: TrainingOrder | SequentialOrder,
        reader: SampleReader,
        transform: Transform,
        config: Config,
        device_id: int | None = None,
    ) -> None:
        reason = why_not_dali(config)
        if reason is not None:
            raise ValueError(f"data.pipeline=dali: {reason}")
        self.order, self.reader, self.transform = order, reader, transform
        side = transform.resize_px
        self._square = transform.placement(side, side)
        self._black = as_pgm(np.zeros((side, side), np.uint8))  # where no sample fills a place
        self._needs_branches = False  # set for good by the first image that is no usual one
        self._has_branches = True  # the running graph
        self._first: tuple[Any, ...] | None = None  # its first batch, made before it
        self.threads = max(1, config.data.workers)
        self.on_gpu = torch.cuda.is_available()
        self.device_id = (
            (torch.cuda.current_device() if device_id is None else device_id)
            if self.on_gpu
            else None
        )
        self.batch_size = max(1, len(order.plan(0)))
        self._pipe: Any = None
        self._base = self._next = 0
        self._plans: dict[int, tuple[Plan, Parameters]] = {}
        self._filled: dict[tuple[int, int], tuple[bool, int, list[Bad]]] = {}
        self._decode_ourselves: set[int] = set()  # steps whose batch DALI refused
        self._own_rows: set[int] = set()  # rows found bad there: not shown to DALI again
        self._failure: Exception | None = None

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
        image = self._run()
        if self._needs_branches and not self._has_branches:
            self._build(step)
            image = self._run()
        return image

    def _run(self) -> torch.Tensor:
        outputs = self._pipe.run()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            self._pipe = None
            raise failure
        images = outputs[0].as_tensor()
        if not self.on_gpu:
            # the dynamic executor's outputs are the caller's: no copy, no later batch in them
            return torch.from_dlpack(images)
        from nvidia.dali.plugin.pytorch import feed_ndarray

        device = torch.device(f"cuda:{self.device_id}")
        size = self.transform.crop_px
        out = torch.empty(self.batch_size, 1, size, size, device=device)
        return feed_ndarray(images, out, cuda_stream=torch.cuda.current_stream(device))

    def _build(self, step: int) -> None:
        self._pipe = None  # frees the old one first
        self._base = self._next = step
        self._plans.clear()
        self._filled.clear()
        self._failure = None
        # made first, as it says which graph is needed
        self._has_branches = True
        self._first = self._make(step)
        self._has_branches = self._needs_branches
        self._pipe = _pipeline(
            self._batch,
            self.transform,
            branches=self._has_branches,
            on_gpu=self.on_gpu,
            batch_size=self.batch_size,
            num_threads=self.threads,
            device_id=self.device_id,
            prefetch_queue_depth=2,
            exec_dynamic=True,
        )
        self._pipe.build()

    def _batch(self, iteration: int) -> tuple[Any, ...]:
        """A step's encoded images and arguments; called ahead of need."""
        first, self._first = self._first, None
        return self._make(self._base + iteration) if first is None else first

    def _make(self, step: int) -> tuple[Any, ...]:
        side = self._square.height
        fields = np.zeros((self.batch_size, _ARGUMENTS))
        # what holds for a letterboxed 8-bit file, as shards have them
        fields[:, :6] = 0.0, 1.0, side, side, 0.0, 0.0
        fields[:, 9] = 1.0
        encoded = [self._black] * self.batch_size
        degrees = np.zeros(self.batch_size)
        try:
            plan, parameters = self._plan(step)
            count, slack = len(plan), self.transform.resize_px - self.transform.crop_px
            fields[:count, 6] = parameters.top / max(1, slack)
            fields[:count, 7] = parameters.left / max(1, slack)
            gain = parameters.gain.astype(np.float64)
            usable = np.where(gain == 0.0, 1.0, gain)  # a gain of zero is refused sample by sample
            # (x - mean) / std over 0..largest is gain * x / largest + offset
            fields[:count, 8] = -parameters.offset / usable * 255.0
            fields[:count, 9] = 255.0 / usable
            degrees[:count] = parameters.degrees
            for place in range(self.batch_size):
                content, unusual = self._sample(step, place, plan, parameters)
                encoded[place] = content
                if unusual is not None:
                    fields[place, :6] = unusual
                    self._needs_branches = True
        except Exception as error:
            self._failure = error
            for place in range(self.batch_size):
                self._filled.setdefault((step, place), (False, -1, []))
            encoded = [self._black] * self.batch_size
            fields[:, :2] = 0.0, 1.0
        if self._needs_branches and not self._has_branches:
            # this batch is made again for the graph that can take it
            encoded = [self._black] * self.batch_size
        fields[fields[:, 0] > 0.0, 8:10] *= 65535.0 / 255.0
        arguments = [fields.astype(np.float32)]
        if self.transform.rotation_degrees != 0.0:
            arguments.append(np.stack([self._matrix(value) for value in degrees.tolist()]))
        return encoded, *arguments

    def _sample(self, step: int, place: int, plan: Plan, parameters: Parameters) -> Sample:
        """One sample's bytes and arguments, keyed by (step, place)."""
        if place >= len(plan):
            return self._nothing(step, place, -1, [])

        def use(row: int, epoch: int) -> Sample:
            return self._arguments(row, epoch, parameters, place, step)

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

    def _arguments(
        self, row: int, epoch: int, parameters: Parameters, place: int, step: int
    ) -> Sample:
        content, header = self.reader.read(row, epoch)
        suspect = step in self._decode_ourselves
        if header.plain and not suspect and row not in self._own_rows:
            encoded, height, width = np.frombuffer(content, np.uint8), header.height, header.width
            wide = header.bits == 16
        else:
            try:
                pixels = self.reader.decode(content, header)
            except BadSample:
                self._own_rows.add(row)
                raise
            height, width = pixels.shape
            encoded, wide = as_pgm(pixels), pixels.dtype == np.uint16
        if parameters.gain[place] == 0.0:
            raise BadSample("undecodable", "brightness of zero")
        side = self.transform.resize_px
        is_letterbox = height == width == side
        if is_letterbox and not wide:
            return encoded, None
        where = self._square if is_letterbox else self.transform.placement(height, width)
        return encoded, [wide, is_letterbox, where.height, where.width, -where.top, -where.left]

    def _matrix(self, degrees: float) -> NDArray[np.float32]:
        """transform.rotation in DALI's coordinates, where pixel centres lie at one half."""
        matrix = self.transform.rotation(degrees)
        matrix[:, 2] += 0.5 - matrix[:, :2] @ np.array([0.5, 0.5])
        return matrix.astype(np.float32)

    def _nothing(self, step: int, place: int, row: int, bad: list[Bad]) -> Sample:
        """A black picture in a place that no sample fills."""
        self._filled[step, place] = (False, row, bad)
        return self._black, None


def _pipeline(
    source: Callable[[int], tuple[Any, ...]],
    transform: Transform,
    *,
    on_gpu: bool,
    branches: bool,
    **options: Any,
) -> Any:
    """The graph: decode -> letterbox where the file is no letterbox yet -> crop and normalise.

    Its branches are taken per sample: resampling an image to its own size would cost three
    quarters of the time, and decoding 8 bits as 16 a third. Splitting and merging the batch for
    them costs a tenth, so there is a graph without, for batches of 8-bit squares of resize_px.
    """
    pipeline_def, fn, types = _dali()
    side, size = float(transform.resize_px), float(transform.crop_px)
    rotates = transform.rotation_degrees != 0.0

    def decode(encoded: Any, dtype: Any) -> Any:
        # GRAY always: ANY_DATA crashes on a grey JPEG
        return fn.decoders.image(
            encoded, device="mixed" if on_gpu else "cpu", output_type=types.GRAY, dtype=dtype
        )

    def letterbox(image: Any, geometry: Any) -> Any:
        scaled = fn.resize(
            image,
            size=geometry[2:4],
            # of DALI's filters the closest to the twin's area averaging: 0.4 / 255 apart
            min_filter=types.INTERP_CUBIC,
            mag_filter=types.INTERP_LINEAR,
            antialias=True,
        )
        return fn.slice(
            scaled,
            geometry[4:6],
            [side, side],
            axis_names="HW",
            normalized_anchor=False,
            normalized_shape=False,
            out_of_bounds_policy="pad",
            fill_values=0,
        )

    def finish(image: Any, geometry: Any, matrix: list[Any]) -> Any:
        place = {"crop": [size, size], "crop_pos_y": geometry[6], "crop_pos_x": geometry[7]}
        if rotates:
            image = fn.warp_affine(
                fn.cast(fn.crop(image, **place), dtype=types.FLOAT),
                matrix=matrix[0],
                size=[size, size],
                fill_value=0.0,
                interp_type=types.INTERP_LINEAR,
            )
            place = {}
        return fn.crop_mirror_normalize(
            image,
            mean=geometry[8:9],
            std=geometry[9:10],
            dtype=types.FLOAT,
            output_layout="CHW",
            **place,
        )

    def inputs() -> Any:
        return fn.external_source(
            source=source,
            num_outputs=3 if rotates else 2,
            batch=True,
            dtype=[types.UINT8, types.FLOAT, types.FLOAT][: 3 if rotates else 2],
            ndim=[1, 1, 2][: 3 if rotates else 2],
        )

    @pipeline_def
    def straight() -> Any:
        encoded, geometry, *matrix = inputs()
        return finish(decode(encoded, types.UINT8), geometry, matrix)

    @pipeline_def(enable_conditionals=True)
    def branching() -> Any:
        encoded, geometry, *matrix = inputs()
        is_wide, is_letterbox = geometry[0] > 0.5, geometry[1] > 0.5
        if is_wide:
            image = decode(encoded, types.UINT16)
            if is_letterbox:
                squared = image
            else:
                squared = letterbox(image, geometry)
            out = finish(squared, geometry, matrix)
        else:
            image = decode(encoded, types.UINT8)
            if is_letterbox:
                squared = image
            else:
                squared = letterbox(image, geometry)
            out = finish(squared, geometry, matrix)
        return out

    return branching(**options) if branches else straight(**options)


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
