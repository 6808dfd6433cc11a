"""The doctor's findings, with what is installed faked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mlip.cli import main
from mlip.commands import doctor
from mlip.system.output_file import refusal

ROOT = Path(__file__).resolve().parents[2]


def test_this_machine_is_healthy_and_no_torchvision_is_here(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert doctor.check_torchvision() is None  # it would break transformers on this torch
    assert main(["doctor"]) == 0
    assert "Ready" in capsys.readouterr().out


def test_a_missing_package_comes_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "_is_importable", lambda module: module != "deepspeed")
    dali = {"nvidia-dali-cuda120": "1.0"}
    monkeypatch.setattr(doctor, "version_of", dali.get)
    mended = doctor.check_dali()
    assert mended is not None and mended.remedy.endswith("pip install '.[dali]'")
    monkeypatch.setattr(doctor, "version_of", lambda name: None)
    by_name = {check.name: check for check in doctor.check_packages()}
    assert by_name["deepspeed"].remedy == "pip install '.[deepspeed]'"  # a checkout alone
    monkeypatch.setattr(doctor, "version_of", lambda name: "0" if name == doctor.NAME else None)
    by_name = {check.name: check for check in doctor.check_packages()}
    assert by_name["deepspeed"].state == doctor.MISSING
    assert by_name["deepspeed"].remedy == "pip install 'mlip-medical[deepspeed]'"
    assert doctor.is_healthy(list(by_name.values()))  # optional
    monkeypatch.setattr(doctor, "_is_importable", lambda module: module != "pydicom")
    checks = doctor.check_packages()
    assert not doctor.is_healthy(checks)
    text = doctor.report(checks)
    assert "To mend:\n  pip install pydicom" in text and "Ready" not in text
    monkeypatch.setattr("mlip.commands.actions.examine", lambda: checks)
    assert main(["doctor"]) == 1
    assert "missing  pydicom" in text and "off      deepspeed" not in text
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None if name == "ninja" else name)
    assert doctor.check_compiler().state == doctor.MISSING
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.check_compiler().remedy == "apt-get install g++ && pip install ninja"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None if name == "ninja" else name)
    monkeypatch.setattr(doctor, "version_of", lambda name: "1.13")  # pip's, not on the path
    assert doctor.check_compiler().state == doctor.OK


def test_every_package_that_an_installation_asks_for_is_looked_at() -> None:
    """Oracle: setup.py. With one of them absent training ended in a traceback after "Ready"."""
    setup = (ROOT / "setup.py").read_text()
    asked = re.findall(r'"([\w-]+)[<>=]', setup.split("install_requires=[")[1].split("]")[0])
    assert len(asked) > 15
    assert set(asked) <= {name for name, _, _, is_needed in doctor.PACKAGES if is_needed}


def test_no_package_is_needed_that_nothing_imports() -> None:
    """matplotlib was, long after the page's curves were drawn without it: 35 MB, and a machine
    without it was called not ready."""
    folders = ("mlip", "dataloading", "kernels")
    texts = [p.read_text() for folder in folders for p in (ROOT / folder).rglob("*.py")]
    for _, module, _, is_needed in doctor.PACKAGES:
        taken = re.compile(rf"^\s*(import|from) {re.escape(module)}\b", re.MULTILINE)
        assert not is_needed or any(map(taken.search, texts)), module


def test_a_version_outside_the_range_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["transformers<6,>=5.17", 'deepspeed<0.20,>=0.19.8; extra == "gpu"', "torch>=2.11"]
    lines += ["PyYAML>=99", "numpy>=2.0"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: lines)
    found = {"transformers": "4.57.1", "deepspeed": "0.20.0", "torch": "2.13.0+cpu"}
    found["numpy"] = "3.0.0rc1"  # what is tried before its release is no fault
    monkeypatch.setattr(doctor, "version_of", lambda name: found.get(name, "1"))
    by_name = {check.name: check for check in doctor.check_packages()}
    assert by_name["torch"].state == by_name["numpy"].state == doctor.OK
    assert by_name["transformers"].state == by_name["deepspeed"].state == doctor.BROKEN
    assert by_name["pyyaml"].state == doctor.BROKEN
    assert by_name["transformers"].remedy == "pip install 'transformers<6,>=5.17'"
    assert not doctor.is_healthy(list(by_name.values()))
    text = doctor.report(list(by_name.values()))
    assert "4.57.1: image and text towers; <6,>=5.17 is needed" in text and "Ready" not in text
    to_mend = text.split("To mend:")[1].split("To switch on")[0]
    assert "pip install 'deepspeed<0.20,>=0.19.8'" in to_mend


def test_a_checkout_that_is_not_installed_asks_for_no_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(name: str) -> None:
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "requires", absent)
    assert doctor.ranges() == {}


def test_a_torchvision_of_another_torch_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda name: "0.28.0")
    broken = subprocess.CompletedProcess(
        [], 1, "", "Traceback\nRuntimeError: operator torchvision::nms does not exist\n"
    )
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: broken)
    check = doctor.check_torchvision()
    assert check is not None and check.state == doctor.BROKEN
    assert "nms does not exist" in check.detail
    assert check.remedy == "pip uninstall -y torchvision"
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **k: subprocess.CompletedProcess([], 0, "", "")
    )
    check = doctor.check_torchvision()
    assert check is not None and check.state == doctor.OK


def test_the_other_project_of_our_name_and_the_old_dali_are_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda name: "0.2.5")
    clash, dali = doctor.check_name_clash(), doctor.check_dali()
    assert clash is not None and "interatomic" in clash.detail
    assert dali is not None and "zeros" in dali.detail
    assert not doctor.is_healthy([clash])


def test_torch_for_cuda_without_a_driver_is_no_fault_and_a_card_is_named_in_gib(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """pip installs torch for CUDA on machines without a GPU too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for driver, state in ((None, doctor.OK), ("/usr/bin/nvidia-smi", doctor.BROKEN)):
        monkeypatch.setattr(doctor.shutil, "which", lambda name, found=driver: found)
        assert doctor.check_accelerator().state == state
    card = SimpleNamespace(name="a card", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert "2 x a card, 80 GiB, CUDA 13.0" in doctor.check_accelerator().detail
    monkeypatch.setattr("mlip.kernels._dispatch.missing_tools", lambda: "no compiler is there")
    assert "kernels: torch, as no compiler is there" in doctor.check_accelerator().detail
    monkeypatch.setattr("mlip.kernels._dispatch.missing_tools", lambda: None)
    assert "kernels: triton" in doctor.check_accelerator().detail
    for version, is_slow in (("3.6.0", False), ("3.7.1", False), ("3.9.0", True), ("3.10.1", True)):
        monkeypatch.setattr(doctor, "version_of", {"triton": version}.get)
        assert ("instructions" in doctor.check_accelerator().detail) == is_slow


BLOCKED = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from mlip.cli import main
sys.exit(main({command!r}))
"""


def _without(names: set[str], *command: str) -> subprocess.CompletedProcess[str]:
    code = BLOCKED.format(names=names, command=list(command))
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT
    )


@pytest.mark.parametrize(
    ("modules", "command", "said"),
    [
        ({"yaml"}, ["evaluate", "checkpoint=x"], "pyyaml is not installed (settings)"),
        ({"yaml", "torch", "numpy", "rich"}, ["knowledge", "stats"], "pip install "),
        ({"torch"}, ["evaluate", "checkpoint=x"], "torch is not installed (everything): pip"),
        ({"transformers"}, ["evaluate", "checkpoint=x"], "pip install transformers"),
        # transformers tells of it in an error of its own
        ({"rich", "safetensors"}, ["evaluate", "checkpoint=x"], "pip install "),
        ({"psutil"}, ["evaluate", "checkpoint=x"], "pip install psutil"),
        ({"cv2"}, ["prepare", "folder", "--root", "x", "--out", "y"], "opencv-python-headless"),
        ({"ahocorasick"}, ["knowledge", "stats"], "pip install pyahocorasick"),
        ({"filelock"}, ["evaluate", "checkpoint=x"], "no module 'filelock' is installed"),
    ],
    ids=lambda value: "-".join(sorted(value)) if isinstance(value, set) else "",
)
def test_a_missing_package_is_a_line_with_what_installs_it_and_code_2(
    modules: set[str], command: list[str], said: str
) -> None:
    """`pip install --no-deps .` beside torch left a command that ended in a traceback."""
    done = _without(modules, *command)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"mlip {command[0]}: ") and said in line and "mlip doctor" in line


def test_the_doctor_and_the_help_need_no_package() -> None:
    every = {module.split(".")[0] for _, module, _, _ in doctor.PACKAGES}
    done = _without(every, "doctor")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "torch cannot be imported" in done.stdout
    assert _without(every, "--help").returncode == 0


def test_an_import_that_fails_for_another_reason_keeps_its_traceback() -> None:
    assert doctor.install_line(ImportError("libGL.so.1: cannot open shared object file")) is None
    ours = ModuleNotFoundError("No module named 'mlip.none'", name="mlip.none")
    assert doctor.install_line(ours) is None


def test_no_temporary_folder_is_broken_and_a_line_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The doctor said "Ready" where importing the towers failed with a traceback."""
    assert doctor.check_temporary().state == doctor.OK
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "absent")])
    found = doctor.check_temporary()
    assert found.state == doctor.BROKEN and "export TMPDIR=" in found.remedy
    assert not doctor.is_healthy([found])
    with pytest.raises(FileNotFoundError) as caught:
        tempfile.gettempdir()
    told = refusal(caught.value, "out")
    assert told is not None and str(tmp_path) in told and "set TMPDIR" in told


def test_a_python_without_docstrings_is_refused_with_a_way_out() -> None:
    """Importing the towers ended in a traceback of transformers, and the doctor said "Ready"."""
    code = (
        "from mlip.commands import doctor; told = doctor.check_python().state == doctor.BROKEN\n"
        "try: import mlip.encoders.text\n"
        "except ValueError as error: print(told, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-OO", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.startswith("True expected") and "PYTHONOPTIMIZE" in done.stdout, done.stderr


def test_a_temporary_folder_that_runs_no_programs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What docker's --tmpfs mounts unless told otherwise."""
    assert "noexec" not in doctor.check_temporary().detail
    flags = SimpleNamespace(f_flag=os.ST_NOEXEC | os.ST_NOSUID)
    monkeypatch.setattr("os.statvfs", lambda place: flags)
    check = doctor.check_temporary()
    assert "noexec" in check.detail and check.state == doctor.OK  # all but compiling works


def test_a_system_that_does_not_tell_how_a_folder_is_mounted_stops_no_doctor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("os.statvfs")
    assert doctor.check_temporary().state == doctor.OK
