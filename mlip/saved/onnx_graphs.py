"""Both towers as ONNX files, each held against the model by ONNX Runtime: `mlip export --onnx`.

image.onnx  image [B, C, H, W] float32, prepared as preprocessing.json says
            -> image_features [B, D] unit, patch_features [B, P, D]
text.onnx   token_ids [B, T] int64, token_mask [B, T] bool, content_mask [B, T] bool
            -> text_features [B, D] unit, token_features [B, T, D]

B and T are free (T up to data.max_tokens). image_features @ text_features.T is the global score.
Knowledge is no part of the graphs: the local score and its heat maps are mlip.pretrained's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlip.model import MLIPModel
from mlip.saved.other_runtimes import difference, plain_model, require_alike
from mlip.settings.config import Config, ConfigError
from mlip.system.packages import version_of

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class ImageGraph(nn.Module):
    """The image tower with its heads, tensors in and out: for torch.export too."""

    def __init__(self, model: MLIPModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model.encode_image(image)
        return found.embedding, found.patches


class TextGraph(ImageGraph):
    """The text tower with its heads."""

    def forward(  # type: ignore[override]
        self, token_ids: Tensor, token_mask: Tensor, content_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        found = self.model.encode_text(token_ids, token_mask, content_mask)
        return found.embedding, found.tokens


@dataclass(frozen=True)
class _Graph:
    """One file: its module, names of inputs and outputs, and two sets of inputs."""

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]  # no name of an operator, such as embedding: torch 2.13 repeats it
    example: tuple[Tensor, ...]
    others: tuple[Tensor, ...]  # of other sizes: what a graph of fixed sizes would refuse
    shapes: tuple[dict[int, Any], ...]


def write_onnx(folder: Path, model: MLIPModel, config: Config) -> dict[str, Any]:
    """Write image.onnx and text.onnx into a folder that exists.

    config   the settings of `model`, its towers described by size (no source)
    Returns: what config.json says of the files: versions, opset, and the largest difference
             between ONNX Runtime and torch, as a part of the output's largest number
    Raises:  ConfigError where a package is missing, PretrainedError where ONNX Runtime computes
             other numbers
    """
    versions = _versions()
    plain = plain_model(model, config)
    facts: dict[str, Any] = {"versions": versions, "largest_difference": {}}
    for graph in (_images(plain, config), _texts(plain, config)):
        path = folder / f"{graph.name}.onnx"
        facts["opset"] = _write(graph, path)
        facts["largest_difference"][path.name] = largest = _largest_difference(graph, path)
        runtime = f"ONNX Runtime {versions['onnxruntime']}"
        told = f"{path.name}: {runtime} differs from torch"
        require_alike(told, largest, "--onnx, or take other versions")
    return facts


def _versions() -> dict[str, str]:
    found = {name: version for name in PACKAGES if (version := version_of(name)) is not None}
    if missing := [name for name in PACKAGES if name not in found]:
        raise ConfigError(
            f"ONNX files need {', '.join(missing)}, not installed here: pip install "
            "'.[onnx]' in the checkout, or export without --onnx"
        )
    return found


def _images(model: MLIPModel, config: Config) -> _Graph:
    generator = torch.Generator().manual_seed(0)
    shape = (config.data.channels, config.data.crop_px, config.data.crop_px)
    images = [torch.randn(n, *shape, generator=generator) for n in (2, 3)]
    batch = torch.export.Dim("batch")
    return _Graph(
        "image",
        ImageGraph(model),
        ("image",),
        ("image_features", "patch_features"),
        (images[0],),
        (images[1],),
        ({0: batch},),
    )


def _texts(model: MLIPModel, config: Config) -> _Graph:
    generator = torch.Generator().manual_seed(0)
    longest, words = config.data.max_tokens, int(model.text.backbone.config.vocab_size)
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", max=longest)

    def inputs(texts: int, width: int) -> tuple[Tensor, ...]:
        ids = torch.randint(0, words, (texts, width), generator=generator)
        lengths = torch.randint(3, width + 1, (texts, 1), generator=generator)
        mask = torch.arange(width) < lengths
        content = mask.clone()
        content[:, 0] = False
        return ids, mask, content

    return _Graph(
        "text",
        TextGraph(model),
        ("token_ids", "token_mask", "content_mask"),
        ("text_features", "token_features"),
        inputs(2, max(4, longest // 2)),
        inputs(3, longest),
        ({0: batch, 1: tokens},) * 3,
    )


def _write(graph: _Graph, path: Path) -> int:
    with _quiet():
        program = torch.onnx.export(
            graph.module,
            graph.example,
            dynamo=True,
            input_names=graph.inputs,
            output_names=graph.outputs,
            dynamic_shapes=graph.shapes,
            verbose=False,
        )
    assert program is not None  # without a file name
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # lines and folders of this machine's Python
    path.touch(mode=0o600)  # weights, as those of model.safetensors: for their owner
    program.save(path)
    return int(program.model.opset_imports[""])


def open_session(path: Path) -> Any:
    """An onnxruntime.InferenceSession on the CPU that reports nothing to anybody.

    ONNX Runtime 1.32 keeps a device id and its events in ~/.cache and sends them to its maker; the
    variable is read when it is imported.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _largest_difference(graph: _Graph, path: Path) -> float:
    """From torch, over inputs of other sizes and single ones."""
    session = open_session(path)
    worst = 0.0
    for inputs in (graph.others, tuple(tensor[:1] for tensor in graph.others)):
        fed = {name: t.numpy() for name, t in zip(graph.inputs, inputs, strict=True)}
        with torch.no_grad():
            expected = graph.module(*inputs)
        for found, own in zip(session.run(list(graph.outputs), fed), expected, strict=True):
            worst = max(worst, difference(torch.from_numpy(found), own))
    return worst


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch names every operator of packages that are not installed, and its own old spellings."""
    of_exporter = logging.getLogger("torch.onnx")
    before = of_exporter.level
    of_exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        of_exporter.setLevel(before)
