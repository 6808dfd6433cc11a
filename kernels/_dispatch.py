"""Which implementation serves a call: Triton kernels or plain torch, and why.

Asks whether triton is there without importing it, so that a machine without it can import the ops.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sysconfig
from pathlib import Path

import torch

logger = logging.getLogger("mlip")

DISABLE_VARIABLE = "MLIP_DISABLE_TRITON"
# Ampere: the first chips whose tensor cores multiply bfloat16
MINIMUM_CAPABILITY = (8, 0)
HAS_TRITON = importlib.util.find_spec("triton") is not None


def missing_tools() -> str | None:
    """What Triton lacks to build and load the launcher of a kernel: compiler, headers, a place."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton finds no C compiler; install gcc or clang, or name one in CC"
    scheme = sysconfig.get_default_scheme()
    # where triton/runtime/build.py looks; a compiler may be told of other folders
    headers = Path(
        sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
    )
    is_told = any(os.environ.get(name) for name in ("CPATH", "C_INCLUDE_PATH"))
    if not is_told and not (headers / "Python.h").is_file():
        return f"triton needs Python.h, absent from {headers}; install python3-dev or its like"
    return _closed_cache()


def _closed_cache() -> str | None:
    """Why no launcher can be loaded from Triton's cache, or made there; as in a container."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache")).absolute()
    # os.path: pathlib's own raises where a parent is closed
    there = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    if runs_no_programs(there):
        return (
            f"triton loads what it compiles from {folder}, on a file system that runs no programs "
            "(noexec); set TRITON_CACHE_DIR to another, or mount it with exec"
        )
    # one that is there may hold all that is asked for, unless it holds nothing
    lacks = "make" if there != folder else "fill" if _is_empty(folder) else ""
    if lacks and not os.access(there, os.W_OK | os.X_OK):
        return (
            f"triton cannot {lacks} {folder}; set TRITON_CACHE_DIR to a folder that can be written"
        )
    return None


def _is_empty(folder: Path) -> bool:
    try:
        return not os.listdir(folder)
    except OSError:  # one that may not be listed may hold files all the same
        return False


def runs_no_programs(folder: Path) -> bool:
    """Whether the folder is mounted noexec; False where the system does not tell."""
    try:
        return bool(os.statvfs(folder).f_flag & os.ST_NOEXEC)
    except (AttributeError, OSError):  # macOS has no such flag, Windows no statvfs
        return False


# asked once: torch.compile cannot trace a look at the file system
MISSING_TOOLS = missing_tools()
_said: set[str] = set()


def is_interpreting() -> bool:
    """True where Triton runs kernels through its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _capability(index: int) -> tuple[int, int]:
    # of the properties, which torch.compile takes for a constant
    properties = torch.cuda.get_device_properties(index)
    return properties.major, properties.minor


def _obstacle(device: torch.device) -> str | None:
    """Why Triton cannot run on this device, or None."""
    if os.environ.get(DISABLE_VARIABLE, "0") not in ("", "0"):
        return f"{DISABLE_VARIABLE} is set"
    if not HAS_TRITON:
        return "triton is not installed"
    if device.type == "cpu" and is_interpreting():
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, and Triton needs an NVIDIA GPU"
    if torch.version.cuda is None:
        return "this torch build has no CUDA"
    index = device.index if device.index is not None else torch.cuda.current_device()
    if _capability(index) < MINIMUM_CAPABILITY:
        major, minor = _capability(index)
        return f"the GPU has compute capability {major}.{minor}, below 8.0"
    return None


def check_impl(impl: str) -> None:
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'expected impl "auto", "triton" or "torch", got {impl!r}')


def resolve(impl: str, device: torch.device, refusal: str | None = None) -> str:
    """ "triton" or "torch" for a call on `device`.

    refusal: why the op's own kernels cannot take these inputs (dtype, size), or None
    Raises:  ValueError for an unknown impl, or for impl="triton" where Triton cannot serve
    """
    check_impl(impl)
    if impl == "torch":
        return "torch"
    obstacle = _obstacle(device) or refusal
    if impl == "triton":
        if obstacle is not None:
            remedy = 'pass impl="auto" or "torch"'
            if device.type == "cpu" and not is_interpreting():
                remedy += ", or set TRITON_INTERPRET=1 before the first import to run CPU tensors "
                remedy += "in the interpreter"
            raise ValueError(f'impl="triton" cannot run: {obstacle}; {remedy}')
        return "triton"
    if obstacle is None and device.type == "cuda":
        # impl="triton" goes on: launchers may lie in its cache, and its own error says more
        obstacle = MISSING_TOOLS
    # the interpreter is for tests: thousands of times slower than torch, so never chosen by itself
    if obstacle is None and device.type == "cuda":
        return "triton"
    is_news = obstacle is not None and obstacle not in _said
    if device.type == "cuda" and is_news and not torch.compiler.is_compiling():
        _said.add(str(obstacle))
        logger.info("mlip.kernels runs in plain torch: %s", obstacle)
    return "torch"
