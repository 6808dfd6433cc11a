"""`mlip export --onnx`: what another runtime computes is what the model computes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml

from mlip.cli import main
from mlip.model import MLIPModel
from mlip.pretrained import PretrainedError, from_pretrained, save_pretrained
from mlip.saved import onnx_graphs, other_runtimes
from mlip.settings.config import ConfigError, load
from mlip.transfer.alignment.prompts import make_text_batch, phrase_encoder
from mlip.transfer.films.own_inputs import model_input, read_image
from tests.small_run import SETTINGS, small_export, small_run

pytest.importorskip("onnxruntime", reason="pip install '.[onnx]'")
onnx = pytest.importorskip("onnx")
HAS_A_SESSION = """
import sys
from pathlib import Path
from onnx import TensorProto, helper
from mlip.saved.onnx_graphs import open_session

x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
imports = [helper.make_opsetid("", 18)]
path = Path(sys.argv[1])
path.write_bytes(helper.make_model(graph, opset_imports=imports).SerializeToString())
assert open_session(path).get_outputs()[0].name == "y"
"""


def _run(file: Path, **inputs: np.ndarray) -> list[Any]:
    return list(onnx_graphs.open_session(file).run(None, inputs))


def test_no_device_id_and_no_event_are_kept_for_the_maker_of_the_runtime(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ORT_", "XDG_"))}
    subprocess.run(
        [sys.executable, "-c", HAS_A_SESSION, str(tmp_path / "neg.onnx")],
        env=environment | {"HOME": str(home)},
        check=True,
    )
    assert not list(home.rglob("*"))


def test_a_file_and_a_phrase_get_the_models_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a picture on disk to the global score, every number by ONNX Runtime."""
    out = tmp_path / "model"
    assert main(["export", f"checkpoint={small_export()}", "--out", str(out), "--onnx"]) == 0
    grey = np.random.default_rng(1).integers(0, 256, (130, 120)).astype(np.uint8)
    assert cv2.imwrite(str(tmp_path / "film.png"), grey)
    opened = from_pretrained(out)  # its sums hold the two files too
    phrases = ["left pleural effusion", "no pneumothorax"]
    images = opened.encode_images([tmp_path / "film.png"])
    expected = opened.similarity(images, opened.encode_texts(phrases))

    pixels = model_input(read_image(str(tmp_path / "film.png")), opened.config).numpy()
    encoder = phrase_encoder(opened.config, opened.tokenizer, opened.linker, opened.table)
    texts = make_text_batch(phrases, encoder)
    image, patches = _run(out / "image.onnx", image=pixels)
    text, _ = _run(
        out / "text.onnx",
        token_ids=texts.token_ids.numpy(),
        token_mask=texts.token_mask.numpy(),
        content_mask=texts.content_mask.numpy(),
    )
    np.testing.assert_allclose(image @ text.T, expected, atol=1e-5)
    np.testing.assert_allclose(patches, images.patches.numpy(), atol=1e-4)
    facts = json.loads((out / "config.json").read_text())["onnx"]
    assert facts["versions"] == {p: importlib.metadata.version(p) for p in onnx_graphs.PACKAGES}
    for name in ("image.onnx", "text.onnx"):
        (domain,) = [d for d in onnx.load(out / name).opset_import if not d.domain]
        assert domain.version == facts["opset"]
    assert set(facts["largest_difference"]) == {"image.onnx", "text.onnx"}
    assert all(0 <= value < 1e-5 for value in facts["largest_difference"].values())

    card = (out / "README.md").read_text(encoding="utf-8")
    assert "onnx" in yaml.safe_load(card.split("---\n")[1])["tags"]
    _, code = re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["image_features"].shape == (1, 32)


def test_towers_for_a_gpu_become_plain_float32_graphs(tmp_path: Path) -> None:
    """bfloat16, packed reports and residuals are the machine's, not the file's."""
    run = small_run()
    options = "hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32"
    changed = [s for s in SETTINGS if not s.startswith(("model.vision", "model.text"))]
    changed += [
        "model.vision.kind=vit",
        f"model.vision.options={{{options}, patch_size: 16}}",
        f"model.text.options={{{options}}}",
        "model.text.packed=true",
        "train.precision=bf16",
        "train.residual=bf16",
    ]
    config = load([], changed)
    torch.manual_seed(0)
    vectors = run.model.concept_vectors
    words = run.tokenizer.vocab_size
    model = MLIPModel(config, vocab_size=words, concept_vectors=vectors).eval()
    out = save_pretrained(tmp_path / "m", model, config, run.tokenizer, run.table, onnx=True)
    image = torch.randn(4, 1, 96, 96, generator=torch.Generator().manual_seed(0))
    features, patches = _run(out / "image.onnx", image=image.numpy())
    with torch.no_grad():
        own = model.encode_image(image)  # under autocast
    assert features.dtype == np.float32 and patches.shape == (4, 36, 32)
    np.testing.assert_allclose(features, own.embedding.numpy(), atol=0.02)
    for name in ("image.onnx", "text.onnx"):
        written = (out / name).read_bytes()
        assert (out / name).stat().st_mode & 0o077 == 0
        assert b".py" not in written and str(Path.home()).encode() not in written


def test_other_numbers_are_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_run()
    monkeypatch.setattr(other_runtimes, "MOST_DIFFERENT", 0.0)
    with pytest.raises(PretrainedError, match=r"image\.onnx: ONNX Runtime .* differs from torch"):
        save_pretrained(
            *(tmp_path / "m", run.model, run.config, run.tokenizer, run.table), onnx=True
        )
    assert not list(tmp_path.iterdir())


class _Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, 2 * x


@pytest.mark.parametrize(
    ("wrong", "rows", "output", "expected"),
    [
        (0.0, 3, 0, 0.0),
        (0.04, 3, 0, 0.01),  # of the largest number, 4
        (-0.04, 3, 0, 0.01),
        (0.04, 3, 1, 0.005),
        (0.04, 1, 1, 0.02),  # of a single one, which a graph of a fixed size computes wrongly
        (float("nan"), 1, 0, float("inf")),
    ],
)
def test_what_a_runtime_computes_otherwise_is_found_wherever_it_is(
    monkeypatch: pytest.MonkeyPatch, wrong: float, rows: int, output: int, expected: float
) -> None:
    class Session:
        def run(self, names: list[str], fed: dict[str, np.ndarray]) -> list[np.ndarray]:
            assert names == ["same", "twice"]
            found = [fed["x"].copy(), 2 * fed["x"]]
            if len(fed["x"]) == rows:
                found[output][-1, -1] += wrong
            return found

    monkeypatch.setattr(onnx_graphs, "open_session", lambda path: Session())
    x = torch.tensor([[1.0, -1.0], [3.0, 2.0], [-4.0, 0.0]])
    graph = onnx_graphs._Graph("g", _Double(), ("x",), ("same", "twice"), (x,), (x,), ({},))
    found = onnx_graphs._largest_difference(graph, Path("g.onnx"))
    assert found == pytest.approx(expected, rel=1e-5)


def test_numbers_that_are_not_finite_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graphs, "_write", lambda graph, path: 18)
    monkeypatch.setattr(onnx_graphs, "_largest_difference", lambda graph, path: float("inf"))
    with pytest.raises(PretrainedError, match=r"image\.onnx: .* differs from torch by inf"):
        onnx_graphs.write_onnx(tmp_path, small_run().model, small_run().config)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.metadata.version

    def version(name: str) -> str:
        if name == "onnxscript":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    run = small_run()
    with pytest.raises(ConfigError, match=r"need onnxscript, not installed here: .*\[onnx\]"):
        onnx_graphs.write_onnx(tmp_path, run.model, run.config)
