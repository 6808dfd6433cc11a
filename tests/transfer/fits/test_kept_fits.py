"""`mlip evaluate` that ended in the middle goes on with the fits that were finished.

Oracle: the files of a run that was left alone, byte by byte. Encoders here give other last digits
for every other batch, as real ones can: what is encoded together must not depend on the past.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import ViTConfig, ViTModel

from mlip import precision
from mlip.pages import transfer_page
from mlip.settings.config import Config, load
from mlip.settings.typed_tree import all_keys
from mlip.system.output_file import only_writer, whole_file
from mlip.system.stop_signal import Stopped
from mlip.transfer.fits import kept_fits, protocol, sealed_file
from mlip.transfer.fits.detection import Detection
from mlip.transfer.fits.encoder import Encoder
from mlip.transfer.fits.fitting import Record
from mlip.transfer.fits.kept_fits import FREE_SETTINGS, Fit, KeptFits
from mlip.transfer.measures.average_precision import Truth
from tests.small_run import small_export
from tests.transfer import small_manifest
from tests.transfer.small_manifest import BOXES, LABELS, MASKS, SECRETS, evaluate, write

ROOT = Path(__file__).resolve().parents[3]
FITS = ["transfer.fractions=[40, 100]", "transfer.seeds=[1, 2]", "transfer.epochs=2"]
TUNED = "transfer.encoder=tuned"
TASKS = {
    "probe": LABELS,
    "logistic": [*LABELS, "transfer.probe=logistic"],
    "exclusive": [
        *("transfer.task=classification", "transfer.classes={Edema: zero, Mass: zero}"),
        "transfer.exclusive=true",
    ],
    "fine-tuning": [*LABELS, TUNED],
    "segmentation": [*MASKS, "evaluate.examples=3"],
    "segmentation, tuned": [*MASKS, TUNED],
    "detection": [*BOXES, "transfer.monitor=score", "evaluate.examples=3"],
    "detection, tuned": [*BOXES, TUNED, "transfer.score_cut=0.01"],
}
ENCODED_ONCE = ("probe", "logistic", "exclusive")  # a frozen encoder, for all fits
SHORT = ("probe", "fine-tuning", "segmentation", "detection")
NAMES = ("results.json", "predictions.parquet", "report.html")


def _masks(folder: Path) -> Callable[[int], str]:
    """Mask files of their own for every row."""
    pictures, rng = small_manifest.pictures(), np.random.default_rng(1)
    for i in range(small_manifest.ROWS):
        mask = np.zeros((small_manifest.HEIGHT, small_manifest.WIDTH), np.uint8)
        if i % 4:
            y, x = rng.integers(0, 15), rng.integers(0, 30)
            mask[y : y + 20, x : x + 25] = 255
        cv2.imwrite(str(pictures / f"kept-{i}.png"), mask)
    return lambda i: f"kept-{i}.png"


def settings_of(folder: Path, task: str) -> list[str]:
    boxes = {i: json.dumps([[4 + i, 5, 20, 18, "Edema"]] if i % 4 else []) for i in range(30)}
    data = write(folder, mask=_masks(folder), boxes=lambda i: boxes[i])
    return [*data, *FITS, *TASKS[task]]


@pytest.fixture(autouse=True)
def _no_clock_and_other_digits_in_other_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    noon = SimpleNamespace(strftime=lambda form: "noon")
    monkeypatch.setattr(transfer_page, "datetime", SimpleNamespace(now=lambda zone: noon))
    pooled, levels = Encoder.pooled, Encoder.levels
    monkeypatch.setattr(
        Encoder, "pooled", lambda self, image: pooled(self, image) + 1e-3 * image.mean()
    )
    monkeypatch.setattr(
        Encoder,
        "levels",
        lambda self, image: [m + 1e-3 * image.mean() for m in levels(self, image)],
    )


def stop_after(fits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C as soon as so many fits of this start are kept."""
    keep, done = KeptFits.keep, [0]

    def keep_and_stop(self: KeptFits, *given: Any) -> None:
        keep(self, *given)
        done[0] += 1
        if done[0] == fits:
            raise Stopped(signal.SIGINT)

    monkeypatch.setattr(KeptFits, "keep", keep_and_stop)


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NAMES if (folder / name).exists()}


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(task, marks=[] if task in SHORT else pytest.mark.long, id=task)
        for task in TASKS
    ],
)
def test_a_run_that_was_stopped_between_fits_ends_with_the_bytes_of_one_left_alone(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(tmp_path, task)
    assert evaluate(tmp_path, settings) == 0
    out = tmp_path / "out"
    whole = files_of(out)
    assert sorted(p.name for p in out.iterdir()) == sorted(whole)  # no fit stays behind
    for path in out.iterdir():
        path.unlink()
    capsys.readouterr()
    for fits, number in ((1, 1), (2, 3)):
        kept = stopped_run(tmp_path, settings, monkeypatch, fits)
        images = ", and encoded images" * (task in ENCODED_ONCE)
        told = f"finished fits kept in {kept}: {number}{images}; the same command goes on with the "
        assert capsys.readouterr().err.splitlines()[-2:] == [
            f"{told}others",
            "mlip: interrupted",
        ]
        assert not files_of(out)
    assert sorted(p.stem for p in kept.glob("[0-9]*")) == ["100.0-1", "40.0-1", "40.0-2"]
    assert any(kept.glob("features-*")) == (task in ENCODED_ONCE)
    made: list[int] = []
    name = next(s.partition("=")[2] for s in settings if s.startswith("transfer.task="))
    fit = protocol.TASKS[name].fit
    monkeypatch.setattr(
        protocol.TASKS[name],
        "fit",
        lambda self, start, train, val, seed: (
            made.append(seed) or fit(self, start, train, val, seed)
        ),
    )
    assert evaluate(tmp_path, settings) == 0
    said = capsys.readouterr().out
    assert made == [2] and said.count(", kept from before") == 3
    assert files_of(out) == whole
    assert sorted(p.name for p in out.iterdir()) == sorted(whole)


def stopped_run(
    folder: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch, fits: int = 3
) -> Path:
    """The folder of kept fits of a run that was stopped."""
    with monkeypatch.context() as stopped:
        stop_after(fits, stopped)
        assert evaluate(folder, settings) == 130
    return folder / "out" / kept_fits.FOLDER


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["transfer.lr=1e-2"], "of other transfer.lr:"),
        (["transfer.by_fraction={40: {batch: 4}, 100: {batch: 4}}"], "of other transfer.batch:"),
        (["transfer.decoder_width=8", "transfer.patience=1"], "transfer.decoder_width, tran"),
        (["train: {precision: bf16, residual: bf16}"], "of other train.residual:"),
        (["evaluate.examples=2"], "of other evaluate.examples:"),
        (
            ["data.workers=2", "transfer.cache_gib=0.5", "evaluate.bootstrap=30", "train: {lr: 1}"],
            None,
        ),
    ],
)
def test_a_fit_of_other_settings_is_made_anew_and_the_log_names_them(
    changes: list[str],
    named: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = settings_of(tmp_path, "segmentation")
    stopped_run(tmp_path, settings, monkeypatch)
    capsys.readouterr()
    file = tmp_path / "more.yaml"  # settings of the training are refused where they are typed
    file.write_text("\n".join(change for change in changes if change.startswith("train:")))
    typed = [change for change in changes if not change.startswith("train:")]
    assert evaluate(tmp_path, [str(file), *settings, *typed]) == 0
    said = capsys.readouterr().out
    if named is None:
        assert said.count(", kept from before") == 3 and "anew" not in said
    else:
        assert "kept from before" not in said and said.count(": the fit is made anew") == 3
        assert said.count(named) == 3


def test_a_fit_of_other_pixels_masks_weights_or_code_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(tmp_path, "segmentation")
    pictures = small_manifest.pictures()

    def turned(name: str) -> Callable[[], None]:
        return lambda: (
            cv2.imwrite(
                str(pictures / name), cv2.imread(str(pictures / name), cv2.IMREAD_GRAYSCALE)[::-1]
            )
            and None
        )

    def other_code() -> None:
        monkeypatch.setattr(kept_fits, "hash_of_source", lambda: "another")

    start = protocol.open_start

    def other_weights() -> None:
        def opened(*given: Any) -> Any:
            found = start(*given)
            with torch.no_grad():
                next(found.vision.parameters()).mul_(1.5)
            return protocol.Start(found.vision, "another")

        monkeypatch.setattr(protocol, "open_start", opened)

    for change, named in (
        (turned("0.png"), "of other images"),
        (turned("kept-1.png"), "of other truth"),
        (other_code, "of other code"),
        (other_weights, "of other weights"),
    ):
        stopped_run(tmp_path, settings, monkeypatch, fits=1)
        change()
        capsys.readouterr()
        assert evaluate(tmp_path, settings) == 0
        said = capsys.readouterr().out
        assert f"40.0-1.safetensors: is {named}: the fit is made anew" in said, named
        assert "kept from before" not in said
    turned("0.png")(), turned("kept-1.png")()  # the folder is other tests' too


def test_a_fit_of_a_source_whose_config_was_edited_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An activation is no weight, and the settings hold the folder's name alone."""
    source = tmp_path / "vit"
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "patch_size": 16, "image_size": 96, "num_channels": 1}
    tower = ViTConfig(**sizes)
    ViTModel(tower).save_pretrained(source)
    settings = [
        *settings_of(tmp_path, "logistic"),
        *("transfer.start=imagenet", "model.vision.kind=vit", f"model.vision.source={source}"),
        "transfer.image_px=0",
    ]
    stopped_run(tmp_path, settings, monkeypatch, fits=1)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    capsys.readouterr()
    assert evaluate(tmp_path, settings) == 0
    said = capsys.readouterr().out
    assert "40.0-1.safetensors: is of other tower: the fit is made anew" in said
    assert "kept from before" not in said


def test_a_fit_is_that_of_its_seed_and_its_order_of_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(tmp_path, "fine-tuning")
    kept = stopped_run(tmp_path, settings, monkeypatch)
    # all rows, the same weights: only the seed tells which of the two it is
    (kept / "100.0-1.safetensors").rename(kept / "100.0-2.safetensors")
    capsys.readouterr()
    assert evaluate(tmp_path, settings) == 0
    assert "100.0-2.safetensors: is of other seed: the fit" in capsys.readouterr().out
    # two classes that the same images have: not a label tells in which order
    both = write(tmp_path, labels=lambda i: "Edema|Mass" if i % 3 else "")
    both += [*FITS, TUNED, "transfer.task=classification"]
    stopped_run(tmp_path, [*both, "transfer.classes={Edema: zero, Mass: zero}"], monkeypatch, 1)
    capsys.readouterr()
    assert evaluate(tmp_path, [*both, "transfer.classes={Mass: zero, Edema: zero}"]) == 0
    said = capsys.readouterr().out
    assert "40.0-1.safetensors: is of other transfer.classes: the fit" in said


def test_a_probe_after_other_draws_is_made_anew_since_its_images_were_encoded_with_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(tmp_path, "logistic")
    stopped_run(tmp_path, settings, monkeypatch)
    capsys.readouterr()
    assert evaluate(tmp_path, [*settings, "transfer.fractions=[100, 40]"]) == 0
    said = capsys.readouterr().out
    assert said.count("is of other encoded together: the fit is made anew") == 3


def test_the_hash_of_boxes_tells_places_classes_and_images_apart() -> None:
    """They may lie beside the manifest, whose hash says nothing of them then."""

    def hash_of(*images: list[tuple[int, int]]) -> str:
        task = Detection.__new__(Detection)
        task._boxes = {
            row: Truth(
                np.array([[x, 0.0, x + 9, 9.0] for x, _ in boxes]).reshape(-1, 4),
                np.array([k for _, k in boxes], dtype=np.int64),
            )
            for row, boxes in enumerate(images)
        }
        return task.truth_hash(np.arange(len(images)))

    cases = (
        *([[(1, 0)], [(2, 1)]], [[(1, 0)], [(3, 1)]], [[(1, 0)], [(2, 0)]]),
        *([[(2, 1)], [(1, 0)]], [[(1, 0), (2, 1)], []], [[], [(1, 0), (2, 1)]]),
    )
    assert len({hash_of(*images) for images in cases}) == len(cases)


def test_code_versions_device_and_precision_tell_fits_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, cpu = load([], ["transfer.precision=auto"]), torch.device("cpu")

    def made(device: torch.device = cpu) -> str:
        return json.dumps(kept_fits.made_by(config, device))

    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: device.type != "cpu")
    found = {made(), made(torch.device("cuda"))}
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: True)
    found |= {made(), made(torch.device("cuda"))}
    for name in ("hash_of_source", "versions"):
        monkeypatch.setattr(kept_fits, name, lambda: "another")
        found.add(made())
    version = importlib.metadata.version
    for library in ("opencv-python-headless", "scipy", "pycocotools"):
        monkeypatch.setattr(
            *(importlib.metadata, "version"),
            lambda name, other=library: "another" if name == other else version(name),
        )
        found.add(made())
    assert len(found) == 8


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "a bit of the arrays": lambda path: _flip(path, -1),
    # 0.3 becomes 0.2: the entry can still be read
    "a bit of how it went": lambda path: _flip(path, path.read_bytes().index(b"[0.3, 0.3") + 3),
    "a bit of a name": lambda path: _flip(path, path.read_bytes().index(b'"corners"') + 1),
    "a bit of a shape": lambda path: _flip(path, path.read_bytes().index(b"[0,4]") + 3),
    "a bit of the header's length": lambda path: _flip(path, 3),
    "no fit": lambda path: save_file({"a": np.zeros(1)}, path),
    "lists within lists": lambda path: save_file({}, path, {"fit": "[" * 10**5}),
    "a list": lambda path: save_file({}, path, {"fit": "[]"}),
    "no file": lambda path: path.unlink() or path.mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_fit_is_not_taken_and_said(damage: str, tmp_path: Path) -> None:
    said: list[str] = []
    fit = Fit(
        Record(1, 2, 3, (0.1, 0.2), (0.3, 1 / 3), (None, 0.5)),
        {"boxes": np.arange(3), "corners": np.zeros((0, 4), np.float32), "b": np.array([True])},
        1.5,
    )
    made_of = {"rows": [1, 2], "lr": 1e-3, "bounds": (1, 2)}
    with kept_fits.kept_fits(tmp_path, said.append) as kept:
        kept.keep(10.0, 1, made_of, fit)
        read = kept.read(10.0, 1, made_of)
        assert read is not None and not said
        assert (read.record, read.seconds) == (fit.record, fit.seconds)
        for name, values in fit.prediction.items():
            assert read.prediction[name].dtype == values.dtype
            np.testing.assert_array_equal(read.prediction[name], values)
        (path,) = kept.folder.iterdir()
        DAMAGES[damage](path)
        assert kept.read(10.0, 1, made_of) is None
    assert said == [f"{path}: is damaged or cannot be read: the fit is made anew"]


def test_a_run_goes_on_past_a_damaged_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(tmp_path, "detection")
    assert evaluate(tmp_path, settings) == 0
    whole = files_of(tmp_path / "out")
    kept = stopped_run(tmp_path, settings, monkeypatch)
    _flip(kept / "40.0-2.safetensors", -1)
    capsys.readouterr()
    assert evaluate(tmp_path, settings) == 0
    said = capsys.readouterr().out
    assert "40.0-2.safetensors: is damaged or cannot be read: the fit is made anew" in said
    assert said.count(", kept from before") == 2 and files_of(tmp_path / "out") == whole


def test_what_is_kept_says_nothing_of_patients_and_is_its_owners_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for task in ("logistic", "detection"):
        settings = settings_of(tmp_path, task)
        kept = stopped_run(tmp_path, settings, monkeypatch, fits=1)
        assert len(list(kept.iterdir())) == (2 if task == "logistic" else 1)
        for path in kept.iterdir():
            content = path.read_bytes()
            secrets = (*SECRETS, str(small_manifest.pictures()))
            assert not [s for s in secrets if s.encode() in content]
            assert path.stat().st_mode & 0o077 == 0
            path.unlink()


def test_only_worst_masks_are_kept_of_a_fit_and_pictures_show_them(tmp_path: Path) -> None:
    asked = settings_of(tmp_path, "segmentation")
    kept: list[dict[str, np.ndarray]] = []
    keep = KeptFits.keep
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            KeptFits,
            "keep",
            lambda self, *given: kept.append(given[3].prediction) or keep(self, *given),
        )
        assert evaluate(tmp_path, asked) == 0
    assert [len(one["masks"]) for one in kept] == [3] * 4 and len(kept[0]["truth"]) == 12
    assert "<polygon" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_or_broken_disk_costs_the_keeping_of_a_fit_and_not_the_run(
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @contextmanager
    def full(path: Path, **named: Any) -> Iterator[Path]:
        with whole_file(path, **named) as partial:
            yield partial
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(sealed_file, "whole_file", full)
    assert evaluate(tmp_path, settings_of(tmp_path, "logistic")) == 0
    said = capsys.readouterr().out
    assert said.count("this fit is not kept, a kill would lose it: ") == 4
    assert said.count("encoded images are not kept, a kill would lose them: ") == 1
    assert os.strerror(code) in said
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(NAMES)


def test_fits_of_other_fractions_stay_until_their_command_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(tmp_path, "fine-tuning")
    kept = stopped_run(tmp_path, settings, monkeypatch)
    (kept / ".40.0-1.safetensors.host.1").write_text("half")  # of a kill in another container
    (kept / ".another's").mkdir()
    capsys.readouterr()
    assert evaluate(tmp_path, [*settings, "transfer.fractions=[40]"]) == 0
    said = capsys.readouterr().out
    assert said.count(", kept from before") == 2 and "1 fits of fractions or seeds" in said
    assert sorted(p.name for p in kept.iterdir()) == [".another's", "100.0-1.safetensors"]
    assert evaluate(tmp_path, settings) == 0
    said = capsys.readouterr().out
    assert said.count(", kept from before") == 1 and "that were not asked for" not in said
    assert [p.name for p in kept.iterdir()] == [".another's"]  # or the folder goes too


def test_what_fits_of_a_probe_do_not_depend_on_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(tmp_path, "probe")
    stopped_run(tmp_path, settings, monkeypatch)
    changes = ["evaluate.examples=2", "evaluate.threshold_rule=youden", "run.seed=2"]
    capsys.readouterr()
    assert evaluate(tmp_path, [*settings, *changes]) == 0
    assert capsys.readouterr().out.count(", kept from before") == 3


def test_an_error_leaves_no_folder_that_was_made_for_it(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with (
        pytest.raises(ValueError),
        kept_fits.kept_fits(tmp_path / "there" / "a" / "b", print) as kept,
    ):
        assert kept.folder.parent.is_dir()
        raise ValueError
    assert not any((tmp_path / "there").iterdir())


def test_a_second_process_is_refused_before_it_reads_or_writes_a_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(tmp_path, "logistic")
    kept = stopped_run(tmp_path, settings, monkeypatch)
    before = {p.name: p.read_bytes() for p in kept.iterdir()}
    capsys.readouterr()
    out = tmp_path / "out"
    with only_writer(out / ".evaluate.lock", "the first"):
        assert evaluate(tmp_path, settings) == 2
    assert "another process is writing there: wait for its end" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in kept.iterdir()} == before and not files_of(out)


def test_every_free_setting_is_one() -> None:
    keys = all_keys(Config)
    for free in (*FREE_SETTINGS, kept_fits.OF_PICTURES, kept_fits.RESIDUAL):
        assert any(key.startswith(free) for key in keys), free


# ends as a process does that the system kills: after the fit of this number, or, "half", when half
# of it is written
KILLED = """
import os, signal, sys
from pathlib import Path
from mlip.cli import main
from mlip.transfer.fits.kept_fits import KeptFits
number, is_half = int(sys.argv[1]), sys.argv[2] == "half"
keep, replace, done = KeptFits.keep, Path.replace, [0]
def kill(self, target):
    if is_half and Path(target).suffix == ".safetensors" and done[0] + 1 == number:
        content = self.read_bytes()
        self.write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
def keep_and_die(self, *given):
    keep(self, *given)
    done[0] += 1
    if done[0] == number:
        os.kill(os.getpid(), signal.SIGKILL)
Path.replace, KeptFits.keep = kill, keep_and_die
sys.exit(main(sys.argv[3:]))
"""


def _process(number: int, how: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(number), how, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def _plain(folder: Path) -> tuple[bytes, bytes]:
    lines = (folder / "results.json").read_bytes().splitlines()
    return b"\n".join(line for line in lines if b'"seconds": ' not in line), (
        folder / "predictions.parquet"
    ).read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("task", ["probe", "segmentation"])
def test_kill_9_behind_every_fit_and_within_the_writing_of_one(task: str, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, task)
    command = ["evaluate", *settings, f"checkpoint={small_export()}", "--out"]
    alone = _process(9, "whole", [*command, str(tmp_path / "alone")])
    assert alone.returncode == 0, alone.stderr
    # the second start dies while it writes its first fit; each of the others behind its first
    for start, how in enumerate(("whole", "half", "whole", "whole", "whole")):
        ended = _process(1, how, [*command, str(tmp_path / "killed")])
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert ended.stdout.count(", kept from before") == (0, 1, 1, 2, 3)[start]
    last = _process(1, "whole", [*command, str(tmp_path / "killed")])
    assert last.returncode == 0 and last.stdout.count(", kept from before") == 4, last.stderr
    assert _plain(tmp_path / "killed") == _plain(tmp_path / "alone")
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == sorted(
        p.name for p in (tmp_path / "alone").iterdir()
    )


@pytest.mark.long
def test_of_two_processes_at_once_one_works_and_the_other_says_so(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "segmentation")
    command = ["evaluate", *settings, f"checkpoint={small_export()}", "--out", str(tmp_path / "o")]
    two = [
        subprocess.Popen(
            [sys.executable, "-m", "mlip", *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=600) for process in two]
    codes = [process.returncode for process in two]
    assert 0 in codes and set(codes) <= {0, 2}
    if 2 in codes:  # or the first was done before the second began
        assert "another process is writing there" in said[codes.index(2)][1]
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == sorted(NAMES)
