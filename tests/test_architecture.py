"""Who may import whom, where third parties are walled in, and the layout that imports rely on."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# what every part of mlip.dataloading may use, and each part beside it: what reads one file knows no
# table of pairs, what prepares a data set no batch
_DATA_USES = (
    "mlip.settings",
    "mlip.system",
    *(f"mlip.dataloading.{name}" for name in ("compiled", "demographics", "image_limits")),
    *(f"mlip.dataloading.{name}" for name in ("ledger", "name_forms", "progress", "text_hash")),
    "mlip.dataloading.view_position",
)
_DATA_PARTS = {
    "tables": (),
    "images": ("dicom",),
    "dicom": (),
    "phantom": ("dicom",),
    "reports": ("tables", "shards", "keyed_draws"),
    "pipelines": ("images", "shards", "manifest", "keyed_draws"),
    "datasets": ("tables", "reports", "images", "dicom", "splits"),
    "prepare": ("datasets", "images", "dicom", "shards"),
}

# what every part of mlip.transfer may use, and each part beside it: labels know no score, scores no
# task, tasks that fit nothing none that fit
_TRANSFER_USES = (
    "mlip.settings",
    "mlip.system",
    "mlip.batch",
    "mlip.kernels",
    "mlip.knowledge",
    "mlip.dataloading",
    "mlip.encoders",
    "mlip.model",
    "mlip.keyed_random",
    "mlip.unit_length",
    "mlip.precision",
    "mlip.transfer.array",
)
_TRANSFER_SHARED = tuple(
    f"mlip.transfer.{name}"
    for name in (
        *("features", "fingerprint", "feature_store", "frames", "draws", "png_text", "trained_on"),
        *("trained_heads", "truth"),
    )
)
_TRANSFER_PARTS = {
    "truth": (),
    "measures": ("mlip.transfer.truth", "mlip.transfer.fingerprint", "mlip.transfer.table"),
    "alignment": (*_TRANSFER_SHARED, "mlip.transfer.measures"),
    "fits": (*_TRANSFER_SHARED, "mlip.transfer.measures"),
    "films": (*_TRANSFER_SHARED, "mlip.transfer.alignment"),
}

# module prefix -> prefixes of ours it may import; the most specific rule holds. What has no rule
# (assembly, saved, commands, train.py) puts the parts together, one way too: the test of circles.
ALLOWED = {
    "mlip.settings": ("mlip.settings",),
    # what settings are, before any of them has a value
    **{
        f"mlip.settings.{name}": ("mlip.settings.typed_tree",)
        for name in (
            "typed_tree",
            "strict_yaml",
            "losses",
            "evaluate",
            "transfer",
            "bounds",
            "needed",
        )
    },
    "mlip.settings.agreement": ("mlip.settings.typed_tree", "mlip.settings.transfer"),
    "mlip.settings.config_file": ("mlip.settings.typed_tree", "mlip.settings.strict_yaml"),
    "mlip.system": ("mlip.system", "mlip.settings.typed_tree"),
    "mlip.system.machine": (),  # of the standard library alone, for machines with torch and no more
    "mlip.ranks": ("mlip.ranks", "mlip.system.machine"),
    **{
        f"mlip.{name}": ()
        for name in (
            "first_process",
            "batch",
            "host_read",
            "precision",
            "unit_length",
            "token_weights",
        )
    },
    "mlip.keyed_random": ("mlip.kernels.keyed_uniform",),
    "mlip.kernels": ("mlip.kernels",),
    "mlip.knowledge": ("mlip.knowledge", "mlip.settings", "mlip.system"),
    "mlip.dataloading": (
        "mlip.dataloading",
        "mlip.settings",
        "mlip.system",
        "mlip.batch",
        "mlip.keyed_random",
    ),
    **{
        f"mlip.dataloading.{part}": (
            f"mlip.dataloading.{part}",
            *_DATA_USES,
            *(f"mlip.dataloading.{name}" for name in others),
            *(("mlip.batch", "mlip.knowledge") if part == "reports" else ()),
            *(("mlip.keyed_random",) if part == "pipelines" else ()),
        )
        for part, others in _DATA_PARTS.items()
    },
    "mlip.encoders": (
        "mlip.encoders",
        "mlip.settings.config",
        "mlip.batch",
        "mlip.ranks.distributed",
    ),
    "mlip.model": (
        "mlip.encoders",
        "mlip.settings.config",
        "mlip.batch",
        "mlip.kernels",
        "mlip.precision",
        "mlip.token_weights",
        "mlip.unit_length",
    ),
    "mlip.divergence": (
        "mlip.settings.config",
        "mlip.batch",
        "mlip.keyed_random",
        "mlip.unit_length",
    ),
    "mlip.losses": (
        "mlip.losses",
        "mlip.settings.config",
        "mlip.batch",
        "mlip.ranks.distributed",
        "mlip.keyed_random",
        "mlip.divergence",
        "mlip.host_read",
        "mlip.kernels",
        "mlip.token_weights",
        "mlip.unit_length",
    ),
    "mlip.training": (
        "mlip.training",
        "mlip.settings",
        "mlip.system",
        "mlip.ranks",
        "mlip.batch",
        "mlip.host_read",
        "mlip.precision",
    ),
    "mlip.training.grad_cache": ("mlip.ranks.distributed",),  # for others' loops: torch alone
    "mlip.objective": (
        "mlip.model",
        "mlip.losses",
        "mlip.batch",
        "mlip.settings.config",
        "mlip.ranks.distributed",
        "mlip.training.grad_cache",
        "mlip.training.determinism",
    ),
    **{
        f"mlip.transfer.{part}": (f"mlip.transfer.{part}", *_TRANSFER_USES, *own)
        for part, own in _TRANSFER_PARTS.items()
    },
    "mlip.transfer": ("mlip.transfer", *_TRANSFER_USES),
    "mlip.pages": ("mlip.pages", "mlip.settings", "mlip.system", "mlip.transfer"),
}
FORBIDDEN_EVERYWHERE = ("tests", "benchmarks", "train", "kernels", "dataloading")
WALLS = {
    "deepspeed": ("mlip/training/deepspeed_engine.py",),
    "nvidia": ("dataloading/pipelines/dali_pipeline.py",),
    "triton": ("triton_kernels.py",),
    "pydicom": ("dataloading/dicom/",),
    "imagecodecs": ("dataloading/dicom/",),
    "transformers": (
        "mlip/encoders/",
        "dataloading/reports/tokenizer.py",
        "mlip/transformers_auto.py",
        "mlip/saved/transformers_",
    ),
    "PIL": ("mlip/saved/transformers_inputs.py",),
    "open_clip": ("kernels/info_nce/open_clip_patch.py",),
    "xformers": ("mlip/encoders/attention.py",),
    "wandb": ("mlip/training/trackers.py",),
    "mlflow": ("mlip/training/trackers.py",),
    "torchvision": (),
    "pycocotools": ("mlip/transfer/measures/average_precision.py",),
    "torchmetrics": (),
    "timm": (),
    "pickle": (),
}


def _sources() -> list[Path]:
    files = []
    for folder in ("mlip", "kernels", "dataloading"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "mlip/kernels" in str(path) or "mlip/dataloading" in str(path):
                continue
            files.append(path)
    return files


def _module(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    name = ".".join(relative.parts)
    return name if name.startswith("mlip") else f"mlip.{name}"


def _imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; imports are absolute here"
            module = node.module or ""
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                names.append(whole if (ROOT / f"{whole.replace('.', '/')}.py").exists() else module)
    return names


@pytest.mark.parametrize("path", _sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way_and_stay_behind_their_walls(path: Path) -> None:
    module = _module(path)
    rules = [rule for rule in ALLOWED if module == rule or module.startswith(rule + ".")]
    allowed = ALLOWED[max(rules, key=len)] if rules else None
    relative = str(path.relative_to(ROOT))
    for name in _imports(path):
        top = name.split(".")[0]
        assert top not in FORBIDDEN_EVERYWHERE, f"{relative} imports {name}"
        if top in WALLS:
            assert any(place in relative for place in WALLS[top]), (
                f"{relative} imports {name}: only {WALLS[top]} may"
            )
        if top == "mlip" and allowed is not None and name != "mlip":
            assert any(name == a or name.startswith(a + ".") for a in allowed), (
                f"{relative} imports {name}; {module} may import {allowed}"
            )


def _part(module: str) -> str:
    """The folder that a module is of; one that lies beside folders is a part by itself."""
    if (ROOT / module.replace(".", "/")).is_dir():
        return module
    folder = module.rpartition(".")[0]
    has_folders = any((ROOT / folder.replace(".", "/")).glob("*/*.py"))
    return module if has_folders else folder


def test_no_part_imports_one_that_imports_it_back_over_however_many() -> None:
    uses: dict[str, set[str]] = {}
    for path in _sources():
        part = _part(_module(path).removesuffix(".__init__"))
        ours = (_part(name) for name in _imports(path) if name.startswith("mlip."))
        uses.setdefault(part, set()).update(name for name in ours if name != part)
    # what imports nothing that is left, or is imported by nothing that is left, is in no circle
    while ends := {
        part
        for part, others in uses.items()
        if not others & uses.keys() or part not in set().union(*uses.values())
    }:
        uses = {part: others - ends for part, others in uses.items() if part not in ends}
    assert not uses, f"circles of imports: {uses}"


def test_namespace_folders_have_no_init_file() -> None:
    for folder in ("kernels", "dataloading"):
        assert not (ROOT / folder / "__init__.py").exists()
        link = ROOT / "mlip" / folder
        assert link.is_symlink() and not Path(link.readlink()).is_absolute()


def test_only_distributed_modules_call_torch_distributed() -> None:
    allowed = {
        "mlip/ranks/distributed.py",
        "mlip/ranks/process_group.py",
        "kernels/_distributed.py",
        "mlip/encoders/normalisation.py",
    }
    users = {
        str(path.relative_to(ROOT))
        for path in _sources()
        if any(name.startswith("torch.distributed") for name in _imports(path))
    }
    assert users == allowed


def test_no_source_file_is_longer_than_400_lines() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in [*_sources(), ROOT / "train.py"]
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long


def test_imports_work_from_an_uninstalled_checkout() -> None:
    code = "import mlip.kernels.info_nce, mlip.dataloading.manifest"
    import sys

    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
