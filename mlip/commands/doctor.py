"""`mlip doctor`: what is installed, what is missing, what is wrong, and the line that mends it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mlip.system.packages import version_of

OK, MISSING, BROKEN = "ok", "missing", "broken"
NAME = "mlip-medical"
MIN_PYTHON = (3, 11)
# distribution, module, what it serves, is it needed
PACKAGES = (
    ("torch", "torch", "everything", True),
    ("numpy", "numpy", "everything", True),
    ("pyyaml", "yaml", "settings", True),
    ("transformers", "transformers", "image and text towers", True),
    ("tokenizers", "tokenizers", "report tokens", True),
    ("safetensors", "safetensors", "checkpoints", True),
    ("opencv-python-headless", "cv2", "images", True),
    ("pillow", "PIL", "image and text towers", True),
    ("numba", "numba", "input loops", True),
    ("pyarrow", "pyarrow", "manifests", True),
    ("pydicom", "pydicom", "DICOM files", True),
    ("imagecodecs", "imagecodecs", "compressed DICOM", True),
    ("pyahocorasick", "ahocorasick", "linking concepts", True),
    ("scipy", "scipy", "manifests and evaluation", True),
    ("scikit-learn", "sklearn", "evaluation", True),
    ("pycocotools", "pycocotools", "detection scores", True),
    ("jinja2", "jinja2", "report.html", True),
    ("rich", "rich", "the log of a run", True),
    ("psutil", "psutil", "memory plans", True),
    ("deepspeed", "deepspeed", "ZeRO training", False),
    ("nvidia-dali-cuda130", "nvidia.dali", "DALI input", False),
    ("triton", "triton", "fused kernels on a GPU", False),
    ("xformers", "xformers", "its attention, optional, made for x86_64 alone", False),
    ("tensorboard", "tensorboard", "its curves, optional", False),
    ("wandb", "wandb", "curves in Weights & Biases, optional", False),
    ("mlflow-skinny", "mlflow", "curves in MLflow, optional", False),
    ("sqlalchemy", "sqlalchemy", "MLflow without a server, optional", False),
    ("alembic", "alembic", "the same", False),
    ("onnx", "onnx", "mlip export --onnx, optional", False),
    ("onnxscript", "onnxscript", "the same", False),
    ("onnxruntime", "onnxruntime", "the same", False),
)
# what installs it where that is not its name alone
REMEDIES = {
    "deepspeed": f"pip install '{NAME}[deepspeed]'",
    "nvidia-dali-cuda130": f"pip install '{NAME}[dali]'",
    "triton": "comes with torch for CUDA",
    "tensorboard": f"pip install '{NAME}[tensorboard]'",
    "wandb": f"pip install '{NAME}[wandb]'",
    "mlflow-skinny": f"pip install '{NAME}[mlflow]'",
    "sqlalchemy": f"pip install '{NAME}[mlflow]'",
    "alembic": f"pip install '{NAME}[mlflow]'",
    "onnx": f"pip install '{NAME}[onnx]'",
    "onnxscript": f"pip install '{NAME}[onnx]'",
    "onnxruntime": f"pip install '{NAME}[onnx]'",
}


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report."""

    name: str
    state: str  # OK | MISSING | BROKEN
    detail: str
    remedy: str = ""
    is_needed: bool = False


def ranges() -> dict[str, str]:
    """Distribution -> the versions that this project asks for, as pip was told; {} without pip."""
    try:
        lines = importlib.metadata.requires(NAME) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = [re.match(r"([\w.-]+)\s*([^;]*)", line) for line in lines]
    return {one[1].lower(): one[2].strip() for one in found if one is not None}


def _fits(version: str, wanted: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # comes with transformers
        return True
    return SpecifierSet(wanted).contains(version, prereleases=True)


def check_packages() -> list[Check]:
    checks, wanted = [], ranges()
    for distribution, module, purpose, is_needed in PACKAGES:
        version = version_of(distribution)
        needed = wanted.get(distribution, "")
        if version is not None and not _fits(version, needed):
            detail = f"{version}: {purpose}; {needed} is needed"
            mend = f"pip install '{distribution}{needed}'"
            checks.append(Check(distribution, BROKEN, detail, mend, is_needed))
        elif version is not None:
            checks.append(Check(distribution, OK, f"{version}: {purpose}"))
        elif _is_importable(module):
            checks.append(Check(distribution, OK, f"under another name: {purpose}"))
        else:
            checks.append(Check(distribution, MISSING, purpose, _remedy(distribution), is_needed))
    return checks


def _remedy(distribution: str) -> str:
    line = REMEDIES.get(distribution, f"pip install {distribution}")
    # on no package index: where it is not installed, pip knows it by the checkout alone
    return line if version_of(NAME) is not None else line.replace(f"{NAME}[", ".[")


def install_line(error: ImportError) -> str | None:
    """What to install where a module that the error or its causes name is missing; else None."""
    names: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            names.append(cause.name.split(".")[0])
        cause = cause.__cause__ or cause.__context__
    if not names or "mlip" in names:
        return None
    for distribution, module, purpose, _ in PACKAGES:
        if module.split(".")[0] in names:
            missing = f"{distribution} is not installed ({purpose}): {_remedy(distribution)}"
            break
    else:
        missing = f"no module {names[-1]!r} is installed: install what holds it"
    return f"{missing}; `mlip doctor` lists all that is missing, `pip install .` brings it"


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def check_python() -> Check:
    version = platform.python_version()
    if sys.version_info < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        return Check("python", BROKEN, f"{version}; {wanted} or newer is needed", "", True)
    if sys.flags.optimize > 1:
        detail = f"{version} without docstrings (-OO), which transformers reads as it is imported"
        return Check("python", BROKEN, detail, "unset PYTHONOPTIMIZE", True)
    return Check("python", OK, version)


def check_torchvision() -> Check | None:
    """A torchvision built for another torch breaks transformers as well: worse than none.

    It is tried in a process of its own, so that nothing half-loaded stays behind.
    """
    version = version_of("torchvision")
    if version is None:
        return None
    tried = subprocess.run(
        [sys.executable, "-c", "import torchvision"], capture_output=True, text=True, timeout=120
    )
    if tried.returncode == 0:
        return Check("torchvision", OK, f"{version}: not used by this project")
    reason = (tried.stderr.strip().splitlines() or ["no message"])[-1]
    return Check(
        "torchvision",
        BROKEN,
        f"{version} does not fit torch {version_of('torch')} ({reason}); it breaks transformers",
        "pip uninstall -y torchvision",
        True,
    )


def check_name_clash() -> Check | None:
    """Another project owns the distribution name `mlip` and ships the same import name."""
    version = version_of("mlip")
    if version is None:
        return None
    return Check(
        "mlip",
        BROKEN,
        f"{version} is another project (interatomic potentials) with the same import name",
        "pip uninstall -y mlip",
        True,
    )


def check_compiler() -> Check:
    """DeepSpeed builds a small C++ extension the first time it runs on a CPU."""
    lacking = [name for name in ("g++", "ninja") if shutil.which(name) is None]
    if "ninja" in lacking and version_of("ninja") is not None:
        lacking.remove("ninja")
    if lacking:
        return Check(
            "compiler",
            MISSING,
            f"{' and '.join(lacking)}: DeepSpeed on a CPU builds an extension with it",
            " && ".join(
                {"g++": "apt-get install g++", "ninja": "pip install ninja"}[n] for n in lacking
            ),
        )
    return Check("compiler", OK, "g++ and ninja: DeepSpeed can build its extension")


def check_temporary() -> Check:
    """torch and transformers ask for a temporary folder while they are imported."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:
        detail = "no folder can be written to: TMPDIR, /tmp and /var/tmp are full or closed"
        return Check("temporary", BROKEN, detail, "export TMPDIR=/a/folder/with/room", True)
    detail = f"{folder}: a folder that can be written to"
    with contextlib.suppress(ImportError):  # without torch nothing is compiled
        from mlip.kernels._dispatch import runs_no_programs

        if runs_no_programs(Path(folder)):
            detail += (
                "; it runs no programs (noexec): torch.compile cannot use what it builds there"
            )
    return Check("temporary", OK, detail)


def check_accelerator() -> Check:
    from mlip.system.machine import usable_cores, usable_memory

    try:
        import torch
    except ImportError as error:
        return Check("accelerator", BROKEN, f"torch cannot be imported: {error}", "", True)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory = properties.total_memory / 2**30
        return Check(
            "accelerator",
            OK,
            f"{torch.cuda.device_count()} x {properties.name}, {memory:.0f} GiB, "
            f"CUDA {torch.version.cuda}; kernels: {_kernels()}{_bfloat16('cuda')}",
        )
    memory = usable_memory() / 2**30
    detail = f"none; {usable_cores()} cores and {memory:.1f} GiB to use; kernels: torch"
    detail += _bfloat16("cpu")
    if torch.version.cuda is not None and shutil.which("nvidia-smi"):
        return Check(
            "accelerator",
            BROKEN,
            f"torch is built for CUDA {torch.version.cuda} and a driver is there, but no GPU can "
            "be used",
            "check the driver with nvidia-smi; it may be older than this CUDA needs",
        )
    return Check("accelerator", OK, detail)


def _bfloat16(device: str) -> str:
    import torch

    from mlip.precision import multiplies_bf16

    return "" if multiplies_bf16(torch.device(device)) else "; no products of bfloat16"


def _kernels() -> str:
    from mlip.kernels._dispatch import missing_tools

    lacking = missing_tools()
    return f"torch, as {lacking}" if lacking else f"triton{_speed_of_triton()}"


def _speed_of_triton() -> str:
    """What to know of a Triton whose kernels nobody timed (counted in kernels/README.md)."""
    version = version_of("triton") or ""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or tuple(map(int, found.groups())) <= (3, 7):
        return ""
    return (
        f" {version}, not timed: up to 1.15 times the instructions of 3.6, which torch 2.11 brings"
    )


def check_dali() -> Check | None:
    """DALI for CUDA 12 brings an nvJPEG that can decode some lossless DICOM frames to zeros."""
    version = version_of("nvidia-dali-cuda120")
    if version is None:
        return None
    return Check(
        "nvidia-dali-cuda120",
        BROKEN,
        f"{version}: brings nvJPEG 12, which can decode 9 to 15 bit lossless JPEG to all zeros",
        f"pip uninstall -y nvidia-dali-cuda120 && {_remedy('nvidia-dali-cuda130')}",
    )


def examine() -> list[Check]:
    """Every check, in the order a person reads them."""
    found = [
        check_python(),
        check_name_clash(),
        *check_packages(),
        check_torchvision(),
        check_dali(),
        check_compiler(),
        check_temporary(),
        check_accelerator(),
    ]
    return [check for check in found if check is not None]


def report(checks: list[Check]) -> str:
    """The checks as text, what to do last."""
    signs = {OK: "ok     ", MISSING: "missing", BROKEN: "BROKEN "}
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        state = signs[check.state]
        if check.state == MISSING and not check.is_needed:
            state = "off    "
        lines.append(f"{state}  {check.name:<{width}}  {check.detail}")
    wanted = [c for c in checks if c.remedy and (c.is_needed or c.state == BROKEN)]
    optional = [c for c in checks if c.remedy and c not in wanted]
    if wanted:
        lines += ["", "To mend:"] + [f"  {c.remedy}" for c in wanted]
    if optional:
        lines += ["", "To switch on what is off:"] + [
            f"  {c.remedy:<44} # {c.name}" for c in optional
        ]
    if not wanted:
        lines += ["", "Ready: training and evaluation will run here."]
    return "\n".join(lines)


def is_healthy(checks: list[Check]) -> bool:
    return not any(c.state == BROKEN or (c.state == MISSING and c.is_needed) for c in checks)
