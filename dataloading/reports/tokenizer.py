"""The tokenizer of reports: trained on them, saved, or read from a local folder.

With mlip/encoders, mlip/transformers_auto.py and mlip/saved/transformers_*.py the only user of
transformers, and only to read a foreign tokenizer folder.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection, Hashable, Iterable
from pathlib import Path
from socket import gethostname
from typing import Any

from mlip.dataloading.reports.common_words import common_words
from mlip.dataloading.reports.text import clean_report
from mlip.system.output_file import sync_all

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads are ours
logger = logging.getLogger("mlip")

_BERT_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
SPECIAL = tuple(_BERT_TOKENS.values())


class ReportTokenizer:
    """A WordPiece (or any fast) tokenizer with the ids that a Batch needs."""

    def __init__(self, backend: Any, special: dict[str, str]) -> None:
        self.backend = backend
        backend.no_truncation()
        backend.no_padding()
        self.special = special
        ids = {name: backend.token_to_id(token) for name, token in special.items()}
        missing = [special[name] for name, value in ids.items() if value is None]
        if missing:
            raise ValueError(
                f"tokenizer: expected {', '.join(missing)} in its vocabulary; a BERT-style "
                "tokenizer with padding, start and separator tokens is needed"
            )
        self.pad_id, self.unk_id = ids["pad_token"], ids["unk_token"]
        self.cls_id, self.sep_id = ids["cls_token"], ids["sep_token"]

    @property
    def vocab_size(self) -> int:
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def encode_batch(self, texts: list[str]) -> list[Any]:
        """tokenizers.Encoding per text (ids, offsets), without special tokens."""
        return self.backend.encode_batch(texts, add_special_tokens=False)

    def token(self, token_id: int) -> str:
        """The piece behind an id, "##" included."""
        return self.backend.id_to_token(int(token_id)) or ""

    def _reader(self) -> dict[str, Any]:
        """transformers' class for it: BertTokenizer sets case and the two special tokens anew."""
        from tokenizers.models import WordPiece

        if not isinstance(self.backend.model, WordPiece):
            return {"tokenizer_class": "PreTrainedTokenizerFast"}
        normalizer = self.backend.normalizer
        is_lower = normalizer is not None and normalizer.normalize_str("A") == "a"
        return {"tokenizer_class": "BertTokenizer", "do_lower_case": is_lower}

    def save(self, directory: str | Path, max_tokens: int | None = None) -> None:
        """Write tokenizer.json, tokenizer_config.json and vocab.txt: what transformers reads.

        max_tokens  where transformers cuts a text if asked to, [CLS] and [SEP] counted
        Written beside and renamed, so a folder that exists is complete; it is left as it is.
        Raises:  ValueError where a folder of another vocabulary stands there.
        """
        directory = Path(directory)
        temporary = directory.with_name(f"{directory.name}.tmp{os.getpid()}@{gethostname()}")
        # of a killed process: in a container the next one has its number, and that of another
        # container, which is alive, may have it too
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            whole = self.backend.to_str(pretty=True)  # its save() hides a full disk's OSError
            (temporary / "tokenizer.json").write_text(whole, encoding="utf-8")
            vocabulary = self.backend.get_vocab(with_added_tokens=True)
            lines = sorted(vocabulary, key=lambda token: vocabulary[token])
            (temporary / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            config = {**self._reader(), **self.special}
            config |= {} if max_tokens is None else {"model_max_length": max_tokens}
            (temporary / "tokenizer_config.json").write_text(
                json.dumps(config, indent=1, sort_keys=True), encoding="utf-8"
            )
            # without it no checkpoint of the run can be opened, and those are synced
            sync_all(temporary)
            _put(temporary, directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, directory: Path) -> None:
    """Renames a written folder, unless one of the same words, case and special tokens is there."""
    try:
        temporary.rename(directory)
    except OSError:
        if not (directory / "tokenizer.json").is_file():
            raise
        if not all(_is_same_file(directory / f.name, f) for f in temporary.iterdir()):
            raise ValueError(
                f"tokenizer {directory}: holds another vocabulary than this run's reports and "
                "settings give, an earlier try's for instance: remove the folder, or choose "
                "another run.dir"
            ) from None


def _is_same_file(a: Path, b: Path) -> bool:
    return a.is_file() and a.read_bytes() == b.read_bytes()


def is_vocabulary(directory: str | Path) -> bool:
    """Whether the folder holds the file of a vocabulary, and may be looked into."""
    names = ("tokenizer.json", "vocab.txt")
    return any(os.path.isfile(os.path.join(directory, name)) for name in names)


def load_tokenizer(directory: str | Path) -> ReportTokenizer:
    """The tokenizer of a local folder: one of ours, or any that transformers reads offline.

    Raises:  ValueError naming the folder and what it lacks.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(
            f"tokenizer: expected a folder, there is none at {directory}; it is "
            "model.text.tokenizer, else model.text.source, which have to be local folders here; "
            "without both the run trains a vocabulary of its own"
        )
    if not is_vocabulary(directory):
        raise ValueError(
            f"tokenizer {directory}: expected tokenizer.json or vocab.txt in it; another folder "
            "that has them can be named in model.text.tokenizer"
        )
    special = _BERT_TOKENS | _special_tokens(directory)
    if (directory / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        try:
            backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # the library raises no narrower kind
            raise ValueError(
                f"tokenizer {directory / 'tokenizer.json'}: cannot be read ({error}); restore the "
                "file"
            ) from error
    else:
        from transformers import AutoTokenizer

        try:  # left to its default, transformers asks whether to run what the folder brings
            read: Any = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the libraries raise no narrower kind
            raise ValueError(
                f"tokenizer {directory}: its vocab.txt cannot be read ({str(error).splitlines()[0]}"
                "); code that a folder brings is never run: add the config.json of its model, "
                "which names the model type, or restore both"
            ) from error
        backend = read.backend_tokenizer
        # transformers 5 can ignore a vocabulary file without a word: every token then is [UNK]
        # of text, splitlines would end a line at an entry such as U+2028 too
        entries = (directory / "vocab.txt").read_bytes().splitlines()
        if backend.get_vocab_size() < len(entries):
            first = {entry: line for line, entry in reversed(list(enumerate(entries, 1)))}
            again = [line for line, entry in enumerate(entries, 1) if first[entry] != line]
            told = "add a config.json that names the model type"
            if backend.get_vocab_size() == len(first):  # all of them were read
                told = f"line {again[0]} repeats line {first[entries[again[0] - 1]]}: restore it"
            raise ValueError(
                f"tokenizer {directory}: {backend.get_vocab_size()} of the {len(entries)} entries "
                f"of vocab.txt were read; {told}"
            )
    return ReportTokenizer(backend, special)


def _special_tokens(directory: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = directory / name
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tokenizer {file}: not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"tokenizer {file}: expected a JSON object; restore the file")
        for key in _BERT_TOKENS:
            value = content.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[key] = value
    return found


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    directory: str | Path,
    *,
    patients: Iterable[Hashable] | None = None,
    min_patients: int = 5,
    public: Collection[str] = (),
) -> ReportTokenizer:
    """A lower-case WordPiece tokenizer trained on cleaned texts, saved, and loaded again.

    patients: whose report each text is; None = each text has a patient of its own.
    A word of fewer than min_patients patients' reports that is not public (lower case) is left out,
    so no part of a name, id or date becomes a piece through it: it is read as the pieces of common
    words that fit, in the end as single characters. The same texts give the same files, byte for
    byte.
    Raises:  ValueError if there is no text or vocab_size cannot hold the characters; as save.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    characters: set[str] = set()

    def words_of_reports() -> Iterable[tuple[Hashable, list[str]]]:
        pairs = enumerate(texts) if patients is None else zip(patients, texts, strict=True)
        for patient, text in pairs:
            plain = normalizer.normalize_str(clean_report(text))
            characters.update(plain)
            yield patient, [word for word, _ in splitter.pre_tokenize_str(plain)]

    common = common_words(words_of_reports(), min_patients, public)
    alphabet = sorted(c for c in characters if not c.isspace())
    if not alphabet:
        raise ValueError("tokenizer: expected at least one training report with text, got none")
    # The trainer numbers unseen "##x" pieces in the order of a hash map that differs from run to
    # run, and breaks ties between merges by those numbers: naming them all first makes the
    # vocabulary repeatable.
    first = [*SPECIAL, *alphabet, *(f"##{c}" for c in alphabet)]
    if vocab_size <= len(first):
        raise ValueError(
            f"data.vocab_size={vocab_size}: expected more than the {len(first)} entries that "
            "special tokens and single characters take"
        )
    logger.info(
        "vocabulary: learnt from %d words; %d others (%.1f %% of the text) occur in the reports of "
        "fewer than %d patients",
        len(common.counts),
        common.rare,
        100 * common.rare_share,
        min_patients,
    )
    trainee = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trainee.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # the words are cut already
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=first,
        initial_alphabet=alphabet,
        min_frequency=2,
        show_progress=False,
    )
    trainee.train_from_iterator((f"{w} " * n for w, n in common.counts.items()), trainer)
    vocabulary = trainee.get_vocab()
    backend = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(list(SPECIAL))
    ReportTokenizer(backend, _BERT_TOKENS).save(directory)
    return load_tokenizer(directory)
