"""Who may import whom, where third parties are walled in, and the layout that imports rely on."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# what every part of mlip.transfer may use, and each part beside it: labels know no score, scores no
# task, tasks that fit nothing none that fit
_TRANSFER_USES = (
    "mlip.transfer_settings",
    "mlip.evaluate_settings",
    "mlip.loss_settings",
    "mlip.config",
    "mlip.strict_yaml",
    "mlip.typed_tree",
    "mlip.output_file",
    "mlip.batch",
    "mlip.kernels",
    "mlip.knowledge",
    "mlip.dataloading",
    "mlip.encoders",
    "mlip.model",
    "mlip.keyed_random",
    "mlip.unit_length",
    "mlip.machine",
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

# module prefix -> prefixes of ours it may import; the most specific rule holds
ALLOWED = {
    "mlip.strict_yaml": (),
    "mlip.typed_tree": (),
    "mlip.transfer_settings": ("mlip.typed_tree",),
    "mlip.config_agreement": ("mlip.typed_tree", "mlip.transfer_settings"),
    "mlip.config_bounds": ("mlip.typed_tree",),
    "mlip.config_file": ("mlip.typed_tree", "mlip.strict_yaml"),
    "mlip.loss_settings": (),
    "mlip.evaluate_settings": (),
    "mlip.config": (
        "mlip.strict_yaml",
        "mlip.typed_tree",
        "mlip.config_agreement",
        "mlip.config_bounds",
        "mlip.config_file",
        "mlip.evaluate_settings",
        "mlip.loss_settings",
        "mlip.transfer_settings",
    ),
    "mlip.needed_settings": (),
    "mlip.given_settings": (
        "mlip.needed_settings",
        "mlip.typed_tree",
        "mlip.config_file",
        "mlip.config",
        "mlip.transfer_settings",
    ),
    "mlip.settings_reference": (
        "mlip.typed_tree",
        "mlip.config",
        "mlip.config_bounds",
        "mlip.given_settings",
    ),
    "mlip.settings_text": (
        "mlip.typed_tree",
        "mlip.config",
        "mlip.given_settings",
        "mlip.settings_reference",
    ),
    "mlip.output_file": ("mlip.typed_tree", "mlip.folder_lock"),
    "mlip.first_process": (),
    "mlip.machine": (),
    "mlip.folder_lock": (),
    "mlip.unread_output": (),
    "mlip.batch": (),
    "mlip.keyed_random": ("mlip.kernels.keyed_uniform",),
    "mlip.host_read": (),
    "mlip.precision": (),
    "mlip.unit_length": (),
    "mlip.token_weights": (),
    "mlip.launcher": (),
    "mlip.distributed": (),
    "mlip.process_group": ("mlip.distributed", "mlip.launcher", "mlip.machine"),
    "mlip.kernels": ("mlip.kernels",),
    "mlip.knowledge": (
        "mlip.knowledge",
        "mlip.config",
        "mlip.output_file",
        "mlip.strict_yaml",
    ),
    "mlip.knowledge.command": (
        "mlip.knowledge",
        "mlip.config",
        "mlip.output_file",
        "mlip.unread_output",
        "mlip.dataloading.report_markup",
        "mlip.dataloading.report_text",
    ),
    "mlip.dataloading": (
        "mlip.dataloading",
        "mlip.typed_tree",
        "mlip.config",
        "mlip.batch",
        "mlip.keyed_random",
        "mlip.knowledge",
        "mlip.machine",
        "mlip.folder_lock",
        "mlip.output_file",
        "mlip.unread_output",
    ),
    "mlip.encoders": ("mlip.encoders", "mlip.config", "mlip.batch", "mlip.distributed"),
    "mlip.model": (
        "mlip.encoders",
        "mlip.config",
        "mlip.batch",
        "mlip.kernels",
        "mlip.precision",
        "mlip.token_weights",
        "mlip.unit_length",
    ),
    "mlip.divergence": ("mlip.config", "mlip.batch", "mlip.keyed_random", "mlip.unit_length"),
    "mlip.losses": (
        "mlip.losses",
        "mlip.config",
        "mlip.batch",
        "mlip.distributed",
        "mlip.keyed_random",
        "mlip.divergence",
        "mlip.host_read",
        "mlip.kernels",
        "mlip.token_weights",
        "mlip.unit_length",
    ),
    "mlip.training": (
        "mlip.training",
        "mlip.config",
        "mlip.config_file",
        "mlip.distributed",
        "mlip.process_group",
        "mlip.batch",
        "mlip.host_read",
        "mlip.machine",
        "mlip.output_file",
        "mlip.precision",
        "mlip.folder_lock",
        "mlip.unread_output",
    ),
    "mlip.training.grad_cache": ("mlip.distributed",),  # for others' loops: torch alone
    "mlip.objective": (
        "mlip.model",
        "mlip.losses",
        "mlip.batch",
        "mlip.config",
        "mlip.distributed",
        "mlip.training.grad_cache",
        "mlip.training.determinism",
    ),
    **{
        f"mlip.transfer.{part}": (f"mlip.transfer.{part}", *_TRANSFER_USES, *own)
        for part, own in _TRANSFER_PARTS.items()
    },
    "mlip.transfer": ("mlip.transfer", *_TRANSFER_USES),
}
FORBIDDEN_EVERYWHERE = ("tests", "benchmarks", "train", "kernels", "dataloading")
WALLS = {
    "deepspeed": ("mlip/training/deepspeed_engine.py",),
    "nvidia": ("dataloading/dali_pipeline.py",),
    "triton": ("triton_kernels.py",),
    "pydicom": ("dataloading/dicom",),
    "imagecodecs": ("dataloading/dicom",),
    "transformers": ("mlip/encoders/", "dataloading/report_tokenizer.py", "mlip/transformers_"),
    "PIL": ("mlip/transformers_inputs.py",),
    "open_clip": ("kernels/info_nce/open_clip_patch.py",),
    "xformers": ("mlip/encoders/attention.py",),
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
            names.append(node.module or "")
            names += [f"{node.module}.{alias.name}" for alias in node.names]
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


def test_namespace_folders_have_no_init_file() -> None:
    for folder in ("kernels", "dataloading"):
        assert not (ROOT / folder / "__init__.py").exists()
        link = ROOT / "mlip" / folder
        assert link.is_symlink() and not Path(link.readlink()).is_absolute()


def test_only_distributed_modules_call_torch_distributed() -> None:
    allowed = {
        "mlip/distributed.py",
        "mlip/process_group.py",
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
