"""Files and texts of one's own give what training and evaluation make of them.

Oracles: `mlip embed` of the same rows through the loader; scores of evaluation; the model itself
for its export by torch.export.
"""

from __future__ import annotations

import dataclasses
from collections import UserList
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mlip.batch import ImageFeatures
from mlip.dataloading.dicom.radiograph import write_radiograph
from mlip.pretrained import from_pretrained
from mlip.saved.onnx_graphs import ImageGraph, TextGraph
from mlip.saved.pretrained_model import Pretrained
from mlip.transfer.alignment.patch_maps import phrase_maps
from mlip.transfer.alignment.prompts import TextError
from mlip.transfer.films.embed import write_embeddings
from mlip.transfer.films.own_inputs import (
    ImageFileError,
    encode_pixels,
    encode_texts,
    model_input,
)
from mlip.transfer.films.search import ask_phrases
from tests.small_run import small_export, small_run


class Table(UserList[str]):
    """What a table of pandas is to who goes through it: the names of its columns."""

    columns = ("edema",)


@pytest.fixture(scope="module")
def opened() -> Pretrained:
    return from_pretrained(small_export())


def test_features_are_those_of_the_loader(opened: Pretrained, tmp_path: Path) -> None:
    run = small_run()
    write_embeddings(
        *(dataclasses.replace(opened, config=run.config), run.manifest, tmp_path),
        split="test",
        with_patches=True,
    )
    part = load_file(tmp_path / "part-00000.safetensors")
    rows = part["row_index"].tolist()[:20]
    files = [run.folder / "data" / run.manifest.image_path(row) for row in rows]
    images = opened.encode_images(files)
    texts = opened.encode_reports([run.manifest.text(row) for row in rows])
    for own, loaded in (
        (images.embedding, part["image"]),
        (images.patches, part["patches"]),
        (texts.text.embedding, part["report"]),
        (texts.knowledge.present_mean, part["knowledge"]),
    ):
        torch.testing.assert_close(own, loaded[:20].float(), rtol=0, atol=2e-5)
    by_global = opened.similarity(images, texts)
    expected = part["image"][:20].double() @ part["report"][:20].double().T
    np.testing.assert_allclose(by_global, expected.numpy(), atol=1e-4)
    # one pair alone scores as it does among twenty
    report = opened.encode_reports([run.manifest.text(rows[3])])
    one = opened.similarity(opened.encode_images(files[3:4]), report, "local")
    among = opened.similarity(images, texts, "local")
    np.testing.assert_allclose(one[0, 0], among[3, 3], atol=1e-5)


def test_a_report_is_read_as_training_reads_it(opened: Pretrained) -> None:
    """Its sections, as far as the model reads; no message quotes it."""
    long = "The heart is large. " * 40
    whole, cut = opened.encode_reports(
        [f"HISTORY: Fever. FINDINGS: {long}", f"FINDINGS: {long}Effusion."]
    ).text.embedding
    assert torch.equal(whole, cut)
    plain, html = opened.encode_reports(
        ["FINDINGS: No edema.\n\nMass.", "<p>FINDINGS: No edema.</p><p>Mass&#46;</p>"]
    ).text.embedding
    assert torch.equal(plain, html)
    with pytest.raises(ValueError, match="report 2 is RTF, which is not read: export plain text"):
        opened.encode_reports(["Clear.", r"{\rtf1 Clear.}"])
    with pytest.raises(ValueError, match="shorten it"):
        opened.encode_texts([long])
    with pytest.raises(ValueError, match="report 2 is empty") as caught:
        opened.encode_reports(["Clear.", "[**Canary**]"])
    assert "Canary" not in str(caught.value)


def test_heat_maps_lie_on_the_patch_grid(opened: Pretrained) -> None:
    run = small_run()
    rows = run.manifest.rows("test")[:2]
    images = opened.encode_images([run.folder / "data" / run.manifest.image_path(r) for r in rows])
    texts = opened.encode_texts(["left pleural effusion", "no pneumothorax", "pacemaker"])
    maps = opened.heat_maps(images, texts)
    assert maps.shape == (2, 3, *images.grid)
    flat = phrase_maps(opened.model, images.patches, texts).numpy()
    np.testing.assert_array_equal(maps[1, 2].ravel(), flat[2, 1])


def test_a_dicom_file_gives_the_features_of_its_pixels(opened: Pretrained, tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 65536, (140, 120)).astype(np.uint16)
    write_radiograph(tmp_path / "film.dcm", grey, patient_id="P", study_id="S")
    read = opened.encode_images([tmp_path / "film.dcm"])
    made = encode_pixels(opened, model_input(grey, opened.config))
    assert torch.equal(read.embedding, made.embedding) and torch.equal(read.patches, made.patches)


def test_words_that_the_vocabulary_does_not_know_are_told_by_number(
    opened: Pretrained, caplog: pytest.LogCaptureFixture
) -> None:
    """Two phrases that differ in unknown words alone are one to the model."""
    texts = ["heart", "\u5de6 effusion", "\u53f3 effusion", "pleural effusion"]
    found = opened.encode_texts(texts)
    assert torch.equal(found.text.embedding[1], found.text.embedding[2])
    (line,) = caplog.messages
    tokens = len(opened.tokenizer.encode_batch(["\u5de6 effusion"])[0].ids)
    assert line.endswith(", ".join(f"phrase {n} (1 of {tokens} tokens)" for n in (2, 3)))
    assert not any(word in line for word in ("effusion", "\u5de6", "\u53f3"))
    caplog.clear()
    opened.encode_texts(["heart", "pleural effusion"])
    assert caplog.messages == []
    opened.encode_texts([f"heart \u5de6{n}" for n in range(7)])
    assert "phrase 5 (" in caplog.text and "phrase 6" not in caplog.text
    assert caplog.messages[-1].endswith(" and 2 more")
    ask_phrases(["heart", "\u5de6 effusion"], opened)
    assert caplog.messages[-1].endswith(f"token: phrase 2 (1 of {tokens} tokens)")


def test_words_that_are_read_letter_by_letter_and_are_no_term_are_told_by_number(
    opened: Pretrained, caplog: pytest.LogCaptureFixture
) -> None:
    """ "zzyx" had a hot map without a word. A term of the lexicon is read with its concept, too."""
    words = ["wkwkw", "copd", "xwx", "\u00e9wkw", "effusion"]
    encoded = opened.tokenizer.encode_batch(words)
    assert [len(one.ids) for one in encoded] == [5, 4, 3, 4, 1]  # a letter each, but the last
    opened.encode_texts([*words[1:], "left zyzyx, Wkwkw. w k w k leftww", *words[1:]])
    (line,) = caplog.messages
    assert "letter by letter" in line and line.endswith(": phrase 5 (2 words)")
    assert not any(word in line.lower() for word in ("wkw", "zyz", "copd", "w k"))
    ask_phrases(["heart", "wkwkw"], opened)
    assert caplog.messages[-1].endswith(": phrase 2 (1 word)")


def test_what_cannot_be_encoded_is_said(opened: Pretrained, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ImageFileError, match=r"broken\.png"):
        opened.encode_images([tmp_path / "broken.png"])
    with pytest.raises(ImageFileError, match=r"film\.png: there is no such folder"):
        opened.encode_images([tmp_path / "nowhere" / "film.png"])
    (tmp_path / "loop.png").symlink_to("loop.png")  # was a traceback
    with pytest.raises(ImageFileError, match=r"loop\.png: missing: links that lead to one anot"):
        opened.encode_images([tmp_path / "loop.png"])
    nothing: Any
    for nothing in ([], str(tmp_path / "broken.png"), np.array("film.png"), None, object()):
        with pytest.raises(ValueError, match="list of image files"):
            opened.encode_images(nothing)
    # of a dict and of a table of pandas the names were encoded, in place of what they name
    named = {"edema": "there is edema"}
    for nothing in ([], "effusion", np.array("effusion"), named, Table(named), None, 5):
        with pytest.raises(ValueError, match="list of texts"):
            opened.encode_texts(nothing)
    with pytest.raises(ValueError, match="empty"):
        opened.encode_texts(["effusion", " "])
    for strange in (["effusion", None], ["effusion", "\udc80"], {"effusion", "heart"}):
        with pytest.raises(ValueError, match=r"number 2 is of|text 2 holds|list of texts"):
            opened.encode_texts(strange)
    with pytest.raises(ValueError, match="list of image files, number 1 is of type ndarray"):
        opened.encode_images(np.zeros((9, 9), np.uint8))
    with pytest.raises(ValueError, match="the phrase '\u5de6' holds no word"):
        opened.encode_texts(["\u5de6"])
    with pytest.raises(ValueError, match="report 2 holds no word") as caught:
        opened.encode_reports(["Clear.", "\u5de6\u4fa7"])
    assert "\u5de6" not in str(caught.value)
    images, texts = encode_pixels(opened, torch.zeros(1, 1, 96, 96)), opened.encode_texts(["heart"])
    with pytest.raises(ValueError, match="expected 'global' or 'local', got 'both'"):
        opened.similarity(images, texts, "both")  # type: ignore[arg-type]


def test_pixels_of_an_array_are_taken_where_its_kind_says_what_white_is(
    opened: Pretrained,
) -> None:
    """pixel_array of pydicom is often int16, and plain floats are of any range: both were black."""
    grey = np.random.default_rng(3).integers(0, 256, (99, 90), np.uint8)
    pixels = model_input(grey, opened.config)
    assert torch.equal(pixels, model_input(np.asfortranarray(grey), opened.config))
    wrong: list[Any] = [grey.astype(kind) for kind in ("f4", "f8", "i2", "i4", "?", ">u2")]
    for other in (*wrong, torch.from_numpy(grey), grey.tolist()):
        with pytest.raises(ValueError, match=r"\(white 255\) or uint16 .*: scale and convert"):
            model_input(other, opened.config)
    for shape in ((99, 90, 3), (1, 99, 90), (0, 90)):
        with pytest.raises(ValueError, match=r"expected one grey picture \[H, W\], got \["):
            model_input(np.zeros(shape, np.uint8), opened.config)
    assert len(encode_pixels(opened, pixels.double()).embedding) == 1
    for made in (pixels[0], pixels[..., :-1], pixels.repeat(1, 3, 1, 1), pixels.to(torch.uint8)):
        with pytest.raises(ValueError, match=r"expected pixels \[N, 1, 96, 96\] in floating"):
            encode_pixels(opened, made)
    nan = pixels.clone()
    nan[..., 50, 50] = float("nan")  # "the checkpoint is broken", it said
    no_pixels: Any
    for no_pixels, got in (
        (pixels.numpy(), "ndarray"),
        (None, "NoneType"),
        (nan, "NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=f"expected pixels .* gives them, got {got}"):
            encode_pixels(opened, no_pixels)


def test_a_broken_model_gives_no_features(opened: Pretrained) -> None:
    """Of the embedding and of the patches alone: every score would be NaN."""
    for head in ("image_head", "patch_head"):
        own = from_pretrained(small_export())
        with torch.no_grad():
            next(getattr(own.model, head).parameters()).fill_(float("nan"))
        with pytest.raises(ValueError, match="image features hold NaN .*: the checkpoint is brok"):
            encode_pixels(own, torch.zeros(1, 1, 96, 96))


def test_twelve_bits_in_sixteen_are_refused_as_mlip_prepare_refuses_them(
    opened: Pretrained, tmp_path: Path
) -> None:
    grey = np.random.default_rng(4).integers(0, 4096, (99, 90)).astype(np.uint16)
    for name, image in (("dark.png", grey), ("scaled.png", grey * 16), ("black.png", grey >> 12)):
        assert cv2.imwrite(str(tmp_path / name), image)
    assert cv2.imwrite(str(tmp_path / "eight.png"), (grey >> 8).astype(np.uint8))
    opened.encode_images([tmp_path / "scaled.png", tmp_path / "eight.png"])
    for name in ("dark.png", "black.png"):
        with pytest.raises(ImageFileError, match=rf"{name}: too_dark: .*times 16"):
            opened.encode_images([tmp_path / name])


def test_scores_are_of_features_of_this_model(opened: Pretrained) -> None:
    images, texts = encode_pixels(opened, torch.zeros(2, 1, 96, 96)), opened.encode_texts(["heart"])
    files: Any = ["film.png"]
    other = ImageFeatures(torch.zeros(2, 64), torch.zeros(2, 144, 64), images.grid)
    none = ImageFeatures(images.embedding[:0], images.patches[:0], images.grid)
    grown = ImageFeatures(images.embedding.requires_grad_(), images.patches, images.grid)
    for score in (
        opened.similarity,
        lambda i, t: opened.similarity(i, t, "local"),
        opened.heat_maps,
    ):
        for pair in ((texts, images), (files, texts), (images, ["heart"]), (images, None)):
            with pytest.raises(ValueError, match="expected what encode_images gave and then"):
                score(*pair)
        with pytest.raises(ValueError, match="of D=32, got D=64 of the images and D=32 of the"):
            score(other, texts)
        assert score(none, texts).shape[:2] == (0, 1)
        assert score(grown, texts).shape[:2] == (2, 1)


def test_texts_are_chosen_as_arrays_are(opened: Pretrained) -> None:
    texts = opened.encode_texts(["left effusion", "edema", "heart"])
    whole = texts.text.embedding
    for index, rows in (
        (np.array([False, True, True]), [1, 2]),  # was rows 0, 1 and 1
        (slice(1, None), [1, 2]),
        ([2, 0], [2, 0]),
        (-1, [2]),
        ([], []),
    ):
        assert torch.equal(texts.rows(index).text.embedding, whole[rows])  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        texts.rows([3])  # type: ignore[arg-type]


def test_a_long_phrase_is_named_by_its_number(opened: Pretrained) -> None:
    """It may be a report that was given to the wrong method."""
    words = ["edema"] * 300
    for long, reason in (("Canary " * 70, "reads 62: shorten"), ("\u5de6" * 61, "holds no word")):
        with pytest.raises(TextError, match=rf"^phrase 301 .*{reason}") as caught:
            opened.encode_texts([*words, long])
        assert caught.value.place == 300
        assert "Canary" not in str(caught.value) and "\u5de6" not in str(caught.value)
        # `mlip search` asks one at a time, and has told of the others what they are
        with pytest.raises(ValueError, match=rf"^phrase 2 .*{reason}"):
            ask_phrases(["edema", long], opened)
    with pytest.raises(TextError, match="^phrase 12 is empty") as empty:
        encode_texts(opened, ["edema", " " * 61], first=10)
    assert empty.value.place == 11


def test_files_and_texts_come_in_any_order_that_stays(opened: Pretrained, tmp_path: Path) -> None:
    names = [str(tmp_path / f"{i}.png") for i in range(3)]
    for i, name in enumerate(names):
        assert cv2.imwrite(name, np.random.default_rng(i).integers(0, 256, (99, 90), np.uint8))
    expected = opened.encode_images(names).embedding
    for files in (np.array(names), map(Path, names), (name for name in names)):
        assert torch.equal(opened.encode_images(files).embedding, expected)
    words = ["left effusion", "edema"]
    phrases, reports = opened.encode_texts(words), opened.encode_reports(words)
    for texts in (np.array(words), iter(words)):
        assert torch.equal(opened.encode_texts(texts).text.embedding, phrases.text.embedding)
    assert torch.equal(
        opened.encode_reports(np.array(words)).text.embedding, reports.text.embedding
    )


def test_a_model_in_training_mode_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    """Its features would depend on their batch, and the call would move its running statistics."""
    own = from_pretrained(small_export())
    assert cv2.imwrite(str(tmp_path / "film.png"), np.full((99, 90), 99, np.uint8))
    files, words = [tmp_path / "film.png"], ["effusion"]
    before = own.encode_images(files).embedding
    buffers = {name: value.clone() for name, value in own.model.named_buffers()}
    for part in (own.model, own.model.vision):  # one tower alone counts too
        part.train()
        for call in (
            lambda: own.encode_images(files),
            lambda: own.encode_texts(words),
            lambda: own.encode_reports(words),
        ):
            with pytest.raises(ValueError, match=r"training mode.*\.eval\(\)"):
                call()
        assert part.training
        own.model.eval()
    assert all(torch.equal(value, buffers[name]) for name, value in own.model.named_buffers())
    after = own.encode_images(files).embedding
    assert torch.equal(after, before) and not after.requires_grad


def test_half_a_model_and_autocast_give_float32(opened: Pretrained, tmp_path: Path) -> None:
    """Bound: eight bits of mantissa, as texts have it."""
    grey = np.random.default_rng(2).integers(0, 256, (99, 90), np.uint8)
    assert cv2.imwrite(str(tmp_path / "film.png"), grey)
    files, words = [tmp_path / "film.png"], ["effusion", "edema"]
    whole = opened.encode_images(files)
    half = from_pretrained(small_export())
    half.model.to(torch.bfloat16)
    images = half.encode_images(files)
    assert images.embedding.dtype == torch.float32
    torch.testing.assert_close(images.embedding, whole.embedding, rtol=0, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        maps = opened.heat_maps(opened.encode_images(files), opened.encode_texts(words))
    expected = opened.heat_maps(whole, opened.encode_texts(words))
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps, expected, atol=0.05)


def test_the_page_of_evaluation_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its block runs as it is printed, on a folder and files of those names."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "evaluation.md").read_text()
    page = page.split("## From Python")[1]
    block = page.split("```python\n")[1].split("```")[0]
    grey = np.random.default_rng(1).integers(0, 65536, (130, 120)).astype(np.uint16)
    write_radiograph(tmp_path / "film.dcm", grey, patient_id="P", study_id="S")
    assert cv2.imwrite(str(tmp_path / "film.png"), grey)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(small_export())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["by_global"].shape == (2, 3) and names["by_local"].shape == (2, 1)
    assert names["heat"].shape[:2] == (2, 3)
    # the window of the DICOM file spans the whole range: both files hold one picture
    np.testing.assert_allclose(names["by_global"][0], names["by_global"][1], atol=1e-6)


def test_both_towers_export_as_graphs_of_any_batch_and_length(opened: Pretrained) -> None:
    """What serving runtimes take: torch.export, without a line of ours in the graph's way."""
    batch, tokens = torch.export.Dim("batch", max=512), torch.export.Dim("tokens", min=4, max=64)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (7, 33), generator=generator)
    mask = torch.arange(33) < torch.tensor([33, 9, 4, 20, 33, 12, 5])[:, None]
    text, image = TextGraph(opened.model), ImageGraph(opened.model)
    inputs = torch.randn(5, 1, 96, 96, generator=generator)
    cases: list[tuple[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...], tuple[object, ...]]] = [
        (image, (inputs[:2],), (inputs,), ({0: batch},)),
        (
            text,
            (ids[:2, :16].clone(), *(mask[:2, :16].clone() for _ in range(2))),
            (ids, mask, mask),
            ({0: batch, 1: tokens},) * 3,
        ),
    ]
    for module, example, others, shapes in cases:
        graph = torch.export.export(module, example, dynamic_shapes=shapes).module()
        with torch.no_grad():
            for exported, own in zip(graph(*others), module(*others), strict=True):
                torch.testing.assert_close(exported, own)
