"""DALI's graphs: what becomes of encoded images and their arguments.

Branches are taken per sample: resampling an image to its own size would cost three quarters of the
time, and decoding 8 bits as 16 a third. Splitting and merging the batch for them costs a tenth, so
either kind of graph exists without, for batches that need none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlip.dataloading.pipelines.transforms import Transform

# columns of the arguments of a sample
WIDE, FITS, HEIGHT, WIDTH, CORNER_Y, CORNER_X, CROP_Y, CROP_X, MEAN, STD = range(10)

Dali = tuple[Any, Any, Any]  # pipeline_def, fn and types of nvidia.dali


def pixels(dali: Dali, source: Callable[..., Any], *, branches: bool, **options: Any) -> Any:
    """Grey values as decoded, scaled where a picture is not: what the CPU does in DALI.

    Returns: a pipeline of one output, [H, W, 1]: uint8 without branches; with them uint16, which
             holds 8-bit values as they are
    """
    pipeline_def, fn, types = dali

    @pipeline_def
    def plain() -> Any:
        (encoded,) = fn.external_source(
            source=source, num_outputs=1, batch=True, dtype=[types.UINT8], ndim=[1]
        )
        return _decode(dali, encoded, types.UINT8, "cpu")

    @pipeline_def(enable_conditionals=True)
    def branching() -> Any:
        encoded, arguments = fn.external_source(
            source=source, num_outputs=2, batch=True, dtype=[types.UINT8, types.FLOAT], ndim=[1, 1]
        )
        is_wide, fits = arguments[WIDE] > 0.5, arguments[FITS] > 0.5
        if is_wide:
            image = _decode(dali, encoded, types.UINT16, "cpu")
            if fits:
                out = image
            else:
                out = _scale(dali, image, arguments)
        else:
            narrow = _decode(dali, encoded, types.UINT8, "cpu")
            if fits:
                grey = narrow
            else:
                grey = _scale(dali, narrow, arguments)
            out = fn.cast(grey, dtype=types.UINT16)
        return out

    return branching(**options) if branches else plain(**options)


def finished(
    dali: Dali,
    source: Callable[..., Any],
    transform: Transform,
    *,
    on_gpu: bool,
    branches: bool,
    one_decoder: bool = False,
    **options: Any,
) -> Any:
    """decode -> letterbox where the file is no letterbox yet -> crop and normalise, all in DALI.

    one_decoder  on a GPU, all JPEG through CUDA kernels. Otherwise the card's JPEG engine takes a
                 share of each batch: an image's place in the batch may change its last bit
    Returns: a pipeline of one output, [1, crop_px, crop_px] float32
    """
    pipeline_def, fn, types = dali
    size = float(transform.crop_px)
    rotates = transform.rotation_degrees != 0.0
    device = "mixed" if on_gpu else "cpu"
    decoder = {"hw_decoder_load": 0.0} if on_gpu and one_decoder else {}

    def letterbox(image: Any, arguments: Any) -> Any:
        return fn.slice(
            _scale(dali, image, arguments),
            # named: of inputs by place, constants would go to the GPU beside an anchor on the host
            start=fn.cast(arguments[CORNER_Y : CORNER_X + 1], dtype=types.INT32),
            shape=[transform.resize_px, transform.resize_px],
            axis_names="HW",
            out_of_bounds_policy="pad",
            fill_values=0,
        )

    def squared(dtype: Any, encoded: Any, arguments: Any, fits: Any) -> Any:
        image = _decode(dali, encoded, dtype, device, **decoder)
        if fits:
            out = image
        else:
            out = letterbox(image, arguments)
        return out

    def finish(image: Any, arguments: Any, matrix: list[Any]) -> Any:
        place = {
            "crop": [size, size],
            "crop_pos_y": arguments[CROP_Y],
            "crop_pos_x": arguments[CROP_X],
        }
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
            mean=arguments[MEAN : MEAN + 1],
            std=arguments[STD : STD + 1],
            dtype=types.FLOAT,
            output_layout="CHW",
            **place,
        )

    def inputs() -> Any:
        count = 3 if rotates else 2
        return fn.external_source(
            source=source,
            num_outputs=count,
            batch=True,
            dtype=[types.UINT8, types.FLOAT, types.FLOAT][:count],
            ndim=[1, 1, 2][:count],
        )

    @pipeline_def
    def straight() -> Any:
        encoded, arguments, *matrix = inputs()
        image = _decode(dali, encoded, types.UINT8, device, **decoder)
        return finish(image, arguments, matrix)

    @pipeline_def(enable_conditionals=True)
    def branching() -> Any:
        encoded, arguments, *matrix = inputs()
        is_wide, fits = arguments[WIDE] > 0.5, arguments[FITS] > 0.5
        if is_wide:
            out = finish(squared(types.UINT16, encoded, arguments, fits), arguments, matrix)
        else:
            out = finish(squared(types.UINT8, encoded, arguments, fits), arguments, matrix)
        return out

    return branching(**options) if branches else straight(**options)


def _decode(dali: Dali, encoded: Any, dtype: Any, device: str, **decoder: float) -> Any:
    _, fn, types = dali
    # GRAY always: ANY_DATA crashes on a grey JPEG
    return fn.decoders.image(encoded, device=device, output_type=types.GRAY, dtype=dtype, **decoder)


def _scale(dali: Dali, image: Any, arguments: Any) -> Any:
    _, fn, types = dali
    return fn.resize(
        image,
        size=arguments[HEIGHT : WIDTH + 1],
        # of DALI's filters the closest to the twin's area averaging: 0.4 / 255 apart
        min_filter=types.INTERP_CUBIC,
        mag_filter=types.INTERP_LINEAR,
        antialias=True,
    )
