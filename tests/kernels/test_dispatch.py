"""Which implementation is chosen, and what is said where none can serve."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mlip.kernels import _dispatch

CPU = torch.device("cpu")


def test_every_launching_operator_makes_its_tensors_gpu_the_current_one() -> None:
    """Triton launches on the current GPU and its current stream, whatever the tensors are on.

    Oracle: the syntax tree: launchers are imported inside operators, and called under the guard.
    """
    folder = Path(_dispatch.__file__).parent
    seen = 0
    for file in (folder / "token_knowledge_patch/operators.py", folder / "info_nce/op.py"):
        for function in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(function, ast.FunctionDef):
                continue
            imports = [n for n in ast.walk(function) if isinstance(n, ast.ImportFrom)]
            modules = [n for n in imports if "triton_kernels" in (n.module or "")]
            launchers = {a.asname or a.name for n in modules for a in n.names}
            guards = [
                n
                for n in ast.walk(function)
                if isinstance(n, ast.With) and "device_of" in ast.unparse(n.items[0])
            ]
            inside = {n.id for g in guards for n in ast.walk(g) if isinstance(n, ast.Name)}
            assert launchers <= inside, (function.name, launchers - inside)
            seen += bool(launchers)
    assert seen == 10


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(_dispatch.DISABLE_VARIABLE, raising=False)


def test_cpu_tensors_go_to_torch() -> None:
    assert _dispatch.resolve("auto", CPU) == "torch"
    assert _dispatch.resolve("torch", CPU) == "torch"


def test_triton_without_a_gpu_is_an_error_that_says_why() -> None:
    with pytest.raises(ValueError, match="needs an NVIDIA GPU.*TRITON_INTERPRET=1"):
        _dispatch.resolve("triton", CPU)


def test_the_interpreter_takes_cpu_tensors_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _dispatch.resolve("triton", CPU) == "triton"
    assert _dispatch.resolve("auto", CPU) == "torch"
    # no remedy that would not help: they are in the interpreter, or can never be
    for device, refusal, why in ((CPU, "D is too large", "D is too large"),
                                 (torch.device("mps"), None, "tensors are on mps")):  # fmt: skip
        with pytest.raises(ValueError, match=why) as error:
            _dispatch.resolve("triton", device, refusal)
        assert "TRITON_INTERPRET" not in str(error.value)


def test_the_switch_turns_triton_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(_dispatch.DISABLE_VARIABLE, "1")
    assert _dispatch.resolve("auto", CPU) == "torch"
    with pytest.raises(ValueError, match=_dispatch.DISABLE_VARIABLE):
        _dispatch.resolve("triton", CPU)
    for off in ("", "0"):
        monkeypatch.setenv(_dispatch.DISABLE_VARIABLE, off)
        assert _dispatch.resolve("triton", CPU) == "triton"


def test_an_old_gpu_falls_back_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    cuda = torch.device("cuda", 0)
    assert _dispatch.resolve("auto", cuda) == "torch"
    with pytest.raises(ValueError, match="7.5, below 8.0"):
        _dispatch.resolve("triton", cuda)
    monkeypatch.setattr(_dispatch, "_capability", lambda index: (8, 0))
    assert _dispatch.resolve("auto", cuda) == "triton"


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_capability", lambda index: (9, 0) if index == 1 else (7, 5))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert _dispatch.resolve("auto", torch.device("cuda")) == "triton"
    assert _dispatch.resolve("auto", torch.device("cuda", 0)) == "torch"


def test_why_a_gpu_is_not_used_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with AMD's torch, whose GPUs are called cuda too."""
    monkeypatch.setattr(_dispatch, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(_dispatch, "_said", set())
    monkeypatch.setattr(_dispatch.logger, "propagate", True)
    with caplog.at_level("INFO", "mlip"):
        for device in (CPU, torch.device("cuda", 0), torch.device("cuda", 1)):
            assert _dispatch.resolve("auto", device) == "torch"
    assert caplog.messages == ["mlip.kernels runs in plain torch: this torch build has no CUDA"]


def test_without_a_c_compiler_or_headers_auto_is_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Triton compiles a launcher in C at a kernel's first call; slim images have no compiler."""
    assert _dispatch.missing_tools() is None  # this machine has both
    with monkeypatch.context() as patch:
        patch.delenv("CPATH", raising=False)
        patch.delenv("C_INCLUDE_PATH", raising=False)
        patch.setattr("sysconfig.get_path", lambda *_: str(tmp_path))
        assert "Python.h" in str(_dispatch.missing_tools())
        for name in ("CPATH", "C_INCLUDE_PATH"):  # a compiler may be told where to look
            with monkeypatch.context() as told:
                told.setenv(name, "/opt/python/include")
                assert _dispatch.missing_tools() is None
        patch.setenv("PATH", str(tmp_path))
        patch.delenv("CC", raising=False)
        assert "C compiler" in str(_dispatch.missing_tools())
        patch.setenv("CC", "/opt/bin/cc")
        assert "C compiler" not in str(_dispatch.missing_tools())
        patch.delenv("CC")
        (tmp_path / "clang").touch(mode=0o755)
        assert "C compiler" not in str(_dispatch.missing_tools())
    monkeypatch.setattr(_dispatch, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    cuda = torch.device("cuda", 0)
    assert _dispatch.resolve("auto", cuda) == "triton"
    monkeypatch.setattr(_dispatch, "MISSING_TOOLS", "triton finds no C compiler")
    assert _dispatch.resolve("auto", cuda) == "torch"
    assert _dispatch.resolve("triton", cuda) == "triton"


def test_where_nothing_can_be_loaded_from_tritons_cache_auto_is_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A container's /tmp is mounted noexec by default, and its home read-only."""
    monkeypatch.delenv("TRITON_HOME", raising=False)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _dispatch.missing_tools() is None
    asked = []

    def closed(place: str | Path, mode: int) -> bool:
        asked.append(str(place))
        return False

    with monkeypatch.context() as patch:  # root may write anywhere: the system's answer is given
        patch.setattr("os.access", closed)
        assert "triton cannot make" in str(_dispatch._closed_cache())
        assert asked == [str(tmp_path)]
        (tmp_path / "filled").mkdir()
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path / "filled"))
        patch.setenv("TRITON_HOME", "/proc")  # the folder itself comes first
        assert "triton cannot fill" in str(_dispatch._closed_cache())
        (tmp_path / "filled" / "KERNEL").mkdir()
        assert _dispatch._closed_cache() is None  # may hold all that is asked for
    mounted = {str(tmp_path): os.ST_NOEXEC | os.ST_NOSUID}
    flags = SimpleNamespace
    monkeypatch.setattr("os.statvfs", lambda place: flags(f_flag=mounted.get(str(place), 0)))
    assert f"{tmp_path}/.triton/cache, on a file system" in str(_dispatch.missing_tools())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "filled"))
    assert _dispatch.missing_tools() is None


@pytest.mark.parametrize(
    "system",
    [
        "del os.ST_NOEXEC",  # macOS
        "del os.ST_NOEXEC, os.statvfs",  # Windows
        "os.statvfs = lambda place: os.stat('/no/such/place')",  # a file system that does not say
    ],
)
def test_the_ops_import_where_nothing_tells_whether_programs_run(system: str) -> None:
    code = f"import os\n{system}\nimport mlip.kernels.info_nce, mlip.kernels._dispatch as ours\n"
    code += "assert ours.MISSING_TOOLS is None, ours.MISSING_TOOLS"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_ops_does_not_import_triton() -> None:
    code = (
        "import sys, mlip.kernels.token_knowledge_patch, mlip.kernels.info_nce\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
