"""Nothing of a stranger's is executed: planted checkpoints with matching hashes, and the source.

Twelve payloads lie where some library would unpickle, import or evaluate them. Each is a command
that makes a file; the folder's hash list is made to match, as a stranger can. Everything that reads
a checkpoint then reads it: resuming, evaluation, export. The file must never appear.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mlip.dataloading.reports.tokenizer import load_tokenizer
from mlip.pretrained import PretrainedError, open_checkpoint
from mlip.training import checkpoint
from mlip.training.lifecycle import CheckpointError
from tests.training.test_checkpoint import _config, _save

ROOT = Path(__file__).resolve().parents[2]


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def _pickled(marker: Path) -> bytes:
    return pickle.dumps(_Payload(marker))


def _torch_zip(marker: Path) -> bytes:
    """As torch.save writes it: a zip whose data.pkl is unpickled."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("archive/data.pkl", _pickled(marker))
        archive.writestr("archive/version", "3\n")
    return held.getvalue()


def _numpy_objects(marker: Path) -> bytes:
    held = io.BytesIO()
    np.save(held, np.array([_Payload(marker)], dtype=object), allow_pickle=True)
    return held.getvalue()


def _yaml_object(marker: Path) -> bytes:
    return f"!!python/object/apply:os.system ['touch {marker}']\n".encode()


def _code(marker: Path) -> bytes:
    return f"import os\nos.system('touch {marker}')\n".encode()


def _json_code(marker: Path) -> bytes:
    return f"__import__('os').system('touch {marker}')".encode()


# name -> (where it lies below the checkpoint's folder, what lies there)
PAYLOADS: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "pickle as parameters": ("parameters.safetensors", _pickled),
    "torch archive as parameters": ("parameters.safetensors", _torch_zip),
    "pickle as first moments": ("exp_avg.safetensors", _pickled),
    "pickle as second moments": ("exp_avg_sq.safetensors", _pickled),
    "object array as buffers": ("buffers.safetensors", _numpy_objects),
    "pickle as state": ("state.json", _pickled),
    "YAML object as state": ("state.json", _yaml_object),
    "expression as state": ("state.json", _json_code),
    "DeepSpeed's model states": ("mp_rank_00_model_states.pt", _torch_zip),
    "DeepSpeed's optimiser states": ("zero_pp_rank_0_mp_rank_00_optim_states.pt", _pickled),
    "metadata of torch's distributed checkpoints": (".metadata", _pickled),
    "code beside a model": ("modeling_mlip.py", _code),
}


def _plant(folder: Path, name: str, content: bytes) -> None:
    """The file, and hashes that match: they catch damage, not malice."""
    (folder / name).write_bytes(content)
    names = sorted(p.name for p in folder.iterdir() if p.name not in ("SHA256SUMS", "COMPLETE"))
    sums = "".join(f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names)
    (folder / "SHA256SUMS").write_text(sums)
    (folder / "COMPLETE").write_text(hashlib.sha256(sums.encode()).hexdigest() + "\n")


def test_there_are_twelve_payloads_and_each_of_them_would_work(tmp_path):
    # the injector's own test: a payload that cannot fire proves nothing
    assert len(PAYLOADS) == 12
    marker = tmp_path / "executed"
    for make in (_pickled, _torch_zip, _numpy_objects, _yaml_object, _code, _json_code):
        content = make(marker)
        if make is _pickled:
            pickle.loads(content)
        elif make is _torch_zip:
            torch.load(io.BytesIO(content), weights_only=False)
        elif make is _numpy_objects:
            np.load(io.BytesIO(content), allow_pickle=True)
        elif make is _yaml_object:
            yaml.unsafe_load(content)
        elif make is _code:
            exec(content)
        else:
            eval(content)
        assert marker.exists(), make
        marker.unlink()


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_planted_payload_is_never_executed(tmp_path, name, record_property):
    place, make = PAYLOADS[name]
    run, marker = tmp_path / "run", tmp_path / "executed"
    folder = _save(run, 1)
    _plant(folder, place, make(marker))
    if place in ("parameters.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors",
                 "buffers.safetensors", "state.json"):  # fmt: skip
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoint.load_newest(_config(run))
    else:
        assert checkpoint.load_newest(_config(run)) is not None  # nobody opens it
    for path in (run, folder):  # evaluation and export; the toy state is no model in any case
        with pytest.raises((CheckpointError, PretrainedError, ValueError)):
            open_checkpoint(path)
    record_property("executed", int(marker.exists()))
    assert not marker.exists()


def test_code_that_a_tokenizer_brings_is_neither_run_nor_offered(tmp_path, monkeypatch):
    """transformers asks on the terminal whether to run it, unless it is told not to."""
    marker = tmp_path / "executed"
    (tmp_path / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}})
    )
    (tmp_path / "theirs.py").write_bytes(_code(marker))
    monkeypatch.setattr("builtins.input", lambda _: "y")
    with pytest.raises(ValueError, match="code that a folder brings is never run"):
        load_tokenizer(tmp_path)
    assert not marker.exists()


# what runs or can run what it reads; an entry is a call's dotted name, or a keyword of any call
FORBIDDEN_CALLS = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "joblib.load", "dill.load",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "compile", "__import__",
    "os.system", "os.popen", "marshal.loads", "shelve.open",
}  # fmt: skip
FORBIDDEN_KEYWORDS = {"shell": True, "allow_pickle": True, "trust_remote_code": True,
                      "weights_only": False}  # fmt: skip
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}


def forbidden_in(source: str) -> list[str]:
    tree, found = ast.parse(source), []
    # a loader of the file's own that refuses more than YAML's safe one
    safe_loaders = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any("yaml.SafeLoader" in ast.unparse(base) for base in node.bases)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN_IMPORTS]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (
            FORBIDDEN_IMPORTS
        ):
            found.append(str(node.module))
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        loaders = [ast.unparse(k.value) for k in node.keywords if k.arg == "Loader"]
        is_safe = name == "yaml.load" and loaders and loaders[0] in safe_loaders
        if name in FORBIDDEN_CALLS and not is_safe:
            found.append(name)
        for keyword in node.keywords:
            if keyword.arg in FORBIDDEN_KEYWORDS and isinstance(keyword.value, ast.Constant):
                if keyword.value.value is FORBIDDEN_KEYWORDS[keyword.arg]:
                    found.append(f"{name}({keyword.arg}={keyword.value.value})")
    return found


def _sources() -> list[Path]:
    files = [ROOT / "train.py"]
    for folder in ("mlip", "kernels", "dataloading"):
        files += sorted(p for p in (ROOT / folder).rglob("*.py"))
    return files


def test_no_source_file_calls_what_can_execute_data():
    found = {str(p.relative_to(ROOT)): f for p in _sources() if (f := forbidden_in(p.read_text()))}
    assert not found
    assert len(_sources()) > 100  # the scan saw the project


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "torch.load(x)", "yaml.load(x)", "eval('1')",
     "exec(x)", "subprocess.run(x, shell=True)", "np.load(x, allow_pickle=True)",
     "AutoModel.from_pretrained(x, trust_remote_code=True)", "import joblib",
     "class L(yaml.FullLoader): ...\nyaml.load(x, Loader=L)"],
)  # fmt: skip
def test_the_scan_sees_each_of_them(source):
    assert forbidden_in(source)


def test_the_scan_lets_pass_what_is_harmless():
    assert not forbidden_in("model.eval()\nyaml.safe_load(x)\nre.compile(x)\nnp.load(x)")
    assert not forbidden_in("class L(yaml.SafeLoader): ...\nyaml.load(x, Loader=L)")
