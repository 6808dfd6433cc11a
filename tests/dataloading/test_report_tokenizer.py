"""Tokenizer training, saving and loading."""

from __future__ import annotations

import csv
import hashlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from mlip.dataloading.manifest import load_manifest
from mlip.dataloading.reports.tokenizer import (
    SPECIAL,
    ReportTokenizer,
    load_tokenizer,
    train_tokenizer,
)
from mlip.saved.run_vocabulary import open_tokenizer
from mlip.settings.config import load

TEXT = "A small left effusion. No pneumothorax. Possible nodule, 1.5 cm."


def test_training_the_vocabulary_again_gives_the_same_bytes(tmp_path: Path) -> None:
    # the library's own trainer gives another vocabulary each time: its hash maps are reseeded
    words = "effusion nodule cardiac silhouette apical pneumothorax tube opacity".split()
    texts = [f"The {a} and {b} are seen, {i % 7}.5." for i, a in enumerate(words) for b in words]
    saved = set()
    for i in range(6):
        train_tokenizer(texts, 120, tmp_path / f"t{i}")
        files = sorted((tmp_path / f"t{i}").iterdir())
        saved.add(hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest())
    assert len(files) == 3 and len(saved) == 1


def test_what_a_killed_process_of_the_same_number_left_keeps_no_vocabulary_out(
    tmp_path: Path,
) -> None:
    """In a container the next one has it: the run could not begin until somebody removed it."""
    ours, other = (
        tmp_path / f"t.tmp{os.getpid()}@{host}" for host in (socket.gethostname(), "another")
    )
    for left in (ours, other):
        left.mkdir()
        (left / "vocab.txt").write_text("cut")
    train_tokenizer(["heart and lungs"] * 9, 60, tmp_path / "t")
    assert not ours.exists() and (tmp_path / "t" / "tokenizer.json").is_file()
    assert other.is_dir()  # of another container, that may be alive


def test_a_saved_tokenizer_is_read_by_transformers_with_equal_ids(
    tokenizer: ReportTokenizer, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert len(theirs) == tokenizer.vocab_size
    ids = tokenizer.encode_batch([TEXT])[0].ids
    assert theirs(TEXT)["input_ids"] == [tokenizer.cls_id, *ids, tokenizer.sep_id]
    assert theirs.pad_token_id == tokenizer.pad_id == 0


@pytest.mark.parametrize("kind", ["cased", "bytes"])
def test_a_foreign_tokenizer_is_saved_as_it_reads(kind: str, tmp_path: Path) -> None:
    # of a cased BERT, as Bio_ClinicalBERT, transformers read "No" as "no" from an export
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "N", "o", "No", "no"]
    folder = tmp_path / "foreign"
    folder.mkdir()
    if kind == "cased":
        (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
        (folder / "config.json").write_text('{"model_type": "bert"}')
        (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    else:
        vocabulary = {piece: i for i, piece in enumerate(pieces[:8])}
        backend = Tokenizer(models.BPE(vocabulary, [("N", "o")], unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert theirs.tokenize("No") == tokenizer.encode_batch(["No"])[0].tokens == ["No"]
    assert theirs.pad_token_id == tokenizer.pad_id


def test_a_folder_of_the_same_words_in_another_case_is_not_taken_for_it(tmp_path: Path) -> None:
    """A run's copy that stayed from an earlier try would read its reports otherwise."""
    given = train_tokenizer(["heart and lungs"] * 9, 60, tmp_path / "given")
    given.save(tmp_path / "run")  # the same again
    kept = tmp_path / "run" / "tokenizer.json"
    kept.write_text(kept.read_text().replace('"lowercase": true', '"lowercase": false'))
    with pytest.raises(ValueError, match="holds another vocabulary"):
        given.save(tmp_path / "run")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["given", "run"]


def test_a_folder_with_only_a_vocabulary_file_is_read(tmp_path: Path) -> None:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "small", "effusion", "##s", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 9
    assert tokenizer.encode_batch(["Small effusions."])[0].ids == [5, 6, 7, 8]


@pytest.mark.parametrize("config", ["", '{"model_type": "bert"}'])
def test_a_vocabulary_file_that_is_not_read_names_its_folder(tmp_path: Path, config: str) -> None:
    # alone, as Google's BERT came; and cut inside a character
    pieces = "[PAD] [UNK] [CLS] [SEP] [MASK] no".replace(" ", "\n").encode()
    (tmp_path / "vocab.txt").write_bytes(pieces + (b"\xe9" if config else b"") + b"\n")
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=f"tokenizer {tmp_path}: .*config.json"):
        load_tokenizer(tmp_path)


def test_pieces_never_cross_the_limit_of_the_vocabulary(tmp_path: Path) -> None:
    texts = ["Effusion on the left side."] * 5
    assert train_tokenizer(texts, 60, tmp_path / "a").vocab_size <= 60
    with pytest.raises(ValueError, match="data.vocab_size=10: expected more than"):
        train_tokenizer(texts, 10, tmp_path / "b")
    with pytest.raises(ValueError, match="at least one training report"):
        train_tokenizer(["", "___"], 100, tmp_path / "c")


def _planted(name: str, *, reports_of: tuple[int, ...]) -> tuple[list[str], list[int]]:
    """Reports and their patients: twelve patients' plain ones, and one naming `name` for each
    number of reports_of."""
    texts = [f"Moderate cardiomegaly, film {i % 3}. No pneumothorax." for i in range(12)]
    named = [f"{name} was seen on 17-03-1961, ward Xylophonia. Cardiomegaly." for _ in reports_of]
    return [*texts, *named], [*range(12), *reports_of]


@pytest.mark.parametrize("owners", [(50, 50, 50), (50, 51), (50, 51, 52, 53, 53, 53)])
def test_a_word_of_few_patients_gives_no_piece_of_the_vocabulary(
    tmp_path: Path, owners: tuple[int, ...]
) -> None:
    # what may stand in the vocabulary beyond single characters: parts of words of five patients
    texts, patients = _planted("Zqwertus Obrovnik", reports_of=owners)
    tokenizer = train_tokenizer(texts, 400, tmp_path / "t", patients=patients)
    pieces = {p.removeprefix("##") for p in tokenizer.backend.get_vocab()} - set(SPECIAL)
    common = "moderate cardiomegaly film no pneumothorax".split()
    assert set(common) <= pieces
    long = {piece for piece in pieces if len(piece) > 1}
    assert all(any(piece in word for word in common) for piece in long)
    saved = b"".join(f.read_bytes() for f in (tmp_path / "t").iterdir()).lower()
    assert not any(part in saved for part in (b"zqw", b"wert", b"obr", b"vnik", b"1961"))
    # and yet it is read, to the last character
    (encoding,) = tokenizer.encode_batch(["Zqwertus 1961"])
    assert tokenizer.unk_id not in encoding.ids
    assert "".join(t.removeprefix("##") for t in encoding.tokens) == "zqwertus1961"


def test_a_word_of_enough_patients_or_of_the_lexicon_is_a_piece(tmp_path: Path) -> None:
    texts, patients = _planted("Zqwertus", reports_of=(50, 51, 52, 53, 54))
    five = train_tokenizer(texts, 400, tmp_path / "five", patients=patients)
    assert "zqwertus" in five.backend.get_vocab()
    texts, patients = _planted("Zqwertus", reports_of=(50, 50))
    public = train_tokenizer(texts, 400, tmp_path / "public", patients=patients, public={"ward"})
    assert "ward" in public.backend.get_vocab() and "seen" not in public.backend.get_vocab()
    lowered = train_tokenizer(texts, 400, tmp_path / "one", patients=patients, min_patients=1)
    assert "zqwertus" in lowered.backend.get_vocab()


@pytest.mark.parametrize(
    ("owners", "fewest", "learnt"),
    [((50,) * 6, 5, False), (range(50, 55), 5, True), (range(50, 55), 6, False)],
)
def test_a_run_counts_the_patients_of_its_manifest(
    tmp_path: Path, owners: Any, fewest: int, learnt: bool
) -> None:
    texts, patients = _planted("Zqwertus", reports_of=tuple(owners))
    texts[0] += 3 * " Pneumomediastinum."  # of one patient, and of the lexicon
    with open(tmp_path / "manifest.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "report", "patient_id", "study_id", "split"])
        for row, (text, patient) in enumerate(zip(texts, patients, strict=True)):
            writer.writerow([f"{row}.png", text, f"p{patient}", f"s{row}", "train"])
    config = load(
        [],
        [
            f"data.manifest={tmp_path / 'manifest.csv'}",
            f"run.dir={tmp_path / 'run'}",
            f"data.vocab_min_patients={fewest}",
            "data.columns={image_id: null, sha256: null}",
        ],
    )
    pieces = open_tokenizer(config, load_manifest(config.data)).backend.get_vocab()
    assert ("zqwertus" in pieces) == learnt
    assert "pneumothorax" in pieces and "pneumomediastinum" in pieces


def test_the_order_of_the_reports_does_not_change_the_vocabulary(tmp_path: Path) -> None:
    texts, patients = _planted("Zqwertus", reports_of=(50, 51, 52, 53, 54))
    train_tokenizer(texts, 400, tmp_path / "a", patients=patients)
    train_tokenizer(texts[::-1], 400, tmp_path / "b", patients=patients[::-1])
    for name in ("tokenizer.json", "vocab.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_vocabulary_is_on_the_disk_before_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints are: after a power cut none of them could be opened without it."""
    synced, fsync = set[int](), os.fsync

    def look(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    train_tokenizer(["no pleural effusion", "clear lungs"], 60, tmp_path / "a")
    folder = tmp_path / "a"
    assert {path.stat().st_ino for path in (*folder.iterdir(), folder)} <= synced


def test_a_vocabulary_that_is_read_in_part_is_refused_and_odd_signs_in_it_are_not(
    tmp_path: Path,
) -> None:
    """Signs that end a line for Python alone made a whole vocabulary seem to be read in part."""
    entries = [*SPECIAL, "lung", "a\u2028b", "\x85", "c\x0cd"]
    (tmp_path / "vocab.txt").write_text("\n".join(entries) + "\n", encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert load_tokenizer(tmp_path).vocab_size == len(entries)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    wrong_type = r"1 of the 9 entries of vocab\.txt were read; add a config\.json that names"
    with pytest.raises(ValueError, match=wrong_type):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "lung", "rib", "lung"]) + "\n")
    with pytest.raises(ValueError, match=r"7 of the 8 entries .*; line 8 repeats line 6: restore"):
        load_tokenizer(tmp_path)


def test_a_missing_or_foreign_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is none at"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="tokenizer.json or vocab.txt"):
        load_tokenizer(tmp_path)
